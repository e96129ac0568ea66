"""Results as tables that people can paste."""

import json

import pandas as pd

from recbole_unlearn.data.triple_log import write_atomically


def comparison_table(result, metrics=("hit", "ndcg")):
    """One row a figure, one column a model.

    Args:
        result (dict): of ``run_unlearn``.

    Returns:
        pandas.DataFrame of strings.
    """
    models = result["models"]
    rows = {}
    for protocol in next(iter(models.values()))["ranking"]:
        for metric in next(iter(models.values()))["ranking"][protocol]:
            if metric.split("@")[0] in metrics:
                name = metric.upper().replace("HIT", "HR")
                rows[f"{name} ({protocol})"] = {
                    model: f"{values['ranking'][protocol][metric]:.4f}" for model, values in models.items()
                }
    rows["forget-set AUC"] = {model: f"{values['forget_auc']:.4f}" for model, values in models.items()}
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


def markdown(result):
    """The result as a Markdown page."""
    table = comparison_table(result).to_markdown(disable_numparse=True, colalign=("left",))
    forget = result["forget_set"]
    solve = result["unlearning"]
    lines = [
        f"# {result['model']} on {result['dataset']}: {forget['interactions']} interactions forgotten",
        "",
        f"{forget['interactions']} of {forget['of']} training interactions ({forget['kind']}), {forget['users']} users, "
        f"{forget['items']} items.",
        "",
        table,
        "",
        result["verdict"] or "",
        "",
        f"{_how(solve)}; kernels loaded in {solve['setup_seconds']:.2g} s before the request.",
        "",
    ]
    return "\n".join(lines)


def _how(unlearning):
    if unlearning["method"] == "replay":
        return (
            f"Method: replay of {unlearning['rows_replayed']} embedding rows over {unlearning['epochs']} epochs "
            f"({unlearning['triples_replayed']:,} triples)"
        )
    return (
        f"Method: influence step; linear solve: {unlearning['iterations']} iterations, relative residual "
        f"{unlearning['residual']:.1e}" + (", negative curvature met" if unlearning["negative_curvature"] else "")
    )


def write(result, folder):
    """Write result.json and result.md."""
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    write_atomically(folder / "result.md", markdown(result).encode())
