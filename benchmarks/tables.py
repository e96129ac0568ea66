"""Puts what is in results/ into the README's tables, so that they cannot differ.

python benchmarks/tables.py
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "forget-set AUC",
    "AUC, sd from Retrain",
    "correlation / ceiling",
    "Wasserstein / floor",
    "HR, sd",
    "NDCG, sd",
    "seconds",
)
RATIO_ROWS = ("interactions", "HR@10", "NDCG@10 difference", "forget-set AUC", "AUC, sd", "seconds")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def narrow(page, columns):
    """The table of a Markdown page with some of its columns only."""
    rows = [cells(line) for line in page.splitlines() if line.startswith("|") and not line.startswith("|:")]
    chosen = [0, *(rows[0].index(name) for name in columns)]
    lines = ["| " + " | ".join(row[k] for k in chosen) + " |" for row in rows]
    return "\n".join([lines[0], "|" + ":---|" * len(chosen), *lines[1:]])


def fidelity():
    parts = []
    for file in sorted((ROOT / "results/fidelity").glob("*.md")):
        page = file.read_text()
        parts += [f"**{page.splitlines()[0].removeprefix('## ')}**", "", narrow(page, COLUMNS), ""]
    return "\n".join(parts)


def ratios():
    parts = []
    for file in sorted((ROOT / "results").glob("paper_ratios-*.md")):
        lines = file.read_text().splitlines()
        table = [line for line in lines if line.startswith("|")]
        kept = [row for row in table[2:] if cells(row)[0].startswith(RATIO_ROWS)]
        parts += [f"**{lines[0].removeprefix('## ')}**", "", *table[:2], *kept, "", lines[-1], ""]
    return "\n".join(parts)


def speed():
    columns, rows = [], {}
    for file in sorted((ROOT / "results/speed").glob("request_cost-*.md")):
        head, _, *lines = (cells(line) for line in file.read_text().splitlines())
        columns.append(head[1])
        for name, value in lines:
            rows.setdefault(name, {})[head[1]] = value
    table = ["| | " + " | ".join(columns) + " |", "|" + ":---|" * (len(columns) + 1)]
    table += [f"| {name} | " + " | ".join(values.get(c, "") for c in columns) + " |" for name, values in rows.items()]
    others = [(ROOT / f"results/speed/{name}.md").read_text().partition("\n\n")[2] for name in ("kernels", "solver")]
    return "\n".join([*table, "", *others])


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    for make in (fidelity, ratios, speed):
        mark = f"<!-- {make.__name__} -->\n"
        before, found, rest = text.partition(mark)
        if not found:
            raise SystemExit(f"README.md lacks the line {mark.strip()}")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}\n{make()}\n{end}{after}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
