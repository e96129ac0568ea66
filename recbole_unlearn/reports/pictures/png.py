"""Pictures as PNG files, for where SVG cannot go; needs matplotlib (``pip install recbole-unlearn[plots]``)."""

import io
from importlib.util import find_spec

from recbole_unlearn.errors import InputError
from recbole_unlearn.reports.pictures.chart import ticks
from recbole_unlearn.storage.files import write_atomically

MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle": "^",
    "triangle-down": "v",
    "cross": "x",
    "plus": "+",
}


def available():
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write(picture, path, dpi=160):
    """Draw a picture into a PNG file.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("PNG pictures need matplotlib; pip install matplotlib, or take the SVG") from None
    columns = min(picture.columns, len(picture.panels))
    rows = -(-len(picture.panels) // columns)
    figure = Figure((4 * columns, 3.1 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(picture.title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(picture.panels) :]:
        axis.set_axis_off()
    for axis, chart in zip(axes, picture.panels, strict=False):
        _draw(axis, chart)
        if chart.legend and len(picture.panels) > 1 and not picture.legend:
            axis.legend(fontsize=7, framealpha=0.6)
    if picture.legend or len(picture.panels) == 1 and picture.panels[0].legend:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=max(3, 2 * columns), fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    write_atomically(path, drawn.getvalue())


def _draw(axis, chart):
    axis.set_title(chart.title, fontsize=9)
    for which, own in (("x", chart.x), ("y", chart.y)):
        low, high = chart.limits(which)
        axis.set(
            **{f"{which}label": own.label, f"{which}scale": "log" if own.log else "linear", f"{which}lim": (low, high)}
        )
        places = range(len(own.categories)) if own.categories else ticks(low, high, own.log) if own.marks else []
        names = own.categories or [own.text(place) for place in places]
        getattr(axis, f"set_{which}ticks")(list(places), list(names))
        getattr(axis, f"{which}axis").set_minor_locator(_none())
    for series in chart.series:
        _draw_series(axis, series)
    if chart.level is not None:
        axis.axhline(chart.level, color="#444444", lw=0.8)
    axis.grid(alpha=0.25)


def _none():
    from matplotlib.ticker import NullLocator  # pyright: ignore[reportMissingImports]

    return NullLocator()


def _draw_series(axis, series):
    look = series.look
    x, y = list(series.x), list(series.y)
    spread = None
    if series.low is not None:
        centre = x if series.kind == "bars" else y
        ends = zip(centre, series.low, series.high, strict=True)
        spread = [list(side) for side in zip(*((c - low, high - c) for c, low, high in ends), strict=True)]
    if series.kind == "bars":
        axis.barh(y, x, color=look.colour, label=series.name, xerr=spread)
        return
    dash = (0, tuple(map(float, look.dash.split()))) if look.dash else "-"
    filled = "none" if look.marker.endswith("-open") else look.colour
    axis.errorbar(
        x, y, spread, color=look.colour, label=series.name, lw=1.5, ms=5 * series.size, elinewidth=0.8,
        ls="none" if series.kind == "points" else dash,
        marker="" if series.kind == "line" else MARKERS[look.marker.removesuffix("-open")], markerfacecolor=filled,
    )  # fmt: skip
    if series.fill:
        axis.fill_between(x, y, color=look.colour, alpha=0.2, lw=0)
