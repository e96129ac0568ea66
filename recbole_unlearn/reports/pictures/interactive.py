"""Pictures as one interactive page, drawn with Plotly (a dependency of RecBole), which the page carries with it."""

from collections.abc import Sequence
from html import escape
from math import log10
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from recbole_unlearn.reports.pictures.chart import Chart, Picture, ticks
from recbole_unlearn.reports.templates import render
from recbole_unlearn.storage.files import write_atomically

GREY = "#767b80"  # of text and lines: legible on white and on near black
SYMBOLS = {
    "triangle": "triangle-up",
    "triangle-open": "triangle-up-open",
    "cross": "x-thin-open",
    "plus": "cross-thin-open",
}
MODES = {"line": "lines", "curve": "lines+markers", "points": "markers"}


def figure(chart: Chart) -> go.Figure:
    """One chart, for Plotly to draw."""
    result = go.Figure()
    named = set()
    for series in chart.series:
        result.add_trace(_trace(series, chart, series.name not in named))
        named.add(series.name)
    if chart.level is not None:
        low, high = chart.limits("x")
        line = {"color": GREY, "width": 1}
        result.add_trace(
            go.Scatter(x=[low, high], y=[chart.level] * 2, mode="lines", line=line, hoverinfo="skip", showlegend=False)
        )
    result.update_layout(
        title={"text": escape(chart.title), "font": {"size": 14}, "x": 0.02},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "remove": ["select2d", "lasso2d", "autoScale2d"]},
        font={"color": GREY, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 10, "r": 28, "t": 40, "b": 10},  # room for half of the last number along x
        height=360,
        showlegend=bool(chart.legend),
        legend={"orientation": "h", "y": -0.25},
        xaxis=_axis(chart, "x"),
        yaxis=_axis(chart, "y"),
    )
    return result


def page(pictures: Sequence[Picture], title: str) -> str:
    """All pictures as one HTML page that needs nothing from outside; plotly.js makes it some 5 MB."""
    figures = ",".join(f"[{','.join(figure(chart).to_json() for chart in each.panels)}]" for each in pictures)
    return render(
        "interactive.html.jinja",
        title=title,
        pictures=pictures,
        plotly=Markup(get_plotlyjs()),
        figures=Markup("[" + figures.replace("</", "<\\/") + "]"),
    )


def write(pictures: Sequence[Picture], path: Path | str, title: str) -> None:
    """Write `page` to a file."""
    write_atomically(path, page(pictures, title).encode())


def _trace(series, chart, first):
    look = series.look
    x, y = list(series.x), list(series.y)
    spread = None
    if series.low is not None:
        centre = x if series.kind == "bars" else y
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [high - value for high, value in zip(series.high, centre, strict=True)],
            "arrayminus": [value - low for low, value in zip(series.low, centre, strict=True)],
            "thickness": 1,
        }
    common = {"name": escape(series.name), "legendgroup": escape(series.name), "showlegend": first}
    if series.kind == "bars":
        names = [chart.y.categories[place] for place in y]
        return go.Bar(x=x, y=names, orientation="h", marker={"color": look.colour}, error_x=spread, **common)
    return go.Scatter(
        x=x,
        y=y,
        mode=MODES[series.kind],
        line={"color": look.colour, "dash": ",".join(f"{n}px" for n in look.dash.split()) or "solid"},
        marker={"color": look.colour, "symbol": SYMBOLS.get(look.marker, look.marker), "size": 8 * series.size},
        fill="tozeroy" if series.fill else None,
        fillcolor=f"rgba({','.join(str(int(look.colour[n : n + 2], 16)) for n in (1, 3, 5))},.22)",
        error_y=spread,
        **common,
    )


def _axis(chart, which):
    axis = getattr(chart, which)
    result = {
        "title": {"text": escape(axis.label)},
        "gridcolor": "rgba(128,128,128,.3)",
        "zeroline": False,
        "linecolor": GREY,
        "automargin": True,
    }
    if axis.categories:
        return {**result, "type": "category", "categoryorder": "array", "categoryarray": list(axis.categories)}
    low, high = chart.limits(which)
    places = ticks(low, high, axis.log) if axis.marks else []
    result |= {"tickmode": "array", "tickvals": places, "ticktext": [axis.text(place) for place in places]}
    if axis.log:
        return {**result, "type": "log", "range": [log10(low), log10(high)]}
    return {**result, "range": [low, high]}
