"""The pictures themselves: from figures, as plain values, to charts.

Where a value may come with its spread over seeds, it is either a number or a pair (mean, standard deviation).
"""

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from recbole_unlearn.reports.pictures.chart import LOOKS, Axis, Chart, Picture, Series, looks

RANK_BINS = 20
Value = float | tuple[float, float | None] | list[float]
Curves = Mapping[str, Mapping[float, Value]]  # name -> {x: value}


def rank_histogram(counts: Mapping[str, Sequence[int]]) -> Picture:
    """How the forgotten interactions rank, in each model.

    Args:
        counts (dict): model -> number of forgotten interactions in each of equally wide bins of the rank percentile.
    """
    looked, series = looks(counts), []
    for name, each in counts.items():
        series.append(Series(name, *_outline(each), looked[name], "line", fill=name == "unlearned"))
    top = max((count / max(sum(each), 1) for each in counts.values() for count in each), default=1)
    means = ", ".join(f"{name} {_middle(each):.2f}" for name, each in counts.items())
    chart = Chart(
        "",
        Axis("rank percentile of the forgotten item", limits=(0, 1), percent=True),
        Axis("share of the forgotten", limits=(0, 1.08 * top or 1), percent=True),
        series,
        f"Histogram of where forgotten items rank among the items that their users never had; means about {means}.",
    )
    return Picture("Where the forgotten items rank", [chart])


def pair_histograms(pairs: Mapping[str, Sequence[float]], floors: Mapping[str, Sequence[float]]) -> Picture:
    """How well each forgotten pair gives its deletion away, one panel a method, beside retrained models among them.

    Args:
        pairs (dict): method -> the attack's AUC of each pair, .5 being chance.
        floors (dict): method -> the same of models that were retrained, against others of them.
    """

    def outline(values):
        counts = [0] * RANK_BINS
        for value in values:
            counts[min(int(value * RANK_BINS), RANK_BINS - 1)] += 1
        return _outline(counts)

    drawn = {name: outline(values) for name, values in pairs.items()}
    bases = {name: outline(floors[name]) for name in pairs}
    top = 1.08 * max(max(y) for _, y in (*drawn.values(), *bases.values()))
    panels = [
        Chart(
            name,
            Axis("AUC of the likelihood-ratio attack on a pair", limits=(0, 1)),
            Axis("share of the forgotten pairs", limits=(0, top), percent=True),
            [
                Series("retrained", *bases[name], LOOKS[1], "line"),
                Series("unlearned", *outlined, LOOKS[0], "line", fill=True),
            ],
            f"{name}: median AUC {median(pairs[name]):.2f}, of retrained models {median(floors[name]):.2f}.",
        )
        for name, outlined in drawn.items()
    ]
    return Picture("Can a forgotten pair be told from one that was never there?", panels, 3)


def _outline(counts):
    """(x, y) of a histogram's outline over 0 to 1: up and down at every edge."""
    n, total = len(counts), max(sum(counts), 1)
    edges = [k / n for k in range(n + 1) for _ in (0, 1)]
    return edges, [0, *(count / total for count in counts for _ in (0, 1)), 0]


def _middle(counts):
    n = len(counts)
    return sum((k + 0.5) / n * count for k, count in enumerate(counts)) / max(sum(counts), 1)


def embedding_map(maps: Mapping[str, Mapping]) -> Picture:
    """t-SNE of one user, some of its positives and their negatives, one panel a model (Figure 4 of the paper).

    Args:
        maps (dict): model -> {"user": [x, y], "positives": [[x, y], ...], "negatives": [[x, y], ...]}, each model's
            by a t-SNE of its own: see `recbole_unlearn.evaluation.geometry.tsne_map`.
    """
    kinds = {
        "negatives": ("its negatives", LOOKS[2]),
        "positives": ("forgotten items", LOOKS[1]),
        "user": ("user", LOOKS[0]),
    }
    panels = []
    for model, points in maps.items():
        series = []
        for kind, (name, look) in kinds.items():
            places = [points[kind]] if kind == "user" else points[kind]
            size = 1.6 if kind == "user" else 1
            series.append(Series(name, [x for x, _ in places], [y for _, y in places], look, "points", size=size))
        counts = f"{len(points['positives'])} items, {len(points['negatives'])} negatives"
        alt = f"t-SNE map of the {model} model: one user, {counts}."
        # a panel is wider than high: with these limits a step is as long across as up
        x, y = (Axis(limits=limits, marks=False) for limits in ((-0.4, 1.4), (-0.04, 1.04)))
        panels.append(Chart(model, x, y, series, alt))
    return Picture("A forgotten user, three of its items and their negatives (t-SNE)", panels, len(panels))


def pnpr(values: Mapping[str, Sequence[float]], most: int = 12) -> Picture:
    """Ratio of the distances to negatives and to positives, user by user (Figure 5 of the paper).

    Args:
        values (dict): model -> PNPR of each user, the same users in the same order; unnamed.
        most (int): users shown, those at equal steps in the order of the first model's values.
    """
    first = next(iter(values.values()))
    order = sorted(range(len(first)), key=lambda user: -first[user])
    shown = [
        order[round(k * (len(order) - 1) / max(min(most, len(order)) - 1, 1))] for k in range(min(most, len(order)))
    ]
    looked = looks(values)
    series = [
        Series(name, list(range(1, len(shown) + 1)), [each[user] for user in shown], looked[name], "points")
        for name, each in values.items()
    ]
    means = ", ".join(f"{name} {sum(each) / len(each):.3f}" for name, each in values.items())
    chart = Chart(
        "",
        Axis(f"users, by their value in the {next(iter(values))} model", limits=(0.4, len(shown) + 0.6), marks=False),
        Axis("PNPR (1: no difference)"),
        series,
        f"Distance to negatives over distance to forgotten items, {len(shown)} of {len(first)} users. Means: {means}.",
        level=1,
    )
    return Picture("Distance of the forgotten items from their users", [chart])


def convergence(
    histories: Mapping[str, Sequence[float]], tolerance: float | None = None, label: str = "relative residual"
) -> Picture:
    """How a solver came down, iteration by iteration.

    Args:
        histories (dict): name -> value after each iteration.
        tolerance (float, optional): where it was to stop.
    """
    looked = looks(histories)
    series = [
        Series(name, list(range(1, len(each) + 1)), list(each), looked[name], "line" if len(each) > 40 else "curve")
        for name, each in histories.items()
    ]
    ends = ", ".join(f"{name}: {each[-1]:.1e} after {len(each)} iterations" for name, each in histories.items() if each)
    longest = max(len(each) for each in histories.values())
    x = Axis("iteration", limits=(0.5, longest + 0.5))
    chart = Chart("", x, Axis(label, log=True), series, f"Convergence of the solver. {ends}.", level=tolerance)
    return Picture("Convergence of the solver", [chart])


def running_times(
    seconds: Mapping[str, float | list[float] | tuple[float, ...]], title: str = "Running time"
) -> Picture:
    """A bar a method, from the fastest, on a logarithmic scale (Figure 3 of the paper, over all ratios).

    Args:
        seconds (dict): method -> seconds, or a list of them (over seeds or ratios): median and range are drawn.
    """
    lists = {name: each if isinstance(each, (list, tuple)) else [each] for name, each in seconds.items()}
    order = sorted(lists, key=lambda name: -median(lists[name]))
    looked = looks(lists)
    series = [
        Series(name, [median(lists[name])], [place], looked[name], "bars", [min(lists[name])], [max(lists[name])])
        for place, name in enumerate(order)
    ]
    middle = {name: median(lists[name]) for name in reversed(order)}
    names = tuple(f"{name} {middle[name]:.3g} s" for name in order)
    alt = f"{title}: " + ", ".join(f"{name} {value:.3g} s" for name, value in middle.items()) + "."
    return Picture(title, [Chart("", Axis("seconds, logarithmic", log=True), Axis(categories=names), series, alt)])


def _curves(values, look_of, title, x, y):
    """One chart: a curve a name; ``values``: name -> {x: value}."""
    series = []
    for name, each in values.items():
        pairs = {place: value if isinstance(value, (list, tuple)) else (value, None) for place, value in each.items()}
        mean = [value for value, _ in pairs.values()]
        spread = all(sd is not None for _, sd in pairs.values())
        low = [value - sd for value, sd in pairs.values()] if spread else None
        high = [value + sd for value, sd in pairs.values()] if spread else None
        series.append(Series(name, list(pairs), mean, look_of[name], "curve", low, high))
    ranges = ", ".join(f"{s.name} {s.y[0]:.4g} to {s.y[-1]:.4g}" for s in series if len(s.y))
    return Chart(title, x, y, series, f"{y.label} against {x.label}{', ' + title if title else ''}: {ranges}.")


def cutoff_curves(values: Mapping[str, Curves], metric: str = "NDCG") -> Picture:
    """HR@K or NDCG@K of several methods, one panel a forget ratio (Figures 1 and 2 of the paper).

    Args:
        values (dict): panel's title, such as '0.010 %' -> method -> {K: value}.
    """
    looked = looks(list(dict.fromkeys(method for methods in values.values() for method in methods)))
    panels = [_curves(methods, looked, ratio, Axis("K"), Axis(f"{metric}@K")) for ratio, methods in values.items()]
    return Picture(f"{metric}@K by forget ratio", panels, min(3, len(panels)))


def ratio_curves(values: Curves, label: str, title: str, log: bool = False) -> Picture:
    """Anything against the forget ratio (Figure 3: running time, with ``log=True``).

    Args:
        values (dict): method -> {forget ratio in per cent: value}.
    """
    return Picture(title, [_curves(values, looks(values), "", Axis("forget ratio (%)"), Axis(label, log=log))])


def weight_distances(values: Mapping[str, Curves], scores: Collection[str] = ()) -> Picture:
    """l2 distances between the weights of models (Figure 6 of the paper), logarithmic unless one is 0.

    Args:
        values (dict): panel's title -> pair, such as 'U/O' -> {forget ratio in per cent: distance}. A pair looks like
            the first of its two models, which differ within a panel.
        scores: titles of the panels that hold root mean squares of differences of scores instead.
    """
    looked = looks(list(dict.fromkeys(pair.split("/")[0] for pairs in values.values() for pair in pairs)))
    looked = {pair: looked[pair.split("/")[0]] for pairs in values.values() for pair in pairs}
    found = [value for pairs in values.values() for each in pairs.values() for value in each.values()]
    log = all((value[0] if isinstance(value, (list, tuple)) else value) > 0 for value in found)
    x = Axis("forget ratio (%)")
    panels = []
    for title, pairs in values.items():
        measured = "difference of scores" if title in scores else "l2 distance of the weights"
        panels.append(_curves(pairs, looked, title, x, Axis(measured, log=log)))
    return Picture("Weight distances", panels, min(2, len(panels)))


def negatives_curves(values: Mapping[str, Curves]) -> Picture:
    """HR and NDCG against the number of negatives an interaction (Figure 7 of the paper), one panel a metric.

    Args:
        values (dict): metric, such as 'NDCG@10' -> method -> {number of negatives: value}.
    """
    panels = [
        _curves(methods, looks(methods), "", Axis("negatives an interaction"), Axis(metric))
        for metric, methods in values.items()
    ]
    return Picture("Number of negatives", panels, min(2, len(panels)))


def drift(comparisons: Sequence[Mapping[str, float]], key: str, label: str) -> Picture:
    """A stream's model beside retrained ones, on the way.

    Args:
        comparisons (list of dict): of `recbole_unlearn.runs.stream.drift`, with ``requests``.
        key (str): figure, such as 'forget_auc'.
    """
    values = {
        model: {each["requests"]: each[f"{key}_{model}"] for each in comparisons}
        for model in ("unlearned", "retrained")
    }
    return Picture(
        f"{label} along the stream", [_curves(values, looks(values), "", Axis("requests served"), Axis(label))]
    )


def stream_times(requests: Sequence[int], seconds: Sequence[float]) -> Picture:
    """Seconds of each batch of a stream.

    Args:
        requests (list of int): requests in each batch.
        seconds (list of float)
    """
    served = [sum(requests[: n + 1]) for n in range(len(requests))]
    series = [Series("unlearned", served, list(seconds), LOOKS[0], "points")]
    alt = f"Seconds of each of {len(seconds)} requests: median {median(seconds):.3g}, longest {max(seconds):.3g}."
    return Picture("Time of each request", [Chart("", Axis("requests served"), Axis("seconds", log=True), series, alt)])
