"""RecBole without an import that hardly a run needs: scikit-learn, for metrics of ratings and two of its models."""

import sys
from importlib import import_module
from types import ModuleType

import recbole.utils  # noqa: F401  (with all else that the modules below import)

# RecBole's modules that import scikit-learn, and what they take from it.
MODULES = ("recbole.evaluator.metrics", "recbole.model.general_recommender")
TAKEN = {
    "sklearn.metrics": ("auc", "mean_absolute_error", "mean_squared_error"),
    "sklearn.linear_model": ("ElasticNet",),
    "sklearn.exceptions": ("ConvergenceWarning",),
    "sklearn.utils.extmath": ("randomized_svd",),
}


class _Late:
    """Stands in for a function or class of scikit-learn's until one of them is called."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def real(self):
        return getattr(import_module(self.module), self.name)

    def __call__(self, *arguments, **options):
        for name in [name for name in sys.modules if name.split(".")[0] == "recbole"]:
            held = vars(sys.modules[name])
            held.update({key: value.real() for key, value in held.items() if isinstance(value, _Late)})
        return self.real()(*arguments, **options)


def import_recbole() -> None:
    """Import `MODULES` with stand-ins for scikit-learn, which are taken out of ``sys.modules`` again at once."""
    if "sklearn" in sys.modules or any(name in sys.modules for name in MODULES):
        return
    stand_ins = {name: ModuleType(name) for name in ("sklearn", "sklearn.utils", *TAKEN)}
    for module, names in TAKEN.items():
        vars(stand_ins[module]).update({name: _Late(module, name) for name in names})
    sys.modules.update(stand_ins)
    try:
        for name in MODULES:
            import_module(name)
    finally:
        for name in stand_ins:
            del sys.modules[name]
