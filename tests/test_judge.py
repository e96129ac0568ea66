"""``compare: paired``: the judge is the model's own training without the forget set, by the same random numbers."""

import json
from pathlib import Path

import pytest
from conftest import SEQUENTIAL

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn

MODELS = {
    "BPR": {},
    "LightGCN": {"n_layers": 2, "learning_rate": 0.005},
    "NGCF": {"hidden_size_list": [8]},
    "GRU4Rec": {**SEQUENTIAL, "hidden_size": 8, "loss_type": "CE", "train_neg_sample_args": None},
}
EXACT = {"method": "replay", "replay_rows": "all", "coupling": "paired"}


@pytest.fixture
def judged(make_options):
    """Function (model, **keys) -> Result of a run that paired training judges."""

    def run(name, **keys):
        keys = {"forget_count": 25, "compare": "paired", "output_dir": "out", **MODELS[name], **keys}
        return run_unlearn(name, "tiny", config_dict=make_options(**keys))

    return run


@pytest.mark.parametrize("name", MODELS)
def test_exact_forgetting_goes_all_the_way_to_paired_training(judged, name):
    result = judged(name, **EXACT)
    paired = result["paired"]
    assert paired["distance"] < (1e-3 if name in ("BPR", "LightGCN") else 1e-12)  # kernels round otherwise than torch
    assert paired["way"] == pytest.approx(1, abs=0.02) and paired["correlation"] > 0.999
    assert "paired one" in paired["sentence"] and paired["sentence"] in result.page
    assert result["models"]["retrained"]["seconds"] > 0 and " paired" in result["verdict"]
    assert json.loads(Path("out/result.json").read_text())["paired"] == paired
    assert Path(result["files"]["retrained"]).is_file()


def test_one_step_goes_another_way_and_a_retraining_is_no_judge_of_pairs(judged):
    step = judged("BPR", method="influence")["paired"]
    assert step["distance"] > 0.01 and step["correlation"] < 0.9999
    retrained = judged("BPR", compare="retrain", output_dir="again", **EXACT)
    assert "paired" not in retrained and "paired one" not in retrained.page


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"evaluate": "none"}, "judges no model"),
        ({"methods": "ours"}, "leave compare out"),
    ],
)
def test_what_paired_training_cannot_judge_is_refused_before_any_work(judged, keys, said):
    with pytest.raises(InputError, match=said) as caught:
        judged("GRU4Rec", **keys)
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_a_result_that_may_have_drawn_in_training_is_not_trained_again_in_pairs(judged):
    judged("NGCF", **EXACT)
    with pytest.raises(InputError, match="compare: paired is not possible: NGCF may draw"):
        run_unlearn(config_dict={"checkpoint": "out/unlearned.pth", "forget_count": 3, "compare": "paired"})
