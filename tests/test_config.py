"""Configuration: RecBole's precedence, without its traps."""

import copy
import importlib.util
import re
import string
import sys

import pytest
import yaml
from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.conflicts import check_sizes
from recbole_unlearn.settings.keys import KEYS, OWN, properties_dir

OWN_KEYS = list(KEYS)


def build(files=None, checkpoint_config=None, **given):
    return UnlearnConfig("BPR", "tiny", files, given, checkpoint_config)


def refusal(*args, **given):
    with pytest.raises(InputError) as refused:
        build(*args, **given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def write_yaml(tmp_path):
    """Function (text, name='a.yaml') -> path."""

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# -- precedence


def test_defaults_come_from_the_properties_file():
    config, defaults = build(), yaml.safe_load((properties_dir() / "overall.yaml").read_text())
    for key, value in defaults.items():
        assert config[key] == value, key


def test_what_is_changed_in_one_configuration_is_in_no_other():
    for _ in range(2):
        config = build()
        assert config["metrics"] == ["Recall", "MRR", "NDCG", "Hit", "Precision"]
        config["metrics"].append("MAP")
        config["eval_args"]["split"]["RS"][0] = 0.5
        config["additional_feat_suffix"] = []


def test_files_override_properties_and_config_dict_overrides_files(write_yaml):
    file = write_yaml("damping_strength: 0.125\nepochs: 7\ncg_max_iterations: 9\n")
    assert build()["damping_strength"] != 0.125
    config = build([file], epochs=8)
    assert (config["damping_strength"], config["epochs"], config["cg_max_iterations"]) == (0.125, 8, 9)


def test_later_files_override_earlier_ones(write_yaml):
    files = [write_yaml("epochs: 7\nseed: 1\n"), write_yaml("epochs: 8\n", "b.yaml")]
    config = build(files)
    assert (config["epochs"], config["seed"]) == (8, 1)


def test_a_checkpoints_configuration_is_below_files_and_above_properties(write_yaml):
    stored = {"epochs": 5, "seed": 5, "damping_strength": 0.25, "a_key_of_a_later_version": 3}
    config = build([write_yaml("seed: 6\n")], stored, damping_strength=0.75)
    assert (config["epochs"], config["seed"], config["damping_strength"]) == (5, 6, 0.75)


def test_model_and_data_set_may_come_from_a_file(write_yaml):
    config = UnlearnConfig(config_file_list=[write_yaml("model: BPR\ndataset: tiny\n")])
    assert (config["model"], config["dataset"]) == ("BPR", "tiny")


def test_the_properties_folder_is_found_from_any_folder():
    assert build(["properties/paper.yaml"])["embedding_size"] == 8


# -- RecBole's traps


def test_the_command_line_is_not_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--epochs=77", "--forget_count=3", "--nonsense", "--epochs=78"])
    config = build(epochs=4)
    assert (config["epochs"], config["forget_count"]) == (4, None)


def test_config_dict_is_not_changed():
    given = {"epochs": "4", "train_neg_sample_args": {"sample_num": 2, "distribution": "uniform"}, "topk": 5}
    before = copy.deepcopy(given)
    config = UnlearnConfig("BPR", "tiny", None, given)
    config["train_neg_sample_args"]["sample_num"] = 99
    assert given == before


@pytest.mark.parametrize(
    "key",
    [
        "forget_file",
        "output_dir",
        "checkpoint",
        "checkpoint_dir",
        "data_path",
        "wandb_project",
        "forget_users",
    ],
)
@pytest.mark.parametrize(
    "code", ["__import__('os').system('touch ran')", "open('ran', 'w')", "[open('ran', 'w') for _ in '1']"]
)
def test_values_are_never_run(tmp_path, monkeypatch, key, code):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    value = build(**{key: code})[key]
    assert not list((tmp_path / "here").iterdir())
    assert value.startswith(code)


def test_a_yaml_file_cannot_run_code(tmp_path, write_yaml):
    file = write_yaml(f"output_dir: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    refusal([file])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7), ("0.5", 0.5), ("1e-3", 1e-3), ("True", True), ("false", False), ("None", None), ("~", None),
        ("[1, 2]", [1, 2]), ("{'a': 1}", {"a": 1}), ("abc", "abc"), ("1+1", "1+1"), ("NDCG@10", "NDCG@10"),
        ("", ""), ("a'b", "a'b"),
    ],
)  # fmt: skip
def test_text_from_the_command_line_becomes_the_value_it_spells(text, value):
    got = build(wandb_project=text)["wandb_project"]
    assert got == value and type(got) is type(value)


# -- misspelt keys


@pytest.mark.parametrize(
    "key, meant",
    [
        ("forget_ratoi", "forget_ratio"), ("forget_user", "forget_users"), ("dampng", "damping"),
        ("damping_strenght", "damping_strength"), ("curvatur", "curvature"), ("cg_tolerence", "cg_tolerance"),
        ("log_negative", "log_negatives"), ("negative", "negatives"), ("chekpoint", "checkpoint"),
        ("ouput_dir", "output_dir"), ("Purge", "purge"), ("pool_retrun", "pool_return"),
        ("compar", "compare"), ("epochss", "epochs"), ("embeding_size", "embedding_size"),
        ("train_batchsize", "train_batch_size"),
        ("learning_rat", "learning_rate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["dict", "file"])
def test_a_misspelt_key_is_refused_with_the_nearest_name(write_yaml, key, meant, where):
    message = refusal(**{key: 1}) if where == "dict" else refusal([write_yaml(f"{key}: 1\n")])
    assert repr(key) in message and f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("key", ["forget_everything_now", "cg_preconditioner_kind", "unlearn_quickly_please"])
def test_an_unknown_key_in_our_name_is_refused(key):
    assert repr(key) in refusal(**{key: 1})


@pytest.mark.parametrize(
    "given",
    [{"worker": 2}, {"eval_args": {"mode": "full"}}, {"load_col": None},
     {"user_inter_num_interval": "[2,inf)"}, {"reg_weight": 0.1}, {"n_layers": 2},
     {"benchmark_filename": None}, {"rm_dup_inter": "first"}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_recboles_own_keys_are_accepted(given):
    key, value = next(iter(given.items()))
    if key == "eval_args":
        assert build(**given)[key]["mode"] == {"valid": "full", "test": "full"}
    else:
        assert build(**given)[key] == value


# -- wrong values


@pytest.mark.parametrize("key", ["negatives", "curvature", "damping", "compare", "method"])
@pytest.mark.parametrize("value", ["nonsense", 3, True, ["static"], ""])
def test_a_value_that_is_no_choice_is_refused_with_the_choices(key, value):
    message = refusal(**{key: value})
    assert key in message and repr(value) in message and "one of" in message


@pytest.mark.parametrize(
    "key, value, meant",
    [("negatives", "Static", "static"), ("curvature", "hesian", "hessian"), ("damping", "adm", "adam"),
     ("compare", "retrained", "retrain"), ("curvature", "gauss-newton", "gauss_newton")],
)  # fmt: skip
def test_a_misspelt_choice_is_refused_with_the_nearest(key, value, meant):
    assert f"did you mean {meant!r}?" in refusal(**{key: value})


@pytest.mark.parametrize("key", ["damping", "compare"])
@pytest.mark.parametrize("value", [None, "None", "none", "~"])
def test_none_may_be_written_in_any_way(key, value):
    assert build(**{key: value})[key] == "none"


@pytest.mark.parametrize("key", ["paper", "pool_return", "log_negatives", "purge"])
@pytest.mark.parametrize("value", [1, 0, "yes", None, "Truee"])
def test_a_switch_that_is_not_true_or_false_is_refused(key, value):
    assert key in refusal(**{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key in ("damping_strength", "cg_tolerance")
        for value in (-1, "much", None, True, float("nan"), [1])
    ]
    + [(key, value) for key in ("curvature_triples", "cg_max_iterations") for value in (0, -1, 2.5, "some", True)]
    + [("cg_max_iterations", value) for value in ("all", None)]
    + [("log_epochs", value) for value in (0, -1, 1.5, "last", None, True, [1])],
)
def test_a_number_of_the_wrong_kind_is_refused(key, value):
    message = refusal(**{key: value})
    assert key in message and repr(value) in message


@pytest.mark.parametrize("key, words", [("curvature_triples", "'auto', 'all' or a"), ("log_epochs", "'all' or a")])
def test_words_that_may_stand_for_a_number_are_named(key, words):
    assert f"{key} must be {words} whole number of at least 1, not 'most'" in refusal(**{key: "most"})


@pytest.mark.parametrize("key", ["damping_strength", "cg_tolerance"])
@pytest.mark.parametrize("value", [float("inf"), "1e999"])
def test_an_infinite_number_is_refused(key, value):
    assert key in refusal(**{key: value})


@pytest.mark.parametrize(
    "given",
    [{"metrics": ["Nonsense"]}, {"topk": 0}, {"topk": "many"}, {"eval_args": "full"}, {"topk": [0]},
     {"train_neg_sample_args": "two"}, {"train_neg_sample_args": {"distribution": "normal", "sample_num": 1}},
     {"eval_args": {"mode": "nonsense"}}, {"eval_args": {"mode": "uniform"}}, {"valid_metric": 3}],
    ids=str,
)  # fmt: skip
def test_values_that_recbole_refuses_are_refused_in_one_line(given):
    refusal(**given)


@pytest.mark.parametrize("model", ["NoSuchModel", "bpr", "", "os"])
def test_an_unknown_model_is_refused(model):
    with pytest.raises(InputError) as refused:
        UnlearnConfig(model or "x", "tiny")
    assert "\n" not in str(refused.value)


def test_missing_model_or_data_set_is_refused():
    for args in ((None, "tiny"), ("BPR", None)):
        with pytest.raises(InputError) as refused:
            UnlearnConfig(*args)
        assert "\n" not in str(refused.value)


# -- files


@pytest.mark.parametrize("files", ["bpr.yaml", b"bpr.yaml", 5])
def test_config_files_that_are_no_list_are_refused(files):
    with pytest.raises(InputError, match="must be a list of files"):
        run_unlearn("BPR", "tiny", files)


def test_a_missing_config_file_is_refused(tmp_path):
    assert "no.yaml" in refusal([str(tmp_path / "no.yaml")])


@pytest.mark.parametrize(
    "text",
    [
        "epochs: [1, 2\n",
        "a: b: c\n",
        "\tepochs: 3\n",
        "- epochs\n- seed\n",
        "just text\n",
        "epochs: !!nonsense 3\n",
    ],
)
def test_a_config_file_that_is_no_yaml_mapping_is_refused(write_yaml, text):
    assert "a.yaml" in refusal([write_yaml(text)])


@pytest.mark.parametrize("text", ["5: 3\n", "true: 3\n", "~: 3\n"])
def test_a_config_file_whose_keys_are_no_text_is_refused(write_yaml, text):
    refusal([write_yaml(text)])


def test_a_config_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00epochs")
    assert "a.yaml" in refusal([str(tmp_path / "a.yaml")])


def test_an_empty_config_file_changes_nothing(write_yaml):
    assert build([write_yaml("# nothing\n")])["epochs"] == build()["epochs"]


# -- what it looks like


def test_own_keys_are_grouped_when_printed():
    printed = re.sub(r"\x1b\[[0-9;]*m", "", str(build(forget_count=12345)))
    groups = re.split(r"^(\w[\w ]*) Hyper Parameters:", printed, flags=re.MULTILINE)
    unlearning = dict(zip(groups[1::2], groups[2::2], strict=True))["Unlearning"]
    shown = re.findall(r"^(\w+) = ", unlearning, re.MULTILINE)
    assert set(shown) == set(OWN_KEYS) - {"eval_batch_size"}
    assert "forget_count = 12345" in unlearning
    assert len(re.findall(r"^forget_count = ", printed, re.MULTILINE)) == 1


def test_building_twice_does_not_repeat_a_group():
    build()
    printed = str(build())
    assert len(re.findall(r"damping_strength", printed)) == 1


def test_every_own_key_has_a_type_and_a_meaning():
    defaults = yaml.safe_load((properties_dir() / "overall.yaml").read_text())
    assert OWN_KEYS == list(defaults)
    for key in KEYS.values():
        assert key.default == defaults[key.name] and key.meaning[0] in "'" + string.ascii_uppercase, key
        if key.default is not None and key.name in OWN:
            assert key.checked(key.default) == key.default
            kinds = {"bool": bool, "int": int, "float": float}
            held = kinds.get(key.parts[0].split(" ")[0], str)
            assert isinstance(key.default, held) or key.default in key.parts, key


@pytest.mark.parametrize("file", ["overall.yaml", "paper.yaml"])
def test_every_line_of_the_properties_has_a_type_and_a_meaning(file):
    for line in (properties_dir() / file).read_text().splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"# \([a-z][^)]*\) [A-Z0-9'].*\.$", line), line


# -- the paper's settings


def test_paper_yaml_loads_as_the_papers_setting():
    config = UnlearnConfig("BPR", "ml-1m", ["properties/paper.yaml"])
    assert (config["embedding_size"], config["epochs"], config["learning_rate"]) == (8, 50, 0.01)
    assert config["train_neg_sample_args"]["sample_num"] == 4
    assert config["train_neg_sample_args"]["distribution"] == "uniform"
    assert isinstance(config["weight_decay"], float) and 0 < config["weight_decay"] < 1e-6
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"}
    assert config["test_neg_sample_args"]["sample_num"] == 99
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    assert config["forget_ratio"] == 0.0001
    assert max(config["topk"]) == 100


def test_paper_sets_equation_7():
    config = build(paper=True)
    assert config["method"] == "influence"
    assert (config["curvature"], config["damping"]) == ("hessian", "none")
    assert (config["pool_return"], config["log_epochs"]) == (False, 1)


@pytest.mark.parametrize(
    "key, value",
    [("curvature", "gauss_newton"), ("damping", "adam"), ("damping", "scalar"), ("pool_return", True),
     ("log_epochs", "all"), ("log_epochs", 2), ("method", "replay")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["dict", "file"])
def test_what_contradicts_the_paper_is_refused(write_yaml, key, value, where):
    if where == "dict":
        message = refusal(paper=True, **{key: value})
    else:
        message = refusal([write_yaml(f"{key}: {value}\n")], paper=True)
    assert "paper" in message and key in message


def test_what_agrees_with_the_paper_is_accepted():
    assert build(paper=True, curvature="hessian", damping="none", pool_return=False, log_epochs=1)["paper"] is True


def test_a_checkpoints_configuration_does_not_contradict_the_paper():
    assert build(None, {"curvature": "gauss_newton", "damping": "adam"}, paper=True)["curvature"] == "hessian"


def test_the_configuration_reference_is_up_to_date():
    docs = properties_dir().parent / "docs"
    spec = importlib.util.spec_from_file_location("configuration", docs / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (docs / "configuration.md").read_text("utf-8") == module.page(), "run: python docs/configuration.py"


def test_more_clusters_than_users_are_refused(make_config, make_split):
    """NCL's default is a thousand; faiss would end in its own words, after an epoch."""
    with pytest.raises(InputError, match="num_clusters: 1000 is more than 38 users or items; lower it"):
        check_sizes(make_config("NCL"), make_split())
    check_sizes(make_config("NCL", num_clusters=38), make_split())


@pytest.mark.parametrize("model", ["ConvNCF", "NeuMF", "NNCF", "CFKG", "KTUP"])
def test_models_that_score_single_pairs_are_evaluated_by_recboles_batches(model):
    """All scores of a full ranking at once are rows of a network: 26 GB of ConvNCF on ml-100k."""
    assert UnlearnConfig(model, "tiny", None, {})["eval_batch_size"] == Config(model, "tiny")["eval_batch_size"]
    assert UnlearnConfig(model, "tiny", None, {"eval_batch_size": 77})["eval_batch_size"] == 77
    assert build()["eval_batch_size"] > 10**6
