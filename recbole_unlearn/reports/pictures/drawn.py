"""Pictures drawn by matplotlib: as SVG, in the colours of the page around them, and as PNG.

A panel is drawn for the width of a phone, so that its text is readable there; wider screens show more of them side by
side.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from recbole_unlearn.reports.pictures.chart import Axis, Chart, Picture, Series, ticks
from recbole_unlearn.storage.files import write_atomically

if TYPE_CHECKING:  # it is slow to import, so that only those who draw wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PLOT_HEIGHT = 340, 190
KEPT = 16  # panels: a run's page is written twice, the second time with its audit record
LETTER = 6.8  # mean width of a letter at 11 px, in pixels: matplotlib's font, wider than most

LIGHT = {"ink": "#1c2127", "faint": "#8b939c", "paper": "#ffffff"}
DARK = {"ink": "#e6e9ec", "faint": "#6c757e", "paper": "#14181d"}


def _properties(theme: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in theme.items())


STYLE = f""":root{{color-scheme:light dark;{_properties(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_properties(DARK)}}}}}
.chart{{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;stroke-linejoin:round}}
"""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11, "xtick.major.pad": 5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), LIGHT["ink"]),
    "axes.edgecolor": LIGHT["faint"], "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": LIGHT["faint"], "grid.alpha": 0.35, "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.handlelength": 2.2,
}  # fmt: skip
SPACE, HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
COLOURS = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle": "^",
    "triangle-down": "v",
    "cross": "x",
    "plus": "+",
    "pentagon": "p",
    "hexagon": "h",
    "star": "*",
}

_panels: dict[bytes, str] = {}


def panel(chart: Chart) -> str:
    """One chart as an ``<svg>`` element for a page that holds `STYLE`; it has no ids, so that a page can hold many."""
    key = pickle.dumps(chart)
    if key not in _panels:
        if len(_panels) == KEPT:
            _panels.clear()
        _panels[key] = ElementTree.tostring(_svg([chart], "", 1, chart.alt), "unicode")
    return _panels[key]


def svg(picture: Picture) -> str:
    """A picture as an SVG file of its own, in light or dark as the reader prefers."""
    alt = " ".join([picture.title + ".", *(chart.alt for chart in picture.panels)])
    root = _svg(picture.panels, picture.title, picture.columns, alt)
    _, _, width, height = root.get("viewBox", "").split()
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    style, paper = ElementTree.Element("style"), ElementTree.Element("rect")
    style.text = STYLE
    paper.attrib |= {"width": "100%", "height": "100%", "fill": "var(--paper)"}
    root[:0] = [style, paper]
    return ElementTree.tostring(root, "unicode") + "\n"


def write_png(picture: Picture, path: Path | str, dpi: float = 160) -> None:
    """Draw a picture into a PNG file."""
    drawn, _ = _drawn(picture.panels, picture.title, picture.columns, "png", dpi)
    write_atomically(path, drawn)


# -- drawing


def _drawn(panels: Sequence[Chart], title: str, columns: int, kind: str, dpi: float = 72) -> tuple[bytes, dict]:
    """(file, group of points in it -> what is said of each)."""
    import matplotlib
    from matplotlib.figure import Figure

    shared = Picture(title, panels).legend
    columns = min(columns, len(panels))
    width, top = WIDTH * columns, 26 * bool(title)
    first = top + _legend_height(shared, width)
    head = max(22 * bool(each.title) + (0 if shared else _legend_height(each.legend, WIDTH)) for each in panels) + 8
    body = max(30 * len(each.y.categories) + 10 if each.y.categories else PLOT_HEIGHT for each in panels)
    step = head + body + max(16 * (each.x.marks + bool(each.x.label)) for each in panels) + 8
    height = first + step * -(-len(panels) // columns)

    def at(x: float, y: float) -> tuple[float, float]:
        return x / width, 1 - y / height

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # pictures look the same whatever somebody's matplotlibrc says
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure((width / 72, height / 72), facecolor=LIGHT["paper"], dpi=dpi)
        figure.patch.set_visible(kind == "png")
        figure.text(*at(width / 2, 18), title, ha="center", fontsize=12, fontweight="bold")
        handles, said = {}, {}
        for number, chart in enumerate(panels):
            x, y = number % columns * WIDTH, first + number // columns * step
            figure.text(*at(x + WIDTH / 2, y + 16), chart.title, ha="center", fontsize=12, fontweight="bold")
            left, right = _edges(chart)
            axes = figure.add_axes((*at(x + left, y + head + body), (right - left) / width, body / height))
            handles = _panel(axes, chart, said)
            if chart.legend and not shared:
                _legend(figure, handles, at(x + WIDTH / 2, y + 22 * bool(chart.title) + 4), WIDTH)
        if shared:
            _legend(figure, handles, at(width / 2, top), width)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=dpi)
    return file.getvalue(), said


def _edges(chart: Chart) -> tuple[float, float]:
    """Where the axes of a panel start and end, in pixels: beside them is room for what stands along them."""
    across, up = (_ticks(axis, chart.limits(which))[1] for which, axis in (("x", chart.x), ("y", chart.y)))
    left = 8 + LETTER * max(map(len, up), default=0) + 18 * bool(chart.y.label)
    return left, WIDTH - 8 - LETTER / 2 * max(map(len, across[-1:]), default=0)


def _legend_height(names: Sequence[str], width: float) -> float:
    return 15 * -(-len(names) // _columns(names, width)) + 4 if names else 0


def _columns(names: Sequence[str], width: float) -> int:
    """How many entries of a legend stand side by side."""
    widths = [40 + LETTER * len(name) for name in names]
    return len(names) if sum(widths) <= width else max(1, int(width / max(widths)))


def _legend(figure: Figure, handles: dict, place: tuple[float, float], width: float) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="upper center",
        bbox_to_anchor=place,
        borderaxespad=0,
        borderpad=0,
        ncols=_columns(list(handles), width),
        labelspacing=0.25,
        columnspacing=1,
        handletextpad=0.5,
    )


def _panel(axes: Axes, chart: Chart, said: dict) -> dict:
    """Draw a chart; returns what stands for each series in a legend."""
    left, right = _edges(chart)
    for which, axis in (("x", chart.x), ("y", chart.y)):
        limits = chart.limits(which)
        axes.set(**{f"{which}label": axis.label, f"{which}scale": "log" if axis.log else "linear"})
        axes.set(**{f"{which}lim": limits})
        places, names = _ticks(axis, limits)
        if which == "x" and sum(LETTER * len(name) + 6 for name in names) > right - left:
            names[1::2] = [""] * len(names[1::2])  # too crowded for all
        getattr(axes, f"set_{which}ticks")(places, names)
        getattr(axes, f"{which}axis").grid(not axis.categories)
    axes.minorticks_off()
    axes.tick_params(length=0)
    if chart.level is not None:
        axes.axhline(chart.level, color=LIGHT["ink"], alpha=0.6, lw=1)
    return {series.name: _series(axes, series, chart, said) for series in chart.series}


def _ticks(axis: Axis, limits: tuple[float, float]) -> tuple[list, list[str]]:
    """(places, names)"""
    if axis.categories:
        return list(range(len(axis.categories))), list(axis.categories)
    places = ticks(*limits, axis.log) if axis.marks else []
    return places, list(map(axis.text, places))


def _shown(series: Series, chart: Chart) -> Iterator[tuple]:
    """(x, y, low, high) of the points that the axes can show; low and high may be None."""
    none = [None] * len(series.x)
    for x, y, low, high in zip(series.x, series.y, series.low or none, series.high or none, strict=True):
        if all(math.isfinite(v) and (v > 0 or not axis.log) for v, axis in ((x, chart.x), (y, chart.y))):
            yield x, y, low, high


def _series(axes: Axes, series: Series, chart: Chart, said: dict):
    """Draw a series; returns what stands for it in a legend."""
    look, points = series.look, list(_shown(series, chart))
    x, y = [point[0] for point in points], [point[1] for point in points]
    group = f"said-{len(said)}"
    bars, line, dots = series.kind == "bars", series.kind in ("line", "curve"), series.kind in ("curve", "points")
    lowest = chart.limits("x" if bars else "y")[0]
    _spread(axes, points, look.colour, bars, lowest)
    if bars:
        for place, (width, height) in enumerate(zip(x, y, strict=True)):
            said[f"{group}-{place}"] = [f"{series.name}: {chart.x.text(width)}"]
            axes.barh(height, width - lowest, 0.55, lowest, color=look.colour, gid=f"{group}-{place}")
        return None
    if series.fill:
        axes.fill_between(x, y, lowest, color=look.colour, alpha=0.22, lw=0)
    dash = (0, [float(length) / 1.8 for length in look.dash.split()]) if look.dash else "-"
    style = {
        "color": look.colour,
        "lw": 1.8,
        "ls": dash,
        "clip_on": False,
        "ms": 5.4 * series.size,
        "markeredgewidth": 1.4,
        "marker": MARKERS[look.marker.removesuffix("-open")],
        "fillstyle": "none" if look.marker.endswith("-open") else "full",
    }
    if line:
        axes.plot(x, y, **{**style, "marker": ""})
    if dots:
        said[group] = [_where(series.name, chart, *point[:2]) for point in points]
        axes.plot(x, y, **{**style, "ls": "none"}, gid=group)
    (handle,) = axes.plot([], [], **{**style, "ms": 5.4, "ls": dash if line else "", "marker": style["marker"] * dots})
    return handle


def _spread(axes: Axes, points: Sequence[tuple], colour: str, bars: bool, lowest: float) -> None:
    """Lines from low to high, with caps on bars, where there is anything between."""
    ends = [(x, y, max(low, lowest), high) for x, y, low, high in points if low is not None and high > low]
    for x, y, low, high in ends:
        if bars:
            axes.plot([low, high], [y, y], color=LIGHT["ink"], lw=1, marker="|", ms=8, clip_on=False)
        else:
            axes.plot([x, x], [low, high], color=colour, lw=1, clip_on=False)


def _where(name: str, chart: Chart, x: float, y: float) -> str:
    where = ", ".join(axis.text(value) for axis, value in ((chart.x, x), (chart.y, y)) if axis.marks)
    return f"{name}: {where}" if where else name


# -- what matplotlib makes, as a page can hold it: no ids that clash, no styles that its policy forbids, no date


def _svg(panels: Sequence[Chart], title: str, columns: int, alt: str) -> ElementTree.Element:
    """matplotlib's shapes and text alone, their styles as attributes, with ``<title>`` where something is said."""
    drawn, said = _drawn(panels, title, columns, "svg")
    root = ElementTree.fromstring(drawn)
    result = ElementTree.Element("svg", {"class": "chart", "viewBox": root.get("viewBox", ""), "role": "img"})
    result.set("aria-label", alt)
    marks = {f"#{each.get('id')}": each for each in root.iterfind(f".//{SPACE}defs/{SPACE}path")}
    result.extend(_leaves(root, marks, said, iter(())))
    return result


def _leaves(group: ElementTree.Element, marks: dict, said: dict, words: Iterator) -> Iterator[ElementTree.Element]:
    """Every ``path`` and ``text`` within a group; references become the paths that they refer to."""
    words = iter(said[group.get("id")]) if group.get("id") in said else words
    for each in group:
        kind = each.tag.removeprefix(SPACE)
        if kind == "g":
            yield from _leaves(each, marks, said, words)
        elif kind == "text":
            leaf = ElementTree.Element("text", _attributes(each))
            leaf.text = each.text
            yield leaf
        elif kind in ("path", "use"):
            mark = marks.get(each.get(HREF))
            attributes = _attributes(each) if mark is None else _attributes(mark) | _attributes(each)
            leaf = ElementTree.Element("path", attributes)
            if word := next(words, None):
                ElementTree.SubElement(leaf, "title").text = word
            if attributes.get("fill") != "none" or "stroke" in attributes:
                yield leaf


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    """Shape, place and style of an element."""
    given = {name: element.get(name, "") for name in ("d", "x", "y", "transform")}
    if HREF in element.attrib:
        given = {"transform": f"translate({given['x']} {given['y']})"}
    result = {
        name: re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.5g}", " ".join(value.split()))
        for name, value in given.items()
        if value and not value.startswith("rotate(-0 ")
    }
    for pair in element.get("style", "").split(";"):
        name, _, value = map(str.strip, pair.partition(":"))
        if name.startswith("font"):  # the page's own, in this size
            if size := re.search(r"([\d.]+)px", value):
                result["font-size"] = size[1]
            if re.search(r"\b(bold|700)\b", value):
                result["font-weight"] = "bold"
        elif name:
            result[name] = COLOURS.get(value, value)
    return result
