"""UBPR's one step, equation (7), as published."""

from recbole_unlearn.methods.ours import Ours
from recbole_unlearn.models.support import no_step
from recbole_unlearn.settings.config import PAPER


class UBPR(Ours):
    """Exact Hessian of the last epoch's triples, no damping but L2, and the gradient of the forgotten triples' loss, in
    which equation (7) has L2 too (here: each triple's share of it); nothing else.

    "Learning to unlearn for Bayesian personalized ranking via influence function" (2025). Without L2, or where training
    stopped early, this Hessian is indefinite; conjugate gradient then stops at the first direction of negative
    curvature, which ``details`` say.
    """

    @classmethod
    def refuses(cls, config):
        return super().refuses(config) or no_step(config)

    def changes(self):
        return {"paper": True, **PAPER, **self.settings}
