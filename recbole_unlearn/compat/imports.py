"""Without imports that hardly a run needs: RecBole without scikit-learn, for metrics of ratings and two of its models,
and scikit-learn without scipy's distributions."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

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
    """Stands in for a function or class of another package until one of them is called."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def real(self):
        return getattr(import_module(self.module), self.name)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

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


class _LateModule(ModuleType):
    """Stands in for a module of which names are taken, but hardly used."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Late(self.__name__, name)


def import_tsne() -> Any:
    """scikit-learn's ``TSNE``; what is imported with it gets a stand-in for ``scipy.stats``, half of the wait."""
    name = "scipy.stats"
    if "sklearn" in sys.modules or name in sys.modules:
        return import_module("sklearn.manifold").TSNE
    sys.modules[name] = _LateModule(name)
    try:
        return import_module("sklearn.manifold").TSNE
    finally:
        del sys.modules[name]
