"""The guard: what training does is in the log or the log is not used."""

import json
import shutil
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender.bpr import BPR
from recbole.utils import get_model, get_trainer, init_seed

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import Given
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training.trained import Checkpoint, config_of
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners import guard
from recbole_unlearn.unlearners.dot_product import DotProduct
from recbole_unlearn.unlearners.influence import Influence


@pytest.fixture
def ready(make_options, tmp_path):
    """Function (model='BPR', **keys) -> (trainer, train, valid), as RecBole's run_recbole makes them."""

    def make(model="BPR", **keys):
        given = make_options(**{"epochs": 8, "eval_step": 0, "checkpoint_dir": str(tmp_path / "saved"), **keys})
        config = UnlearnConfig(model, "tiny", None, given)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, _ = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, get_model(model)(config, train.dataset))
        return trainer, train, valid

    return make


def after_each_epoch(trainer, work):
    """Have a training do something after each of its epochs, as people's scripts do."""
    epoch = trainer._train_epoch

    def then(*args, **kwargs):
        loss = epoch(*args, **kwargs)
        work()
        return loss

    trainer._train_epoch = then


def reproduced(path):
    """How far replay with nothing forgotten ends from a checkpoint's weights."""
    stored, log = checkpoint.load(path)
    opened = Checkpoint(path, config_of(path, stored, log, Given.read()), stored, log)
    return DotProduct(opened.trained(opened.split())).reproduction()


def request(path, **keys):
    return run_unlearn(
        config_dict={"checkpoint": str(path), "forget_count": 5, "compare": "none", "state": "ERROR",
                     "show_progress": False, "output_dir": "out", **keys}
    )  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"shuffle": False}, {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}},
        {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}}, {"negatives": "static"},
        {"weight_decay": 0.001}, {"train_batch_size": 5000}, {"learning_rate": 0.05}, {"embedding_size": 1},
    ],
    ids=str,
)  # fmt: skip
def test_replay_with_nothing_forgotten_gives_the_weights(ready, keys):
    trainer, train, _ = ready(**keys)
    trainer.fit(train, verbose=False)
    distance, rounding = reproduced(trainer.saved_model_file)
    assert rounding == 0 and distance < 1e-4 < guard.LIMIT


@pytest.mark.parametrize("each", ["epoch", "step"])
def test_a_schedule_of_learning_rates_is_replayed(ready, each):
    trainer, train, _ = ready()
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.8 if each == "epoch" else 0.98)
    if each == "epoch":
        after_each_epoch(trainer, schedule.step)
    else:
        trainer.optimizer.register_step_post_hook(lambda *_: schedule.step())
    trainer.fit(train, verbose=False)
    log = TripleLog.open(log_path(trainer.saved_model_file))
    log.verify()
    rates = np.concatenate([log.rates(epoch) for epoch in range(log.n_epochs)])
    assert rates[0] == 0.02 and rates[-1] < 0.01 and len(rates) == 8 * -(-log.n_rows // 97)
    assert reproduced(trainer.saved_model_file)[0] < 1e-4
    result = request(trainer.saved_model_file)
    assert result["guard"]["checked"] == "replayed" and result["guard"]["distance"] < 1e-4
    shorter = TripleLog.open("out/unlearned.triples")
    assert np.array_equal(np.concatenate([shorter.rates(epoch) for epoch in range(8)]), rates)


def test_a_schedule_is_refused_where_one_rate_is_taken(ready):
    trainer, train, _ = ready()
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.8)
    after_each_epoch(trainer, schedule.step)
    trainer.fit(train, verbose=False)
    with pytest.raises(InputError, match="learning rate went from 0.02 to"):
        request(trainer.saved_model_file, method="influence")
    assert request(trainer.saved_model_file, method="influence", damping="scalar")["guard"]["checked"] == "recorded"


def weights_changed(trainer):
    def work():
        with torch.no_grad():
            trainer.model.item_embedding.weight.mul_(0.97)

    after_each_epoch(trainer, work)


def gradients_changed(trainer):
    count = iter(range(10**6))
    trainer.model.item_embedding.weight.register_hook(lambda grad: grad * (next(count) % 3 > 0))


def state_lost(trainer):
    after_each_epoch(trainer, trainer.optimizer.state.clear)


@pytest.mark.parametrize("meddle", [weights_changed, gradients_changed, state_lost])
def test_what_no_log_holds_is_found_and_replay_refused(ready, meddle):
    trainer, train, _ = ready()
    meddle(trainer)
    trainer.fit(train, verbose=False)
    with pytest.raises(InputError, match="does not tell what training did") as refused:
        request(trainer.saved_model_file)
    assert "\n" not in str(refused.value) and "method: influence" in str(refused.value)
    with pytest.raises(InputError, match="does not tell what training did"):
        InfluenceUnlearner.load(trainer.saved_model_file)


def test_another_optimiser_than_the_settings_say_is_refused(ready):
    trainer, train, _ = ready()
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), 0.02, weight_decay=0.0)
    trainer.fit(train, verbose=False)
    with pytest.raises(InputError, match="its optimiser was AdamW, not Adam"):
        request(trainer.saved_model_file)


def test_an_optimiser_whose_other_settings_change_ends_the_log(ready):
    trainer, train, _ = ready()
    rates = torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, 0.05, total_steps=1000, cycle_momentum=True)
    trainer.optimizer.register_step_post_hook(lambda *_: rates.step())
    trainer.fit(train, verbose=False)
    assert not log_path(trainer.saved_model_file).exists()
    with pytest.raises(InputError, match="settings changed while it trained"):
        request(trainer.saved_model_file)


def test_a_second_fit_goes_on_in_the_same_log(ready):
    trainer, train, valid = ready(eval_step=1)
    for _ in range(3):
        trainer.fit(train, valid, verbose=False, saved=True)
    trainer._save_checkpoint(trainer.epochs - 1, verbose=False)  # of the last epoch, whichever was best
    stored, log = checkpoint.load(trainer.saved_model_file)
    assert log.n_epochs == stored["triple_log"]["epochs"] > 16
    assert reproduced(trainer.saved_model_file)[0] < 1e-3


def test_a_fit_that_saves_nothing_leaves_nothing_and_ends_the_log_of_later_ones(ready, tmp_path):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False, saved=False)
    assert not list((tmp_path / "saved").iterdir())
    trainer.fit(train, verbose=False)
    with pytest.raises(InputError, match="had taken steps before"):
        request(trainer.saved_model_file)


def test_a_checkpoint_keeps_its_log_until_another_replaces_it(ready):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    _, other, _ = ready(eval_args={"split": {"RS": [0.5, 0.2, 0.3]}})
    trainer.fit(other, verbose=False, saved=False)
    assert trainer.no_log and request(trainer.saved_model_file)["guard"]["distance"] < 1e-4


def test_a_fit_on_other_interactions_ends_the_log(ready):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    _, other, _ = ready(eval_args={"split": {"RS": [0.5, 0.2, 0.3]}})
    trainer.fit(other, verbose=False)
    assert not log_path(trainer.saved_model_file).exists()
    with pytest.raises(InputError, match="other interactions too"):
        request(trainer.saved_model_file)


def test_a_loader_that_another_training_has_used_is_still_known(ready):
    first, train, _ = ready(epochs=3)
    first.fit(train, verbose=False)
    second, _, _ = ready()
    second.fit(train, verbose=False)
    assert reproduced(second.saved_model_file)[0] < 1e-4


def test_a_loader_without_its_generator_is_still_known(ready):
    """So RecBole leaves its loaders after ``save_dataloaders``."""
    trainer, train, _ = ready()
    train.generator = train.sampler.generator = None
    trainer.fit(train, verbose=False)
    assert reproduced(trainer.saved_model_file)[0] < 1e-4


@pytest.mark.parametrize("model", ["BPR", "NGCF"])
def test_a_step_is_settled_though_its_log_was_never_replayed(ready, model):
    """The stored weights are what replay is compared with, not those that the step has moved."""
    one = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
    trainer, train, _ = ready(model, embedding_size=8, hidden_size_list=[8], epochs=3, **one)
    trainer.fit(train, verbose=False)
    with load(trainer.saved_model_file, config_dict={"cg_max_iterations": 2}, way=Influence()) as unlearner:
        assert unlearner.check().checked == "recorded"
        unlearner.forget(rows=np.arange(0, unlearner.split.n_rows, 7))
        assert unlearner.settle().details["exact"] and unlearner.guard.distance < 1e-4


# -- once a log, and tied to it


@pytest.fixture
def counted(monkeypatch):
    """How often a replay with nothing forgotten was made: a list that grows."""
    made, reproduction = [], DotProduct.reproduction

    def count(self, *args):
        made.append(1)
        return reproduction(self, *args)

    monkeypatch.setattr(DotProduct, "reproduction", count)
    return made


def test_it_is_made_once_a_log_and_kept_with_it(ready, counted):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    assert not counted
    first = request(trainer.saved_model_file)
    again = request(trainer.saved_model_file, output_dir="again")
    assert len(counted) == 1
    assert first["guard"]["seconds"] > 0 == again["guard"]["seconds"]
    assert first["guard"]["distance"] == again["guard"]["distance"]
    next_one = request("out/unlearned.pth", output_dir="next")
    assert len(counted) == 1 and next_one["guard"]["checked"] == "inherited"
    page = (log_path("again/unlearned.pth").parent / "result.md").read_text()
    assert "Guard: Replay of the log with nothing forgotten ends" in page


def test_other_weights_or_another_log_are_checked_anew(ready, counted):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    path = trainer.saved_model_file
    request(path)
    state = torch.load(path, weights_only=True)
    state["state_dict"]["item_embedding.weight"] *= 1.1
    torch.save(state, path)
    with pytest.raises(InputError, match="does not tell what training did"):
        request(path, output_dir="again")
    assert len(counted) == 2


def test_a_result_whose_note_is_not_of_its_weights_is_checked_anew(ready, counted):
    """Not taken for one that was never checked: only that has no note."""
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    request(trainer.saved_model_file)
    note = log_path("out/unlearned.pth") / guard.FILE
    note.write_text("[]")
    assert request("out/unlearned.pth", output_dir="again")["guard"]["checked"] == "replayed" and len(counted) == 2
    state = torch.load("out/unlearned.pth", weights_only=True)
    state["state_dict"]["item_embedding.weight"] *= 1.1
    torch.save(state, "out/unlearned.pth")
    with pytest.raises(InputError, match="does not tell what training did"):
        request("out/unlearned.pth", output_dir="changed")
    note.unlink()
    assert "not guarded" in request("out/unlearned.pth", output_dir="changed")["guard"]["sentence"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"distance": "far"}',
        "\xff",
        '{"distance": 0, "limit": 1, "checked": "replayed", "weights": "", "log": ""}',
    ],
)
def test_a_damaged_note_of_it_is_no_licence(ready, counted, content):
    trainer, train, _ = ready()
    trainer.fit(train, verbose=False)
    (log_path(trainer.saved_model_file) / guard.FILE).write_text(content, "latin-1")
    request(trainer.saved_model_file)
    assert len(counted) == 1
    assert json.loads((log_path(trainer.saved_model_file) / guard.FILE).read_text())["checked"] == "replayed"


@pytest.fixture
def other_facts(make_options, linked_path, tmp_path):
    """Trains CKE; function that gives its items other facts (True), or their own back."""
    data = shutil.copytree(linked_path, tmp_path / "data")
    file = data / "tiny" / "tiny.kg"
    keys = {"data_path": str(data), "epochs": 2, "embedding_size": 8, "kg_embedding_size": 8, "load_col": None}
    keys |= {"method": "replay", "replay_rows": "all", "compare": "none", "forget_count": 5, "output_dir": "first"}
    run_unlearn("CKE", "tiny", None, make_options(**keys))
    head, *facts = whole = file.read_text().splitlines()
    others = [f"{fact.rpartition('t')[0]}{facts[n - 7].rpartition(chr(9))[2]}" for n, fact in enumerate(facts)]
    lines = {True: [head, *others], False: whole}
    return lambda other: file.write_text("\n".join(lines[other]) + "\n")


@pytest.mark.parametrize("name", ["model", "unlearned"])
def test_a_model_whose_facts_are_others_is_checked_anew(other_facts, name):
    path = f"first/{name}.pth"
    asked = {"method": "replay", "replay_rows": "all"}
    kept = request(path, **asked)["guard"]
    assert kept["seconds"] == 0 and kept["checked"] == ("replayed" if name == "model" else "inherited")
    other_facts(True)
    with pytest.raises(InputError, match="does not tell what training did.*have changed since.*put them back"):
        request(path, output_dir="other", **asked)
    other_facts(False)
    assert request(path, output_dir="again", **asked)["guard"]["distance"] == kept["distance"]


def test_what_is_scaled_anew_by_each_request_is_no_other_data(make_options, write_data, interactions):
    """It is rounded once a request, and once when all are read from the files."""
    early, rows, own = ["u17", "u20", "u23"], [], Counter(user for user, _, _ in interactions)
    for user, item, time in interactions:
        own[user] -= 1
        early_time = (early.index(user) + 1) * (7000 * (early.index(user) + 1) - 13 * own[user]) if user in early else 0
        rows.append((user, item, early_time if early_time and own[user] > 1 else time))
    keys = {"data_path": write_data("data", "tiny", rows), "normalize_all": True, "load_col": None, "compare": "none"}
    keys |= {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}}
    asked = {"method": "replay", "replay_rows": "all", "coupling": "paired", "purge": True}
    chosen = make_options(epochs=2, eval_step=0, output_dir="0", forget_users=early[:1], **asked, **keys)
    run_unlearn("NeuMF", "tiny", None, chosen)
    for n, user in enumerate(early[1:]):
        found = request(f"{n}/unlearned.pth", output_dir=str(n + 1), forget_count=None, forget_users=[user], **asked)
        assert found["guard"]["checked"] == "inherited"


@pytest.mark.parametrize("distribution", ["popularity", "uniform"])
def test_held_out_interactions_count_where_negatives_are_drawn_by_popularity(
    make_options, interactions, tmp_path, distribution
):
    folder, head = tmp_path / "data" / "cut", "user_id:token\titem_id:token\ttimestamp:float"
    folder.mkdir(parents=True)
    lines = ["\t".join(map(str, each)) for each in interactions]
    train = [*lines[::2], *dict(zip([user for user, _, _ in interactions], lines, strict=True)).values()]
    train += dict(zip([item for _, item, _ in interactions], lines, strict=True)).values()  # all tokens are in it
    rest = [line for line in lines if line not in train]
    parts = {"train": list(dict.fromkeys(train)), "valid": rest[::2], "test": rest[1::2]}

    def write(test):
        for part, own in {**parts, "test": test}.items():
            (folder / f"cut.{part}.inter").write_text("\n".join([head, *own]) + "\n")

    write(parts["test"])
    keys = {"data_path": str(tmp_path / "data"), "benchmark_filename": list(parts), "compare": "none"}
    keys["train_neg_sample_args"] = {"distribution": distribution, "sample_num": 1, "alpha": 1.0}
    run_unlearn("BPR", "cut", None, make_options(forget_count=5, epochs=6, output_dir="first", **keys))
    write(parts["test"][::5])
    if distribution == "uniform":
        assert request("first/unlearned.pth")["guard"]["seconds"] == 0
        return
    for name in ("model", "unlearned"):
        with pytest.raises(InputError, match="popularity, by which its negatives were drawn, counts them"):
            request(f"first/{name}.pth")
    write(parts["test"])
    assert request("first/unlearned.pth")["guard"]["checked"] == "inherited"


def test_replay_of_lightgcn_is_guarded_too(ready):
    trainer, train, _ = ready("LightGCN", n_layers=2, reg_weight=1e-4, epochs=2)
    trainer.fit(train, verbose=False)
    found = request(trainer.saved_model_file)["guard"]
    assert found["checked"] == "replayed" and found["distance"] < 1e-4


def test_models_that_take_steps_are_checked_by_what_the_log_says(ready):
    trainer, train, _ = ready(
        "NGCF", hidden_size_list=[8], node_dropout=0.0, message_dropout=0.0, reg_weight=1e-5, epochs=2
    )
    trainer.fit(train, verbose=False)
    asked = {"method": "influence", "cg_max_iterations": 3}
    assert request(trainer.saved_model_file, **asked)["guard"]["checked"] == "recorded"


def test_a_start_that_the_seed_does_not_give_is_that_of_the_log(ready):
    """But for a log of an earlier version, which rounded it."""
    trainer, train, _ = ready(epochs=2, learning_rate=0.0005)
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.normal_(0, 0.3)
    trainer.fit(train, verbose=False)
    distance, rounding = reproduced(trainer.saved_model_file)
    assert distance < 1e-4 and rounding == 0
    log, name = TripleLog.open(log_path(trainer.saved_model_file)), "weights-00000.npy"
    rounded = np.array(log.snapshot(0)).astype(np.float16)
    np.save(log.path / name, rounded)
    log.metadata["crc32"][name] = zlib.crc32(rounded.data.cast("B"))
    del log.metadata["crc32"]["metadata.json"]
    (log.path / "metadata.json").write_text(json.dumps(log.metadata))
    distance, rounding = reproduced(trainer.saved_model_file)
    assert guard.LIMIT < distance < rounding + guard.LIMIT


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "NGCF"])
@pytest.mark.parametrize("method", ["auto", "influence"])
def test_a_training_that_went_on_from_other_weights_is_refused(ready, model, method):
    """They may have been trained on what is to be forgotten, and replay would keep what they know."""
    keys = {"hidden_size_list": [8], "n_layers": 2, "epochs": 2} if model != "BPR" else {}
    first, train, _ = ready(model, **keys)
    first.fit(train, verbose=False)
    second, again, _ = ready(model, **keys)
    second.model.load_state_dict(torch.load(first.saved_model_file, weights_only=True)["state_dict"])
    second.fit(again, verbose=False)
    with pytest.raises(InputError, match="went on from others"):
        request(second.saved_model_file, method=method)
    assert request(first.saved_model_file, method=method, cg_max_iterations=2)["forget_set"]["interactions"] == 5


class Doubled(BPR):
    """A model of the user's own whose loss is another."""

    def calculate_loss(self, interaction):
        return 2 * super().calculate_loss(interaction)


def test_an_own_model_forgets_by_its_own_loss(make_options, tmp_path):
    given = make_options(method="influence", compare="none", forget_users=["u17"], output_dir="out")
    result = run_unlearn(Doubled, "tiny", None, given)
    assert result["unlearning"]["method"] == "influence" and result["guard"]["checked"] == "recorded"
    again = {"checkpoint": "out/unlearned.pth", "forget_users": ["u20"], "compare": "none", "output_dir": "again"}
    with pytest.raises(InputError, match="a class of your own, Doubled"):
        run_unlearn(None, None, None, again)
    assert run_unlearn(Doubled, None, None, again)["forget_set"]["users"] == 1
    with InfluenceUnlearner.load("again/unlearned.pth", model=Doubled) as session:
        session.forget("users", ["u23"])
