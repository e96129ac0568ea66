"""What shaped a training cannot be changed by a request: every key of RecBole's, one by one."""

import pytest
import yaml

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import Given
from recbole_unlearn.settings.keys import KEYS, OF_TRAINING
from recbole_unlearn.settings.recbole_keys import DERIVED, FREE, recbole_keys
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.training.trained import config_of

OWN = set(KEYS)
# RecBole derives valid_metric_bigger from valid_metric, whatever is given
TRAININGS = sorted(recbole_keys() - FREE - OWN - {"model", "dataset", "valid_metric_bigger"})


@pytest.fixture(scope="module")
def stored(make_options):
    config = UnlearnConfig("BPR", "tiny", None, make_options(learner="Adam", n_layers=2))
    return {"config": plain(config.final_config_dict)}


def opened(stored, **given):
    return config_of("model.pth", stored, None, Given.read(config_dict=given))


def another(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, "more"]
    if isinstance(value, dict):
        return {**value, "more": 1}
    return f"{value or ''}x"


@pytest.mark.parametrize("key", TRAININGS)
def test_a_key_that_shaped_the_training_keeps_its_value(stored, key):
    """Refused as another value than the training's, or as none that the key can have."""
    with pytest.raises(InputError) as refused:
        opened(stored, **{key: another(stored["config"].get(key))})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"train_batch_size": 16}, {"learning_rate": 0.5}, {"epochs": 4}, {"seed": 1}, {"embedding_size": 9},
        {"weight_decay": 0.1}, {"learner": "sgd"}, {"shuffle": False}, {"reproducibility": False}, {"worker": 1},
        {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}}, {"eval_step": 2},
        {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}}, {"stopping_step": 3},
        {"eval_args": {"mode": "uni99"}}, {"valid_metric": "Recall@10"}, {"user_inter_num_interval": "[3,inf)"},
        {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}, {"negatives": "static"}, {"enable_amp": True},
        {"repeatable": True}, {"MAX_ITEM_LIST_LENGTH": 20}, {"clip_grad_norm": {"max_norm": 1}}, {"n_layers": 3},
        {"rm_dup_inter": "first"}, {"require_pow": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["dict", "file"])
def test_another_value_is_one_line_that_names_both(stored, tmp_path, given, where):
    key, files = next(iter(given)), None
    if where == "file":
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
        files, given = [str(tmp_path / "r.yaml")], {}
    with pytest.raises(InputError, match="was trained with") as refused:
        config_of("model.pth", stored, None, Given.read(None, None, files, given))
    assert key in str(refused.value) and "a request cannot change it" in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"learner": "adam"}, {"learner": "ADAM"}, {"learning_rate": "0.02"}, {"train_batch_size": "97"}, {"epochs": 3},
        {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}, {"eval_args": {"mode": "full"}},
        {"train_neg_sample_args": {"sample_num": 1, "distribution": "uniform", "alpha": 1}}, {"weight_decay": 0},
        {"eval_args": {"mode": {"valid": "full", "test": "full"}, "order": "RO"}}, {"n_layers": 2.0},
        {"valid_metric": "ndcg@10"}, {"user_inter_num_interval": "[0, inf)"}, {"encoding": "UTF8"},
        {"eval_args": {"split": {"RS": [8, 1, 1]}}}, {"load_col": {"inter": ["item_id", "user_id"]}},
        {"field_separator": r"\t"},
    ],
    ids=str,
)  # fmt: skip
def test_the_same_value_in_other_words_is_taken(stored, given):
    """As RecBole reads it."""
    assert opened(stored, **given)["learning_rate"] == 0.02


@pytest.mark.parametrize(
    "given",
    [
        {"topk": 5, "valid_metric": "NDCG@10"}, {"metrics": "NDCG"}, {"show_progress": True}, {"state": "error"},
        {"data_path": "elsewhere"}, {"checkpoint_dir": "there"}, {"gpu_id": "1"}, {"eval_batch_size": 7},
        {"metric_decimal_place": 2}, {"method": "influence"}, {"replay_rows": "all"}, {"forget_users": ["u17"]},
        {"compare": "none"}, {"purge": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_run_may_choose_is_taken(stored, given):
    opened(stored, **given)


@pytest.mark.parametrize("given", [{"model": "LightGCN"}, {"dataset": "other"}], ids=str)
def test_another_model_or_data_set_in_a_file_is_refused_too(finished, tmp_path, given):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(given))
    request = {"checkpoint": str(finished[1] / "model.pth"), "forget_count": 3}
    with pytest.raises(InputError, match=f"was trained with {next(iter(given))}"):
        run_unlearn(None, None, [str(tmp_path / "m.yaml")], request)


@pytest.mark.parametrize("key", DERIVED)
def test_what_follows_from_other_keys_is_no_setting(key):
    with pytest.raises(InputError, match=f"{key} is no setting"):
        UnlearnConfig("BPR", "tiny", None, {key: 3})


def test_the_list_of_what_a_request_may_change_names_keys_that_there_are():
    assert FREE <= recbole_keys() | {"device", "single_spec", "config_files"}
    assert set(OF_TRAINING) <= OWN


def test_uppercase_keys_come_from_the_checkpoint_too(make_options):
    config = UnlearnConfig("BPR", "tiny", None, make_options(MAX_ITEM_LIST_LENGTH=20, TIME_FIELD="when"))
    again = opened({"config": plain(config.final_config_dict)})
    assert (again["MAX_ITEM_LIST_LENGTH"], again["TIME_FIELD"]) == (20, "when")
    assert again["MODEL_TYPE"] == config["MODEL_TYPE"]


@pytest.mark.parametrize("key", ["zzz", "xy", "qwertyuiop"])
@pytest.mark.parametrize("where", ["dict", "file"])
def test_a_key_that_nobody_knows_is_refused(tmp_path, key, where):
    (tmp_path / "a.yaml").write_text(f"{key}: 3\n")
    files, given = ([str(tmp_path / "a.yaml")], {}) if where == "file" else (None, {key: 3})
    with pytest.raises(InputError, match=f"unknown key '{key}'"):
        UnlearnConfig("BPR", "tiny", files, given)
