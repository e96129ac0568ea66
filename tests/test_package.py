"""What `import recbole_unlearn` brings, and what it leaves for later."""

import subprocess
import sys
from pathlib import Path

import pytest

import recbole_unlearn

SCRIPT = """
import sys
import recbole_unlearn
assert "numba" not in sys.modules
from recbole.utils import ModelType, get_trainer
trainer = get_trainer(ModelType.GENERAL, "BPR")
assert trainer is recbole_unlearn.BPRTrainer and trainer.__module__ == "recbole_unlearn.training.trainer"
assert get_trainer(ModelType.GENERAL, "ENMF").__name__ == "Trainer"
"""


def test_importing_registers_the_trainer_without_loading_numba():
    root = Path(recbole_unlearn.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_public_names_are_those_of_their_modules():
    from recbole_unlearn.quick_start import run_unlearn
    from recbole_unlearn.unlearner import InfluenceUnlearner

    assert recbole_unlearn.run_unlearn is run_unlearn
    assert issubclass(recbole_unlearn.UnlearnSession, InfluenceUnlearner)
    assert recbole_unlearn.InfluenceUnlearner is InfluenceUnlearner
    assert set(recbole_unlearn.__all__) <= set(dir(recbole_unlearn))


def test_other_names_are_none_of_its_own():
    with pytest.raises(AttributeError, match="'recbole_unlearn' has no attribute 'Unlearner'"):
        recbole_unlearn.Unlearner  # noqa: B018
