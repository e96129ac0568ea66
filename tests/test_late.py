"""What RecBole imports and hardly a run needs comes late, and is then what it would have been."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import sys, warnings
import recbole_unlearn
{body}
"""
USED = """
import numpy as np
from recbole.evaluator import metrics
from recbole.utils import get_model
from recbole.model.general_recommender import slimelastic, nceplrec
get_model("SLIMElastic")
assert "sklearn" not in sys.modules
own = {"metric_decimal_place": 12}
truth, guess = np.array([1.0, 0, 1, 0, 1]), np.array([0.9, 0.3, 0.4, 0.6, 0.7])
found = [metrics.AUC(own).metric_info(guess, truth), metrics.MAE(own).metric_info(guess, truth)]
found.append(metrics.RMSE(own).metric_info(guess, truth))
import sklearn.metrics, sklearn.linear_model, sklearn.exceptions
fpr, tpr, _ = sklearn.metrics.roc_curve(truth, guess)
expected = [sklearn.metrics.auc(fpr, tpr), np.abs(truth - guess).mean(), np.sqrt(((truth - guess) ** 2).mean())]
np.testing.assert_allclose(found, expected)
assert metrics.sk_auc is sklearn.metrics.auc
model = slimelastic.ElasticNet(alpha=0.5)
assert type(model) is sklearn.linear_model.ElasticNet and model.alpha == 0.5
assert slimelastic.ConvergenceWarning is sklearn.exceptions.ConvergenceWarning
with warnings.catch_warnings():
    warnings.simplefilter("ignore", category=slimelastic.ConvergenceWarning)
assert nceplrec.randomized_svd is sklearn.utils.extmath.randomized_svd
"""
REQUEST = """
from recbole_unlearn import quick_start, unlearner
assert not {"sklearn", "scipy.stats", "torch._dynamo", "plotly", "matplotlib"} & set(sys.modules)
"""
MAP = """
import numpy as np
from recbole_unlearn.compat.imports import import_tsne
points = np.random.default_rng(1).normal(size=(30, 4))
def mapped(kind):
    return kind(perplexity=5.0, init="pca", method="exact", random_state=1).fit_transform(points)
TSNE = import_tsne()
assert "scipy.stats" not in sys.modules
found = mapped(TSNE)
assert "scipy.stats" not in sys.modules
import scipy.stats, sklearn.manifold
from sklearn.preprocessing import QuantileTransformer, _data
assert _data.stats is not scipy.stats and _data.stats.norm.cdf(1) == scipy.stats.norm.cdf(1)
assert np.isfinite(QuantileTransformer(n_quantiles=9, output_distribution="normal").fit_transform(points)).all()
assert import_tsne() is TSNE is sklearn.manifold.TSNE and np.array_equal(mapped(TSNE), found)
"""


@pytest.mark.parametrize("body", [USED, REQUEST, MAP], ids=["metrics and models", "request", "map"])
def test_scikit_learn_comes_when_it_is_called(body):
    run(RUN.format(body=body))


def test_where_scikit_learn_is_there_already_nothing_stands_in():
    run("import sklearn.metrics, sys, warnings, recbole_unlearn\nfrom recbole.evaluator import metrics\n"
        "assert metrics.sk_auc is sklearn.metrics.auc")  # fmt: skip
    run("import recbole.trainer, recbole_unlearn\nfrom recbole.evaluator import metrics\nimport sklearn.metrics\n"
        "assert metrics.sk_auc is sklearn.metrics.auc")  # fmt: skip


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_trainer_that_only_judges_has_no_optimiser(make_options):
    from recbole_unlearn.data.split import Split
    from recbole_unlearn.evaluation import ranking
    from recbole_unlearn.settings.config import UnlearnConfig
    from recbole_unlearn.training.fit import new_model
    from recbole_unlearn.training.trainer import make_trainer

    config = UnlearnConfig("BPR", "tiny", None, make_options())
    split = Split(config)
    found = []
    for trains in (True, False):
        trainer = make_trainer(config, new_model(config, split), trains)
        trainer.eval_collector.data_collect(split.train)
        found.append(ranking.evaluate(trainer, trainer.model, split, 1))
        assert (trainer.optimizer is not None) is trains
    assert found[0] == found[1]


def test_the_command_looks_for_garbage_once_all_is_imported(monkeypatch):
    import gc

    import run_unlearn
    from recbole_unlearn import quick_start
    from recbole_unlearn.settings import given

    monkeypatch.setattr(gc, "freeze", lambda: seen.append("frozen"))
    seen, read = [], given.read_arguments
    monkeypatch.setattr(sys, "argv", ["run_unlearn.py"])
    monkeypatch.setattr(given, "read_arguments", lambda *words: seen.append(gc.isenabled()) or read(*words))
    monkeypatch.setattr(quick_start, "run_unlearn", lambda *_: seen.append(gc.isenabled()))
    assert run_unlearn.main() == 0 and seen == [False, "frozen", True]
    assert run_unlearn.main([]) == 0 and seen[3:] == [True, True]
