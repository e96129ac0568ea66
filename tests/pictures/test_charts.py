"""Pictures: one description, two drawers; legible colours, round ticks, nothing outside, and the values as given."""

import json
import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_unlearn import methods
from recbole_unlearn.reports.pictures import described, drawn, interactive
from recbole_unlearn.reports.pictures.chart import LOOKS, Axis, Chart, Picture, Series, looks, ticks

ROOT = Path(__file__).parents[2]
METHODS = tuple(methods.METHODS)
RATIOS = (0.010, 0.015, 0.020, 0.025, 0.030, 0.035)
CURVES = {
    m: {k: (0.1 + 0.03 * math.log(k) + 0.01 * n, 0.004) for k in (1, 5, 10, 50, 100)} for n, m in enumerate(METHODS)
}
TIMES = {m: [10.0 ** (n - 3), 2 * 10.0 ** (n - 3)] for n, m in enumerate(METHODS[:6])}
MAP = {"user": [0.5, 0.5], "positives": [[0.4, 0.5], [0.6, 0.5]], "negatives": [[0.1, 0.1], [0.9, 0.9], [1, 0]]}
PICTURES = {
    "ranks": described.rank_histogram({"original": [0] * 19 + [40], "unlearned": [2] * 20, "retrained": [1, 3] * 10}),
    "map": described.embedding_map({"original": MAP, "unlearned": MAP, "retrained": MAP}),
    "pnpr": described.pnpr({"original": [2.0, 3.0, 1.5], "unlearned": [1.1, 1.0, 0.9]}),
    "convergence": described.convergence({"conjugate gradient": [0.5**n for n in range(60)]}, tolerance=1e-3),
    "times": described.running_times(TIMES),
    "cutoffs": described.cutoff_curves({f"{ratio:.3f} %": CURVES for ratio in RATIOS}),
    "ratios": described.ratio_curves({m: dict.fromkeys(RATIOS, 0.1) for m in METHODS}, "seconds", "Time", log=True),
    "weights": described.weight_distances(
        {"all": {"U/O": {r: (r, r / 10) for r in RATIOS}, "R/O": {r: 2.0 for r in RATIOS}}, "one": {"U/R": {0.01: 0.3}}}
    ),
    "negatives": described.negatives_curves({"HR@10": {"retrain": {1: 0.5, 2: 0.6}}, "NDCG@10": {"retrain": {1: 0.3}}}),
    "stream": described.stream_times([1, 1, 5], [0.1, 0.2, 3.0]),
    "drift": described.drift(
        [{"requests": n, "forget_auc_unlearned": 0.5, "forget_auc_retrained": 0.5 + n / 100} for n in (5, 10)],
        "forget_auc", "forget-set AUC",
    ),
}  # fmt: skip


def luminance(colour):
    """Relative luminance of '#rrggbb' (WCAG 2)."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


# What a colour looks like to people without red, green or blue cones: Machado, Oliveira and Fernandes, IEEE TVCG
# 15(6), 2009, severity 1, on linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour, blindness):
    rgb = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLIND[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# -- looks


def test_every_colour_is_legible_on_light_and_on_dark():
    for look in LOOKS:
        for theme in (drawn.LIGHT, drawn.DARK):
            assert contrast(look.colour, theme["paper"]) >= 3, look


@pytest.mark.parametrize("blindness", BLIND)
def test_the_three_models_of_a_run_are_told_apart_by_the_colour_blind(blindness):
    three = [look.colour for look in looks(("original", "unlearned", "retrained")).values()]
    for first, second in combinations(three, 2):
        assert np.linalg.norm(lab(first, blindness) - lab(second, blindness)) > 20


def test_looks_differ_in_more_than_colour():
    assert len({look.marker for look in LOOKS}) == len({look.dash for look in LOOKS}) == len(LOOKS)


def test_a_method_always_looks_the_same_and_no_two_alike():
    everything = looks(["original", *METHODS])
    assert len(set(everything.values())) == 1 + len(METHODS)
    assert looks(["ubpr", "retrain"]) == {name: everything[name] for name in ("ubpr", "retrain")}
    assert looks(["retrained", "retrain"])["retrain"] != looks(["retrained", "retrain"])["retrained"]
    assert len(looks([f"method {n}" for n in range(30)])) == 30


# -- axes


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_within(low, width):
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 6
    steps = np.diff(found)
    assert np.allclose(steps, steps[:1], rtol=1e-6)
    assert found[0] >= low - 1e-6 * width and found[-1] <= low + width * (1 + 1e-6)


@given(st.floats(-8, 6), st.floats(0.01, 12))
def test_logarithmic_ticks_are_within_and_increase(low, decades):
    low, high = 10**low, 10 ** (low + decades)
    found = ticks(low, high, log=True)
    assert 2 <= len(found) <= 8
    assert all(np.diff(found) > 0) and found[0] >= low * (1 - 1e-6) and found[-1] <= high * (1 + 1e-6)


def test_an_axis_leaves_room_for_the_spread_and_none_for_what_cannot_be_shown():
    series = Series("a", [1, 2, 3], [5.0, math.nan, 7.0], LOOKS[0], "curve", [1, 2, 3], [9, 9, 9])
    low, high = Chart("", Axis(), Axis(), [series], "").limits("y")
    assert low < 1 and 9 < high < 10
    low, high = Chart("", Axis(), Axis(log=True), [Series("a", [1, 2], [0.0, 10.0], LOOKS[0])], "").limits("y")
    assert 0 < low < 10 < high
    bars = Chart("", Axis(log=True), Axis(categories=("a",)), [Series("a", [0.115], [0], LOOKS[0], "bars")], "")
    assert bars.limits("x")[0] == pytest.approx(0.01)  # a bar needs some length to be seen


# -- SVG

SPACE = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", PICTURES)
def test_an_svg_file_is_whole_in_itself_and_nothing_leaves_it(name):
    picture = PICTURES[name]
    text = drawn.svg(picture)
    root = ElementTree.fromstring(text)
    assert "href" not in text and "url(" not in text and "<script" not in text
    assert root.get("aria-label").startswith(picture.title) and picture.panels[0].alt in root.get("aria-label")
    width, height = float(root.get("width")), float(root.get("height"))
    for each in root.iter(f"{SPACE}text"):
        across, down = float(each.get("x")), float(each.get("y"))
        # 5 px a letter, which most fonts need more than
        length = 5 * len(each.text) / (1 if each.get("text-anchor", "start") in ("start", "end") else 2)
        if "transform" in each.attrib:  # upwards
            assert 0 <= across <= width and length <= down <= height - length
        else:
            assert (
                0 if each.get("text-anchor", "start") == "start" else length
            ) <= across <= width and 0 <= down <= height
            assert each.get("text-anchor") == "end" or across + length <= width
    words = " ".join(root.itertext())
    for chart in picture.panels:
        for label in (chart.title, chart.x.label, chart.y.label, *(chart.y.categories or ())):
            assert label in words


def test_every_point_is_drawn_where_it_belongs():
    x, y = [1.0, 2.0, 4.0], [10.0, 100.0, 1000.0]
    chart = Chart("", Axis("x"), Axis("y", log=True), [Series("a", x, y, LOOKS[0], "points")], "alt")
    root = ElementTree.fromstring(drawn.panel(chart))
    places = [path.get("transform") for path in root.iter("path") if path.get("transform")]
    places = np.array([[float(n) for n in re.findall(r"-?[\d.]+", place)] for place in places])
    assert len(places) == 3
    assert np.diff(places[:, 0])[1] == pytest.approx(2 * np.diff(places[:, 0])[0], abs=0.2)  # linear across
    assert np.diff(places[:, 1])[0] == pytest.approx(np.diff(places[:, 1])[1], abs=0.2)  # logarithmic, upwards
    assert np.diff(places[:, 1])[0] < 0
    assert [title.text for title in root.iter("title")] == ["a: 1, 10", "a: 2, 100", "a: 4, 1,000"]


def test_a_panel_is_drawn_once_and_again_where_anything_of_it_is_another(monkeypatch):
    made, write = [], ElementTree.tostring
    monkeypatch.setattr(drawn.ElementTree, "tostring", lambda *given: made.append(given) or write(*given))
    values = np.arange(2000.0)
    series = [Series("a", values, values, LOOKS[0])]
    other = [Series("a", values, np.where(values == 1000, 0, values), LOOKS[0])]
    panels = [drawn.panel(Chart("", Axis(), Axis(), each, "")) for each in (series, series, other, series)]
    assert panels[0] == panels[1] == panels[3] != panels[2] and len(made) == 2
    for number in range(drawn.KEPT + 1):
        drawn.panel(Chart(str(number), Axis(), Axis(), series, ""))
    drawn.panel(Chart("", Axis(), Axis(), series, ""))
    assert len(made) == drawn.KEPT + 4, "what was drawn long ago is not kept"


def test_what_has_no_place_on_an_axis_is_left_out():
    series = [
        Series("a", [1, 2, 3, 4], [0.0, 1.0, math.inf, math.nan], LOOKS[0], "points"),
        Series("b", [], [], LOOKS[1]),
    ]
    text = drawn.panel(Chart("", Axis(), Axis(log=True), series, ""))
    assert text.count("<title>") == 1 and "nan" not in text and "inf" not in text


def test_names_are_text_not_markup():
    name = "<script>alert(1)</script>& $x$"
    chart = Chart(name, Axis(name), Axis(name), [Series(name, [1], [1], LOOKS[0])] * 2, f'"{name}')
    text = drawn.panel(chart)
    assert "<script" not in text and name in [each.text for each in ElementTree.fromstring(text).iter("text")]
    assert "<script>alert" not in interactive.page([Picture(name, [chart])], name)


@pytest.mark.parametrize("name", PICTURES)
def test_a_page_can_hold_a_picture_many_times_and_forbid_inline_styles(name):
    for chart in PICTURES[name].panels:
        elements = list(ElementTree.fromstring(drawn.panel(chart)).iter())
        assert not {"id", "style"} & {key for each in elements for key in each.attrib}
        assert {each.tag for each in elements} <= {"svg", "path", "text", "title"}
        # what is neither a series nor white or black takes the page's colours
        colours = {each.get(paint) for each in elements for paint in ("fill", "stroke")} - {None, "none"}
        assert colours <= {"var(--ink)", "var(--faint)", *(series.look.colour for series in chart.series)}


def test_the_same_picture_is_the_same_file_whatever_the_settings_of_matplotlib(tmp_path):
    import matplotlib

    def files():
        drawn.write_png(PICTURES["weights"], tmp_path / "picture.png", dpi=40)
        return drawn.svg(PICTURES["weights"]), (tmp_path / "picture.png").read_bytes()

    first = files()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert files() == first
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_by_the_first_picture_and_pyplot_never():
    script = """
import sys
import recbole_unlearn.reports.tables
from recbole_unlearn.reports.pictures import described, drawn
assert "matplotlib" not in sys.modules
drawn.svg(described.running_times({"ours": 1.0}))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# -- what the describers make of figures


def test_the_histogram_shows_shares_as_an_outline():
    (chart,) = described.rank_histogram({"unlearned": [1, 3], "retrained": [4, 0]}).panels
    assert chart.series[0].x == [0, 0, 0.5, 0.5, 1, 1]
    assert chart.series[0].y == [0, 0.25, 0.25, 0.75, 0.75, 0]
    assert chart.series[0].fill and not chart.series[1].fill
    assert "unlearned 0.62" in chart.alt and "retrained 0.25" in chart.alt


def test_users_keep_their_column_in_every_model():
    (chart,) = described.pnpr({"original": [1.0, 3.0, 2.0], "unlearned": [10.0, 30.0, 20.0]}).panels
    assert chart.series[0].y == [3, 2, 1] and chart.series[1].y == [30, 20, 10]
    (chart,) = described.pnpr({"original": list(range(100))}, most=12).panels
    assert len(chart.series[0].y) == 12 and chart.series[0].y[0] == 99 and chart.series[0].y[-1] == 0


def test_times_are_medians_with_their_range_slowest_below():
    (chart,) = described.running_times({"ours": [3.0, 1.0, 2.0], "retrain": 50.0}).panels
    assert chart.y.categories == ("retrain 50 s", "ours 2 s")
    ours = next(series for series in chart.series if series.name == "ours")
    assert (ours.x, ours.y, ours.low, ours.high) == ([2.0], [1], [1.0], [3.0])


def test_curves_carry_mean_and_spread():
    picture = described.cutoff_curves({"0.010 %": {"ours": {1: (0.2, 0.1), 10: (0.4, 0.1)}}}, "HR")
    (series,) = picture.panels[0].series
    assert series.x == [1, 10] and series.y == [0.2, 0.4]
    assert series.low == pytest.approx([0.1, 0.3]) and series.high == pytest.approx([0.3, 0.5])
    assert picture.panels[0].y.label == "HR@K"


# -- Plotly and PNG


@pytest.mark.parametrize("name", PICTURES)
def test_plotly_is_given_the_same_values(name):
    for chart in PICTURES[name].panels:
        shown = json.loads(interactive.figure(chart).to_json())
        for series, trace in zip(chart.series, shown["data"], strict=False):
            assert trace["name"] == series.name
            assert trace["x"] == pytest.approx(list(series.x))
            if series.kind != "bars":
                assert trace["y"] == pytest.approx(list(series.y))
        assert shown["layout"]["xaxis"]["title"].get("text", "") == chart.x.label


def test_a_png_shows_something(tmp_path):
    from matplotlib.image import imread

    for name in ("times", "map", "ranks", "negatives"):
        drawn.write_png(PICTURES[name], tmp_path / "picture.png", dpi=40)
        assert imread(tmp_path / "picture.png")[..., :3].std() > 0.02, name
