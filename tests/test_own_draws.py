"""Samplers, loaders and data sets of a user's own: they draw what is trained on, and what draws by a law says so."""

import functools

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.bpr import BPR
from recbole.sampler import RepeatableSampler, Sampler
from recbole.trainer.trainer import Trainer
from recbole.utils import init_seed

import recbole_unlearn as ru
from recbole_unlearn.data.sampling import PairwiseCollate, own_draws
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.testing import flat


def larger_of_two(method):
    """What a method draws, twice: the larger ids of both."""

    @functools.wraps(method)  # which lends it RecBole's name
    def draw(*args):
        first, second = method(*args), method(*args)
        return np.maximum(first, second) if isinstance(first, np.ndarray) else torch.maximum(first, second)

    return draw


class ByUsers(Sampler):
    sample_by_user_ids = larger_of_two(Sampler.sample_by_user_ids)


class ByKeys(Sampler):
    sample_by_key_ids = larger_of_two(Sampler.sample_by_key_ids)


class ByLaw(Sampler):
    _uni_sampling = larger_of_two(Sampler._uni_sampling)


class Sevens(TrainDataLoader):
    def collate_fn(self, index):
        batch = super().collate_fn(index)
        batch["neg_item_id"] = torch.full_like(batch["neg_item_id"], 7)
        return batch


class Eights(TrainDataLoader):
    def _neg_sampling(self, inter_feat):
        batch = super()._neg_sampling(inter_feat)
        batch["neg_item_id"] = torch.full_like(batch["neg_item_id"], 8)
        return batch


class Reversed(TrainDataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Halves(TrainDataLoader):
    def collate_fn(self, index):
        return super().collate_fn(index[::2] or index)


class Renamed(TrainDataLoader):
    def collate_fn(self, index):
        batch = super().collate_fn(index)
        return Interaction({name: batch[name] for name in ("user_id", "item_id", "neg_item_id")})


class Swapped(Dataset):
    """Its rows come with other items."""

    def __getitem__(self, index):
        rows = super().__getitem__(index)
        rows[self.iid_field] = rows[self.iid_field].clamp(max=5)
        return rows


def on_the_sampler(loader):
    loader._sampler.sample_by_user_ids = larger_of_two(loader._sampler.sample_by_user_ids)


OWN = {
    "sample_by_user_ids": {"sampler": ByUsers},
    "sample_by_key_ids": {"sampler": ByKeys},
    "_uni_sampling": {"sampler": ByLaw},
    "collate_fn": {"loader": Sevens},
    "_neg_sampling": {"loader": Eights},
    "__iter__": {"loader": Reversed},
    "set on the sampler": {"change": on_the_sampler},
    "another law": {"sampler": functools.partial(Sampler, distribution="popularity")},
}
UNTOLD = {"half of the rows": {"loader": Halves}, "no row": {"loader": Renamed}, "other items": {"data": Swapped}}


@pytest.fixture
def fit(make_options):
    """Function (kind of trainer, sampler, loader, data, change, **keys) -> trainer and loaders, after two epochs."""

    def run(kind, sampler=Sampler, loader=TrainDataLoader, data=None, change=lambda loader: None, **keys):
        given = make_options(epochs=2, eval_step=0, state="ERROR", **keys)
        config = Config("BPR", "tiny", config_dict=given)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, test = data_preparation(config, data(config) if data else create_dataset(config))
        parts = [each._dataset for each in (train, valid, test)]
        train = loader(config, parts[0], sampler(["train", "valid", "test"], parts).set_phase("train"), shuffle=True)
        change(train)
        init_seed(config["seed"], config["reproducibility"])
        trainer = kind(config, BPR(config, parts[0]))
        trainer.fit(train, verbose=False)
        return trainer, (train, valid, test)

    return run


def weights(trainer):
    return flat(trainer.model.state_dict())


@pytest.mark.parametrize("case", OWN)
def test_what_is_trained_on_is_what_they_draw_and_no_law_is_made_up_for_them(fit, case):
    stock, _ = fit(Trainer, **OWN[case])
    trainer, loaders = fit(ru.BPRTrainer, **OWN[case])
    assert torch.equal(weights(trainer), weights(stock))
    log = TripleLog.open(log_path(trainer.saved_model_file))
    assert log.n_epochs == 2 and log.own_draws == own_draws(loaders[0])
    if case in ("collate_fn", "_neg_sampling"):
        assert (log.epoch(1) == {"collate_fn": 7, "_neg_sampling": 8}[case]).all()
    trained = ru.Trained.of(trainer, *loaders)
    for way in (ru.Replay("all", "fresh"), ru.Replay("all"), ru.Replay("touched")):
        with pytest.raises(ru.InputError, match="^method: replay is not possible: negatives came from a .*influence$"):
            ru.InfluenceUnlearner(trained, way)


def test_steps_name_it_and_so_do_checkpoints_and_what_comes_of_them(fit):
    trainer, _ = fit(ru.BPRTrainer, sampler=ByUsers)
    with ru.load(trainer.saved_model_file) as unlearner:
        gone = unlearner.forget(users=["u17"])
        assert gone.method == "influence" and "a sampler of your own, ByUsers" in gone.why
        assert any("ByUsers" in each for each in gone.details["approximated"])
        unlearner.save("v2.pth")
    with ru.load("v2.pth") as again:
        assert again.method == "influence" and "ByUsers" in again.chosen
    given = {"checkpoint": trainer.saved_model_file, "forget_count": 3, "compare": "retrain"}
    with pytest.raises(ru.InputError, match="^compare: retrain is not possible: .*ByUsers.*compare: none.*"):
        ru.run_unlearn(config_dict=given, saved=False)


@pytest.mark.parametrize("case", UNTOLD)
def test_batches_that_a_log_cannot_tell_are_trained_on_and_not_logged(fit, case):
    stock, _ = fit(Trainer, **UNTOLD[case])
    trainer, loaders = fit(ru.BPRTrainer, **UNTOLD[case])
    assert torch.equal(weights(trainer), weights(stock))
    with pytest.raises(ru.InputError, match="no triple log: batches of a .* of your own, .* are not the rows"):
        ru.Trained.of(trainer, *loaders)


def test_a_function_set_on_a_loader_is_run(fit):
    stock, trainer = (fit(kind, change=on_the_loader_itself)[0] for kind in (Trainer, ru.BPRTrainer))
    assert torch.equal(weights(trainer), weights(stock))


def on_the_loader_itself(loader):
    own = loader.collate_fn

    def collate(index):
        batch = own(index)
        batch["neg_item_id"] = torch.full_like(batch["neg_item_id"], 7)
        return batch

    loader.collate_fn = collate


def test_a_sampler_given_to_a_loader_later_draws_from_then_on(fit, tmp_path):
    def two(kind):
        trainer, (train, *_) = fit(kind, checkpoint_dir=str(tmp_path / kind.__name__))
        train._sampler.__class__ = ByUsers
        trainer.fit(train, verbose=False)
        return trainer

    stock, ours = two(Trainer), two(ru.BPRTrainer)
    assert torch.equal(weights(ours), weights(stock))
    assert "ByUsers" in TripleLog.open(log_path(ours.saved_model_file)).own_draws


def test_draws_that_go_on_in_streams_of_their_own_are_stored(fit):
    """To draw them again would move those streams on, and so change what is trained on."""

    class Streamed(Sampler):
        def sample_by_user_ids(self, user_ids, item_ids, num):
            self.stream = getattr(self, "stream", None) or np.random.default_rng(3)
            return torch.from_numpy(self.stream.integers(1, self.item_num, len(user_ids) * num))

    stock, _ = fit(Trainer, sampler=Streamed)
    trainer, _ = fit(ru.BPRTrainer, sampler=Streamed, log_negatives="drawn")
    assert torch.equal(weights(trainer), weights(stock))


def test_static_negatives_are_for_recboles_own(fit):
    with pytest.raises(ru.InputError, match="negatives: static .* a sampler of your own, ByUsers; leave it out"):
        fit(ru.BPRTrainer, sampler=ByUsers, negatives="static")


def test_a_model_that_the_configuration_does_not_name_has_no_log(fit, monkeypatch):
    class Other(BPR):
        def calculate_loss(self, interaction):
            return super().calculate_loss(interaction) + interaction["timestamp"].mean() * 0

    monkeypatch.setitem(globals(), "BPR", Other)
    trainer, loaders = fit(ru.BPRTrainer, load_col={"inter": ["user_id", "item_id", "timestamp"]})
    with pytest.raises(ru.InputError, match="no triple log: its model is a Other; the configuration names BPR"):
        ru.Trained.of(trainer, *loaders)


def test_recboles_own_are_drawn_fast(fit):
    trainer, (train, *_) = fit(ru.BPRTrainer)
    assert own_draws(train) is None and isinstance(train.collate_fn, PairwiseCollate)
    assert TripleLog.open(log_path(trainer.saved_model_file)).own_draws is None


def test_a_repeatable_sampler_of_ones_own_draws_by_its_own_method(split):
    class ByKeysToo(RepeatableSampler):
        sample_by_key_ids = larger_of_two(RepeatableSampler.sample_by_key_ids)

    stock, own = (kind("train", split.train.dataset) for kind in (RepeatableSampler, ByKeysToo))
    users, items = split.users[:40], split.items[:40]
    np.random.seed(2)
    drawn = own.sample_by_user_ids(users, items, 2)
    np.random.seed(2)
    assert torch.equal(drawn, larger_of_two(stock.sample_by_user_ids)(users, items, 2))
