"""A run's report as one HTML file that needs nothing else: no script, no font, nothing from outside, no personal data.

It is made from ``run_unlearn``'s result alone, which holds counts and figures, never who or what was forgotten.
"""

import base64
import hashlib
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from recbole_unlearn.reports import templates
from recbole_unlearn.reports.pictures import described, drawn
from recbole_unlearn.settings.conflicts import BY_KERNELS, RECOMPUTED
from recbole_unlearn.storage.audit import weight_settings

FORGOTTEN = {
    "ratio": "a share of the interactions, drawn at random",
    "count": "a number of interactions, drawn at random",
    "users": "everything of some users",
    "items": "everything of some items",
    "file": "interactions listed in a file",
    "requests": "a stream of deletion requests",
    "core_users": "everything of the users with the most interactions",
    "edge_users": "everything of the users with the fewest interactions",
    "popular_items": "everything of the items with the most interactions",
    "rare_items": "everything of the items with the fewest interactions",
    "category": "everything of the items of some categories",
    "time": "the interactions of a span of time",
    "spam": "injected spam",
}
OUTCOMES = {
    "alike": ("good", "✓"),
    "too small": ("open", "?"),
    "not yet": ("bad", "!"),
    "over-forgotten": ("bad", "!"),
}
NAMES = {"original": "training", "unlearned": "unlearning", "retrained": "retraining"}


def page(result: dict, table: pd.DataFrame, method: str, cohort: str) -> str:
    """The report as HTML.

    Args:
        result (dict): of ``run_unlearn``.
        table (DataFrame of strings): `reports.tables.comparison_table` of it.
        method (str): how it was unlearned, in words.
        cohort (str): that it was no less than retraining, where it was.
    """
    style = drawn.STYLE + (templates.FOLDER / "style.css").read_text()
    return templates.render(
        "report.html.jinja",
        result=result,
        method=method,
        cohort=cohort,
        style=Markup(style),
        digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        described=described,
        panel=lambda chart: Markup(drawn.panel(chart)),
        seconds=_seconds,
        audited=Path((result.get("audit") or {}).get("file") or "").name,
        outcomes=OUTCOMES,
        judged=judged(result),
        chosen=FORGOTTEN.get(result["forget_set"]["kind"]) or result["forget_set"]["kind"],
        comparison=_comparison(table),
        spam=any("exposure" in each for each in result["models"].values()),
        pnpr=_pnpr((result.get("geometry") or {}).get("pnpr")),
        times={NAMES.get(name, name): each["seconds"] for name, each in result["models"].items() if each["seconds"]},
        drift=_drift((result.get("stream") or {}).get("drift")),
        certificate=_certificate(result),
        exact=result["unlearning"].get("exact", False),
        compiled=result["settings"].get("model") in BY_KERNELS,
        recomputed=result["settings"].get("model") in RECOMPUTED,
        settings=weight_settings(result["settings"]).items(),
    )


def judged(result: dict) -> bool:
    """Whether the models of a result were judged."""
    return all("forget_auc" in each for each in result["models"].values())


def _comparison(table):
    columns = ["gap" if " - " in column else column for column in table.columns]
    return {"columns": columns, "rows": [tuple(row) for row in table.itertuples()]}


def _pnpr(ratios):
    if not ratios:
        return None
    number = len(next(iter(ratios.values())))
    rows = [[name, f"{sum(each) / len(each):.4f}"] for name, each in ratios.items()]
    return {"columns": [f"mean PNPR of {number:,} user{'s' * (number > 1)}"], "rows": rows}


def metric_title(metric: str) -> str:
    """How tables name a metric such as ``ndcg@10``."""
    name, at, k = metric.partition("@")
    titles = {"hit": "HR", "fairness": "active users minus others, NDCG"}
    return f"{titles.get(name) or (name.upper() if len(name) <= 4 else name.capitalize())}{at}{k}"


def drift_names(comparison: dict) -> dict[str, str]:
    """What is shown of a comparison along a stream, key -> title: forget-set AUC, and NDCG or the first metric."""
    found = [key.removesuffix("_unlearned") for key in comparison if key.endswith("_unlearned") and "@" in key]
    found = sorted(found, key=lambda key: not key.startswith("ndcg"))[:1]
    return {"forget_auc": "forget-set AUC", **{key: metric_title(key) for key in found}}


def _drift(comparisons):
    if not comparisons:
        return None
    names = drift_names(comparisons[0])
    panels = [chart for key, name in names.items() for chart in described.drift(comparisons, key, name).panels]
    return {
        "picture": described.Picture("Drift along the stream", panels, 2),
        "columns": ["forgotten", *(f"{name} {of}" for name in names.values() for of in ("unlearned", "retrained"))],
        "rows": [
            [each["requests"], f"{each['forgotten']:,}"]
            + [f"{each[f'{key}_{of}']:.4f}" for key in names for of in ("unlearned", "retrained")]
            for each in comparisons
        ],
    }


def _certificate(result):
    unlearning, audit = result["unlearning"], result.get("audit") or {}
    found = result["guard"]
    rows = [["method", unlearning["method"]], ["guard", found["sentence"]]]
    if found["distance"] is not None:
        rows.append(["guard: distance, and at most", f"{found['distance']:.1e}, {found['limit']:g}"])
    names = {
        "exact": "exact retraining",
        "coupling": "random numbers",
        "residual": "relative residual of the solve",
        "negative_curvature": "negative curvature met",
        "gradient_norm_stored": "mean gradient norm of the stored weights",
        "converged": "converged",
        "epochs": "epochs replayed",
        "epochs_trained": "epochs that validation chose from",
        "valid_score": "validation score of the chosen one",
        "rows_replayed": "embedding rows replayed",
        "triples_replayed": "triples replayed",
        "step_norm": "norm of the change of weights",
    }
    rows += [[name, _plain(unlearning[key])] for key, name in names.items() if key in unlearning]
    rows += [[name, audit[key]] for key, name in (("request", "request"), ("time", "time (UTC)")) if key in audit]
    for when in ("before", "after"):
        for what, checksum in (audit.get(when) or {}).items():
            rows.append([f"keyed checksum of the {what} {when}", checksum])
    if "head" in audit:
        rows.append(["head of the audit record", audit["head"]])
    rows += [[f"version of {name}", version] for name, version in (result.get("versions") or {}).items()]
    return rows


def _seconds(value):
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"


def _plain(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
