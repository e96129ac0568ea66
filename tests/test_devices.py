"""Training, forgetting and serving on a GPU: a fake one, with the CPU's numbers (`fake_device`)."""

import numpy as np
import pytest
import torch
from fake_device import GPU, FakeGPU
from recbole.utils import init_seed

from recbole_unlearn import InfluenceUnlearner, devices
from recbole_unlearn.data.split import Split
from recbole_unlearn.evaluation.forgetting import percentiles
from recbole_unlearn.evaluation.ranking import evaluate
from recbole_unlearn.models.losses import fixed_randomness
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training.fit import train

IN_TIME = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "loss_type": "BPR",
    "hidden_size": 8,
    "MAX_ITEM_LIST_LENGTH": 6,
    "epochs": 2,
}
QUICK = {"cg_max_iterations": 3, "curvature_triples": 64}
MODELS = {
    "BPR": {},
    "LightGCN": {"epochs": 2},
    "SimpleX": QUICK,
    "GRU4Rec": IN_TIME | QUICK,
    "SASRec": IN_TIME | QUICK | {"inner_size": 8, "n_layers": 1},
    "FPMC": IN_TIME | QUICK,
}


def forgotten(name, options, gpu, folder, method="auto"):
    """Weights, ranks and metrics after two requests to a model; asserts that it trains and serves on its device."""
    options |= {"gpu_id": "0" if gpu else ""}
    config = UnlearnConfig(name, "tiny", config_dict=options)
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    model, trainer, _ = train(config, split, folder / "model.pth")
    device = GPU if gpu else torch.device("cpu")
    assert {value.device for value in model.parameters()} == {device}
    found = [evaluate(trainer, model, split, 1)["full"]]
    own = {key: options[key] for key in (*QUICK, "gpu_id", "show_progress", "state") if key in options}
    own["method"] = method
    with InfluenceUnlearner.load(folder / "model.pth", config_dict=own) as session:
        for rows in (np.arange(5, 12), np.arange(30, 33)):
            unlearned = session.forget_rows(rows)
            assert unlearned.method == ("influence" if method == "influence" else "replay")
            assert {value.device.type for value in session.model.parameters()} == {device.type}
            found += [{name: devices.array(value).copy() for name, value in session.model.state_dict().items()}]
            found += [percentiles(session.model, split, rows)]
            for each, value in unlearned.state_dict.items():
                np.testing.assert_array_equal(value.numpy(), found[-2][each])  # the result's own are on the CPU
        session.save(folder / "forgotten.pth")
    return found


@pytest.mark.parametrize("method", ["replay", "influence"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_gives_what_the_cpu_gives(name, method, make_options, tmp_path):
    results = []
    for gpu in (False, True):
        folder = tmp_path / str(gpu)
        folder.mkdir()
        options = make_options(**MODELS[name])
        if gpu:
            with FakeGPU():
                results.append(forgotten(name, options, gpu, folder, method))
        else:
            results.append(forgotten(name, options, gpu, folder, method))
    for ours, theirs in zip(*results, strict=True):
        for key in ours if isinstance(ours, dict) else [slice(None)]:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_the_fake_gpu_refuses_what_a_gpu_refuses():
    with FakeGPU():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there.device.type, (there * 2).device.type, there.cpu().device.type) == ("cuda", "cuda", "cpu")
        for wrong in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        for wrong in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="numpy"):
                wrong()
        assert (there[torch.tensor([0])] + 1).item() == 2


class Streams:
    """Random streams of two GPUs: the number that each would draw next."""

    def __init__(self, monkeypatch, used=True):
        self.state = [torch.tensor([7]), torch.tensor([8])]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.state[device])
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: self.state.__setitem__(device, state))
        monkeypatch.setattr(torch.cuda, "manual_seed_all", self.seed)

    def seed(self, seed):
        self.state = [torch.tensor([seed])] * 2


def test_the_streams_of_gpus_are_fixed_and_come_back(monkeypatch):
    streams = Streams(monkeypatch)
    with fixed_randomness(3):
        assert [int(each) for each in streams.state] == [3, 3]
        streams.seed(99)  # what is drawn inside
    assert [int(each) for each in streams.state] == [7, 8]


def test_gpus_that_nothing_uses_are_left_alone(monkeypatch):
    streams = Streams(monkeypatch, used=False)
    with fixed_randomness(3):
        drawn = torch.rand(1)
    assert [int(each) for each in streams.state] == [7, 8]
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(3))


def test_losses_are_taken_without_cudnn_and_training_keeps_it(make_options, tmp_path, monkeypatch):
    """cuDNN's recurrent layers have no derivatives in evaluation mode; the fake GPU has no cuDNN to show it."""
    from recbole.model.sequential_recommender import GRU4Rec

    seen, own = set(), GRU4Rec.calculate_loss

    def calculate_loss(model, interaction):
        seen.add((model.training, torch.backends.cudnn.enabled))
        return own(model, interaction)

    monkeypatch.setattr(GRU4Rec, "calculate_loss", calculate_loss)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    forgotten("GRU4Rec", make_options(**MODELS["GRU4Rec"]), False, tmp_path, "influence")
    assert seen == {(True, True), (False, False), (False, True)}  # the last: the embeddings' norms, without derivatives
    assert torch.backends.cudnn.enabled
