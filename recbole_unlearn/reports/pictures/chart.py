"""What a picture shows, whatever draws it: panels, axes, series, and how a series looks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How to tell a series from the others: by colour, and without it by marker and dashes.

    Attributes:
        colour (str): legible on white and on near black (at least 3:1), so that one palette serves both.
        marker (str): key of the drawers' marker tables.
        dash (str): lengths of dash and gap, in pixels; empty: solid.
    """

    colour: str
    marker: str
    dash: str = ""


LOOKS = (
    Look("#0a74c4", "circle"),
    Look("#d1580c", "square", "7 3"),
    Look("#808488", "diamond", "2 3"),
    Look("#0c9267", "triangle", "9 3 2 3"),
    Look("#b45fc7", "triangle-down", "4 2"),
    Look("#a67c00", "cross", "12 3"),
    Look("#d4477a", "plus", "2 2"),
    Look("#7a6ff0", "circle-open", "9 3"),
    Look("#6f8f2f", "square-open", "5 2 2 2"),
    Look("#9a6b52", "diamond-open", "3 3"),
    Look("#2a8f9c", "triangle-open", "1 2"),
    Look("#c9504a", "triangle-down-open", "8 2 2 2 2 2"),
    Look("#5a7d9a", "pentagon", "3 2"),
    Look("#9c6f9a", "hexagon", "6 2"),
    Look("#5f8a5a", "star", "10 2 2 2"),
)
# A method looks the same in every picture.
PLACES = {
    "unlearned": 0, "unlearning": 0, "ours": 0, "retrained": 1, "retraining": 1, "retrain": 1, "original": 2,
    "training": 2, "bpr": 2, "sisa": 3, "receraser": 4,
    "ultrare": 5, "ubpr": 6, "scif": 7, "ifru": 8, "rrl": 9, "gradient_ascent": 10, "fine_tune": 11,
    "gif": 12, "ceu": 13, "certified": 14,
    "r": 1, "o": 2, "s": 3, "e": 4,  # of a pair of models, as the paper writes them
}  # fmt: skip


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A `Look` for each name: the usual one of methods that have one and meet nobody else's, else one still free."""
    taken, result = set(), {}
    for name in names:
        place = PLACES.get(name.lower())
        if place is not None and place not in taken:
            taken.add(place)
            result[name] = LOOKS[place]
    free = [look for place, look in enumerate(LOOKS) if place not in taken]
    for number, name in enumerate(name for name in names if name not in result):
        result[name] = free[number % len(free)] if free else LOOKS[number % len(LOOKS)]
    return result


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label (str): what, and in which unit.
        log (bool): logarithmic.
        limits ((float, float), optional): default: what the series need.
        categories (tuple of str, optional): names of the places 0, 1, 2...; then it is no scale.
        marks (bool): whether numbers stand along it; False where they mean nothing, as in t-SNE.
        percent (bool): whether shares are shown as per cent.
    """

    label: str = ""
    log: bool = False
    limits: tuple[float, float] | None = None
    categories: tuple[str, ...] | None = None
    marks: bool = True
    percent: bool = False

    def text(self, value: float) -> str:
        """A value as it stands along the axis."""
        return f"{100 * value:.6g} %" if self.percent else f"{value:,.6g}"


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name (str): in the legend.
        kind (str): 'line', 'curve' (a line with markers), 'points', or 'bars' (horizontal, from the axis to x).
        low, high (sequences, optional): ends of the spread of each y; for bars of each x.
        fill (bool): whether a line is filled down to the axis.
        size (float): of the markers, 1 being the usual one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Look
    kind: str = "curve"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    fill: bool = False
    size: float = 1


@dataclass(frozen=True)
class Chart:
    """One panel.

    Attributes:
        title (str): may be empty.
        alt (str): what it shows, in words, for those who cannot see it.
        level (float, optional): y of a thin line to compare with.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    alt: str
    level: float | None = None

    @property
    def legend(self) -> list[str]:
        """Names of the series, each once; empty where nothing needs a legend."""
        names = list(dict.fromkeys(series.name for series in self.series))
        return names if len(names) > 1 and not self.y.categories else []

    def limits(self, which: str) -> tuple[float, float]:
        """(low, high) of the 'x' or the 'y' axis."""
        axis = getattr(self, which)
        if axis.limits:
            return axis.limits
        if axis.categories:
            return -0.6, len(axis.categories) - 0.4
        bars = any(series.kind == "bars" for series in self.series)
        values = [value for series in self.series for value in getattr(series, which)]
        if (which == "x") == bars:  # the spread is of x for bars, of y for all others
            values += [v for series in self.series for v in (*(series.low or ()), *(series.high or ()))]
        if which == "y" and self.level is not None:
            values.append(self.level)
        values = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)] or [1.0]
        low, high = min(values), max(values)
        if axis.log:
            low, high = math.log10(low), math.log10(high)
            edge = 0.06 * (high - low) or 0.5
            return 10 ** (math.floor(low - 0.3) if bars else low - edge), 10 ** (high + edge)
        if bars:
            low = min(low, 0.0)
        edge = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return (low if bars else low - edge), high + edge


@dataclass(frozen=True)
class Picture:
    """A titled set of panels; ``columns`` of them side by side where there is room."""

    title: str
    panels: Sequence[Chart]
    columns: int = 1

    @property
    def legend(self) -> list[str]:
        """Names of a legend that serves all of several panels; empty where each needs, or has, its own."""
        legends = [chart.legend for chart in self.panels]
        return legends[0] if len(legends) > 1 and all(each == legends[0] for each in legends) else []


def ticks(low: float, high: float, log: bool = False, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most about ``most``."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last - first >= 1:
            step = max(1, -(-(last - first) // most))
            return [10.0**power for power in range(first, last + 1, step)]
        found = [d * 10.0**power for power in range(first - 1, last + 2) for d in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        return found if len(found) > 1 else [low, high]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]
