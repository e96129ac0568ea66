"""The HTML report: opened in Chromium as a reader would, on a phone, light and dark; and no name of anybody in it."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import measure, needs_chromium, open_page, run
from conftest import SECRET_ITEM, SECRET_USER

from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports import tables as reporting
from recbole_unlearn.reports.pictures import described, interactive
from recbole_unlearn.storage.triple_log import TripleLog


class Tables(HTMLParser):
    """Every table of a page as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, _):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None


@pytest.fixture
def report(finished, tmp_path):
    """The report of a finished run, alone in a folder."""
    page = tmp_path / "report.html"
    page.write_bytes((finished[1] / "report.html").read_bytes())
    return page


def words(text):
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", text, flags=re.S).split())


def pages(result, **changes):
    return reporting.html({**result, **changes})


# -- in the browser


@needs_chromium
def test_the_browser_shows_the_tables_without_an_error_and_without_the_network(finished, report):
    result, _ = finished
    text, console, asked = open_page(report)
    assert console == [] and asked == []
    table = Tables(text).tables[0]
    expected = reporting.comparison_table(result)
    assert table[0] == ["", "original", "unlearned", "retrained", "gap"]
    assert table[1:] == [[name, *map(str, row)] for name, row in zip(expected.index, expected.values, strict=True)]
    shown = words(text)
    assert result["verdict"] in shown and f"{result['forget_set']['of']:,}" in shown
    assert text.count("<svg") == 6  # ranks, PNPR, three maps, times
    assert result["audit"]["after"]["weights"] in shown and result["audit"]["head"] in shown


@needs_chromium
def test_the_browser_would_tell_of_errors_and_requests(tmp_path):
    """What the tests beside this one rely on."""
    page = tmp_path / "bad.html"
    page.write_text('<script>console.error("broken")</script><img src="http://example.invalid/picture.png">')
    _, console, asked = open_page(page)
    assert any("broken" in line for line in console)
    assert asked == ["http://example.invalid/picture.png"]


@needs_chromium
def test_the_page_forbids_scripts_and_requests_even_where_some_got_in(report):
    smuggled = '<script>document.title = "taken"</script><img src="http://example.invalid/picture.png"></main>'
    report.write_text(report.read_text().replace("</main>", smuggled))
    text, console, asked = open_page(report)
    assert "<title>taken" not in text and asked == []
    assert len(console) >= 2 and all("Content Security Policy" in line for line in console)


@needs_chromium
def test_on_a_phone_nothing_is_cut_off_and_pictures_can_be_read(finished, report):
    models = {name: {**each, "exposure": {"exposure@10": 0.5}} for name, each in finished[0]["models"].items()}
    report.write_text(pages(finished[0], models=models))
    found = measure(
        report,
        """{
          width: page.documentElement.scrollWidth,
          tables: [...page.querySelectorAll(".scroll")].map((each) => each.scrollWidth - each.clientWidth),
          letters: Math.min(...[...page.querySelectorAll("svg text")].map((text) =>
            parseFloat(style(text).fontSize) * text.ownerSVGElement.clientWidth / 340)),
          outside: [...page.querySelectorAll("svg text")].filter((text) => {
            const [own, all] = [text, text.ownerSVGElement].map((each) => each.getBoundingClientRect());
            return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
          }).map((text) => text.textContent),
          unnamed: page.querySelectorAll("svg:not([aria-label])").length,
        }""",
    )
    assert found["width"] <= 360 and found["outside"] == [] and found["unnamed"] == 0
    assert found["letters"] >= 10
    assert max(found["tables"]) <= 0


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_light_and_dark(report, scheme):
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    query = """["body", ".chart text", "figcaption", ".sign"].map((name) => {
      const each = style(page.querySelector(name));
      return [name.includes("chart") ? each.fill : each.color, style(page.body).backgroundColor];
    })"""
    for ink, paper in measure(report, query, 1200, *flags):
        ink, paper = (luminance([int(n) for n in re.findall(r"\d+", colour)[:3]]) for colour in (ink, paper))
        assert (paper < ink) == (scheme == "dark")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


def luminance(rgb):
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_chromium
def test_it_prints(report, tmp_path):
    pdf = tmp_path / "report.pdf"
    _, console, asked = run(report.as_uri(), "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    assert console == [] and asked == []
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 4


@needs_chromium
def test_the_interactive_page_draws_every_panel_without_the_network(tmp_path):
    picture = described.running_times({"retrain": [20.0, 30.0], "ours": 0.2})
    panels = described.cutoff_curves({ratio: {"ours": {1: 0.1, 10: 0.4}} for ratio in ("0.010 %", "0.015 %")})
    interactive.write([picture, panels], tmp_path / "figures.html", "Figures")
    text, console, asked = open_page(tmp_path / "figures.html")
    assert console == [] and asked == []
    body = text[text.index("<body>") :]
    drawn = body.split('<div id="picture-')[1:]
    assert len(drawn) == 3 and all('class="main-svg"' in each for each in drawn)
    assert "ours 0.2 s" in words(body)


# -- its content


def test_no_name_of_any_user_or_item_is_in_it(make_options, make_split):
    run_unlearn("BPR", "tiny", None, make_options(forget_users=[SECRET_USER], compare="none", output_dir="out"))
    split = make_split()
    tokens = {str(token) for field, n in (("user", split.n_users), ("item", split.n_items))
              for token in split.token(field, np.arange(1, n))}  # fmt: skip
    assert SECRET_USER in tokens and SECRET_ITEM in tokens
    for name in ("report.html", "result.json"):
        found = set(re.findall(r"[\w-]+", open(f"out/{name}").read()))
        assert not found & tokens


def test_it_depends_on_nothing_but_the_result(finished):
    result, folder = finished
    stored = json.loads((folder / "result.json").read_text())
    assert reporting.html(stored) == (folder / "report.html").read_text() == reporting.html(result)


def test_histogram_and_ratios_are_those_of_the_models(finished):
    result, folder = finished
    counts = result["rank_histogram"]
    log = TripleLog.open(folder / "model.triples")
    for name, each in counts.items():
        assert sum(each) == 25
        middle = np.dot(np.arange(len(each)) + 0.5, each) / len(each) / 25
        assert middle == pytest.approx(result["models"][name]["forget_auc"], abs=0.5 / len(each))
    for each in result["geometry"]["pnpr"].values():
        assert len(each) == result["forget_set"]["users"] <= len(np.unique(log.users))
    shown = words((folder / "report.html").read_text())
    for each in result["geometry"]["pnpr"].values():
        assert f"{np.mean(each):.4f}" in shown


def test_paths_of_this_machine_are_not_in_it(finished):
    result, folder = finished
    page = (folder / "report.html").read_text()
    assert str(folder) not in page and result["settings"]["data_path"] not in page


def test_names_are_text_not_markup(finished):
    result = copy.deepcopy(finished[0])
    bad = '<img src=x>&"'
    page = pages(result, dataset=bad, model=bad, verdict=bad)
    result["settings"]["learner"] = bad
    assert "<img" not in page and "<img" not in reporting.html(result)


@pytest.mark.parametrize(
    "outcome, kind", [("alike", "good"), ("not yet", "bad"), ("over-forgotten", "bad"), ("too small", "open")]
)
def test_the_verdict_has_a_sign_of_its_own(finished, outcome, kind):
    result = finished[0]
    page = pages(result, verdict_figures={**result["verdict_figures"], "outcome": outcome})
    assert f'<p class="verdict {kind}">' in page


def test_without_retraining_it_claims_nothing(finished):
    models = {name: each for name, each in finished[0]["models"].items() if name != "retrained"}
    ranks = {name: finished[0]["rank_histogram"][name] for name in models}
    page = words(
        pages(finished[0], models=models, verdict=None, verdict_figures=None, speed_up=None, rank_histogram=ranks)
    )
    assert "Not compared with retraining" in page and "Well forgotten" not in page and "The aim is" not in page


def test_the_solver_shows_how_it_converged(finished):
    solve = {"method": "influence", "iterations": 4, "residual": 5e-4, "negative_curvature": False, "converged": True,
             "history": [0.5, 0.1, 1e-2, 5e-4], "setup_seconds": 0.1}  # fmt: skip
    page = pages(finished[0], unlearning=solve)
    assert "Convergence of the solver. conjugate gradient: 5.0e-04 after 4 iterations" in page
    assert "conjugate gradient: 4, 0.0005" in page


def test_reoptimisation_shows_how_it_converged(finished):
    solve = {"method": "reoptimise", "iterations": 3, "products": 30, "gradient_norm": 1e-9, "converged": True,
             "gradient_norm_before": 1e-3, "gradient_norm_stored": 1e-8, "triples": 500, "negative_curvature": False,
             "history": [1e-4, 1e-6, 1e-9], "setup_seconds": 0.1}  # fmt: skip
    page = html.unescape(pages(finished[0], unlearning=solve))
    assert "Newton's method: 1.0e-09 after 3 iterations" in page and "mean gradient norm" in page


def test_spam_and_streams_have_their_part(finished):
    result = copy.deepcopy(finished[0])
    for share, each in zip((0.9, 0.2, 0.1), result["models"].values(), strict=True):
        each["exposure"] = {"exposure@10": share}
    figures_of = {"seconds_retrain": 1.0, "hit@10_unlearned": 0.1, "hit@10_retrained": 0.1}
    drift = [
        {"requests": n, "forgotten": 9 * n, **figures_of, "forget_auc_unlearned": 0.5, "forget_auc_retrained": 0.625,
         "ndcg@10_unlearned": 0.3, "ndcg@10_retrained": 0.3125} for n in (2, 4)
    ]  # fmt: skip
    batches = [{"requests": 1, "interactions": 3, "forgotten": 3, "seconds": 0.1, "all_rows": False}] * 4
    result["stream"] = {"batches": batches, "drift": drift, "empty": 3, "retrain": "train anew soon: much is gone"}
    page = reporting.html(result)
    tables = Tables(page).tables
    assert ["spam exposure@10", "0.9000", "0.2000", "0.1000", "+0.1000"] in tables[0]
    assert ["4", "36", "0.5000", "0.6250", "0.3000", "0.3125"] in tables[-1]
    shown = words(page)
    for text in (
        "Drift along the stream",
        "3 requests named nothing",
        "Train anew soon: much is gone.",
        "promoted item",
    ):
        assert text in shown
