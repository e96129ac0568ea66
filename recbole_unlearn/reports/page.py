"""A run's report as one HTML file that needs nothing else: no script, no font, nothing from outside, no personal data.

It is made from ``run_unlearn``'s result alone, which holds counts and figures, never who or what was forgotten.
"""

import base64
import hashlib
from html import escape
from pathlib import Path

from recbole_unlearn.reports.pictures import figures, svg
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
STYLE = f"""
:root{{color-scheme:light dark;{svg.LIGHT};--line:#d5d9de;--soft:#f4f6f8;--good:#0b6b4d;--bad:#a33c00;--open:#4a5058}}
@media (prefers-color-scheme:dark){{:root{{{svg.DARK};--line:#353c44;--soft:#1d2329;--good:#4fc79b;--bad:#ff9a5c;
--open:#b5bcc4}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:62rem;padding:1rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}}
h1{{font-size:1.5rem;line-height:1.25;margin:.5rem 0 1rem}}
h2{{font-size:1.15rem;margin:2rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}}
p{{max-width:44rem;margin:.5rem 0}}
.verdict{{border-left:.3rem solid var(--open);background:var(--soft);padding:.6rem .9rem;max-width:none}}
.verdict.good{{border-color:var(--good)}}.verdict.bad{{border-color:var(--bad)}}
.sign{{font-weight:700;color:var(--open)}}.good .sign{{color:var(--good)}}.bad .sign{{color:var(--bad)}}
.counts{{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem;margin:.75rem 0}}
.counts div{{background:var(--soft);padding:.5rem .7rem}}
.counts dt{{font-size:.85rem}}.counts dd{{margin:0;font-size:1.35rem;font-weight:600;line-height:1.3}}
.counts small{{display:block;font-size:.8rem;font-weight:400}}
.facts{{display:grid;grid-template-columns:minmax(10rem,auto) 1fr;font-size:.9rem;margin:.75rem 0}}
.facts div{{display:grid;grid-template-columns:subgrid;grid-column:1/-1;gap:1rem;padding:.28rem 0;
border-bottom:1px solid var(--line)}}
.facts dd{{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}}
.scroll{{overflow-x:auto;margin:.75rem 0}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.28rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}}
th:first-child{{text-align:left;position:sticky;left:0;background:var(--paper);font-weight:400}}
thead th,thead th:first-child{{font-weight:600;border-bottom-width:2px;vertical-align:bottom;white-space:normal}}
figure{{margin:1rem 0}}figcaption,.note{{font-size:.85rem}}figcaption{{max-width:44rem}}
.panels{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17.5rem),1fr));gap:.75rem}}
.chart{{display:block;width:100%;max-width:30rem;height:auto}}
@media (max-width:34rem){{table{{font-size:.73rem}}th,td{{padding:.25rem .2rem}}th:first-child{{padding-left:0}}
body{{padding:.75rem}}tbody th{{white-space:normal;overflow-wrap:anywhere;min-width:4.4rem}}
.facts,.facts div{{display:block}}.facts dt{{color:var(--open)}}
.counts dd{{font-size:1.15rem}}}}
@media (min-width:60rem){{.wide{{display:grid;grid-template-columns:30rem 1fr;gap:2rem;align-items:center}}}}
code{{font-size:.85em;overflow-wrap:anywhere}}
summary{{cursor:pointer}}
:focus-visible{{outline:2px solid #0a74c4}}
@media print{{:root{{{svg.LIGHT};--line:#bbb;--soft:#fff;--good:#0b6b4d;--bad:#a33c00;--open:#4a5058;
color-scheme:light}}@page{{margin:14mm}}body{{padding:0;max-width:none;font-size:10pt}}
h1{{font-size:15pt;margin-top:0}}h2{{font-size:12pt;margin-top:1rem;break-after:avoid}}p{{max-width:none}}
.scroll{{overflow:visible}}th:first-child{{position:static}}table,.facts{{font-size:8.5pt}}th,td{{padding:.12rem .5rem}}
.facts div{{padding:.08rem 0}}.panels{{grid-template-columns:repeat(3,1fr)}}.wide .panels{{grid-template-columns:1fr}}
.wide{{display:grid;grid-template-columns:9.5cm 1fr;gap:6mm;align-items:center}}
figure,tr,.facts div,.verdict,.counts{{break-inside:avoid}}
details::details-content{{content-visibility:visible;block-size:auto}}
details .facts{{display:block;columns:2}}details .facts div{{grid-template-columns:1fr 1fr}}}}
{svg.STYLE}"""


def page(result, table, method):
    """The report.

    Args:
        result (dict): of ``run_unlearn``.
        table (DataFrame of strings): `reporting.comparison_table` of it.
        method (str): how it was unlearned, in words.

    Returns:
        str: HTML.
    """
    forget = result["forget_set"]
    title = f"{result['model']} on {result['dataset']}: {forget['interactions']:,} interactions forgotten"
    sections = [
        _verdict(result),
        _forgotten(forget),
        _comparison(result, table),
        _embedding_space(result.get("geometry") or {}),
        _times(result),
        _solver(result["unlearning"], method),
        _stream(result.get("stream")),
        _certificate(result),
    ]
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'; img-src data:; \
base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{"".join(sections)}
</main>
</body>
</html>
"""


def _verdict(result):
    if not result["verdict"]:
        why = "Not compared with retraining (<code>compare: none</code>)"
        if not judged(result):
            why = "No model was judged (<code>evaluate: none</code>)"
        return (
            f'<p class="verdict open"><span class="sign" aria-hidden="true">?</span> {why}, '
            "so this run does not tell how close the forgetting came.</p>\n"
        )
    kind, sign = OUTCOMES[result["verdict_figures"]["outcome"]]
    faster = result["speed_up"]
    speed = ""
    if faster:
        speed = (
            f" It took {_seconds(result['models']['unlearned']['seconds'])}; retraining {faster:,.3g} times as long."
        )
    return (
        f'<p class="verdict {kind}"><span class="sign" aria-hidden="true">{sign}</span> '
        f"{escape(result['verdict'])}{speed}</p>\n"
    )


def _forgotten(forget):
    share = forget["interactions"] / forget["of"]
    counts = {
        "interactions": f"{forget['interactions']:,} <small>of {forget['of']:,} ({100 * share:.2g} %)</small>",
        "users": f"{forget['users']:,} <small>who had them</small>",
        "items": f"{forget['items']:,} <small>in them</small>",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in counts.items())
    what = escape(FORGOTTEN.get(forget["kind"]) or forget["kind"])
    return _section(
        "What was forgotten",
        f'<dl class="counts">{cells}</dl><p>Chosen: {what}. This report names no user and no item.</p>',
    )


def judged(result):
    """Whether the models of a result were judged."""
    return all("forget_auc" in each for each in result["models"].values())


def _comparison(result, table):
    if not judged(result):
        return ""
    parts = [
        "<p>The aim is the <em>retrained</em> model, trained anew without the forgotten interactions; "
        "neither a higher nor a lower figure is better.</p>"
        if "retrained" in result["models"]
        else "",
        _table(
            ["gap" if " - " in column else column for column in table.columns],
            table.itertuples(),
            "Figures of each model",
        ),
        '<p class="note">HR@K: share of users with a held-out item among their first K; NDCG@K also counts its '
        "place. full: ranked among all items; uni99: among 99 drawn ones. Forget-set AUC: how often a forgotten item "
        "ranks above an item that its user never had; 0.5 is chance."
        + (" Gap: unlearned minus retrained." * ("retrained" in result["models"]))
        + (" Spam exposure@K: share of the other users with a promoted item among their first K." * _has_spam(result))
        + "</p>",
    ]
    if result.get("rank_histogram"):
        caption = (
            "Each forgotten interaction's item, ranked by each model among the items that its user never had; 100 % is "
            "the top."
        )
        if "retrained" in result["rank_histogram"]:
            caption += (
                " Well forgotten, the filled outline follows the retrained model's, neither to the right of it nor to "
                "the left."
            )
        parts.append(_figure(figures.rank_histogram(result["rank_histogram"]), caption))
    return _section("Before and after", "".join(parts))


def _has_spam(result):
    return any("exposure" in each for each in result["models"].values())


def _embedding_space(geometry):
    parts = []
    if geometry.get("pnpr"):
        caption = (
            "PNPR, the positive-negative proximity ratio of UBPR: how many times farther from the user than a "
            "forgotten item the items lie that were sampled as its negatives; mean over the user's forgotten items, "
            "one column a user."
        )
        means = {name: sum(each) / len(each) for name, each in geometry["pnpr"].items()}
        rows = [[name, f"{mean:.4f}"] for name, mean in means.items()]
        number = len(next(iter(geometry["pnpr"].values())))
        parts += [
            _table([f"mean PNPR of {number:,} user{'s' * (number > 1)}"], rows, "Mean PNPR of each model"),
            _figure(figures.pnpr(geometry["pnpr"]), caption),
        ]
    if geometry.get("map"):
        caption = (
            "t-SNE maps of the embeddings of one user who lost the most. Who is near whom counts; position, direction "
            "and size do not, and each model has a map of its own."
        )
        parts.append(_figure(figures.embedding_map(geometry["map"]), caption))
    return _section("In embedding space", "".join(parts)) if parts else ""


def _times(result):
    seconds = {name: each["seconds"] for name, each in result["models"].items() if each["seconds"]}
    setup = result["unlearning"].get("setup_seconds")
    ready = f" Loading the kernels, once before the first request, took {_seconds(setup)}." if setup is not None else ""
    caption = (
        "Unlearning: from the request to the weights, log reading included. "
        f"Training: RecBole's fit, validation included.{ready}"
    )
    named = {
        {"original": "training", "unlearned": "unlearning", "retrained": "retraining"}.get(n, n): s
        for n, s in seconds.items()
    }
    if len(named) > 1:
        return _section("Time", _figure(figures.running_times(named, "Time of each model"), caption))
    return _section("Time", "".join(f"<p>{name}: {_seconds(value)}. {caption}</p>" for name, value in named.items()))


def _solver(unlearning, method):
    parts = [f"<p>{escape(method)}.</p>"]
    if chosen := unlearning.get("chosen"):
        parts.append(f"<p>Why this method: {escape(chosen)}.</p>")
    if len(unlearning.get("history") or ()) > 1:
        solver, label, caption = "conjugate gradient", "relative residual", "Relative residual of the linear solve."
        if unlearning["method"] == "reoptimise":
            solver, label = "Newton's method", "mean gradient norm"
            caption = "Norm of the mean gradient on what remains, after each trust-region step: the certificate."
        parts.append(_figure(figures.convergence({solver: unlearning["history"]}, label=label), caption))
    elif unlearning["method"] == "replay":
        parts.append("<p>Replay solves no linear system, so there is no convergence to show.</p>")
    return _section("How", "".join(parts))


def _stream(stream):
    if not stream:
        return ""
    parts = []
    if stream["drift"]:
        keys = [key.removesuffix("_unlearned") for key in stream["drift"][0] if key.endswith("_unlearned")]
        shown = ["forget_auc", *[key for key in keys if key.startswith("ndcg")][:1]]
        names = {key: "forget-set AUC" if key == "forget_auc" else key.upper() for key in shown}
        if len(stream["drift"]) > 1:
            panels = [figures.drift(stream["drift"], key, name) for key, name in names.items()]
            caption = (
                "The model that keeps forgetting beside models retrained without all that was forgotten until then."
            )
            joined = figures.Picture("Drift along the stream", [chart for each in panels for chart in each.panels], 2)
            parts.append(_figure(joined, caption))
        columns = [
            "requests",
            "forgotten",
            *(f"{name} {of}" for name in names.values() for of in ("unlearned", "retrained")),
        ]
        rows = [
            [each["requests"], f"{each['forgotten']:,}"]
            + [f"{each[f'{key}_{of}']:.4f}" for key in names for of in ("unlearned", "retrained")]
            for each in stream["drift"]
        ]
        parts.append(_table(columns[1:], rows, "Drift along the stream", columns[0]))
    if len(stream["batches"]) > 1:
        seconds = [each["seconds"] for each in stream["batches"]]
        chart = figures.stream_times([each["requests"] for each in stream["batches"]], seconds)
        parts.append(_figure(chart, "Each request, or batch of them, in the order in which they came."))
    if stream["empty"]:
        parts.append(f"<p>{stream['empty']} requests named nothing, or nothing any more, to forget.</p>")
    if stream["retrain"]:
        parts.append(f'<p class="verdict bad">{escape(stream["retrain"].capitalize())}.</p>')
    return _section("The stream of requests", "".join(parts)) if parts else ""


def _certificate(result):
    unlearning, audit = result["unlearning"], result.get("audit") or {}
    found = result["guard"]
    rows = [["method", unlearning["method"]], ["guard", found["sentence"]]]
    if found["distance"] is not None:
        rows.append(["guard: distance, and at most", f"{found['distance']:.1e}, {found['limit']:g}"])
    names = {
        "residual": "relative residual of the solve", "negative_curvature": "negative curvature met",
        "gradient_norm_stored": "mean gradient norm of the stored weights", "converged": "converged",
        "epochs": "epochs replayed", "rows_replayed": "embedding rows replayed", "triples_replayed": "triples replayed",
        "step_norm": "norm of the change of weights",
    }  # fmt: skip
    rows += [[name, _plain(unlearning[key])] for key, name in names.items() if key in unlearning]
    rows += [[name, audit[key]] for key, name in (("request", "request"), ("time", "time (UTC)")) if key in audit]
    for when in ("before", "after"):
        for what, checksum in (audit.get(when) or {}).items():
            rows.append([f"SHA-256 of the {what} {when}", checksum])
    if "head" in audit:
        rows.append(["head of the audit record", audit["head"]])
    rows += [[f"version of {name}", version] for name, version in (result.get("versions") or {}).items()]
    parts = [_facts(rows)]
    if "file" in audit:
        parts.append(
            "<p>To check that the chain of records is whole and the model is the one recorded: <code>python -m "
            f"recbole_unlearn.storage.audit verify {escape(Path(audit['file']).name)} unlearned.pth</code></p>"
        )
    parts.append(
        "<p>Unlearning is approximate: the tables above say how close it came to retraining. This is no formal "
        "(differential-privacy) certificate.</p>"
    )
    settings = weight_settings(result["settings"]).items()
    parts.append(f"<details><summary>Settings that the weights depend on</summary>{_facts(settings)}</details>")
    return _section("Certificate", "".join(parts))


def _section(title, body):
    return f"<section><h2>{title}</h2>\n{body}</section>\n"


def _figure(picture, caption):
    panels = "\n".join(svg.panel(chart) for chart in picture.panels)
    wide = ' class="wide"' if len(picture.panels) == 1 else ""
    return (
        f'<figure{wide}><div class="panels">{panels}</div>'
        f"<figcaption><strong>{escape(picture.title)}.</strong> {caption}</figcaption></figure>\n"
    )


def _table(columns, rows, label, corner=""):
    """A table that scrolls by itself where it is too wide; the first entry of each row is its name."""
    corner = f'<th scope="col">{escape(corner)}</th>' if corner else "<td></td>"
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(name)).replace("@", "@<wbr>")}</th>'
        + "".join(f"<td>{escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead><tr>{corner}{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _facts(rows):
    """Names and values, of which some are long."""
    lines = (f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows)
    return '<dl class="facts">' + "\n".join(lines) + "</dl>"


def _seconds(value):
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"


def _plain(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
