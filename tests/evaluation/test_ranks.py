"""Ranks that are counted give RecBole's own numbers to the last digit, and leave numpy's stream where RecBole does."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer.trainer import Trainer
from recbole.utils import init_seed

from recbole_unlearn.data import sampling
from recbole_unlearn.data.sampling import NegativeDraw
from recbole_unlearn.evaluation import ranks
from recbole_unlearn.evaluation.ranks import RankedLoader
from recbole_unlearn.training.trainer import BPRTrainer

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
HALF_HELD_OUT = {"split": {"RS": [0.5, 0.1, 0.4]}, "order": "RO", "group_by": "user"}
UNGROUPED = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "RO", "group_by": "none"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, write_data):
    """1,500 items, so that RecBole scores two users at a time; every fifth interaction occurs twice."""
    rng = np.random.default_rng(3)
    rows = []
    for user in range(60):
        for item in rng.choice(1500, 20 + user, replace=False):
            rows.append((f"u{user}", f"i{item}", len(rows)))
    rows += [(user, item, time + 7) for user, item, time in rows[::5]]
    return write_data(tmp_path_factory.mktemp("wide"), "tiny", rows)


@pytest.fixture
def build(make_options, wide, tmp_path):
    """Function (eval_args, mode, **options) -> (config, training loader, test loader), all of stock RecBole."""

    def make(eval_args, mode, **options):
        more = {
            "data_path": wide,
            "checkpoint_dir": str(tmp_path / "saved"),
            "metrics": ["Recall", "MRR", "NDCG", "Hit", "Precision", "MAP"],
            "metric_decimal_place": 15,
            "topk": [1, 7, 10, 100],
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {**eval_args, "mode": mode},
        }
        config = Config("BPR", "tiny", config_dict=make_options(**{**more, **options}))
        init_seed(config["seed"], config["reproducibility"])
        train, _, test = data_preparation(config, create_dataset(config))
        return config, train, test

    return make


def plain(model):
    pass


def trained(model):
    """Scores of the size that training gives: a few units."""
    for weight in (model.user_embedding.weight, model.item_embedding.weight):
        weight.mul_(2 / weight.std())


def tied(model):
    for weight in (model.user_embedding.weight, model.item_embedding.weight):
        weight.copy_((2 * weight / weight.std()).round())


def nearly_tied(model):
    """Groups of items apart by a rounding error, which falls out one way or the other with the batch."""
    trained(model)
    items = model.item_embedding.weight
    groups = items[torch.arange(len(items)) % 97]
    items.copy_(groups * (1 + 1e-7 * torch.randint(-1, 2, items.shape)))


def all_equal(model):
    model.item_embedding.weight.zero_()


def not_a_number(model):
    model.item_embedding.weight[::40] = torch.nan


def both(config, train, test, change=plain, model=BPR):
    """[(metrics, next random number)] of stock RecBole and ours."""
    torch.manual_seed(1)
    model = model(config, train.dataset)
    with torch.no_grad():
        change(model)
    results = []
    for kind in (Trainer, BPRTrainer):
        trainer = kind(config, model)
        trainer.eval_collector.data_collect(train)
        np.random.seed(11)
        results.append((trainer.evaluate(test, load_best_model=False), np.random.random()))
    return trainer, results


@pytest.mark.parametrize("change", [plain, trained, tied, nearly_tied, all_equal, not_a_number])
@pytest.mark.parametrize("mode", ["full", "uni99", "uni3"])
@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, HALF_HELD_OUT, UNGROUPED], ids=["one", "many", "ungrouped"])
def test_numbers_and_random_stream_are_those_of_recbole(build, eval_args, mode, change):
    config, train, test = build(eval_args, mode)
    trainer, (stock, ours) = both(config, train, test, change)
    assert RankedLoader.fits(trainer, test)
    assert ours == stock
    assert list(ours[0]) == list(stock[0]) and len(ours[0]) == 24


def test_rounding_decides_between_nearly_tied_items(build):
    """Else the case above shows nothing: scores of many users at once rank otherwise than of two."""
    config, train, test = build(HALF_HELD_OUT, "full")
    torch.manual_seed(1)
    model = BPR(config, train.dataset)
    with torch.no_grad():
        nearly_tied(model)
        whole, two = (model.full_sort_predict(test.user_df[:n]).view(n, -1)[:2] for n in (len(test.user_df), 2))
    if torch.equal(whole, two):
        pytest.skip("this processor's matrix product does not depend on the number of rows")
    assert not torch.equal(whole.argsort(), two.argsort())


@pytest.mark.parametrize("size", [1, 20_000, 2**21])
def test_the_numbers_are_those_of_the_default_batch_size(build, size):
    results = [both(*build(HALF_HELD_OUT, "full", eval_batch_size=n), nearly_tied)[1] for n in (4096, size)]
    assert results[1][1] == results[0][0]


def test_all_items_may_be_asked_for_and_more_fail_as_in_recbole(build, data_path):
    more = {"data_path": data_path, "metrics": ["NDCG"], "valid_metric": "NDCG@46"}
    _, (stock, ours) = both(*build(HALF_HELD_OUT, "full", topk=[46], **more))
    assert ours == stock
    with pytest.raises(RuntimeError):
        both(*build(HALF_HELD_OUT, "full", topk=[48], **more))


def without_full_sort(config, dataset):
    class Pairwise(BPR):
        full_sort_predict = AbstractRecommender.full_sort_predict

    return Pairwise(config, dataset)


FALLBACKS = {
    "Shannon entropy": ("full", {"metrics": ["ShannonEntropy", "NDCG"]}, BPR),
    "Shannon entropy, sampled": ("uni9", {"metrics": ["ShannonEntropy", "NDCG"]}, BPR),
    "GAUC": ("full", {"metrics": ["GAUC"], "valid_metric": "GAUC"}, BPR),
    "popular negatives": ("pop9", {}, BPR),
    "no full_sort_predict": ("full", {}, without_full_sort),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_everything_else_is_left_to_recbole(build, case):
    mode, options, model = FALLBACKS[case]
    config, train, test = build(LEAVE_ONE_OUT, mode, **options)
    trainer, (stock, ours) = both(config, train, test, model=model)
    assert not RankedLoader.fits(trainer, test)
    assert ours == stock


def test_negatives_of_worker_processes_are_left_to_recbole(build):
    config, train, test = build(LEAVE_ONE_OUT, "uni9", worker=1)
    assert not RankedLoader.fits(BPRTrainer(config, BPR(config, train.dataset)), test)


def test_the_best_model_is_loaded_first(build):
    config, train, test = build(LEAVE_ONE_OUT, "full")
    trainer = BPRTrainer(config, BPR(config, train.dataset))
    trainer.eval_collector.data_collect(train)
    expected = trainer.evaluate(test, load_best_model=False)
    trainer._save_checkpoint(0, verbose=False)
    with torch.no_grad():
        trainer.model.item_embedding.weight.neg_()
    assert trainer.evaluate(test, load_best_model=False) != expected
    assert trainer.evaluate(test) == expected


@pytest.mark.parametrize("bits", [8, 64, 2**29])
def test_negatives_are_recboles_however_large_the_filter(build, monkeypatch, bits):
    monkeypatch.setattr(sampling, "FILTER_BITS", bits)
    _, _, test = build(HALF_HELD_OUT, "uni9")
    sampler = copy.copy(test._sampler)
    users = test.uid_list
    counts = 5 * (1 + np.arange(len(users)) % 4)

    def drawn(draw):
        np.random.seed(2)
        return draw(), np.random.random()

    draw = NegativeDraw(sampler, test.dataset.user_num)
    ours, after = drawn(lambda: draw.one_by_one(users, counts))
    alone = lambda user, n: sampler.sample_by_user_ids([user], None, n).numpy()  # noqa: E731
    stock, expected = drawn(lambda: np.concatenate([alone(*each) for each in zip(users, counts, strict=True)]))
    np.testing.assert_array_equal(ours, stock)
    assert after == expected
    ours, after = drawn(lambda: draw(users, 7))
    stock, expected = drawn(lambda: sampler.sample_by_user_ids(users, None, 7).numpy())
    np.testing.assert_array_equal(ours, stock)
    assert after == expected


@pytest.mark.parametrize(("room", "least", "most"), [(2**26, 4, 4), (2**12, 4.01, 5.99), (0, 6, 6)])
def test_the_negatives_of_a_random_state_are_drawn_once_as_far_as_there_is_room(build, monkeypatch, room, least, most):
    monkeypatch.setattr(ranks, "KEPT", room)
    monkeypatch.setattr(ranks, "BLOCK", 2**10)
    drawn, one_by_one = [], NegativeDraw.one_by_one
    monkeypatch.setattr(NegativeDraw, "one_by_one", lambda *each: drawn.append(each) or one_by_one(*each))
    config, train, test = build(HALF_HELD_OUT, "uni3")
    kinds, found = (Trainer, BPRTrainer), {Trainer: [], BPRTrainer: []}
    for model in (BPR(config, train.dataset) for _ in range(2)):
        for kind in kinds:
            trainer = kind(config, model)
            trainer.eval_collector.data_collect(train)
            for seed in (11, 11, 12):
                np.random.seed(seed)
                np.random.normal()  # a second one is pending then
                found[kind].append(
                    (trainer.evaluate(test, load_best_model=False), np.random.normal(), np.random.random())
                )
    assert found[BPRTrainer] == found[Trainer]
    assert found[Trainer][0][0] != found[Trainer][3][0]
    blocks = len({int(users[0]) for _, users, _ in drawn})
    assert blocks > 2 and least * blocks <= len(drawn) <= most * blocks  # of 6 rankings 2 begin as the one before


def test_negatives_are_recboles_where_nearly_every_draw_is_used(build, data_path):
    """Of a user with all but a few items, many times more numbers are drawn than kept."""
    _, _, test = build(HALF_HELD_OUT, "uni9", data_path=data_path)
    sampler = copy.copy(test._sampler)
    sampler.used_ids = sampler.used_ids.copy()
    sampler.used_ids[5] = set(range(1, sampler.item_num - 1))
    draw = NegativeDraw(sampler, test.dataset.user_num)
    np.random.seed(2)
    ours, after = draw.one_by_one(np.array([5]), np.array([200])), np.random.random()
    np.random.seed(2)
    stock, expected = sampler.sample_by_user_ids([5], None, 200).numpy(), np.random.random()
    np.testing.assert_array_equal(ours, stock)
    assert (ours == sampler.item_num - 1).all() and after == expected


@pytest.mark.parametrize("dense", [0, 1000])  # one by one, and all of a user by a matrix product
@pytest.mark.parametrize("cutoff", [3, 60])
def test_inner_products_order_items_as_the_model_does(dense, cutoff, build, monkeypatch):
    """Those near a held-out item's come from the model; all others are too far apart for rounding to matter."""
    monkeypatch.setattr(ranks, "DENSE", dense)
    config, train, test = build(HALF_HELD_OUT, "uni99")
    torch.manual_seed(3)
    model = BPR(config, train.dataset)
    with torch.no_grad():
        nearly_tied(model)
    loader = RankedLoader(BPRTrainer(config, model), test)
    users, ptr, held_out = np.repeat(np.arange(1, 50), 60), 60 * np.arange(50), np.full(49, 7)
    items = np.random.default_rng(4).integers(1, train.dataset.item_num, len(users))
    with torch.no_grad(), ThreadPoolExecutor(2) as loader.threads:
        scores, exact = loader.scores(users, items, ptr, held_out, cutoff)(), loader.predict(users, items)
    mixed = scores != exact
    assert 0.2 < mixed.mean() < 1  # ours differ in the last bits, and not all are ours
    for own, theirs in zip(scores.reshape(49, 60), exact.reshape(49, 60), strict=True):
        order = [np.sign(each[:7, None] - each) for each in (own, theirs)]
        best = [(each < 0).sum(1) < cutoff for each in order]
        np.testing.assert_array_equal(*best)
        np.testing.assert_array_equal(*(each[best[0]] for each in order))
    with torch.no_grad():
        plainly, near = np.empty(len(items), np.float32), np.zeros(len(items), bool)
        P, Q = model.user_embedding.weight.numpy(), model.item_embedding.weight.numpy()
        products = np.empty((0, 0), np.float32)
        ranks.inner_products(users, items, ptr, held_out, products, P, Q, 1e-30, 60, plainly, near)
    order = [np.sign(each.reshape(49, 60)[:, :7, None] - each.reshape(49, 60)[:, None]) for each in (plainly, exact)]
    assert (order[0] != order[1]).any(), "no items so near that rounding decides"


def test_a_model_with_a_predict_of_its_own_is_asked(build):
    class Own(BPR):
        def predict(self, interaction):
            return -super().predict(interaction)

    config, train, test = build(HALF_HELD_OUT, "uni99")
    _, (stock, ours) = both(config, train, test, trained, Own)
    _, (_, usual) = both(config, train, test, trained)
    assert ours == stock and ours != usual


class Masking(BPRTrainer):
    """Shows no item of a low id."""

    def _full_sort_batch_eval(self, batched_data):
        interaction, scores, *held_out = super()._full_sort_batch_eval(batched_data)
        scores[:, :700] = -torch.inf
        return interaction, scores, *held_out

    def _neg_sample_batch_eval(self, batched_data):
        interaction, scores, *held_out = super()._neg_sample_batch_eval(batched_data)
        scores[:, :700] = -torch.inf
        return interaction, scores, *held_out


@pytest.mark.parametrize("mode", ["full", "uni9"])
def test_a_trainer_that_scores_batches_itself_does(build, mode):
    config, train, test = build(HALF_HELD_OUT, mode)
    model, found = BPR(config, train.dataset), []
    for kind in (Masking, BPRTrainer):
        trainer = kind(config, model)
        trainer.eval_collector.data_collect(train)
        assert RankedLoader.fits(trainer, test) == (kind is BPRTrainer)
        np.random.seed(11)
        found.append(trainer.evaluate(test, load_best_model=False))
    assert found[0] != found[1] and found[0]["recall@100"] > 0


@pytest.mark.parametrize("mode", ["full", "uni9"])
def test_a_loader_changed_in_place_is_ranked_by_what_it_has_now(build, mode):
    config, train, test = build(HALF_HELD_OUT, mode)
    _, (before, _) = both(config, train, test, trained)
    if mode == "full":  # nothing of a history is left out any longer
        for user, items in enumerate(test.uid2history_item):
            test.uid2history_item[user] = items if items is None else items[:0]
    else:  # held-out items alone are no negatives
        for user, items in enumerate(test._sampler.used_ids):
            items.clear() if user % 2 else items.intersection_update(range(900))
    _, (stock, ours) = both(config, train, test, trained)
    assert ours == stock and ours != before


class OfColumns(BPR):
    """Scores by what an interaction has beside its ids."""

    def predict(self, interaction):
        return super().predict(interaction) + interaction["timestamp"] * 1e-4


def test_a_model_of_a_users_own_is_shown_every_column_of_a_pair(build):
    config, train, test = build(HALF_HELD_OUT, "uni9")
    _, (stock, ours) = both(config, train, test, trained, OfColumns)
    assert ours == stock and ours != both(config, train, test, trained)[1][0]


class ByPairs(BPR):
    def full_sort_predict(self, interaction):
        raise NotImplementedError

    def predict(self, interaction):
        return torch.tanh(super().predict(interaction))


def test_scores_of_all_items_that_are_not_there_are_those_of_pairs(build):
    config, train, test = build(HALF_HELD_OUT, "full")
    _, (stock, ours) = both(config, train, test, trained, ByPairs)
    assert ours == stock


@pytest.mark.parametrize("mode", ["full", "uni9"])
def test_the_base_seed_of_torchs_iterator_is_drawn(build, mode):
    """From the process's stream where RecBole has saved the loaders, which takes their generators away."""
    config, train, test = build(LEAVE_ONE_OUT, mode)
    test.generator = None
    following = []
    for kind in (Trainer, BPRTrainer):
        trainer = kind(config, BPR(config, train.dataset))
        trainer.eval_collector.data_collect(train)
        torch.manual_seed(5)
        trainer.evaluate(test, load_best_model=False)
        following.append(torch.rand(3).tolist())
    assert following[0] == following[1]
