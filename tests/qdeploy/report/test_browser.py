"""The pages in a real browser: Chromium opens them, and what it shows is read back and compared with the report."""

import json
from itertools import pairwise

import pytest

from qdeploy.report import comparison, comparison_page, page
from tests.browser import shown_figures, wrong

CONTRASTS = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const brightness = (colour) => colour.slice(0, 3)
    .map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const below = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = brightness(numbers(element.namespaceURI.endsWith("svg") ? style.fill : style.color));
    const paper = brightness(below(element));
    found.push([texts.currentNode.data, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]);
  }
  return found;
})()
"""


@pytest.fixture
def written(tmp_path, contents):
    """A page of all that there can be, as a file."""
    path = tmp_path / "report.html"
    path.write_text(page.render(contents), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_opens_without_complaint_and_asks_for_nothing(browser, written, width, dark):
    browser.open(written.as_uri(), width, dark=dark)

    assert browser.complaints == []
    assert browser.requests == [written.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_complaint_and_a_request_would_be_seen(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><img src='x.png'><script>console.error('oh'); undefined.x</script>")
    browser.open(path.as_uri())

    assert len(browser.complaints) >= 2
    assert browser.requests[1:] == [(tmp_path / "x.png").as_uri()]


def test_the_figures_shown_are_those_of_the_report(browser, written, contents):
    report = json.loads(contents.report.text())
    browser.open(written.as_uri())

    shown = shown_figures(browser)

    assert list(filter(None, (wrong(report, *each) for each in shown))) == []
    assert len(shown) > 25
    for field in ("metric", "drop", "drop_interval", "agreement", "sqnr_db", "size_bytes", "compression", "speedup"):
        assert f"targets/0/{field}" in [path for path, _, _ in shown]
    assert {f"targets/0/{name}/p50" for name in ("latency_ms", "baseline_latency_ms")} <= {path for path, _, _ in shown}


def test_a_comparison_shows_the_figures_of_its_json(browser, tmp_path, contents):
    found = comparison.compare(contents, contents, comparison.limits(0.01, 3.0, 1.1, 1.05), ("new", "base"))
    path = tmp_path / "comparison.html"
    path.write_text(comparison_page.render(found), "utf-8")
    browser.open(path.as_uri())

    shown = shown_figures(browser)

    assert browser.complaints == []
    assert len(shown) >= 20
    document = json.loads(found.text())
    assert list(filter(None, (wrong(document, *each) for each in shown))) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_its_background(browser, written, dark):
    browser.open(written.as_uri(), dark=dark)

    contrasts = browser.run(CONTRASTS)

    assert len(contrasts) > 100
    assert [text for text, contrast in contrasts if contrast < 4.5] == []


def test_everything_has_a_name_for_those_who_listen(browser, written):
    browser.open(written.as_uri())
    browser("Accessibility.enable")

    nodes = browser("Accessibility.getFullAXTree")["nodes"]

    named = {"table", "img", "image", "combobox", "searchbox", "button", "link", "navigation", "region"}
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    assert [role for role, name in told if role in named and not name] == []
    assert {"main", "navigation", "table", "combobox", "searchbox"} <= {role for role, _ in told}
    assert any(name.startswith("Histogram of image: Stored as uint8, Range -1 to 0.9922") for _, name in told)
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3')].map((each) => +each.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_table_is_sorted_by_keyboard(browser, written):
    browser.open(written.as_uri())
    first = "document.querySelector('.layers tbody tr').cells[0].innerText"
    assert browser.run(first) == "conv1"

    browser.run("document.querySelector('.layers thead button').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('.layers th').ariaSort") == "ascending"
    browser.press(" ")

    assert browser.run("document.querySelector('.layers th').ariaSort") == "descending"
    assert browser.run(first) == "softmax"


def test_layers_are_filtered_by_what_is_typed(browser, written):
    browser.open(written.as_uri())
    browser.run("document.querySelector('.filtered input').focus()")
    browser.type("FP32 soft")

    shown = (
        "[...document.querySelectorAll('.layers tbody tr')].filter((e) => !e.hidden).map((e) => e.cells[0].innerText)"
    )
    assert browser.run(shown) == ["softmax"]
    assert browser.run("document.querySelector('.filtered output').innerText") == "1 of 2 layers"


def test_a_tensor_is_chosen_by_keyboard(browser, written):
    browser.open(written.as_uri())
    columns = "document.querySelectorAll('.histograms svg :is(.counted, .cut)').length"
    assert browser.run(columns) == 5
    assert browser.run("document.querySelectorAll('.histograms .cut').length") == 1  # the bin from -1.5 to -1.08

    browser.run("document.querySelector('.histograms .next').focus()")
    browser.press("Enter")

    assert browser.run("document.querySelector('.histograms select').selectedIndex") == 1
    assert browser.run("document.querySelector('.histograms svg').ariaLabel").startswith("Histogram of constant")
    assert browser.run(columns) == 1
    assert browser.complaints == []


def test_what_has_the_focus_is_seen(browser, written):
    browser.open(written.as_uri())
    browser.press("Tab")

    assert browser.run("document.activeElement.innerText") == "Skip to the verdict"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Tab")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_a_script_all_figures_are_there(browser, written):
    browser.open(written.as_uri(), scripted=False)

    assert len(shown_figures(browser)) > 20
    assert "Histograms are drawn by the page's script." in browser.run("document.body.innerText")
