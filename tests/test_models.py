"""Any pairwise model: losses of single rows, what they depend on, and one influence step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from recbole_unlearn.data.sampling import negatives_of
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import percentiles
from recbole_unlearn.influence.operators import AutogradCurvature, Damped
from recbole_unlearn.influence.solver import conjugate_gradient, jacobi
from recbole_unlearn.models.losses import Unreduced
from recbole_unlearn.models.view import View
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports.tables import markdown
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.training.fit import new_model, train
from recbole_unlearn.training.trained import Checkpoint, Trained
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners import any_loss
from recbole_unlearn.unlearners.any_loss import After, AnyLoss

NEGATIVES = {"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False}
INTERACTIONS = ["user_id", "item_id", "timestamp"]
SEQUENTIAL = {"loss_type": "BPR", "hidden_size": 8, "MAX_ITEM_LIST_LENGTH": 6, "n_heads": 2, "inner_size": 8}
TIMES = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
SOFTMAX = {"loss_type": "CE", "train_neg_sample_args": None}
MODELS = {
    # unlearn_params: by automatic differentiation, as other models; without it see test_lightgcn.py
    "LightGCN": {"n_layers": 2, "train_neg_sample_args": NEGATIVES, "unlearn_params": ["*"]},
    "NGCF": {"hidden_size_list": [8]},
    "SimpleX": {"train_neg_sample_args": NEGATIVES},
    "SGL": {"n_layers": 1},
    "GCMC": {"gcn_output_dim": 8},
    "LINE": {},
    "ConvNCF": {"embedding_size": 64, "reg_weights": [0.0, 0.0]},
    "GRU4Rec": {**SEQUENTIAL, "load_col": {"inter": INTERACTIONS}},
    "SASRec": {**SEQUENTIAL, "n_layers": 1, "load_col": {"inter": INTERACTIONS}},
    "SASRec, CE": {**SEQUENTIAL, **SOFTMAX, "n_layers": 1, "load_col": {"inter": INTERACTIONS}},
    "GRU4Rec, CE": {**SEQUENTIAL, **SOFTMAX, "load_col": {"inter": INTERACTIONS}},
    "TransRec": {"MAX_ITEM_LIST_LENGTH": 6, "load_col": {"inter": INTERACTIONS}},
    "HRM": {**SEQUENTIAL, "high_order": 2, "pooling_type_layer_1": "mean", "load_col": {"inter": INTERACTIONS}},
    "FPMC": {"MAX_ITEM_LIST_LENGTH": 6, "load_col": {"inter": INTERACTIONS}},
}


@pytest.fixture
def of(make_options):
    """Function (model, **overrides) -> (config, split)."""

    def make(name, **overrides):
        options = make_options(**{"eval_step": 0, **MODELS[name], **overrides})
        config = UnlearnConfig(name.partition(",")[0], "tiny", config_dict=options)
        init_seed(config["seed"], config["reproducibility"])
        return config, Split(config)

    return make


@pytest.fixture
def trained(of, tmp_path):
    """Function (model, **overrides) -> (config, split, stored, log, model, unlearner) after two epochs."""

    def make(name, **overrides):
        config, split = of(name, epochs=2, method="influence", **overrides)
        train(config, split, tmp_path / "model.pth")
        stored, log = checkpoints.load(tmp_path / "model.pth")
        unlearner = InfluenceUnlearner(Checkpoint(tmp_path / "model.pth", config, stored, log).trained(split))
        return config, split, stored, log, unlearner.trained.model, unlearner

    return make


def in_double(model):
    for module in model.double().modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
    return model


def some_rows(split, n=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(split.n_rows, n, replace=False))
    return rows, rng.integers(1, split.n_items, (n, negatives_of(pairwise_loader(split.train))))


@pytest.mark.parametrize(
    "name", ["LightGCN", "NGCF", "GCMC", "ConvNCF", "GRU4Rec", "SASRec", "SASRec, CE", "FPMC", "TransRec", "SimpleX"]
)
def test_mean_of_row_losses_has_the_gradient_of_training(of, name):
    config, split = of(name)
    model = new_model(config, split)
    if hasattr(model, "reg_weight"):
        model.reg_weight = 0  # L2 norms over a batch are approximated
    view = View(model, split.train, split.data_row)
    rows, negatives = some_rows(split)
    batch = view.interaction(rows, negatives)
    alone = {"SimpleX": len(rows), "SASRec, CE": len(rows), "ConvNCF": 1}  # ConvNCF's loss is a sum
    terms = alone.get(name, negatives.size)
    ours = view.losses(batch, len(rows)).sum() / terms
    stock = model.calculate_loss(Interaction(dict(batch.interaction))).sum()
    parameters = list(model.parameters())
    for mine, theirs in zip(
        *(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, stock)), strict=True
    ):
        if mine is None or theirs is None:
            assert all(gradient is None or not gradient.any() for gradient in (mine, theirs))
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["LightGCN", "SimpleX"])
def test_l2_of_a_training_batch_has_the_gradient_of_training(of, name):
    """Of one that could hold more rows than there are."""
    config, split = of(name, reg_weight=10.0, train_batch_size=10**6)
    model = new_model(config, split)
    view = View(model, split.train, split.data_row)
    rows = np.arange(split.n_rows)
    negatives = some_rows(split, split.n_rows)[1]
    batch = view.interaction(rows, negatives)
    terms = len(rows) if name == "SimpleX" else negatives.size
    ours = torch.autograd.grad(view.losses(batch, len(rows)).sum() / terms, view.parameters)
    stock = torch.autograd.grad(model.calculate_loss(Interaction(dict(batch.interaction))).sum(), view.parameters)
    for a, b in zip(ours, stock, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize(("size", "batches"), [(10**6, 1), (500, 2)])
def test_a_sum_over_a_batch_is_damped_by_how_many_batches_there_were(trained, size, batches):
    *_, unlearner = trained("SGL", train_batch_size=size)
    (group,) = unlearner.trained.optimizer["param_groups"]
    expected = []
    for state in unlearner.trained.optimizer["state"].values():
        squares, steps = state["exp_avg_sq"].double().ravel(), int(state["step"])
        assert steps == 2 * batches
        root = (squares / (1 - group["betas"][1] ** steps)).sqrt()
        # an epoch of all gradients, as Adam took it in so many steps
        expected.append(torch.where(squares > 0, batches * (root + group["eps"]) / (group["lr"] * steps), torch.nan))
    expected, damping = torch.cat(expected), unlearner.problem.damping(unlearner.way)
    moved = ~expected.isnan()
    torch.testing.assert_close(damping[moved], expected[moved], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("size", "batches"), [(10**6, 1), (500, 2)])
def test_what_a_batch_adds_once_is_added_as_often_as_there_are_batches(of, size, batches):
    config, split = of("ConvNCF", train_batch_size=size, reg_weights=[0.1, 0.1])
    view = View(new_model(config, split), split.train, split.data_row)
    batch = view.interaction(*some_rows(split, 3))
    with torch.no_grad():
        term, whole = view.model.reg_loss(), view.losses(batch, 3)
        view.model.regs = [0.0, 0.0]
        torch.testing.assert_close(
            split.n_rows * (whole - view.losses(batch, 3)), (batches * term).expand(3), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_same_twice_and_leave_random_streams_alone(of, name):
    config, split = of(name)
    view = View(new_model(config, split), split.train, split.data_row)
    rows, negatives = some_rows(split)
    batch = view.interaction(rows, negatives)
    stream, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        first = view.losses(batch, len(rows))
        torch.rand(3)
        torch.set_rng_state(stream)
        assert torch.equal(first, view.losses(batch, len(rows)))
    assert torch.equal(stream, torch.get_rng_state()) and (numpy == np.random.get_state()[1]).all()


def test_normalised_rows_of_zeros_do_not_spoil_the_exact_hessian():
    """torch's own have NaN for second derivatives: an entity without facts, in KGIN, would make all of them NaN."""
    own = torch.tensor([3.0, 4.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def loss(row, *others):
        rows = torch.stack([row, *(each * row for each in others)])
        return ((torch.nn.functional.normalize(rows) @ weight) * rows.norm(dim=1)).square().sum()

    expected = torch.autograd.functional.hessian(loss, own)
    none = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.functional.hessian(lambda row: loss(row, none), own).isnan().any()
    with Unreduced(torch.nn.Module(), 1).of(2):
        found = torch.autograd.functional.hessian(lambda row: loss(row, none), own)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [-np.inf, np.inf], ids=["less the mean", "whole"])
@pytest.mark.parametrize("name", ["LightGCN", "NGCF", "GRU4Rec", "GRU4Rec, CE"])
def test_z_is_the_gradient_of_what_the_objective_loses(trained, monkeypatch, name, share):
    """Against central differences of the objective itself, in float64, the structure included."""
    monkeypatch.setattr(any_loss, "MEAN_SHARE", share)
    config, split, stored, log, model, unlearner = trained(name)
    rows = some_rows(split, 9)[0]
    problem, way = unlearner.problem, replace(unlearner.way, log_epochs=1)
    after = problem.without(rows, way).view
    problem.view = before = View(in_double(problem.view.model), split.train, split.data_row)
    after = View(in_double(after.model), after.loader, after.position, None, before)
    epochs = problem.log_epochs(way)
    z = problem.lost(After(rows, after, problem.changed(after, rows, epochs)), way)

    everything = np.arange(log.n_rows)
    kept = np.setdiff1d(everything, rows)
    negatives = np.asarray(log.epoch(log.n_epochs - 1), np.int64)
    returned = problem.returned(rows, epochs) if not split.repeatable else None

    def objective(view, chosen, drawn, weight):
        return sum(float(view.loss(batch)) for batch in view.batches(chosen, drawn, weight))

    def lost():
        total = objective(before, everything, negatives, np.ones(len(everything)))
        total -= objective(after, kept, negatives[kept], np.ones(len(kept)))
        if share < 0:  # the others weigh more in their batches
            total -= objective(before, everything, negatives, np.full(len(everything), len(rows) / len(everything)))
        if returned:
            chosen, drawn, instead, weight = returned
            total -= objective(after, chosen, instead, weight) - objective(after, chosen, drawn, weight)
        return total

    direction = torch.randn(len(z), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction /= direction.norm()
    values, step = [], 1e-4
    sizes = [p.numel() for p in before.parameters]
    with torch.no_grad():
        for sign in (1, -2):
            for view in (before, after):
                for p, d in zip(view.parameters, direction.split(sizes), strict=True):
                    p += sign * step * d.view(p.shape)
            values.append(lost())
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - float(z @ direction)) < 1e-5 * (float(z.norm()) + 1e-3)


@pytest.mark.parametrize("name", ["LightGCN", "GRU4Rec", "SASRec", "HRM", "SimpleX"])
def test_curvature_products(of, name):
    """Hessian against differences of the gradient; Gauss-Newton against its definition."""
    config, split = of(name)
    view = View(in_double(new_model(config, split)), split.train, split.data_row)
    rows, negatives = some_rows(split, 20)
    batches = view.batches(rows, negatives, np.random.default_rng(1).random(len(rows)))
    hessian = AutogradCurvature(view.parameters, batches, view.loss)
    newton = AutogradCurvature(view.parameters, batches, view.loss, view.outputs)
    v = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes, gradients, jv = [p.numel() for p in view.parameters], [], []
    for (key, p), part in zip(view.named.items(), v.split(sizes), strict=True):
        if key in ("item_embedding.weight", "item_emb.weight"):
            part.view(p.shape)[0] = 0  # padding has no gradient
    product, gauss_newton = hessian.matvec(v), newton.matvec(v)
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(view.parameters, v.split(sizes), strict=True):
                p += sign * 1e-6 * d.view(p.shape)
        gradients.append(hessian.gradient())
        jv.append(torch.cat([view.outputs(batch)[0].detach() for batch in batches]))
    difference = (gradients[0] - gradients[1]) / 2e-6
    assert (product - difference).norm() < 1e-5 * difference.norm()
    with torch.no_grad():
        for p, d in zip(view.parameters, v.split(sizes), strict=True):
            p += 1e-6 * d.view(p.shape)
    c = torch.cat([view.outputs(batch)[1] for batch in batches])
    expected = (c * ((jv[0] - jv[1]) / 2e-6) ** 2).sum()
    torch.testing.assert_close(v @ gauss_newton, expected, rtol=1e-4, atol=1e-10)


def test_the_curvature_of_a_softmax_is_its_hessian_where_scores_are_linear():
    model = torch.nn.Module()
    model.loss, model.n_items = torch.nn.CrossEntropyLoss(), 7
    rng = torch.Generator().manual_seed(0)
    inputs, weights = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((5, 3), (3, 7)))
    target, unreduced = torch.randint(7, (5,), generator=rng), Unreduced(model, 5)

    def outputs(weights):
        with unreduced.of(5):
            losses = model.loss(inputs @ weights, target)
        return losses.sum(), *unreduced.convex[0]

    hessian = torch.autograd.functional.hessian(
        lambda w: torch.nn.functional.cross_entropy(inputs @ w, target, reduction="sum"), weights
    ).reshape(21, 21)
    slopes = torch.autograd.functional.jacobian(lambda w: outputs(w)[1], weights).reshape(35, 21)
    second = outputs(weights)[3].reshape(35, 1)
    torch.testing.assert_close(slopes.T @ (second * slopes), hessian)


@pytest.mark.parametrize("name", ["GRU4Rec", "FPMC"])
def test_histories_hold_nothing_forgotten(of, name):
    """Against RecBole's own augmentation of the sequences that are left."""
    config, split = of(name)
    rows = some_rows(split, 60)[0]
    limit, data = config["MAX_ITEM_LIST_LENGTH"], split.train.dataset
    rest = split.remaining_dataset(rows).inter_feat
    kept = np.setdiff1d(np.arange(split.n_rows), rows)
    sequences = {}
    lists, lengths = rest["item_id_list"], rest["item_length"]
    first = {}
    whole = data.inter_feat
    for n, user in enumerate(whole["user_id"].tolist()):
        first.setdefault(user, whole["item_id_list"][n, 0].item())
    for n, (user, item) in enumerate(zip(rest["user_id"].tolist(), rest["item_id"].tolist(), strict=True)):
        past = sequences.setdefault(user, [first[user]])
        expected = past[-limit:]
        assert lengths[n] == len(expected)
        assert lists[n].tolist() == expected + [0] * (limit - len(expected))
        past.append(item)
    assert len(rest) == len(kept)


@pytest.mark.parametrize("name", ["GRU4Rec", "FPMC"])
def test_held_out_histories_hold_nothing_forgotten(of, name):
    """Against RecBole's own augmentation of the sequences that are left; the split itself stays."""
    config, split = of(name)
    rows, limit = some_rows(split, 60)[0], config["MAX_ITEM_LIST_LENGTH"]
    train = split.train.dataset.inter_feat
    sequences = {}
    for user, history in zip(train["user_id"].tolist(), train["item_id_list"].tolist(), strict=True):
        sequences.setdefault(user, history[:1])
    gone = set(split.data_row[rows].tolist())
    for n, (user, item) in enumerate(zip(train["user_id"].tolist(), train["item_id"].tolist(), strict=True)):
        sequences[user] += [item] * (n not in gone)
    judged, changed = split.judged_without(rows), 0
    for before, after in ((split.valid, judged.valid), (split.test, judged.test)):
        then, now = before.dataset.inter_feat, after.dataset.inter_feat
        assert torch.equal(then["item_id"], now["item_id"]) and torch.equal(then["user_id"], now["user_id"])
        changed += int((then["item_id_list"] != now["item_id_list"]).any(1).sum())
        for n, (user, item) in enumerate(zip(now["user_id"].tolist(), now["item_id"].tolist(), strict=True)):
            expected = sequences[user][-limit:]
            assert now["item_length"][n] == len(expected)
            assert now["item_id_list"][n].tolist() == expected + [0] * (limit - len(expected))
            sequences[user].append(item)
    assert changed > 10
    assert len(list(judged.test_loader(0))) == len(list(split.test_loader(0)))
    assert split.judged_without([]) is split


def test_a_wholly_forgotten_item_that_begins_a_history_is_named(trained):
    config, split, stored, log, model, unlearner = trained("FPMC")
    data = split.train.dataset.inter_feat
    first = data["item_id_list"][:, 0][data["item_length"] == 1].numpy()
    item = next(item for item in first if 0 < np.count_nonzero(split.items == item) < 20)
    rows = np.flatnonzero(split.items == item)
    users = np.unique(data["user_id"].numpy()[(data["item_length"] == 1).numpy()][first == item])
    assert split.first_items_kept(rows) == len(users)
    assert any(f"of {len(users)} users" in each for each in unlearner.unlearn(rows).details["approximated"])
    assert split.first_items_kept(rows[1:]) == 0
    assert not any("histories" in each for each in unlearner.unlearn(rows[1:]).details["approximated"])


def test_graph_and_probe(trained):
    """A graph ties all rows together; a user's history ties the rows of the user; an embedding none."""
    sampled = {"checkpoint_dir": "sampled", "history_len": 5}
    cases = (("LightGCN", "all", {}), ("SimpleX", "own", {}), ("SimpleX", "own", sampled), ("LINE", "none", {}))
    for name, expected, overrides in cases:
        config, split, stored, log, model, unlearner = trained(name, **{"checkpoint_dir": name, **overrides})
        rows = some_rows(split, 5)[0]
        found = unlearner.problem.without(rows, unlearner.way)
        after, changed = found.view, found.changed
        kept = np.setdiff1d(np.arange(split.n_rows), rows)
        own = kept[np.isin(split.users[kept], split.users[rows])]
        if expected == "all":
            assert np.array_equal(changed, kept)
            ids = after.model.interaction_matrix
            left = set(zip(split.users[kept], split.items[kept], strict=True))
            assert set(zip(ids.row.tolist(), ids.col.tolist(), strict=True)) == left
        elif expected == "own":
            assert np.array_equal(changed, own)
            check_histories(model, after.model, split, rows)


def test_a_shallow_graph_ties_few_rows_and_is_noticed(trained):
    config, split, stored, log, model, unlearner = trained("LightGCN", n_layers=1)
    torch.nn.init.normal_(model.user_embedding.weight), torch.nn.init.normal_(model.item_embedding.weight)
    popularity = np.bincount(split.items, minlength=split.n_items)
    for item in np.flatnonzero((popularity > 1) & (popularity < 6))[:5]:
        row = np.flatnonzero(split.items == item)[:1]
        assert len(unlearner.problem.without(row, unlearner.way).changed) == split.n_rows - 1


def check_histories(before, after, split, rows):
    """What was drawn and is left stays, nothing else is dropped, and all is of the remaining data."""
    kept = np.setdiff1d(np.arange(split.n_rows), rows)
    for user in np.unique(split.users):
        left = set(split.items[kept][split.users[kept] == user].tolist())
        then, now = (set(model.history_item_id[user].tolist()) - {0} for model in (before, after))
        assert then & left <= now <= left
        assert len(now) == min(len(left), after.history_item_id.shape[1]) == after.history_item_len[user]


@pytest.mark.parametrize(
    "name",
    [
        "LightGCN",
        "SGL",
        "SimpleX",
        pytest.param("GRU4Rec", marks=pytest.mark.slow),
        pytest.param("SASRec", marks=pytest.mark.slow),
    ],
)
def test_request(trained, name):
    config, split, stored, log, model, unlearner = trained(name)
    assert isinstance(unlearner.problem, AnyLoss)
    rows = some_rows(split, 20)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unlearned = unlearner.unlearn(rows)
    again = unlearner.unlearn(rows)
    assert all(torch.equal(value, again.state_dict[key]) for key, value in unlearned.state_dict.items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert any(not torch.equal(value, unlearned.state_dict[key]) for key, value in before.items())
    assert unlearned.details["converged"]
    forgotten = new_model(config, split, data=split.remaining_dataset(rows))
    forgotten.load_state_dict(unlearned.state_dict)
    ranks = [percentiles(each, split, rows) for each in (model, forgotten)]
    assert np.isfinite(ranks).all()
    unlearner.apply(rows, unlearned)
    more = np.setdiff1d(some_rows(split, 20, 1)[0], rows)
    assert unlearner.unlearn(more).details["converged"]
    assert len(unlearner.problem.view.dataset) == split.n_rows - len(rows)


def test_curvature_of_all_triples_by_batches(trained, monkeypatch):
    """`all` takes the step that conjugate gradient takes with every triple."""
    config, split, _, _, model, unlearner = trained("GRU4Rec", log_epochs=2)
    rows = some_rows(split, 20)[0]
    steps = {}
    for wanted, batch in ((10**9, None), (40, None), ("all", 1024), ("all", 128)):
        way = replace(unlearner.way, curvature_triples=wanted)
        monkeypatch.setattr("recbole_unlearn.unlearners.any_loss.BATCH_TRIPLES", batch)
        unlearned = InfluenceUnlearner(unlearner.trained, way).unlearn(rows)
        change = [value - model.state_dict()[key] for key, value in unlearned.state_dict.items()]
        steps[wanted, batch] = torch.cat([c.view(-1) for c in change]).double()
        assert unlearned.details["converged"]
        assert unlearned.details["curvature_triples"] == min(wanted if batch is None else 10**9, split.n_rows - 20)
    exact = steps.pop((10**9, None))
    sampled, whole, batches = ((step - exact).norm() / exact.norm() for step in steps.values())
    assert whole < 0.02  # what is left of the descent, and float32
    assert batches < 0.2 and batches < sampled / 2


def change_of(unlearned, state):
    return torch.cat([(value - state[key]).view(-1) for key, value in unlearned.state_dict.items()]).double()


def test_training_is_followed_along_its_snapshots(trained, monkeypatch):
    """The implicit Euler steps that direct solves give at the recorded weights, by the Hessian of all triples.

    Adam's damping is that of the time. The descent goes on for longer here than it does for users.
    """
    config, split, stored, log, model, unlearner = trained("FPMC", negatives="static")
    rows = some_rows(split, 20)[0]
    shorter = change_of(unlearner.unlearn(rows), model.state_dict())
    monkeypatch.setattr("recbole_unlearn.unlearners.any_loss.STEPS", 180)
    monkeypatch.setattr("recbole_unlearn.influence.solver.REACH", 36.0)
    unlearned = unlearner.unlearn(rows)
    assert unlearned.details["stops"] == [1, 2] and unlearned.details["converged"]
    way, t = unlearner.way, 0.0
    view = unlearner.problem.without(rows[:0], way).view
    pace, sizes = unlearner.problem.pace(view, [1, 2]), [value.numel() for value in view.parameters]
    assert (pace[2] == 1).all() and (pace[1] != 1).any()
    for epoch in (1, 2):
        D = unlearner.problem.damping(way) * 2 * torch.from_numpy(np.repeat(pace[epoch], sizes))
        there = new_model(config, split)
        there.load_state_dict(model.state_dict())
        if epoch == 1:
            torch.nn.utils.vector_to_parameters(torch.tensor(log.snapshot(1).astype(np.float32)), there.parameters())
        other = AnyLoss(replace(unlearner.trained, model=there))
        every = replace(way, curvature_triples=10**9, curvature="hessian")
        after = other.without(rows, every)
        z = other.lost(after, every)
        curvature, count = other.curvature(after, every)
        assert count == split.n_rows - 20
        operator, precondition = Damped(curvature, D), jacobi(torch.zeros_like(z), D)
        t, report = conjugate_gradient(operator, z + D * t, precondition, 1e-6, 1000)
        assert report.converged
    change = change_of(unlearned, model.state_dict())
    assert (change - t).norm() < 0.03 * t.norm()
    assert (shorter - t).norm() < 0.2 * t.norm()
    once = InfluenceUnlearner(unlearner.trained, replace(way, log_epochs=2)).unlearn(rows)
    assert "stops" not in once.details
    assert (change_of(once, model.state_dict()) - t).norm() > 0.1 * t.norm()


def test_the_batches_of_a_stop_hold_a_share_of_all_triples(trained, monkeypatch):
    """Data may be large: the step has no curvature of what is in none of them."""
    unlearner = trained("FPMC", negatives="static")[-1]
    rows, found = some_rows(unlearner.split, 20)[0], []
    for least in (any_loss.LEAST_SEEN, 0):
        monkeypatch.setattr(any_loss, "STEP_TRIPLES", 1)
        monkeypatch.setattr(any_loss, "LEAST_SEEN", least)
        found.append(unlearner.unlearn(rows).details)
    assert all(each["stops"] for each in found)
    assert found[0]["curvature_triples"] >= min(unlearner.split.n_rows - 20, 60 * (unlearner.split.n_rows // 120))
    assert found[1]["curvature_triples"] == found[1]["iterations"]


def test_where_the_hessian_is_far_from_convex_gauss_newton_is_followed(trained, monkeypatch):
    """With next to no damping, FPMC's product of factors is: a solve by it has no bound."""
    unlearner = trained("FPMC", damping_strength=0.01, undone_limit=1e9)[-1]
    rows, tried = some_rows(unlearner.split, 20)[0], []
    descended = any_loss.descended

    def noted(way, curvature_of, *arguments):
        tried.append(curvature_of(0).outputs is None)
        return descended(way, curvature_of, *arguments)

    monkeypatch.setattr(any_loss, "descended", noted)
    unlearned = unlearner.unlearn(rows)
    assert tried[:2] == [True, False] and all(torch.isfinite(value).all() for value in unlearned.state_dict.values())


@pytest.mark.parametrize("name", ["FPMC", "HRM"])
def test_the_pace_of_the_training_is_that_of_adams_moments(trained, of, tmp_path, monkeypatch, name):
    """Those of a training that ends after one epoch, by RecBole's optimiser, over those after two."""
    monkeypatch.setattr("recbole_unlearn.unlearners.any_loss.MOMENT_BATCHES", 20)
    *_, unlearner = trained(name)
    config, split = of(name, epochs=1, method="influence")
    train(config, split, tmp_path / "first.pth")
    roots = []
    for path in ("first.pth", "model.pth"):
        optimizer = checkpoints.load(tmp_path / path)[0]["optimizer"]
        beta = optimizer["param_groups"][0]["betas"][1]
        states = optimizer["state"].values()
        roots.append([float((s["exp_avg_sq"].mean() / (1 - beta ** float(s["step"]))).sqrt()) for s in states])
    problem = unlearner.problem
    view = problem.without(np.empty(0, np.int64), unlearner.way).view
    np.testing.assert_allclose(problem.pace(view, [1, 2])[1], np.divide(*roots), rtol=0.1)


def test_moments_anew_are_of_everybody_who_is_left(trained, monkeypatch):
    """Whose rows are in none of the batches that they are measured in would count as never trained."""
    monkeypatch.setattr(any_loss, "BATCHES_ANEW", 1)
    *_, split, _, _, model, unlearner = trained("FPMC", train_batch_size=64)
    number = [name for name, _ in model.named_parameters()].index("UI_emb.weight")
    squares = unlearner.problem.moments()[number]["exp_avg_sq"]
    assert np.array_equal(np.flatnonzero(squares.any(1)), np.unique(split.users))


def test_snapshots_forget_too(trained):
    config, split, stored, log, model, unlearner = trained("FPMC")
    rows = some_rows(split, 20)[0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    unlearned = unlearner.unlearn(rows)
    assert list(log.snapshots) == [0, 1, 2] and set(unlearned.snapshots) == {0, 1}
    np.testing.assert_array_equal(unlearned.snapshots[0], log.snapshot(0))  # nothing was trained yet
    moved = unlearned.snapshots[1] - log.snapshot(1)
    assert np.isfinite(moved).all() and 0 < np.abs(moved).max() < 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    unlearner.apply(rows, unlearned)
    assert unlearner.problem.snapshots is unlearned.snapshots
    assert unlearner.unlearn(rows[:0]).snapshots is unlearned.snapshots


def test_snapshots_of_another_model_are_refused(trained):
    config, split, stored, log, model, _ = trained("FPMC")
    log.metadata["parameters"][0][1][0] += 1
    with pytest.raises(InputError, match="snapshots of the weights are not of this FPMC; train again"):
        AnyLoss(Trained(model, config, split, log, stored, log.path))


def test_without_the_whole_trajectory_one_step_is_taken(trained):
    unlearner = trained("FPMC", log_epochs=1)[-1]
    problem, whole = unlearner.problem, replace(unlearner.way, log_epochs="all")
    assert problem.stops(unlearner.way) == [] and problem.stops(whole) == [1, 2]
    for key, value in (("damping", "scalar"), ("curvature_triples", 500), ("curvature", "hessian")):
        assert problem.stops(replace(whole, **{key: value})) == []
    del problem.snapshots[0]  # a log without
    assert problem.stops(whole) == []


@pytest.mark.parametrize("overrides", [{"curvature": "hessian"}, {"damping": "none"}, {"damping_strength": 0.0}])
def test_curvature_by_batches_needs_a_positive_definite_system(trained, overrides):
    with pytest.raises(InputError, match="curvature_triples: all needs"):
        trained("GRU4Rec", curvature_triples="all", **overrides)
    unlearner = trained("SASRec", **overrides)[-1]  # whose default is `all`
    assert unlearner.problem.curvature_triples(unlearner.way) == 8192


@pytest.mark.parametrize("name", ["CKE", "CFKG", "KGCN"])
def test_knowledge_aware_models_keep_their_facts(make_options, write_data, interactions, tmp_path, name):
    """The log is that of the interactions; facts are in every batch, and stay when interactions go."""
    path = write_data(tmp_path / "data", "tiny", interactions)
    items = sorted({item for _, item, _ in interactions})
    links = [f"{item}\te{n}" for n, item in enumerate(items)]
    facts = [f"e{n}\tr{n % 3}\te{(7 * n + k) % 60}" for n in range(len(items)) for k in range(1, 4)]
    (tmp_path / "data/tiny/tiny.link").write_text("\n".join(["item_id:token\tentity_id:token", *links]) + "\n")
    header = "head_id:token\trelation_id:token\ttail_id:token"
    (tmp_path / "data/tiny/tiny.kg").write_text("\n".join([header, *facts]) + "\n")
    columns = {"inter": INTERACTIONS, "kg": header.replace(":token", "").split(), "link": ["item_id", "entity_id"]}
    asked = {"method": "influence", "eval_step": 0, "epochs": 2, "kg_embedding_size": 8}
    chosen = make_options(data_path=path, load_col=columns, **asked)
    config = UnlearnConfig(name, "tiny", config_dict=chosen)
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    train(config, split, tmp_path / "model.pth")
    stored, log = checkpoints.load(tmp_path / "model.pth")
    assert log.n_epochs == 2 and log.n_rows == split.n_rows
    unlearner = InfluenceUnlearner(Checkpoint(tmp_path / "model.pth", config, stored, log).trained(split))
    rows = some_rows(split, 15)[0]
    unlearned = unlearner.unlearn(rows)
    assert unlearned.details["converged"] and unlearned.details["rows_changed"] == 0
    facts = unlearner.problem.view.facts
    after = unlearner.problem.without(rows, unlearner.way)
    assert all(torch.equal(facts[key], after.view.facts[key]) for key in facts)
    z, named = unlearner.problem.lost(after, unlearner.way), unlearner.problem.view.named
    parts = dict(zip(named, z.split([value.numel() for value in named.values()]), strict=True))
    if name == "CKE":  # whose relations facts alone train
        assert parts["relation_embedding.weight"].norm() < 1e-6 * parts["item_embedding.weight"].norm()
    n = len(next(iter(facts.values())))
    view, (rows, negatives) = unlearner.problem.view, some_rows(split, n)  # as many triples as facts
    batch = view.interaction(rows, negatives)
    total = view.losses(batch, len(rows)).sum()
    assert any(
        g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(total, view.parameters, allow_unused=True)
    )


def test_chosen_parameters_alone_change(trained):
    config, split, stored, log, model, unlearner = trained("NGCF", unlearn_params=["item_*", "GNNlayers.0.*.bias"])
    unlearned = unlearner.unlearn(some_rows(split, 20)[0])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, unlearned.state_dict[key])}
    assert changed and all(key.startswith("item_") or key.endswith("bias") for key in changed)
    with pytest.raises(InputError, match="no parameter of this model"):
        trained("NGCF", unlearn_params=["item_embeding*"])


@pytest.mark.parametrize("name", ["LightGCN", "GRU4Rec"])
def test_run_writes_a_model_and_a_log_that_have_forgotten(make_options, tmp_path, name):
    asked = {"method": "influence", "forget_count": 15, "output_dir": str(tmp_path / "out")}
    chosen = make_options(**MODELS[name], epochs=2, **asked)
    result = run_unlearn(name, "tiny", config_dict=chosen)
    assert result["unlearning"]["method"] == "influence"
    solve = "steps along 2 snapshots of the training; linear solve: 76" if name == "GRU4Rec" else "relative residual"
    assert solve in markdown(result) and solve in (tmp_path / "out" / "report.html").read_text()
    stored, log = checkpoints.load(tmp_path / "out" / "unlearned.pth")
    assert log.n_rows == result["forget_set"]["of"] - 15
    original = checkpoints.load(tmp_path / "out" / "model.pth")[0]
    assert ("restore_user_e" in original["other_parameter"]) == (name == "LightGCN")
    assert not stored["other_parameter"]  # what the original would go on serving
    with InfluenceUnlearner.load(tmp_path / "out" / "unlearned.pth") as session:
        session.forget("count", 5)
        session.save(tmp_path / "again.pth")
    again = checkpoints.load(tmp_path / "again.pth")[1]
    assert again.n_rows == log.n_rows - 5
    if name == "GRU4Rec":  # what has forgotten is followed by the next request
        assert list(log.snapshots) == list(again.snapshots) == [0, 1]
        assert not np.array_equal(log.snapshot(1), again.snapshot(1))


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("MultiVAE", {}, "autoencoder"),
        ("GRU4Rec", {"loss_type": "CE"}, "should be None when the loss_type is CE"),
        ("GRU4Rec", {"loss_type": "BPR", "train_neg_sample_args": None, **TIMES}, "pairwise models need them"),
        ("BERT4Rec", {**SOFTMAX, **TIMES, "method": "influence"}, "masks"),
        ("NeuMF", {"unlearn_params": ["*"]}, "trained on labels"),
        ("DiffRec", {}, "autoencoder"),
        ("ENMF", {}, "whole user histories"),
        ("DIEN", TIMES, "draws negatives beside histories"),
        ("BPR", {"learner": "sparse_adam"}, "sparse_adam takes sparse ones alone"),
        ("NGCF", {"method": "reoptimise", "negatives": "static", "weight_decay": 1e-4}, "not for NGCF"),
        ("NGCF", {"method": "replay", "unlearn_params": ["*"]}, "not for NGCF with unlearn_params"),
        ("LightGCN", {"train_neg_sample_args": {**NEGATIVES, "dynamic": True, "candidate_num": 2}}, "dynamic"),
        ("GRU4Rec", {"loss_type": "BPR", "negatives": "static", **TIMES}, "general models"),
        ("LightGCN", {"unlearn_params": 3}, "must be a list"),
    ],
)
def test_refused_in_one_line_before_any_work(make_options, name, overrides, reason):
    with pytest.raises(InputError, match=reason) as caught:
        run_unlearn(name, "tiny", config_dict=make_options(**overrides))
    assert "\n" not in str(caught.value)
