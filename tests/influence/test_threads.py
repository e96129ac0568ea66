"""Threads of torch's, which are the user's to set."""

import subprocess
import sys

SCRIPT = """
import torch
{before}
import recbole_unlearn as ru
{after}
from recbole_unlearn.testing import options, tiny_interactions, write_dataset
path = write_dataset("data", "tiny", tiny_interactions())
for model in ("BPR", "LightGCN"):
    keys = options(path, epochs=1, forget_count=3, compare="none", output_dir=model)
    ru.run_unlearn(model, "tiny", config_dict=keys)
print("threads", torch.get_num_threads())
"""


def test_kernels_leave_torch_the_threads_that_it_was_given(tmp_path):
    """With others its sums come in another order, and trainings after ours would not end where they do without."""
    for where in ("before", "after"):
        script = SCRIPT.format(**{"before": "", "after": "", where: "torch.set_num_threads(1)"})
        folder = tmp_path / where
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "threads 1"
