"""The page of results in headless Chromium: opened from a file, on a desktop and a phone, by mouse and by keyboard.

Without a browser these tests are skipped; with VTOK_BROWSER=required a missing one is a failure.
"""

import os
import shutil

import numpy as np
import pytest
from test_report_html import EVIL, lines, record

from vtok.eval import write_report

REQUIRED = os.environ.get("VTOK_BROWSER") == "required"
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
PHONE = 375
CONTRAST = """(selector) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return Array.from(document.querySelectorAll(selector)).map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if REQUIRED:
            pytest.fail("VTOK_BROWSER=required, but there is no chromium on the path; apt-get install chromium")
        pytest.skip("no chromium on the path (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    base = np.arange(400) % 10 > 0
    held = [record("unpatched", 1.0, base)]
    for i, budget in enumerate((0.8, 0.6, 0.4)):
        for method in ("tome", "pitome", "random"):
            hits = base & (np.arange(400) % (5 + 3 * i + len(method)) > 0)
            held.append(record(method, budget, hits, base, speedup=0.7 + i / 2, speedup_ci=[0.6 + i / 2, 0.8 + i / 2]))
    held[-1] |= {"title": "random" + "_and_a_very_long_name_without_any_place_to_break" * 3}
    held += [one | {"model": EVIL, "dataset": EVIL, "key": f"evil{one['key']}"} for one in held[:4]]
    held[-1].pop("gmacs")
    path = lines(folder / "results.jsonl", held)
    key = held[1]["key"]
    asked = {"doc_id": 1, "question": f"is it? {EVIL}", "target": "yes", "score": 0.0, "kept_tokens": [3, 4]}
    answers = lines(folder / "samples.jsonl", [asked | {"key": f"{key}/1", "prediction": EVIL, "baseline_prediction": "yes"}])
    return write_report([path, answers], folder / "report.html").path


@pytest.fixture
def opened(browser, report):
    """(viewport width, colour scheme) -> page, watched for requests, dialogs and messages."""
    contexts = []

    def open_(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.seen = []
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("console", lambda message: page.seen.append(message.text))
        page.on("pageerror", lambda error: page.seen.append(str(error)))
        page.on("dialog", lambda dialog: (page.seen.append("dialog"), dialog.dismiss()))
        page.goto(report.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


def column(page, number):
    cells = page.locator("#s1 table.sortable tbody tr").evaluate_all(
        f"rows => rows.map((row) => row.cells[{number}].innerText)"
    )
    return [cell.strip() for cell in cells]


def test_it_opens_from_a_file_without_any_request(opened, report):
    page = opened()
    assert [url for url in page.seen if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.querySelectorAll('img, script').length") == 1  # its own script
    assert "<script>alert(1)</script>" in page.inner_text("main")


def test_columns_are_sorted_by_click_and_by_keyboard(opened):
    page = opened()
    heads = page.locator("#s1 table.sortable thead th")
    names = [name.split("\n")[0] for name in heads.all_inner_texts()]
    macs, first = names.index("GMACs"), column(page, 0)
    button = heads.nth(macs).locator("button")
    button.click()
    values = [float(v) for v in column(page, macs)]
    assert values == sorted(values, reverse=True) and heads.nth(macs).get_attribute("aria-sort") == "descending"
    button.focus()
    page.keyboard.press("Enter")
    assert [float(v) for v in column(page, macs)] == sorted(values) and heads.nth(macs).get_attribute(
        "aria-sort"
    ) == "ascending"
    assert page.locator("#sorted").inner_text() == "Sorted by GMACs, ascending."
    heads.nth(0).locator("button").focus()
    page.keyboard.press("Space")
    assert column(page, 0) == sorted(column(page, 0), key=str.lower) != first
    assert [heads.nth(i).get_attribute("aria-sort") for i in (0, macs)] == ["ascending", "none"]
    heads.nth(names.index("vs random")).locator("button").click()
    gaps = column(page, names.index("vs random"))
    known = [gap for gap in gaps if gap != "–"]
    assert gaps[: len(known)] == known and 0 < len(known) < len(gaps)  # what has no value stays last
    shown = [float(gap.lstrip("▲▼ ").split()[0].replace("−", "-")) for gap in known]
    assert shown == sorted(shown, reverse=True)


def test_everything_is_reached_by_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id === 'main'")
    outlines = page.evaluate(
        """() => Array.from(document.querySelectorAll('a, button, summary, [tabindex="0"]')).map((node) => {
          node.focus({focusVisible: true}); const style = getComputedStyle(node);
          return document.activeElement === node && style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2; })"""
    )
    assert len(outlines) > 25 and all(outlines)
    summary = page.locator("#s1 summary").last
    summary.focus()
    page.keyboard.press("Enter")
    assert summary.evaluate("node => node.parentElement.open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_by_day_and_night(opened, scheme):
    page = opened(PHONE, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    wide = page.evaluate(
        """() => Array.from(document.querySelectorAll('body *')).filter((node) => !node.closest('.scroll, svg, .skip, .sr'))
          .filter((node) => node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    small = page.evaluate(
        "() => Array.from(document.querySelectorAll('svg text')).map((t) => t.getBoundingClientRect().height)"
    )
    assert len(small) > 20 and min(small) > 8
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(int(v) for v in dark[4:-1].split(",")) < 60) == (scheme == "dark")
    ratios = page.evaluate(
        CONTRAST, "p, li, h1, h2, h3, td, th, a:not(.skip), small, summary, dt, dd, .badge, caption span, code"
    )
    assert len(ratios) > 150 and min(ratios) >= 4.5


def test_paper_shows_what_is_folded(opened):
    page = opened()
    folded = page.locator("details:not([open])").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded > 2 and page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded
