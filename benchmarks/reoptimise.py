"""Re-optimisation of a converged, regularised model against an independent optimiser.

    python benchmarks/reoptimise.py

BPR on RecBole's bundled ml-100k, static negatives, weight decay 1e-4 of the mean loss. RecBole trains it briefly,
Newton steps with nothing forgotten finish the training. Then a few random interactions are forgotten, and each method
is compared with the exact minimum without them, by scipy's L-BFGS-B on torch's automatic gradients in float64. Prints
a Markdown table. Takes half a minute on two free cores.

Error of change: ||theta - exact|| / ||exact - trained||, with theta turned to be nearest to exact and exact to be
nearest to trained, since rotations of all embeddings together change nothing. Gradient norms are of the mean objective,
at the float32 weights that a method returns.
"""

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from recbole.utils import init_seed
from scipy.optimize import minimize

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.influence.newton import Objective, flat, minimise, nearest_rotation
from recbole_unlearn.influence.objective import pool_return
from recbole_unlearn.influence.operators import UserTriples
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.trained import Checkpoint
from recbole_unlearn.training import train
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.choose import Auto
from recbole_unlearn.unlearners.influence import PAPER, Influence

EXACT_STEP = {"cg_tolerance": 1e-6, "cg_max_iterations": 1000}
METHODS = {
    "reoptimise": Auto(),
    "one step, equation (7)": replace(PAPER, **EXACT_STEP),
    "one step, Hessian, pool return": Influence(curvature="hessian", damping="none", **EXACT_STEP),
    "one step, Gauss-Newton, pool return": Influence(damping="none", **EXACT_STEP),
}


class Exact:
    """Objective without some rows, by automatic differentiation; values are differences from those at ``start``.

    Differences triple by triple keep what the sum of all losses would round away.
    """

    def __init__(self, log, rows, start, n_users, n_items, weight_decay):
        users, items, negatives = (np.asarray(part, np.int64) for part in (log.users, log.items, log.epoch(0)))
        keep = np.delete(np.arange(log.n_rows), rows)
        back = pool_return(users, items, rows, n_items, log.negatives)
        self.n_users, self.n_items, self.start = n_users, n_items, start
        self.n_triples = negatives[keep].size
        self.l2 = self.n_triples * weight_decay
        self.users, self.pos, self.neg, self.weight = (
            torch.from_numpy(np.concatenate(columns))
            for columns in (
                (users[keep].repeat(log.negatives), back.users),
                (items[keep].repeat(log.negatives), back.pos),
                (negatives[keep].ravel(), back.neg),
                (np.ones(self.n_triples), back.weight),
            )
        )
        self.before = self.losses(start)

    def embeddings(self, theta):
        rows = theta.reshape(self.n_users + self.n_items, -1)
        return rows[: self.n_users], rows[self.n_users :]

    def scores(self, theta):
        P, Q = self.embeddings(theta)
        return (P @ Q.T).numpy()

    def losses(self, theta):
        P, Q = self.embeddings(theta)
        return -torch.nn.functional.logsigmoid((P[self.users] * (Q[self.pos] - Q[self.neg])).sum(1))

    def __call__(self, theta):
        """Value and gradient of the summed objective, for scipy."""
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        value = (self.weight * (self.losses(theta) - self.before)).sum()
        value = value + self.l2 / 2 * ((theta - self.start) * (theta + self.start)).sum()
        value.backward()
        return value.item(), theta.grad.numpy()

    def mean_gradient_norm(self, theta):
        return np.linalg.norm(self(theta.numpy())[1]) / self.n_triples


def finish(log, P, Q, weight_decay):
    """Embeddings at a minimum of the whole log's objective, as float32."""
    triples = UserTriples(log.users, np.array(log.items), np.array(log.epoch(0)), len(P), len(Q))
    objective = Objective([triples], len(triples), weight_decay, (len(P), *Q.shape))
    start = perf_counter()
    P, Q, report = minimise(objective, P, Q, 1e-12, 1000)
    print(
        f"Training finished by {report.iterations} Newton steps ({report.products} products, "
        f"{perf_counter() - start:.1f} s): mean gradient norm {report.gradient_norm_before:.1e} before, "
        f"{report.gradient_norm:.1e} after.\n",
        flush=True,
    )
    return P.astype(np.float32), Q.astype(np.float32)


def rows_of_table(seed, unlearners, rows, log, weight_decay):
    """The exact minimum without some rows, and each method beside it, as Markdown rows."""
    first = next(iter(unlearners.values())).problem
    start, K = flat(first.P, first.Q), first.P.shape[1]
    exact = Exact(log, rows, start, len(first.P), len(first.Q), weight_decay)
    clock = perf_counter()
    options = {"maxcor": 50, "maxiter": 10**5, "maxfun": 10**5, "ftol": 0, "gtol": 1e-8}
    # Where K exceeds the rank of the minimum, the trained weights lie beside saddles that gradients alone do not leave.
    noise = 1e-4 * np.random.default_rng(seed).normal(size=len(start))
    found = minimize(exact, start.numpy() + noise, jac=True, method="L-BFGS-B", options=options)
    seconds = perf_counter() - clock
    reference = nearest_rotation(torch.from_numpy(found.x), start, K)
    change, scores = reference - start, exact.scores(start)
    score_change = exact.scores(reference) - scores
    yield [seed, "nothing done", "1", "", f"{exact.mean_gradient_norm(start):.1e}", "", ""]
    norm = exact.mean_gradient_norm(reference)
    yield [seed, "exact (L-BFGS-B)", "0", "1", f"{norm:.1e}", f"{seconds:.1f}", f"{found.nfev} gradients"]
    for name, unlearner in unlearners.items():
        unlearned = unlearner.unlearn(rows)
        theta = flat(*(unlearned.state_dict[f"{kind}_embedding.weight"].numpy() for kind in ("user", "item")))
        error = (nearest_rotation(theta, reference, K) - reference).norm() / change.norm()
        same = np.corrcoef((exact.scores(theta) - scores).ravel(), score_change.ravel())[0, 1]
        products = str(unlearned.details.get("products", unlearned.details["iterations"]))
        products += ", negative curvature" if unlearned.details["negative_curvature"] else ""
        norm = exact.mean_gradient_norm(theta)
        yield [seed, name, f"{error:.5f}", f"{same:.6f}", f"{norm:.1e}", f"{unlearned.seconds:.2f}", products]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of RecBole's training")
    parser.add_argument("--embedding_size", type=int, default=8)
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--forget_count", type=int, default=35)
    parser.add_argument("--seed", type=int, default=2020, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="number of forget sets")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    options = {
        "embedding_size": args.embedding_size,
        "epochs": args.epochs,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "learning_rate": 0.01,
        "train_batch_size": 4096,
        "negatives": "static",
        "eval_step": 0,
        "show_progress": False,
        "state": "ERROR",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        config = UnlearnConfig("BPR", "ml-100k", config_dict=options)
        init_seed(config["seed"], config["reproducibility"])
        split = Split(config)
        train(config, split, path)
        trained = Checkpoint.written(path, config).trained(split)
        model, log = trained.model, trained.log
        P, Q = finish(log, *(weight.detach().numpy() for weight in model.parameters()), args.weight_decay)
        model.load_state_dict({"user_embedding.weight": torch.tensor(P), "item_embedding.weight": torch.tensor(Q)})
        unlearners = {name: InfluenceUnlearner(trained, way) for name, way in METHODS.items()}
        for unlearner in unlearners.values():
            unlearner.warm_up()
        print(f"{args.forget_count} of {log.n_rows} interactions forgotten; {unlearners['reoptimise'].chosen}.\n")
        print("| set | method | error of change | score-change correlation | gradient norm | seconds | products |")
        print("|---|---|---|---|---|---|---|")
        for seed in range(args.seeds):
            rows = ForgetRequest("count", args.forget_count, seed).rows(split)
            for row in rows_of_table(seed, unlearners, rows, log, args.weight_decay):
                print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


if __name__ == "__main__":
    main()
