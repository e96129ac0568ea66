"""Results as tables that people can paste."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_unlearn.reports import page as html_report
from recbole_unlearn.settings.conflicts import COHORT
from recbole_unlearn.storage.files import write_atomically
from recbole_unlearn.storage.paths import RESULTS

DEFAULT = {"recall", "mrr", "ndcg", "hit", "precision"}  # RecBole's key ``metrics``


def json_text(value: Any, indent: int | None = 1) -> str:
    """JSON, which has no NaN and no infinity: null."""

    def known(each):
        if isinstance(each, dict):
            return {key: known(own) for key, own in each.items()}
        if isinstance(each, (list, tuple)):
            return [known(own) for own in each]
        return None if isinstance(each, float) and not math.isfinite(each) else each

    return json.dumps(known(value), indent=indent, allow_nan=False)


def shown(metrics: Iterable[str]) -> set[str]:
    """Which of some metrics, such as ``ndcg@10``, tables show: all that were asked for; of RecBole's default two."""
    found = {metric.partition("@")[0] for metric in metrics} - {"fairness"}
    return {"hit", "ndcg"} if found == DEFAULT else found


def comparison_table(result: dict) -> pd.DataFrame:
    """One row a figure, one column a model.

    Args:
        result (dict): of ``run_unlearn``.

    Returns:
        pandas.DataFrame of strings.
    """
    models = result["models"]
    rows = {}
    for protocol, figures in next(iter(models.values())).get("ranking", {}).items():
        metrics = shown(figures)
        for metric in figures:
            if metric.partition("@")[0] in metrics:
                rows[f"{html_report.metric_title(metric)} ({protocol})"] = {
                    model: f"{values['ranking'][protocol][metric]:.4f}" for model, values in models.items()
                }
    if html_report.judged(result):
        rows["forget-set AUC"] = {model: f"{values['forget_auc']:.4f}" for model, values in models.items()}
    for name in next(iter(models.values())).get("exposure", ()):
        rows[f"spam {name}"] = {model: f"{values['exposure'][name]:.4f}" for model, values in models.items()}
    if others := result.get("churn"):
        rows["top 10 of others changed"] = {m: f"{100 * others[m]:.1f} %" for m in models if m in others}
    rows["seconds"] = {
        model: f"{values['seconds']:.3g}" if values["seconds"] is not None else "" for model, values in models.items()
    }
    if result["speed_up"]:
        rows["speed-up over Retrain"] = {"unlearned": f"{result['speed_up']:.0f}x"}
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(models)).fillna("")
    if "retrained" in models:
        differences = {}
        for row in table.index:
            try:
                differences[row] = f"{float(table.at[row, 'unlearned']) - float(table.at[row, 'retrained']):+.4f}"
            except ValueError:
                differences[row] = ""
        differences["seconds"] = ""
        table["unlearned - retrained"] = pd.Series(differences)
    return table


NOT_JUDGED = (
    "Not judged (evaluate: none): this run does not tell how the models rank, nor how close the forgetting came."
)
NOT_KEPT = (
    "The original is purged: figures of the models were shown when this ran, and are not kept, since they could be "
    "compared with those of candidates."
)
UNTRAINED = "No training interaction was among what was asked for."
SPAM_EXPOSURE = "Spam exposure@K: share of the users, without the spam's own, with a promoted item in their top K."


def markdown(result: dict) -> str:
    """The result as a Markdown page."""
    table = comparison_table(result).to_markdown(disable_numparse=True, colalign=("left",))
    forget = result["forget_set"]
    solve = result["unlearning"]
    lines = [
        f"# {result['model']} on {result['dataset']}: {forget['interactions']} interactions forgotten",
        "",
        f"{forget['interactions']} of {forget['of']} training interactions ({forget['kind']}), "
        f"{forget['users']} users, "
        f"{forget['items']} items.",
        "",
        table,
        "",
        result["verdict"] or _untold(result),
        "",
        *([result["paired"]["sentence"], ""] if "paired" in result else []),
        *([SPAM_EXPOSURE, ""] if forget["kind"] == "spam" else []),
        *([cohort, ""] if (cohort := _cohort(result)) else []),
        f"{_how(solve)}; kernels loaded in {solve['setup_seconds']:.2g} s before the request.",
        "",
        guard_sentence(result),
        "",
        *(["Nothing is held out for the test: no ranking is measured.", ""] if not _ranked(result) else []),
        *(_drift(result["stream"]) if "stream" in result else []),
        *([_removed(result["lines"]), ""] if "lines" in result else []),
        *([f"Left: {result['left']}.", ""] if "left" in result else []),
    ]
    return "\n".join(lines)


def _removed(lines):
    before = f", and of {lines['earlier']} forgotten before" if lines["earlier"] else ""
    return f"Removed from the data set: the lines of {lines['requested']} interactions that were asked for{before}."


def _untold(result):
    if not result["forget_set"]["interactions"]:
        return UNTRAINED
    if html_report.judged(result):
        return ""
    return NOT_JUDGED if result["settings"].get("evaluate") == "none" else NOT_KEPT


def _ranked(result):
    return any(each.get("ranking", True) for each in result["models"].values())


def _cohort(result):
    """That a request was no less than retraining, and what it cost, where it was of more than `COHORT` of all."""
    forget, unlearning = result["forget_set"], result["unlearning"]
    if not (unlearning.get("exact") and forget["interactions"] > COHORT * forget["of"]):
        return ""
    share, seconds = forget["interactions"] / forget["of"], result["models"]["unlearned"]["seconds"]
    took = result["models"].get("original", {}).get("seconds")
    original = f", where training the original, with validation, took {took:.3g}" if took else ""
    return (
        f"This is retraining: {share:.0%} of the training interactions are forgotten, and no less leads there. It took "
        f"{seconds:.3g} s{original}. The number of epochs and other settings were chosen with them: choose anew."
    )


def guard_sentence(result: dict) -> str:
    """In words, what was checked of whether the log tells the training."""
    found = result["guard"]
    sentence = found["sentence"][:1].upper() + found["sentence"][1:]
    seconds = f", checked in {found['seconds']:.2g} s once for this log" if found["seconds"] else ""
    limit = f" (at most {found['limit']:g} is allowed{seconds})" if found["distance"] is not None else ""
    return f"Guard: {sentence}{limit}."


def html(result: dict) -> str:
    """The result as an HTML page of its own, with pictures."""
    return html_report.page(result, comparison_table(result), _how(result["unlearning"]), _cohort(result))


def _drift(stream):
    """Comparisons with retraining along a stream, and the advice that follows."""
    lines = []
    if stream["drift"]:
        names = html_report.drift_names(stream["drift"][0])
        columns = {f"{key}_{of}": f"{name} {of}" for key, name in names.items() for of in ("unlearned", "retrained")}
        counts = ["requests", "forgotten"]
        table = pd.DataFrame(stream["drift"])[[*counts, *columns]].rename(columns=columns)
        table = table.astype(dict.fromkeys(counts, object))  # else they are floats beside floats
        lines += ["Drift:", "", table.to_markdown(index=False, floatfmt=".4f"), ""]
    if stream["empty"]:
        lines += [f"{stream['empty']} requests named nothing, or nothing any more, to forget.", ""]
    return lines + ([stream["retrain"].capitalize() + ".", ""] if stream["retrain"] else [])


def _how(unlearning):
    if "requests" in unlearning:
        return (
            f"Method: {unlearning['method']}, {unlearning['requests']} requests in {unlearning['batches']} batches of "
            f"{unlearning['median_seconds']:.2g} s (median; longest {unlearning['longest_seconds']:.2g} s), "
            f"exact in {unlearning['replays_of_all_rows']} of them, "
            + ("and at the end" if unlearning.get("exact") else "approximate at the end")
            + _chosen(unlearning)
        )
    if unlearning.get("unchanged"):
        stays = "" if unlearning["exact"] else "; the model stays approximate, as it was before"
        return f"Method: none: {unlearning['chosen']}{stays}"
    if unlearning.get("exact"):
        return (
            f"Method: exact: training of {unlearning['epochs']} epochs again without the forget set "
            f"({unlearning['triples_replayed']:,} triples), by "
            + ("the original's random numbers" if unlearning["coupling"] == "paired" else "new random numbers")
            + _chosen(unlearning)
        )
    if "rows_replayed" in unlearning:
        return (
            f"Method: approximate: replay of {'all ' if unlearning['all_rows'] else ''}"
            f"{unlearning['rows_replayed']} embedding rows "
            f"over {unlearning['epochs']} epochs "
            f"({unlearning['triples_replayed']:,} triples)"
        )
    if unlearning["method"] == "reoptimise":
        return (
            f"Method: re-optimisation in {unlearning['iterations']} Newton steps ({unlearning['products']} Hessian "
            f"products); mean gradient norm {unlearning['gradient_norm_before']:.1e} before, "
            f"{unlearning['gradient_norm']:.1e} after"
            + ("" if unlearning["converged"] else ": above the tolerance, no certified minimum")
        )
    if "residual" in unlearning:
        solve = f"{unlearning['iterations']} iterations, relative residual {unlearning['residual']:.1e}" + (
            ", negative curvature met" if unlearning["negative_curvature"] else ""
        )
    else:
        solve = f"{unlearning['iterations']} batches, {unlearning['change']:.0%} from the mean of its last iterates"
    taken = f"steps along {len(unlearning['stops'])} snapshots of the training" if "stops" in unlearning else "step"
    held, renewed = (unlearning.get(key, 0) for key in ("rows_shortened", "users_renewed"))
    return (
        f"Method: influence {taken}; linear solve: {solve}"
        + (f"; {held} rows were held where they went farther than training could have moved them" if held else "")
        + (f"; {renewed} users with nothing left are as new" if renewed else "")
        + (f"; approximated: {'; '.join(unlearning['approximated'])}" if unlearning.get("approximated") else "")
    )


def _chosen(unlearning):
    """That validation chose the epoch, where it did."""
    if "epochs_trained" not in unlearning:
        return ""
    return f"; {unlearning['chosen'].removeprefix('asked for: ')}, as retraining does"


FIDELITY_COLUMNS = {
    "forget_auc": "forget-set AUC",
    "forget_auc_z": "AUC, sd from Retrain",
    "of_ceiling": "correlation / ceiling",
    "correlation": "correlation",
    "mean_change": "mean change",
    "ks_ratio": "KS / floor",
    "wasserstein_ratio": "Wasserstein / floor",
    "membership_auc": "membership AUC",
    "membership_auc_z": "membership, sd",
    "overlap_affected": "top-10 overlap, affected",
    "overlap_unaffected": "unaffected",
    "hit@10": "HR@10",
    "hit@10_z": "HR, sd",
    "ndcg@10": "NDCG@10",
    "ndcg@10_z": "NDCG, sd",
    "seconds": "seconds",
}


def fidelity_table(results: dict) -> pd.DataFrame:
    """One row a method.

    Args:
        results (dict): of `recbole_unlearn.comparison.fidelity.fidelity`.

    Returns:
        pandas.DataFrame of strings.
    """
    rows = {}
    for name, figures in results.items():
        row = {}
        for key, title in FIDELITY_COLUMNS.items():
            value = figures.get(key)
            if value is None or value != value:
                row[title] = "–"
            elif key.endswith("_z"):
                row[title] = "" if name == "retrained" else f"{value:+.1f}"
            elif key == "seconds":
                row[title] = f"{value:.3g}"
            elif f"{key}_sd" in figures and key != "correlation":
                row[title] = f"{value:.4f} ± {figures[f'{key}_sd']:.4f}"
            else:
                row[title] = f"{value:.3f}"
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def compiled(agreement: float | None) -> str:
    """What a page says of models that were trained by compiled kernels.

    Args:
        agreement: how far these ended from RecBole's trainer; None: the latter trained.
    """
    if agreement is None:
        return ""
    return (
        f" Trained by the compiled kernels, which ended {agreement:.1e} of the way from RecBole's own trainer after "
        "five epochs (compared before the first model); seconds of training are theirs."
    )


def fidelity_markdown(results: dict, title: str) -> str:
    """The table, and what it is to be read against, as a Markdown section."""
    first = results["retrained"]
    return (
        f"## {title}\n\n"
        f"Noise ceiling of the correlation {first['ceiling']:.3f}; true mean change {first['true_mean_change']:+.3f}; "
        f"top-10 overlap of two retrained models {first['overlap_affected_floor']:.3f} (affected users), "
        f"{first['overlap_unaffected_floor']:.3f} (unaffected).{compiled(first.get('agreement'))}\n\n"
        f"{fidelity_table(results).to_markdown(disable_numparse=True)}\n"
    )


def latex(frame: pd.DataFrame) -> str:
    """A DataFrame of strings as a LaTeX tabular."""
    lines = [["", *frame.columns], *([name, *row] for name, row in zip(frame.index, frame.values, strict=True))]
    body = "\n".join(
        " & ".join(line).replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$") + r" \\" for line in lines
    )
    return f"\\begin{{tabular}}{{l{'r' * len(frame.columns)}}}\n{body}\n\\end{{tabular}}\n"


def write_fidelity(results: dict, title: str, folder: Path, name: str = "fidelity") -> str:
    """Write NAME.md, .csv, .tex and .json; returns the Markdown."""
    page, frame = fidelity_markdown(results, title), fidelity_table(results)
    for ending, text in (
        ("md", page),
        ("csv", frame.to_csv()),
        ("tex", latex(frame)),
        ("json", json_text(results)),
    ):
        write_atomically(folder / f"{name}.{ending}", text.encode())
    return page


READ_COMPARED = (
    "Mean ± standard deviation over seeds (difference to Retrain's mean). For the original, Retrain and other models, "
    "request is the time of their training. One thread each; these train side by side, a core each, methods one after "
    "the other; each time is from when its figure was first measured, so that ratios are rough where other work ran on "
    "the machine. Forget-set AUC: near Retrain's is good, above it is "
    "not forgotten, below it over-forgotten."
)


def compared_table(figures: dict, cutoff: int = 10, refused: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row a method or model; ranking metrics at one cutoff.

    Args:
        figures (dict): of `recbole_unlearn.comparison.figures.summary`.
        cutoff (int): K.
        refused: methods that are left out, and why.

    Returns:
        pandas.DataFrame of strings: mean ± standard deviation over seeds (difference to Retrain's mean).
    """
    of_ranking = [key.split("|") for key in figures["retrain"] if "|" in key and not key.startswith("forget_auc|")]
    metrics, columns = shown(metric for metric, _ in of_ranking) | {"fairness"}, {}
    for metric, protocol in of_ranking:
        name, _, k = metric.partition("@")
        if name in metrics and k in ("", str(cutoff)):
            columns[f"{metric}|{protocol}"] = f"{html_report.metric_title(metric)} ({protocol})"
    columns |= {"forget_auc": "forget-set AUC", "forget_auc|z": "AUC, sd from Retrain"}
    if any("forget_auc|original" in row for row in figures.values()):
        columns["forget_auc|original"] = "before, where the method has its own model"
    columns |= {"prepare_seconds": "prepare, s", "seconds": "request, s", "speed_up": "times faster than Retrain"}
    rows = {
        name: {title: _compared_cell(row, key, name) for key, title in columns.items()} for name, row in figures.items()
    }
    rows |= {name: {title: "refused" * (not n) for n, title in enumerate(columns.values())} for name in refused or ()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _compared_cell(row, key, name):
    if key == "forget_auc|z":
        z = row["forget_auc"].get("z")
        return "" if z is None or name == "retrain" else f"{z:+.1f}"
    if key not in row:
        return ""
    mean, sd, delta = (row[key].get(part) for part in ("mean", "sd", "delta"))
    if "seconds" in key or key == "speed_up":
        return f"{mean:.3g}" if mean < 1000 else f"{mean:.0f}"
    text = f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")
    return text + (f" ({delta:+.4f})" if delta is not None and name != "retrain" else "")


def compared_markdown(results: dict, summaries: dict, title: str, cutoff: int) -> str:
    """All forget sets' tables, and how to read them, as a Markdown page.

    Args:
        results (dict): of `recbole_unlearn.comparison.figures.Comparison.run`.
        summaries (dict): name of forget set -> (number of interactions, `recbole_unlearn.comparison.figures.summary`).
    """
    lines = [f"# {title}", ""]
    for name, (interactions, figures) in summaries.items():
        told = results["sets"][name]
        table = compared_table(figures, cutoff, told["refused"]).to_markdown(disable_numparse=True)
        lines += [f"## Forget {name} ({interactions} interactions)", "", table, ""]
        reasons = [f"Refused: {why}." for why in told["refused"].values()]
        lines += [line for note in (*reasons, *told["notes"]) for line in (note, "")]
    lines += [READ_COMPARED + compiled(results.get("agreement")), ""]
    return "\n".join(lines)


def write_compared(results: dict, summaries: dict, title: str, folder: Path, cutoff: int) -> str:
    """Write comparison.md, .csv (every figure), .tex and .json (every seed); returns the Markdown.

    Args:
        results (dict): of `recbole_unlearn.comparison.figures.Comparison.run`.
        summaries: as for `compared_markdown`.
    """
    page = compared_markdown(results, summaries, title, cutoff)
    every = [
        {"forget set": name, "interactions": count, "method": method, "figure": figure, **values}
        for name, (count, figures) in summaries.items()
        for method, row in figures.items()
        for figure, values in row.items()
    ]
    refused = {name: told["refused"] for name, told in results["sets"].items()}
    tabulars = [f"% forget {n}\n{latex(compared_table(f, cutoff, refused[n]))}" for n, (_, f) in summaries.items()]
    for ending, text in (
        ("md", page),
        ("csv", pd.DataFrame(every).to_csv(index=False)),
        ("tex", "\n".join(tabulars)),
        ("json", json_text({**results, "title": title})),
    ):
        write_atomically(folder / f"comparison.{ending}", text.encode())
    return page


def write(result: dict, folder: Path) -> None:
    """Write result.json, result.md and report.html."""
    for name, text in zip(RESULTS, (json_text, markdown, html), strict=True):
        write_atomically(folder / name, text(result).encode())
