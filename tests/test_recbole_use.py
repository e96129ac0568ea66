"""RecBole as people use it, with ``import recbole_unlearn`` beside it: all of it works, and every model keeps a log."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER, SEQUENTIAL
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender.bpr import BPR
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.trainer.trainer import Trainer
from recbole.utils import get_trainer, init_seed
from recbole.utils.case_study import full_sort_topk

import recbole_unlearn
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import ranking
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.keys import PERSONAL
from recbole_unlearn.settings.shown import masked
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.unlearner import InfluenceUnlearner

MODELS = {
    "BPR": {}, "LightGCN": {"n_layers": 1}, "NGCF": {"hidden_size_list": [8]}, "LINE": {}, "DGCF": {"n_factors": 2},
    "GRU4Rec": {**SEQUENTIAL, "hidden_size": 8}, "FPMC": SEQUENTIAL,
}  # fmt: skip


@pytest.fixture
def recbole(make_options, tmp_path):
    """Function (model, **keys) -> checkpoint that RecBole's run_recbole has written."""

    def run(model="BPR", saved=True, **keys):
        given = make_options(**{"epochs": 2, "checkpoint_dir": str(tmp_path / "saved"), "state": "ERROR", **keys})
        for key in ("compare", "forget_count"):
            given.pop(key, None)
        run_recbole(model, "tiny", config_dict=given, saved=saved)
        files = sorted((tmp_path / "saved").glob("*.pth"), key=lambda file: file.stat().st_mtime)
        return files[-1] if files else None

    return run


def request(path, **keys):
    given = {"checkpoint": str(path), "forget_count": 4, "compare": "none", "state": "ERROR", "show_progress": False,
             "output_dir": "out", "cg_max_iterations": 3, **keys}  # fmt: skip
    return run_unlearn(config_dict=given)


@pytest.mark.parametrize("model", MODELS)
def test_every_supported_model_keeps_a_log_and_can_be_unlearned_from(recbole, model):
    path = recbole(model, **MODELS[model])
    assert TripleLog.open(log_path(path)).n_epochs == 2
    assert request(path)["forget_set"]["interactions"] == 4


@pytest.mark.parametrize(
    "model, keys", [("ENMF", {"train_neg_sample_args": None}), ("MultiDAE", {"train_neg_sample_args": None})]
)
def test_models_that_cannot_be_unlearned_from_train_as_ever_and_the_request_says_why(recbole, model, keys):
    path = recbole(model, **keys)
    assert not log_path(path).exists()
    with pytest.raises(InputError) as refused:
        request(path)
    assert "\n" not in str(refused.value) and f"model {model} is not supported: it is" in str(refused.value)


@pytest.mark.parametrize("model", ["LightGCN", "GRU4Rec"])
def test_the_weights_are_those_of_recbole_alone(recbole, monkeypatch, model):
    ours = torch.load(recbole(model, **MODELS[model]), weights_only=True)["state_dict"]
    monkeypatch.setattr(sys.modules["recbole.quick_start.quick_start"], "get_trainer", lambda *_: Trainer)
    stock = torch.load(recbole(model, **MODELS[model]), weights_only=True)["state_dict"]
    assert ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in ours)


@pytest.fixture
def labelled(write_data, interactions, tmp_path):
    """Function (*users) -> ``data_path`` of the tiny data set, each interaction with a label, these users' turned."""

    def write(*turned):
        path = write_data(tmp_path / "-".join(("labelled", *turned)), "tiny", interactions)
        lines = ["user_id:token\titem_id:token\tlabel:float"]
        lines += [
            f"{user}\t{item}\t{(n % 3 > 0) ^ (user in turned):d}" for n, (user, item, _) in enumerate(interactions)
        ]
        (Path(path) / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n")
        return path

    return write


LABELED = {
    "load_col": {"inter": ["user_id", "item_id", "label"]}, "train_neg_sample_args": None, "mlp_hidden_size": [8],
    "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": None, "mode": "labeled"},
    "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC",
}  # fmt: skip


def test_a_model_judged_by_labels_forgets_exactly_where_nothing_is_judged(recbole, labelled):
    path = recbole("NeuMF", data_path=labelled(), **LABELED)
    with recbole_unlearn.load(path) as opened:
        assert opened.guard.distance == 0
        assert all(opened.forget(users=[user]).details["exact"] for user in ("u20", "u17"))
        opened.save("saved.pth")
    keys = {"evaluate": "none", "purge": True, "purge_dataset": True}
    for number, each in enumerate(("saved.pth", "out0/unlearned.pth")):
        assert request(each, output_dir=f"out{number}", **keys)["unlearning"]["exact"]
    keys = {"evaluate": "none", "method": "replay", "replay_rows": "all", "replay_epochs": "validated"}
    # by the training's own validation, whatever else a request names
    assert request("out1/unlearned.pth", metrics=["NDCG"], **keys)["unlearning"]["exact"]


def test_nothing_of_forgotten_labels_is_left(recbole, labelled):
    found = []
    for data in (labelled(), labelled("u20")):
        path = recbole("NeuMF", data_path=data, eval_step=0, **LABELED)
        with recbole_unlearn.load(path) as opened:
            before = torch.cat([value.clone().ravel() for value in opened.state_dict.values()])
            assert opened.forget(users=["u20"]).details["coupling"] == "paired"
            found.append((before, torch.cat([value.ravel() for value in opened.state_dict.values()])))
    (before, after), (turned, forgotten) = found
    assert not torch.equal(before, turned) and torch.equal(after, forgotten) and not torch.equal(before, after)


def test_where_a_model_judged_by_labels_would_be_judged_the_line_says_what_to_give(recbole, labelled):
    path = recbole("NeuMF", data_path=labelled(), **LABELED)
    for keys, says in (({}, "AUC judges predicted values"), ({"metrics": ["NDCG"]}, "mode of valid is labeled")):
        with pytest.raises(InputError, match=f"{says}.* or evaluate: none$"):
            request(path, **keys)
    assert not Path("out").exists()


def test_a_metric_that_validation_misses_is_missed_by_what_validates_alone(recbole):
    path = recbole(epochs=2, eval_step=1, metrics=["MRR", "NDCG"], valid_metric="MRR@10")
    with pytest.raises(InputError, match="valid_metric MRR@10 is none of the metrics.* or compare: none$"):
        request(path, metrics=["NDCG"], compare="retrain")
    assert set(request(path, metrics=["NDCG"])["models"]["unlearned"]["ranking"]["full"]) >= {"ndcg@5", "ndcg@10"}


def test_what_is_not_saved_leaves_nothing(recbole, tmp_path):
    assert recbole(saved=False) is None
    assert not list((tmp_path / "saved").iterdir())


def test_saved_loaders_train_as_stock_does_and_stay_known(recbole, monkeypatch):
    path = recbole(save_dataloaders=True)
    log = TripleLog.open(log_path(path))
    assert all(len(entry) == 2 for entry in log.order)
    assert request(path)["guard"]["distance"] < 1e-4
    again = recbole(save_dataloaders=True)  # from the saved ones
    assert again != path and request(again, output_dir="again")["guard"]["distance"] < 1e-4
    for file in Path("../saved").glob("*dataloader*"):
        file.unlink()
    ours = torch.load(path, weights_only=True)["state_dict"]
    for file in path.parent.glob("*dataloader.pth"):
        file.unlink()
    monkeypatch.setattr(sys.modules["recbole.quick_start.quick_start"], "get_trainer", lambda *_: Trainer)
    stock = torch.load(recbole(save_dataloaders=True), weights_only=True)["state_dict"]
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "GRU4Rec"])
def test_recboles_load_data_and_model_reads_originals_and_unlearned(recbole, model):
    path = recbole(model, **MODELS[model])
    result = request(path, forget_count=None, forget_users=["u17"])
    forgotten = result["forget_set"]["interactions"]
    sizes = {}
    for name, file in (("original", path), ("unlearned", "out/unlearned.pth")):
        config, net, dataset, train, valid, test = load_data_and_model(str(file))
        stored = torch.load(file, weights_only=True)
        assert config["model"] == model and type(net).__name__ == model
        assert all(torch.equal(value, stored["state_dict"][key]) for key, value in net.state_dict().items())
        sizes[name] = len(train.dataset)
        users = dataset.token2id(dataset.uid_field, ["u20", "u23"])
        if model != "GRU4Rec":
            scores, items = full_sort_topk(users, net, test, k=5, device=config["device"])
            assert items.shape == (2, 5) and torch.isfinite(scores).all()
        assert len(dataset) == sum(len(loader.dataset) for loader in (train, valid, test))
    assert sizes["original"] - sizes["unlearned"] == forgotten


def test_load_data_and_model_reads_a_model_without_its_log_and_own_classes(recbole, make_options):
    path = recbole(log_negatives=False)
    assert load_data_and_model(str(path))[0]["model"] == "BPR"
    own = train_own(make_options)
    assert type(load_data_and_model(str(own))[1]) is OwnBPR
    with pytest.raises(InputError, match="does not exist"):
        load_data_and_model("nothing.pth")


def defined(**methods):
    """A class of the same name each time, as a notebook's cell defines it when it is run again."""
    found = type("Cell", (BPR,), {"__module__": __name__, "__qualname__": "Cell", **methods})
    globals()["Cell"] = found
    return found


def test_load_data_and_model_builds_the_class_that_its_name_means_today(make_options, monkeypatch):
    monkeypatch.setitem(globals(), "Cell", None)
    first = defined()
    path = train_own(make_options, kind=first)
    second = defined(other=True)
    assert type(load_data_and_model(str(path))[1]) is second and get_trainer(None, "Cell") is not Trainer
    globals()["Cell"] = None
    with pytest.raises(InputError, match=r"several classes Cell \(.*; give the class to .*load\(..., model=Cell\)"):
        load_data_and_model(str(path))
    assert get_trainer(None, "Cell") is recbole_unlearn.BPRTrainer and first is not second


def test_load_data_and_model_gives_devices_and_progress_back(recbole):
    config = load_data_and_model(str(recbole(gpu_id="", use_gpu=False, show_progress=False)))[0]
    assert (config["gpu_id"], config["use_gpu"], config["show_progress"]) == ("", False, False)


class OwnBPR(BPR):
    """A user's own model, with a key of its own."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.own = config["own_strength"]


def train_own(make_options, kind=OwnBPR, **keys):
    """A script of a user's own, with RecBole's own steps; returns the checkpoint's path."""
    config = Config(kind, "tiny", config_dict=make_options(epochs=2, own_strength=2, state="ERROR", **keys))
    init_seed(config["seed"], config["reproducibility"])
    train, valid, _ = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, kind(config, train.dataset))
    trainer.fit(train, valid, verbose=False)
    return Path(trainer.saved_model_file)


def test_own_models_train_with_a_log_and_have_their_bases_defaults(make_options):
    path = train_own(make_options)
    assert log_path(path).is_dir()
    given = {"checkpoint": str(path), "forget_count": 3, "compare": "none", "state": "ERROR", "show_progress": False}
    assert run_unlearn(OwnBPR, None, None, given)["model"] == "OwnBPR"
    given = make_options(own_strength=3, compare="none", saved=False, forget_count=2)
    given.pop("saved")
    given.pop("embedding_size")
    assert run_unlearn(OwnBPR, "tiny", None, given, saved=False)["settings"]["embedding_size"] == 64


def test_an_own_model_with_the_name_of_recboles_is_refused(make_options):
    with pytest.raises(InputError, match="another name"):
        run_unlearn(type("BPR", (BPR,), {}), "tiny", None, make_options())


@pytest.mark.parametrize(
    "name, meant",
    [("BPRR", "BPR"), ("bpr", "BPR"), ("lightgcn", "LightGCN"), ("SasRec", "SASRec"), ("GRU4rec", "GRU4Rec")],
)
def test_a_misspelt_model_gets_the_nearest_name(make_options, name, meant):
    with pytest.raises(InputError, match=f"no model named '{name}'; did you mean '{meant}'"):
        run_unlearn(name, "tiny", None, make_options())


def test_recboles_objective_for_hyper_tuning_works(make_options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    given = make_options(epochs=1, model="BPR", dataset="tiny", checkpoint_dir=str(tmp_path / "tried"), state="ERROR")
    found = objective_function(given, saved=False)
    assert 0 <= found["best_valid_score"] <= 1
    assert not list((tmp_path / "tried").iterdir())


# -- nothing personal leaves the process


class Wandb(types.ModuleType):
    """Stands in for Weights & Biases: keeps what it is sent."""

    run = None

    def __init__(self):
        super().__init__("wandb")
        self.sent = []

    def init(self, **given):
        self.run = types.SimpleNamespace(summary={})
        self.sent.append(
            repr({key: vars(value) if hasattr(value, "__dict__") else value for key, value in given.items()})
        )
        self.sent.append(repr(sys.argv))

    def log(self, *given, **more):
        self.sent.append(repr((given, more)))

    def define_metric(self, *given, **more):
        pass


@pytest.mark.parametrize(
    "keys", [{"forget_users": [SECRET_USER]}, {"forget_items": SECRET_ITEM}], ids=lambda keys: next(iter(keys))
)
def test_no_logger_gets_what_names_the_forgotten(make_options, monkeypatch, keys):
    import run_unlearn as command_line

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    given = make_options(log_wandb=True, compare="none", output_dir="out", epochs=1, **keys)
    arguments = [f"--{key}={value}" for key, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["run_unlearn.py", "--model=BPR", "--dataset=tiny", *arguments])
    assert command_line.main() == 0
    assert len(wandb.sent) > 2
    for text in wandb.sent:
        assert SECRET_USER not in text and SECRET_ITEM not in text
    for file in Path().rglob("*"):
        if file.is_file() and file.suffix != ".npy":
            content = file.read_bytes()
            assert SECRET_USER.encode() not in content and SECRET_ITEM.encode() not in content, file


def test_tensorboard_and_wandb_get_masked_settings_of_recboles_own_configuration(make_options, tmp_path, monkeypatch):
    """RecBole's Config takes our keys for hyperparameters, and would write them down."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    given = make_options(forget_users=[SECRET_USER], forget_file=SECRET_USER, log_wandb=True, epochs=1, state="ERROR")
    run_recbole("BPR", "tiny", config_dict={**given, "checkpoint_dir": str(tmp_path / "saved")})
    assert wandb.sent and not any(SECRET_USER in text for text in wandb.sent)
    events = list(Path("log_tensorboard").rglob("events*"))
    assert events and not any(SECRET_USER.encode() in file.read_bytes() for file in events)


def test_a_masked_configuration_has_no_personal_value_left(make_options):
    config = Config("BPR", "tiny", config_dict=make_options(**dict.fromkeys(PERSONAL, SECRET_USER)))
    assert SECRET_USER in repr(vars(config)) and SECRET_USER not in repr(vars(masked(config)))
    assert config["forget_users"] == SECRET_USER


# -- nothing unrecorded


NO_TEST = {"eval_args": {"split": {"RS": [1, 0, 0]}, "order": "RO", "group_by": "user", "mode": "full"}}


@pytest.mark.parametrize("keys", [{}, {"forget_count": 3}, {"compare": "retrain"}], ids=str)
def test_without_held_out_interactions_it_forgets_and_leaves_ranking_out(make_options, keys):
    given = make_options(**{"compare": "none", "forget_users": ["u17"], "output_dir": "out", **NO_TEST, **keys})
    if "forget_count" in keys:
        given.pop("forget_users")
    result = run_unlearn("BPR", "tiny", None, given)
    assert all(each["ranking"] == {} for each in result["models"].values())
    assert 0 <= result["models"]["unlearned"]["forget_auc"] <= 1
    assert json.loads(Path("out/result.json").read_text()) == result
    assert "no ranking is measured" in Path("out/result.md").read_text()
    assert Path("out/report.html").is_file() and Path("out/audit.jsonl").is_file()
    checkpoint.load("out/unlearned.pth")


def test_a_user_with_one_interaction_is_no_obstacle(make_options, write_data, tmp_path):
    rows = [(f"u{n}", f"i{n % 9}", n) for n in range(60)]
    data = write_data(tmp_path, "one", rows)
    given = make_options(
        data_path=data, compare="none", forget_users=["u7"], output_dir="out", epochs=2, topk=5, valid_metric="NDCG@5"
    )
    result = run_unlearn("BPR", "one", None, given)
    assert result["forget_set"]["interactions"] == 1
    assert result["geometry"]["map"] == {} and result["geometry"]["pnpr"]  # nothing to compare a map with


def test_one_dimension_has_figures_but_no_map(make_options):
    given = make_options(embedding_size=1, forget_count=4, output_dir="out", learner="adamw")
    result = run_unlearn("BPR", "tiny", None, given)
    assert result["geometry"]["map"] == {} and result["geometry"]["pnpr"]
    assert Path("out/report.html").is_file()


@pytest.mark.parametrize("purge", [False, True])
def test_what_fails_late_leaves_no_new_model_and_deletes_nothing(make_options, monkeypatch, purge):
    run_unlearn("BPR", "tiny", None, make_options(compare="none", output_dir="first", forget_count=1))
    before = {file: file.read_bytes() for file in Path("first").rglob("*") if file.is_file()}

    def broken(*_, **__):
        raise ArithmeticError("a metric of somebody's own")

    monkeypatch.setattr(ranking, "evaluate", broken)
    given = {"checkpoint": "first/model.pth", "forget_count": 3, "compare": "none", "output_dir": "out", "purge": purge,
             "state": "ERROR", "show_progress": False}  # fmt: skip
    with pytest.raises(ArithmeticError):
        run_unlearn(config_dict=given)
    assert not list(Path("out").glob("unlearned*")) and not Path("out/audit.jsonl").exists()
    assert {file: file.read_bytes() for file in Path("first").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("what", ["report", "audit"])
def test_a_model_that_cannot_be_put_on_record_is_taken_back(make_options, monkeypatch, what):
    run_unlearn("BPR", "tiny", None, make_options(compare="none", output_dir="first", forget_count=1))

    def full(*_, **__):
        raise OSError(28, "No space left on device", "report.html")

    if what == "report":
        monkeypatch.setattr(sys.modules["recbole_unlearn.reports.tables"], "html", full)
    else:
        monkeypatch.setattr(sys.modules["recbole_unlearn.storage.audit"], "append", full)
    given = {"checkpoint": "first/model.pth", "forget_count": 3, "compare": "none", "output_dir": "out", "purge": True,
             "state": "ERROR", "show_progress": False}  # fmt: skip
    with pytest.raises(InputError, match="No space left"):
        run_unlearn(config_dict=given)
    left = {entry.name for entry in Path("out").iterdir()} if Path("out").exists() else set()
    assert left <= {"audit.jsonl", "audit.jsonl.key"}
    assert Path("first/model.pth").is_file() and Path("first/model.triples").is_dir()
    with InfluenceUnlearner.load("first/model.pth") as session:
        session.forget("count", 2)
        if what == "audit":
            with pytest.raises(InputError, match="No space left"):
                session.save("new.pth")
            assert not Path("new.pth").exists() and not Path("new.triples").exists()


@pytest.mark.parametrize(
    "metric", ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage", "GAUC", "MAP"]
)
def test_metrics_that_recbole_alone_breaks_on_are_computed(make_options, metric):
    given = make_options(metrics=[metric, "NDCG"], compare="none", forget_count=3, output_dir="out", epochs=1)
    result = run_unlearn("BPR", "tiny", None, given)
    found = result["models"]["unlearned"]["ranking"]["full"]
    assert any(name.startswith(metric.lower()) and np.isfinite(value) for name, value in found.items())


def test_a_training_whose_loss_becomes_nan_is_one_line_and_leaves_nothing(make_options):
    with pytest.raises(InputError, match="loss became NaN .* lower learning_rate"):
        run_unlearn("BPR", "tiny", None, make_options(learning_rate=1e30, output_dir="out", forget_count=3))
    assert not Path("out").exists()


def test_the_names_are_public():
    assert recbole_unlearn.BPRTrainer is not Trainer


SOFTMAX = {
    "loss_type": "CE", "train_neg_sample_args": None, "prototype_size": 4, "interest_size": 2, "tau_ratio": 0.1,
    "MAX_ITEM_LIST_LENGTH": 6, "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}  # fmt: skip


def test_a_pairwise_class_without_negatives_trains_as_by_recbole_and_is_refused(make_options):
    """SINE says that it wants pairs, and has a softmax over all items."""
    weights = []
    for find in (lambda config: Trainer, lambda config: get_trainer(config["MODEL_TYPE"], config["model"])):
        config = Config("SINE", "tiny", config_dict=make_options(**SOFTMAX))
        init_seed(config["seed"], config["reproducibility"])
        train = data_preparation(config, create_dataset(config))[0]
        init_seed(config["seed"], config["reproducibility"])
        trainer = find(config)(config, config.model_class(config, train._dataset))
        trainer.fit(train, verbose=False)
        weights.append(trainer.model.state_dict())
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    missing = torch.load(trainer.saved_model_file, weights_only=True)["triple_log"]["missing"]
    assert "pairwise models need them" in missing
    with pytest.raises(InputError, match="model SINE is not supported: .* pairwise models need them"):
        recbole_unlearn.trainer_of(config, trainer.model)
