"""Pictures as SVG, without any library: light, sharp in print, in the colours of the page around them.

A panel is drawn for the width of a phone, so that its text is readable there; wider screens show more of them side by
side.
"""

import math
from html import escape

from recbole_unlearn.reports.pictures.chart import ticks

WIDTH, PLOT_HEIGHT, LINE = 340, 190, 16
LETTER = 6.0  # mean width of a letter at 11 px, in pixels: on the safe side for most fonts

STYLE = """
.chart{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.chart text{fill:var(--ink)}
.chart .title{font-size:12px;font-weight:600}
.chart .edge{stroke:var(--faint);fill:none}
.chart .grid{stroke:var(--faint);stroke-opacity:.35;stroke-width:.7}
.chart .level{stroke:var(--ink);stroke-opacity:.6;stroke-width:1}
.chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
"""
LIGHT = "--ink:#1c2127;--faint:#8b939c;--paper:#fff"
DARK = "--ink:#e6e9ec;--faint:#6c757e;--paper:#14181d"

MARKERS = {
    "circle": "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z",
    "square": "M-3-3h6v6h-6z",
    "diamond": "M0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
    "triangle": "M0-4l3.9 6.8h-7.8z",
    "triangle-down": "M0 4l3.9-6.8h-7.8z",
    "cross": "M-3-3l6 6M3-3l-6 6",
    "plus": "M-4 0h8M0-4v8",
}


def panel(chart):
    """One chart as an ``<svg>`` element for a page that holds `STYLE` and defines --ink, --faint and --paper."""
    body, height = _panel(chart)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.alt)}">{body}</svg>'


def draw(picture):
    """A picture as an SVG file (str) of its own, in light or dark as the reader prefers."""
    columns = min(picture.columns, len(picture.panels))
    width, top, parts = columns * WIDTH + 16, 26, []
    if picture.legend:
        top = _legend(picture.panels[0], parts, top, width)
    drawn = [_panel(chart, not picture.legend) for chart in picture.panels]
    for start in range(0, len(drawn), columns):
        row = drawn[start : start + columns]
        parts += [f'<g transform="translate({8 + n * WIDTH} {top})">{body}</g>' for n, (body, _) in enumerate(row)]
        top += max(height for _, height in row) + 8
    alt = escape(" ".join([picture.title + ".", *(chart.alt for chart in picture.panels)]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}" role="img" aria-label="{alt}">'
        f"<style>:root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}{STYLE}</style>"
        f'<rect width="100%" height="100%" fill="var(--paper)"/>'
        f'<text class="title" x="{width / 2}" y="18" text-anchor="middle">{escape(picture.title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def _panel(chart, legend=True):
    """(content of a panel, its height)"""
    parts, top = [], 6
    if chart.title:
        parts.append(_text(WIDTH / 2, top + 10, chart.title, "middle", "title"))
        top += 18
    if legend and chart.legend:
        top = _legend(chart, parts, top, WIDTH)
    (x_low, x_high), (y_low, y_high) = chart.limits("x"), chart.limits("y")
    x_ticks, y_ticks = _ticks(chart.x, x_low, x_high), _ticks(chart.y, y_low, y_high)
    room = max((len(text) for _, text in y_ticks), default=0) * LETTER
    left, right = 8 + room + (LINE + 3 if chart.y.label else 0), WIDTH - 10
    height = 30 * len(chart.y.categories) + 10 if chart.y.categories else PLOT_HEIGHT
    top, bottom = top + 6, top + 6 + height
    across = _scale(chart.x, x_low, x_high, left, right)
    up = _scale(chart.y, y_low, y_high, bottom, top)
    crowded = sum(len(text) for _, text in x_ticks) * LETTER + 8 * len(x_ticks) > right - left
    for number, (value, text) in enumerate(x_ticks):
        place = across(value)
        parts.append(f'<path class="grid" d="M{place:.1f} {top}V{bottom}"/>')
        if not (crowded and number % 2):
            # the last number must not be cut off at the picture's edge
            anchor = "end" if place + len(text) * LETTER / 2 > WIDTH else "middle"
            parts.append(_text(min(place, WIDTH - 2), bottom + 14, text, anchor))
    for value, text in y_ticks:
        if not chart.y.categories:
            parts.append(f'<path class="grid" d="M{left:.1f} {up(value):.1f}H{right}"/>')
        parts.append(_text(left - 5, up(value) + 4, text, "end"))
    parts.append(f'<path class="edge" d="M{left:.1f} {top}V{bottom}H{right}"/>')
    if chart.level is not None:
        parts.append(f'<path class="level" d="M{left:.1f} {up(chart.level):.1f}H{right}"/>')
    for series in chart.series:
        parts += _series(series, chart, across, up, left, bottom)
    foot = bottom + (14 if x_ticks else 0)
    if chart.x.label:
        foot += 16
        parts.append(_text((left + right) / 2, foot, chart.x.label, "middle"))
    if chart.y.label:
        middle = (top + bottom) / 2
        parts.append(
            f'<text x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
            f"{escape(chart.y.label)}</text>"
        )
    return "".join(parts), foot + 8


def _legend(chart, parts, top, room):
    """Entries in as many lines as they need; returns where they end."""
    x, y, seen = 8, top + 10, set()
    for series in chart.series:
        if series.name in seen:
            continue
        seen.add(series.name)
        width = 30 + len(series.name) * LETTER
        if x + width > room and x > 8:
            x, y = 8, y + LINE
        look = series.look
        if series.kind in ("line", "curve"):
            parts.append(f'<path class="line" d="M{x} {y - 4}h20" {_stroke(look)}/>')
        if series.kind in ("curve", "points"):
            parts.append(f'<path {_marker(look)} transform="translate({x + 10} {y - 4})"/>')
        parts.append(_text(x + 25, y, series.name, "start"))
        x += width + 8
    return y + 6


def _ticks(axis, low, high):
    if axis.categories:
        return list(enumerate(axis.categories))
    return [(value, axis.text(value)) for value in ticks(low, high, axis.log)] if axis.marks else []


def _scale(axis, low, high, start, end):
    """Function: value -> pixel."""
    if axis.log:
        low, high = math.log10(low), math.log10(high)
        return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _shown(series, chart):
    """(x, y, low, high) of the points that the axes can show; low and high may be None."""
    none = [None] * len(series.x)
    for x, y, low, high in zip(series.x, series.y, series.low or none, series.high or none, strict=True):
        if all(math.isfinite(v) and (v > 0 or not axis.log) for v, axis in ((x, chart.x), (y, chart.y))):
            yield x, y, low, high


def _series(series, chart, across, up, left, bottom):
    look, points = series.look, list(_shown(series, chart))
    if not points:
        return
    if series.kind == "bars":
        for x, y, low, high in points:
            title = f"{series.name}: {chart.x.text(x)}"
            yield (
                f'<rect x="{left:.1f}" y="{up(y) - 8:.1f}" width="{max(across(x) - left, 1):.1f}" height="16" '
                f'fill="{look.colour}"><title>{escape(title)}</title></rect>'
            )
            if low is not None and high > low:
                start, end = across(max(low, chart.limits("x")[0])), across(high)
                caps = "".join(f"M{at:.1f} {up(y) - 4:.1f}v8" for at in (start, end))
                yield f'<path class="level" d="M{start:.1f} {up(y):.1f}H{end:.1f}{caps}"/>'
        return
    path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y, _, _ in points)
    if series.fill:
        base = f"L{across(points[-1][0]):.1f} {bottom}L{across(points[0][0]):.1f} {bottom}z"
        yield f'<path d="M{path}{base}" fill="{look.colour}" fill-opacity=".22"/>'
    if series.kind in ("line", "curve"):
        yield f'<path class="line" d="M{path}" {_stroke(look)}/>'
    scale = f" scale({series.size})" if series.size != 1 else ""
    for x, y, low, high in points:
        if low is not None and high > low and (low > 0 or not chart.y.log):
            yield (f'<path d="M{across(x):.1f} {up(low):.1f}V{up(high):.1f}" stroke="{look.colour}" stroke-width="1"/>')
        if series.kind != "line":
            where = ", ".join(axis.text(v) for axis, v in ((chart.x, x), (chart.y, y)) if axis.marks)
            title = f"{series.name}: {where}" if where else series.name
            yield (
                f'<path {_marker(look)} transform="translate({across(x):.1f} {up(y):.1f}){scale}">'
                f"<title>{escape(title)}</title></path>"
            )


def _stroke(look):
    return f'stroke="{look.colour}"' + (f' stroke-dasharray="{look.dash}"' if look.dash else "")


def _marker(look):
    """Attributes of a marker's path. Markers of strokes alone, and open ones, are stroked; the others filled."""
    path = MARKERS[look.marker.removesuffix("-open")]
    filled = "z" in path and not look.marker.endswith("-open")
    paint = f'fill="{look.colour}"' if filled else f'fill="none" stroke="{look.colour}" stroke-width="1.6"'
    return f'd="{path}" {paint}'


def _text(x, y, text, anchor, kind=None):
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
