"""Retrain is training on the remaining data with the model's seed."""

import torch

from recbole_unlearn.training.fit import train


def test_it_is_training_without_the_rows(task, rows, run, tmp_path):
    forgotten = run("retrain", task, rows)
    other, _, _ = train(task.config, task.split, tmp_path / "other.pth", rows, task.seed, log_negatives=False)
    for name, value in other.state_dict().items():
        assert torch.equal(value, forgotten.model.state_dict()[name])
    assert not (task.folder / "retrained.triples").exists()
    assert 1 <= forgotten.details["epochs"] <= task.config["epochs"]
