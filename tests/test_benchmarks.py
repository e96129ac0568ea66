"""Benchmarks end bad input in one line, and overwrite no page unless they are asked to."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGES = {
    "audit": ("audit.py", "tiny-BPR-default"),
    "lds": ("audit.py", "tiny-BPR-default"),
    "tune": ("audit.py", "tiny-BPR-default"),
    "fidelity": ("fidelity.py", "tiny-default-count-9"),
    "ablation": ("fidelity.py", "tiny-count-9"),
    "paper-ratios": ("fidelity.py", "paper_ratios-tiny"),
}


@pytest.fixture
def benchmark(monkeypatch, capsys, data_path, tmp_path):
    """Function (file, words) -> (exit status, what it said on stderr); what it keeps would lie in ``tmp_path``."""

    def start(file, *words):
        own = [f"--data_path={data_path}", "--dataset=tiny", f"--cache={tmp_path / 'cache'}"]
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / file), *words, *own])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / file), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("audit.py", ["audit", "--methods=fine_tun"], "did you mean 'fine_tune'"),
        ("audit.py", ["audit", "--methods=scif", "--model=NeuMF"], "scif is not for NeuMF"),
        ("audit.py", ["audit", "--changes=epoch=3"], "epoch"),
        ("audit.py", ["audit", "--changes=epochs"], "write --key=value"),
        ("audit.py", ["audit", "--models=4"], "at least 16, not 4"),
        ("audit.py", ["audit", "--settings=nope.json"], "cannot read nope.json"),
        ("audit.py", ["audit", "--add"], "tiny-BPR-default.json"),
        ("audit.py", ["audit", "--ways=magic"], "there are no ways magic"),
        ("audit.py", ["audit", "--sets=users"], "KIND:NUMBER"),
        ("audit.py", ["planted", "--models=15"], "at least 16, not 15"),
        ("audit.py", ["lds", "--methods=magic"], "unknown method 'magic'"),
        ("audit.py", ["tune", "--sets=users:3"], "comparison_sets"),
        ("audit.py", ["tune", "--config_files=nope.yaml"], "nope.yaml"),
        ("fidelity.py", ["fidelity", "--methods=magic"], "there are no methods magic"),
        ("fidelity.py", ["fidelity", "--sets=count"], "'count' must be KIND:NUMBER"),
        ("fidelity.py", ["fidelity", "--seeds=2"], "at least 3 seeds, not 2"),
        ("fidelity.py", ["ablation", "--sets=everybody:3"], "'everybody:3' must be"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(benchmark, tmp_path, file, words, said):
    output = [] if "planted" in words else [f"--output={tmp_path / 'out'}"]
    status, err = benchmark(file, *words, *output)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.md"))


@pytest.mark.parametrize("command", PAGES)
def test_a_page_that_is_there_is_not_overwritten_unless_asked(benchmark, tmp_path, command):
    (file, name), out = PAGES[command], tmp_path / "out"
    out.mkdir()
    page = out / f"{name}.md"
    page.write_text("of hours")
    words = [command, f"--output={out}", *(["--sets=count:9"] if command in ("fidelity", "ablation", "tune") else [])]
    status, err = benchmark(file, *words)
    assert (
        status == 2 and err == f"error: {page} is there; give --again to replace it, or --output for another folder\n"
    )
    status, err = benchmark(file, *words, "--again", "--config_files=nope.yaml")  # goes on, to what is found next
    assert status == 2 and "nope.yaml" in err and page.read_text() == "of hours"
