"""What batches of LINE and CFKG compare, and how batches with facts are made: against RecBole's own loss and loader."""

import random

import numpy as np
import pytest
import torch
from recbole.utils import KGDataLoaderState, init_seed

from recbole_unlearn.data.sampling import WithFacts, drawn_by, streams
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.models.compared import Comparisons, otherwise
from recbole_unlearn.training.fit import new_model

FACTS = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
GRAPH = {"load_col": {"inter": ["user_id", "item_id"], **FACTS}}
MODELS = {
    "LINE": {"second_order_loss_weight": 0.4},
    "LINE, first order": {"order": 1},
    "CFKG": GRAPH,
}


@pytest.fixture
def split_of(make_config, linked_path):
    """Function (model, **keys) -> split, its loader of facts and pairs together."""

    def make(model, **keys):
        split = Split.seeded(make_config(model, data_path=linked_path, **keys))
        if hasattr(split.train, "set_mode"):
            split.train.set_mode(KGDataLoaderState.RSKG)
        return split

    return make


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_batch_compares_has_the_loss_and_gradients_of_the_model_and_draws_as_it_does(split_of, name, negatives):
    sampled = {"distribution": "uniform", "sample_num": negatives}
    split = split_of(name.partition(",")[0], train_neg_sample_args=sampled, train_batch_size=40, **MODELS[name])
    model = new_model(split.config, split)
    seen, cuts = Comparisons(model), []
    table = torch.tensor(seen.part.start, requires_grad=True)
    for number, batch in enumerate(split.train):
        if number == 6:
            break
        back, places = streams(), (model.random_list.copy(), model.random_pr) if hasattr(model, "random_pr") else None
        theirs = model.calculate_loss(batch)
        after = random.random(), np.random.random()
        back()
        if places:
            model.random_list[:], model.random_pr = places
        found = seen.told(batch)
        assert (random.random(), np.random.random()) == after
        queries = table[torch.from_numpy(found.queries)].sum(1)
        high, low = ((queries * table[torch.from_numpy(ids)]).sum(1) for ids in (found.high, found.low))
        each = torch.nn.functional.softplus(-high) + torch.nn.functional.softplus(low)
        ours = (torch.from_numpy(found.shares) * each).sum()
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
        expected = torch.autograd.grad(theirs, seen.parameters, allow_unused=True)
        (gradient,) = torch.autograd.grad(ours, table)
        touched = np.unique(np.searchsorted(seen.part.begins, np.append(found.high, found.low), "right") - 1)
        for owner, part, own in zip(
            seen.owner, gradient.split([len(value) for value in seen.parameters]), expected, strict=True
        ):
            if own is None:
                assert owner > 0 and owner not in touched and not part.any()
            else:
                assert owner == 0 or owner in touched
                torch.testing.assert_close(part, own, rtol=1e-4, atol=1e-7)
        cuts.append(tuple(touched))
    assert len(set(cuts)) == (2 if name == "LINE" else 1)  # the contexts of items, or of users


def test_what_is_otherwise_is_said(split_of):
    for loss, said in (("inner_product", None), ("transe", "its loss is one of distances")):
        split = split_of("CFKG", loss_function=loss, **GRAPH)
        assert otherwise(new_model(split.config, split)) == said
    split = split_of("BPR")
    assert otherwise(new_model(split.config, split)) is None


@pytest.mark.parametrize("size", [11, 50, 60, 4096])
def test_batches_with_facts_are_recboles_and_leave_all_streams_where_it_does(split_of, size):
    """Facts that end before the pairs or after, in a whole batch or within."""
    made, ends = [], []
    for quick in (False, True):
        split = split_of("CKE", train_batch_size=size, **GRAPH)
        loader, seen = split.train, []
        assert WithFacts.fits(loader)
        init_seed(3, True)
        ours = WithFacts(loader)
        for _ in range(3):
            seen += [dict(batch.interaction) for batch in (ours if quick else loader)]
        made.append(seen)
        generators = loader.general_dataloader.generator, loader.kg_dataloader.generator
        ends.append((np.random.random(), random.random(), *(each.get_state() for each in generators)))
    assert len(made[0]) == len(made[1]) == 3 * len(list(drawn_by(pairwise_loader(split.train))))
    for one, other in zip(*made, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert ends[0][:2] == ends[1][:2] and all(map(torch.equal, ends[0][2:], ends[1][2:]))


def test_batches_with_facts_are_left_to_recbole_where_they_are_of_one_kind(split_of):
    split = split_of("CKE", **GRAPH)
    assert WithFacts.fits(split.train) and not WithFacts.fits(pairwise_loader(split.train))
    split.train.set_mode(KGDataLoaderState.KG)
    assert not WithFacts.fits(split.train)
    split.train.set_mode(KGDataLoaderState.RSKG)
    split.train.kg_dataloader.generator = None
    assert not WithFacts.fits(split.train)
