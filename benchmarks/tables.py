"""Puts what is in results/ into the tables of README.md, results/README.md and docs/method.md, so that they agree.

python benchmarks/tables.py
"""

import json
import re
from statistics import median

import pandas as pd
from common import RESULTS, ROOT

from recbole_unlearn.reports import per_example

METHODS = {
    "nothing done": "nothing done",
    "paper's step": "UBPR's step",
    "influence": "one corrected step",
    "touched rows": "touched rows",
    "exact, paired": "exact, paired",
    "exact, fresh": "exact, fresh",
}
KINDS = {"count": "random interactions", "users": "users", "items": "items"}
COMPARED = (
    "NDCG@10 (full)", "HR@10 (full)", "forget-set AUC", "AUC, sd from Retrain", "prepare, s", "request, s",
    "times faster than Retrain",
)  # fmt: skip
RATIO_ROWS = ("interactions", "HR@10 retrained", "HR@10 difference", "NDCG@10 difference", "AUC, sd")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def forget_set(stem):
    """'ml-100k-default-epochs=5-rare_items-300' in words: (data set, model and changes), forget set."""
    words, size = stem.rsplit("-", 1)
    words, kind = words.rsplit("-", 1)
    data, _, changes = words.partition("-default")
    return f"{data}{changes.replace('-', ', ')}", f"{size} {KINDS.get(kind, kind.replace('_', ' '))}"


def measured_fidelity():
    """Data set, forget set and figures of each measured one, in order."""
    files = (RESULTS / "fidelity").glob("*-default-*.json")
    for file in sorted(files, key=lambda file: forget_set(file.stem)):
        results = json.loads(file.read_text())
        if "replay" in results:  # measured before all rows were exact
            results["touched rows"] = results["replay"]
        yield *forget_set(file.stem), results


def fidelity():
    """One line a forget set; of each method, how far its forget-set AUC is from Retrain's, and its correlation."""
    lines = ["| data | forget | " + " | ".join(METHODS.values()) + " |", "|:---|:---|" + ":---|" * len(METHODS)]
    for data, what, results in measured_fidelity():
        line = [data, what]
        for name in METHODS:
            row = results.get(name)
            correlation = "" if name == "nothing done" or row is None else f", {row['of_ceiling']:.2f}"
            line.append("" if row is None else f"{row['forget_auc_z']:+.1f} sd{correlation}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def rows():
    """Touched rows beside exact ones: a line a forget set and way."""
    names = {"touched rows": "touched rows", "exact, paired": "exact, paired"}
    names |= {"replay, all rows": "all rows, not exact yet", "exact, fresh": "exact, fresh", "retrained": "Retrain"}
    lines = ["| data | forget | way | AUC, sd from Retrain | correlation / ceiling | Wasserstein / floor |"]
    lines.append("|:---|:---|:---|:---|:---|:---|")
    for data, what, results in measured_fidelity():
        for name in names if "NGCF" not in data and "SimpleX" not in data else ():
            if row := results.get(name):
                sd = "" if name == "retrained" else f"{row['forget_auc_z']:+.1f}"
                figures = f"{row['of_ceiling']:.3f} | {row['wasserstein_ratio']:.2f}"
                lines.append(f"| {data} | {what} | {names[name]} | {sd} | {figures} |")
    return "\n".join(lines) + "\n"


def ratios():
    parts = []
    for file in sorted(RESULTS.glob("paper_ratios-*.md")):
        lines = file.read_text().splitlines()
        table = [line for line in lines if line.startswith("|")]
        kept = [row for row in table[2:] if cells(row)[0].startswith(RATIO_ROWS)]
        parts += [f"**{lines[0].removeprefix('## ')}**", "", *table[:2], *kept, ""]
    return "\n".join(parts)


def speed():
    columns, rows = [], {}
    for file in sorted((RESULTS / "speed").glob("request_cost-*.md")):
        head, _, *lines = (cells(line) for line in file.read_text().splitlines())
        columns.append(head[1])
        for name, value in lines:
            rows.setdefault(name, {})[head[1]] = value
    table = ["| | " + " | ".join(columns) + " |", "|" + ":---|" * (len(columns) + 1)]
    table += [f"| {name} | " + " | ".join(values.get(c, "") for c in columns) + " |" for name, values in rows.items()]
    return "\n".join([*table, ""])


def first(text):
    """The number that a cell of results/ begins with: '22.4 [21.5, 24.7]', '945', '+2.0% (...)'."""
    return float(re.match(r"[-+]?[\d.,]+(e[-+]?\d+)?", text)[0].replace(",", ""))


def measured(stem):
    """Rows or figures of a command of `speed.py`; None where it has not been run."""
    file = RESULTS / f"speed/{stem}.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return found.get("rows", found.get("figures", found)) if isinstance(found, dict) else found


def targets():
    """What was aimed at in speed and memory, what was measured, and by which command: one line each."""
    lines = ["| | aimed at | measured | `python benchmarks/...` |", "|:---|:---|:---|:---|"]

    def line(what, aim, values, command, unit="×"):
        """``values``: numbers or texts by where they were measured; what misses ``>= n`` or ``<= n`` says so."""
        sign, limit = aim.split()
        shown = []
        for where, value in values.items():
            number = value if isinstance(value, (int, float)) else first(value)
            missed = number < float(limit) if sign == ">=" else number > float(limit)
            head, bracket, range_ = (f"{value:.3g}" if isinstance(value, float) else str(value)).partition(" [")
            shown.append(f"{where} {head.strip('%')}{unit}{bracket}{range_}{' (**missed**)' if missed else ''}".strip())
        words = f"{'at least' if sign == '>=' else 'at most'} {limit}{unit}"
        lines.append(f"| {what} | {words} | {'; '.join(shown)} | {command} |")

    def product(K, column):
        return {row["product"]: row[column] for row in measured("kernels") if row["K"] == K}

    names = {name: measured(f"request_cost-{name}") for name in ("ml-1m-paper", "pinterest-paper", "ml-1m-default")}
    costs = {name: figures for name, figures in names.items() if figures}

    def cost(row, only=None):
        chosen = {name: figures for name, figures in costs.items() if row in figures and (only is None or name in only)}
        return {name: figures[row].split(" (")[0] for name, figures in chosen.items()}

    paper = ("ml-1m-paper", "pinterest-paper")
    kernels, autograd = "speed.py kernels", "autograd / product"
    line("Curvature product against torch autograd's, K = 8", ">= 60", product(8, autograd), kernels)
    line("the same, K = 64", ">= 40", product(64, autograd), kernels)
    line("Product against one read of what it reads, K = 8", "<= 4", product(8, "product / read"), kernels)
    iterations = {}
    for row in measured("solver"):
        if row["preconditioner"] == "block-Jacobi":
            iterations[row["data set"]] = max(row["iterations"], iterations.get(row["data set"], 0))
    line("Conjugate gradient iterations to 1e-3", "<= 15", iterations, "speed.py solver", "")
    faster, request = "times faster than Retrain, {}; {}, 0.02% of the interactions", "speed.py requests"
    for K, where, exact, touched in ((8, paper, 100, 500), (64, ("ml-1m-default",), 40, 300)):
        for way, aim in (("exact", exact), ("touched rows", touched)):
            what = f"Request (.02 %), {way}, against stock Retrain, K = {K}"
            line(what, f">= {aim}", cost(faster.format("stock RecBole", way), where), request)
    graph = measured("lightgcn-ml-1m")
    if graph:
        ratios = [each["times faster"] for each in graph]
        line("the same, LightGCN, many steps at once", ">= 50", {"ml-1m": median(ratios)}, "speed.py lightgcn")
    line("Logging, share of training time", "<= 3", cost("logging, share of training time"), request, "%")
    found = {file.stem.removeprefix("guard-"): measured(file.stem) for file in (RESULTS / "speed").glob("guard-*")}
    values = {name: round(figures["of a replay"], 2) for name, figures in sorted(found.items())}
    if values:
        line("Guard, at a log's first request, in replays of all rows", "<= 1", values, "guard.py")
    line("Log, bytes a triple", "<= 2.5", cost("log, bytes a triple"), request, "")
    for what, row, aim in (
        ("Epoch with validation against stock", "training epoch with validation", ">= 2"),
        ("Full ranking against stock", "evaluation, full ranking", ">= 5"),
        ("99 sampled negatives against stock", "evaluation, 99 sampled", ">= 5"),
    ):
        found = {name: measured(f"evaluation-{name}") for name in names}
        values = {name: float(each[row]["ratio"]) for name, each in found.items() if each}
        if values:
            line(what, aim, values, "speed.py evaluation")
    largest = max(measured("growth"), key=lambda row: (first(row["triples"]), int(row["K"])))
    peak = {"": first(largest["peak MB"]) / 1024}
    line(f"Peak memory, {largest['triples']} triples, K = {largest['K']}", "<= 4", peak, "speed.py growth", " GiB")
    return "\n".join([*lines, ""])


def methods():
    """The forget set's table of a comparison."""
    page = (RESULTS / "methods-ml-100k/comparison.md").read_text()
    rows = [cells(line) for line in page.splitlines() if line.startswith("|") and not line.startswith("|:")]
    chosen = [0, *(rows[0].index(name) for name in COMPARED)]
    lines = ["| " + " | ".join(row[k] for k in chosen) + " |" for row in rows]
    return "\n".join([lines[0], "|" + ":---|" * len(chosen), *lines[1:], ""])


def stream():
    parts = []
    for file in sorted((RESULTS / "stream").glob("*.md")):
        title, *rest = file.read_text().strip().splitlines()
        parts += [f"**{title.removeprefix('## ')}**", *rest, ""]
    return "\n".join(parts)


def pairs():
    """Of each audit, what every forget set's first table says."""
    parts = []
    for file in sorted((RESULTS / "audit").glob("*.md")):
        title, *sections = re.split(r"^## ", file.read_text(), flags=re.M)
        name = title.splitlines()[0].removeprefix("# ")
        for section in sections:
            heading, said, table, *_ = section.strip().split("\n\n")
            about = f"**{name}: {heading[0].lower()}{heading[1:]}** ([whole](audit/{file.name}))"
            parts += [f"{part}\n" for part in (about, said, table)]
    return "\n".join(parts)


def told():
    """The README's: of the first audit's first forget set, the figures that say most."""
    file = RESULTS / "audit/ml-100k-BPR-default.json"
    if not file.exists():
        return ""
    each = next(iter(json.loads(file.read_text())["sets"].values()))
    chosen = {key: per_example.TELLING[key] for key in ("lira_auc", "klom_95", "epsilon_95", "effect left")}
    shown = per_example.table(each, chosen | {key: per_example.OTHERS[key] for key in ("churn", "ndcg")})
    means = shown.iloc[1:].map(lambda cell: cell.partition(" [")[0])  # intervals: of retrained models alone
    shown = pd.concat([shown.iloc[:1], means])
    return shown.drop(columns="n").to_markdown(disable_numparse=True) + "\n"


def models():
    """Every model at its full training; the smoke test's matrix without the details, folded, and who is not in it."""
    full = [line for line in (RESULTS / "models-ml-100k.md").read_text().splitlines() if line.startswith("|")]
    page = (RESULTS / "smoke.md").read_text()
    rows = [cells(line) for line in page.splitlines() if line.startswith("|") and not line.startswith("|:")]
    works, others = [row for row in rows[1:] if row[2] != "–"], [row[0] for row in rows[1:] if row[2] == "–"]
    lines = ["| " + " | ".join(row[:10]) + " |" for row in (rows[0], *works)]
    table = "\n".join([lines[0], "|" + ":---|" * 10, *lines[1:]])
    whole = "\n".join(full)
    return (
        f"{whole}\n\n<details><summary>After two epochs: {len(works)} models, one by one</summary>\n\n{table}\n\n"
        f"Not: {', '.join(others)}; why: [smoke.md](smoke.md).\n\n</details>\n"
    )


PAGES = {
    "README.md": (told,),
    "results/README.md": (fidelity, pairs, models, stream, methods, ratios, targets, speed),
    "docs/method.md": (rows,),
}


def filled(name):
    """A page with its tables as results/ says: each stands between a line with its function's name and an end."""
    text = (ROOT / name).read_text()
    for make in PAGES[name]:
        mark = f"<!-- {make.__name__} -->\n"
        before, found, rest = text.partition(mark)
        if not found:
            raise SystemExit(f"{name} lacks the line {mark.strip()}")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}\n{make()}\n{end}{after}"
    return text


def main():
    for name in PAGES:
        (ROOT / name).write_text(filled(name))


if __name__ == "__main__":
    main()
