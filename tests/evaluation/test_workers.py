"""Processes that train beside others end with the one that they work for, whatever ends it."""

import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

SCRIPT = """
import sys
import time

from recbole_unlearn.comparison.seeds import begin_worker, in_processes


def work(number):
    open(f"began-{number}", "w").close()
    time.sleep(600)


if __name__ == "__main__":
    in_processes(work, [(1,), (2,)], 2, begin_worker, (), False)
"""


def until(condition):
    """Wait for something that takes seconds."""
    end = monotonic() + 120
    while not condition():
        assert monotonic() < end
        sleep(0.1)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_leaves_nobody_behind(end):
    Path("script.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, "script.py"], stderr=subprocess.DEVNULL) as parent:
        until(lambda: Path("began-1").exists() and Path("began-2").exists())
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.send_signal(end)
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers))
