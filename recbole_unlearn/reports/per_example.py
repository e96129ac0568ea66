"""An audit of methods, one example at a time, as tables and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_unlearn.reports.pictures.described import pair_histograms
from recbole_unlearn.reports.pictures.drawn import svg, write_png
from recbole_unlearn.reports.tables import compiled, json_text
from recbole_unlearn.storage.files import write_atomically

# Figure -> title; of these it is a defect to lie outside the floor's interval.
TELLING = {
    "lira_auc": "U-LiRA, AUC",
    "tpr_1": "true positives at 1 % false",
    "klom": "KLoM, median",
    "klom_95": "KLoM, 95 %",
    "epsilon": "epsilon, median",
    "epsilon_95": "epsilon, 95 %",
    "effect left": "effect left",
}
OTHERS = {
    "klom, retained, touched users": "KLoM, retained of touched users",
    "klom, retained, other users": "KLoM, retained of others",
    "klom, held out": "KLoM, held out",
    "before and after, held out": "before and after, AUC",
    "churn": "top-10 changed of untouched",
    "ndcg": "NDCG@10",
    "ndcg, core users": "core users",
    "ndcg, edge users": "edge users",
    "fairness": "active users minus others",
    "gain, popular items": "popular items",
    "gain, rare items": "rare items",
}
OF_TWO = {*TELLING, *(key for key in OTHERS if key.startswith("klom"))}  # populations; all others are single models'
SHARES = ("churn", "effect left", "tpr_1")
READ = (
    "Each figure is the median over 100 choices of n unlearned and n retrained models, in brackets the interval that "
    "holds 95 % of them; *retrained* is n retrained models against n others: what equal laws show. Methods with an "
    "original of their own are compared with what they train without the forget set: *METHOD, retrained*. A figure is "
    "**bold** where its median lies outside that interval, of the same n, and, of means over single models (the second "
    "table, but for KLoM), where the medians differ by more than both intervals explain. Of equal laws one of twenty "
    "means is bold, and hardly any other figure (results/equal.md). Lower is better for all figures of the first "
    "table. Before and after: the AUC of an attacker who has the model from before too, and tells forgotten pairs "
    "from held-out ones by how their margins changed; paired training changes little else, and is easier to read "
    "for one who has both models. How each is computed: docs/comparison.md."
)


def table(each: dict[str, Any], columns: dict[str, str]) -> pd.DataFrame:
    """Some figures of every method, as text.

    Args:
        each: of one forget set, of `comparison.populations.Audit.run`.
        columns: figure -> title.
    """
    floors, rows = each["floors"], {}
    first = next(iter(floors.values()))
    columns = {key: title for key, title in columns.items() if key in first}
    against = each.get("against", {})
    shared = {n: floor for n, floor in floors.items() if n not in against.values()}
    found = {"retrained" + (f", n = {n}" if f is not first else ""): (f, f) for n, f in shared.items()}
    for name, figures in each["figures"].items():
        floor = floor_of(each, name)
        if name in against:  # its own floor stands before the first that it is the floor of
            found.setdefault(against[name], (floor, floor))
        found[name] = figures, floor
    for name, (figures, floor) in found.items():
        cells = {title: cell(key, figures, floor) for key, title in columns.items()}
        rows[name] = {"n": str(figures["n"])} | cells
    return pd.DataFrame.from_dict(rows, orient="index")


def floor_of(each: dict[str, Any], name: str) -> dict[str, Any]:
    """What retrained models show that a method is compared with: its own, where it trains others than the original."""
    return each["floors"][each.get("against", {}).get(name, str(each["figures"][name]["n"]))]


def cell(key: str, found: dict[str, Any], floor: dict[str, Any]) -> str:
    """A figure with its interval, bold where it is `outside` that of retrained models."""
    value = found[key]
    ends = (f"{100 * v:.1f} %" if key in SHARES else f"{v:.3f}" for v in (value["median"], value["low"], value["high"]))
    middle, low, high = ends
    return f"{f'**{middle}**' if outside(key, found, floor) else middle} [{low}, {high}]"


def outside(key: str, found: dict[str, Any], floor: dict[str, Any]) -> bool:
    """Whether a method's figure is another than that of retrained models, by more than rounding.

    A figure of two populations is where its median lies outside the interval of halves of one. A mean over single
    models has an error in each population, which its own interval shows: half of the models have, drawn from all of
    them, the error that all have. Their difference has both.
    """
    ours, theirs = found[key], floor[key]
    low, median, high = theirs["low"], ours["median"], theirs["high"]
    if key not in OF_TWO:
        low = theirs["median"] - np.hypot(theirs["median"] - low, ours["high"] - median)
        high = theirs["median"] + np.hypot(high - theirs["median"], median - ours["low"])
    return not (low <= median <= high or np.isclose(median, low, 1e-9) or np.isclose(median, high, 1e-9))


def verdict(each: dict[str, Any]) -> str:
    """Which methods cannot be told from retraining, and by what the others are."""
    told = {
        name: [title for key, title in TELLING.items() if outside(key, found, floor_of(each, name))]
        for name, found in each["figures"].items()
    }
    alike = ", ".join(name for name, titles in told.items() if not titles)
    lines = [f"Told from retrained models by no figure of the first table: {alike or 'none'}."]
    return " ".join([*lines, *(f"{name}: by {', '.join(titles)}." for name, titles in told.items() if titles)])


def markdown(results: dict[str, Any], title: str, agreement: float | None) -> str:
    """The page.

    Args:
        results: of `comparison.populations.Audit.run`.
        agreement: how far compiled training ended from RecBole's; None: RecBole's trainer was used.
    """
    parts = [f"# {title}", READ, *([compiled(agreement).strip()] if agreement is not None else [])]
    for name, each in results.items():
        tables = (table(each, columns).to_markdown(disable_numparse=True) for columns in (TELLING, OTHERS))
        parts += [f"## Forget {name} ({each['interactions']} interactions)", verdict(each), *tables]
    return "\n\n".join(parts) + "\n"


def write(results: dict[str, Any], title: str, agreement: float | None, folder: Path, name: str = "audit") -> str:
    """Write NAME.md, NAME.json, and a picture of each forget set; returns the page."""
    page = markdown(results, title, agreement)
    write_atomically(folder / f"{name}.md", page.encode())
    kept = {"title": title, "agreement": agreement, "sets": results}
    write_atomically(folder / f"{name}.json", json_text(kept, None).encode())
    for chosen, each in results.items():
        pairs = {way: found["pairs"] for way, found in each["figures"].items()}
        picture = pair_histograms(pairs, {way: floor_of(each, way)["pairs"] for way in pairs})
        stem = f"{name}-{chosen.replace(':', '-')}"
        write_atomically(folder / f"{stem}.svg", svg(picture).encode())
        write_png(picture, folder / f"{stem}.png")
    return page
