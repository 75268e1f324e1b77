"""The report in a browser, from file://, as a reader opens it: `pytest -m browser`.

Playwright comes from requirements-browser.txt, the browser from the system: any Chromium. Skipped only without them.
"""

import contextlib
import io
import itertools
import json
import re
import shutil
from urllib.parse import unquote, urlsplit

import pytest

import synthetic
from dynarep import claims, cli, report
from dynarep.experiment import find, load_all

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="300pt" viewBox="0 0 {width} 300">
<rect width="{width}" height="300" fill="#cde"/><text x="20" y="60" font-size="20">{name}</text></svg>"""
WIDE = "TabB"  # as the table of hyperparameters is
TRAINED = ("C", "R1", "D2")  # two papers and a dial task


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The ci report of all experiments: figures are stand-ins, runs of three experiments are made of chosen numbers."""
    home = tmp_path_factory.mktemp("site")
    results, figures, experiments = home / "results" / "runs", home / "figures", load_all()
    for experiment in experiments:
        path = figures / "ci" / experiment.spec.paper / f"{experiment.spec.id}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width = 941 if experiment.spec.id == WIDE else 374
        path.write_text(SVG.format(width=width, name=experiment.key))
        path.with_suffix(".csv").write_text("metric,value\n")
    for name in TRAINED:
        synthetic.write_runs(find(experiments, name), "ci", results, chosen)
    verdicts = claims.judge_all(experiments, "ci", results)
    assert len({v.verdict for v in verdicts}) > 2, "a filter needs something to tell apart"
    path = results / "report" / "ci.html"
    path.parent.mkdir()
    path.write_text(report.build(experiments, "ci", verdicts, results, figures))
    return path


def chosen(variant, task, seed, update, metric):
    """Return a value that depends on the arm, and on the seed so that there is an interval; nothing diverges."""
    level = {"mbpo": 5.0, "tun_only": 0.5, "zero": 3.0}.get(variant, 1.0)
    return 0.0 if metric == "diverged" else level * (1 + 0.01 * (seed * seed % 7))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """Open the page at a width. Whatever a test does, no request may leave the machine and nothing may go wrong."""
    asked, wrong, contexts = [], [], []

    def opened(width=1280, fragment="", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(30_000)
        context.set_default_navigation_timeout(120_000)  # on two busy cores
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(site.as_uri() + fragment)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}
    assert not wrong


def listed():
    """Return what `dynarep list` says there is."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.main(["list", "--json"])
    return json.loads(text.getvalue())


def shown(page):
    return page.locator("tbody[data-verdict]:visible")


def width_needed(page):
    return page.evaluate("document.documentElement.scrollWidth")


# -- what is there ------------------------------------------------------------------------------------------------


def test_every_claim_and_every_figure_that_is_listed_can_be_seen(visit):
    page = visit()
    for entry in listed():
        key = entry["target"]
        figure = page.locator(f"#figure-{key}")
        assert figure.is_visible(), key
        size = figure.locator("img").evaluate("image => image.complete && image.naturalWidth")
        assert size == round((941 if entry["experiment"] == WIDE else 374) * 4 / 3), "the picture itself did not come"
        assert page.locator(f"#exp-{key}").is_visible()
        for claim in entry["claims"]:
            row = page.locator(f"#claim-{claim['claim']}")
            assert row.is_visible(), claim["claim"]
            assert claim["says"] in row.inner_text()
    assert shown(page).count() == sum(len(entry["claims"]) for entry in listed())


def test_without_its_script_the_page_is_whole_and_offers_nothing_that_does_not_work(visit):
    page = visit(java_script_enabled=False)
    assert shown(page).count() == page.locator("tbody[data-verdict]").count() > 100
    assert page.locator("button:visible").count() == 0
    assert page.locator("dialog:visible").count() == 0


# -- filters ------------------------------------------------------------------------------------------------------


def press(page, group, name):
    page.get_by_role("group", name=group).get_by_role("button", name=name).click()


def test_each_filter_leaves_what_it_says_and_all_three_together_fit(visit):
    page = visit()
    status = page.get_by_role("status").first
    total = shown(page).count()
    for group, what in (
        ("Filter by verdict", "verdict"),
        ("Filter by paper", "paper"),
        ("Filter by the tiers", "tier"),
    ):
        for button in page.get_by_role("group", name=group).get_by_role("button").all()[1:]:
            button.click()
            value, rows = button.get_attribute("value"), shown(page).all()
            assert 0 < len(rows) < total, value
            assert all(value in (row.get_attribute(f"data-{what}") or "").split() for row in rows)
            promised = re.search(r"\((\d+)\)", button.inner_text())
            assert promised is None or int(promised[1]) == len(rows), button.inner_text()
            assert status.inner_text() == f"Showing {len(rows)} of {total} claims", (
                "a screen reader hears another number"
            )
            assert button.get_attribute("aria-pressed") == "true"
        press(page, group, "All")
        assert shown(page).count() == total
    press(page, "Filter by the tiers", "judged here")
    press(page, "Filter by paper", "FTFL")
    both = shown(page).count()
    assert both == page.locator("tbody[data-tier~=here][data-paper=ftfl]").count() > 0
    press(page, "Filter by verdict", "untested")
    assert shown(page).count() == 0
    assert page.get_by_text("No claim fits all three filters.").is_visible()


def test_a_link_to_a_claim_that_is_filtered_away_brings_it_back(visit):
    page = visit()
    press(page, "Filter by paper", "MAD-TD")
    assert not page.locator("#claim-F3").is_visible()
    page.locator("#exp-ftfl_C a[href='#claim-F3']").click()
    page.locator("#claim-F3").wait_for(state="visible")


# -- links --------------------------------------------------------------------------------------------------------


def test_no_link_is_dead(visit, site):
    page = visit()
    links = page.evaluate("Array.from(document.querySelectorAll('a[href]'), a => a.getAttribute('href'))")
    inside = {link[1:] for link in links if link.startswith("#")}
    assert inside <= set(page.evaluate("Array.from(document.querySelectorAll('[id]'), e => e.id)"))
    files = {link for link in links if not link.startswith("#")}
    assert len([link for link in files if link.endswith("manifest.json")]) > 50
    assert len([link for link in files if link.endswith(".csv")]) == len(listed())
    assert not [link for link in files if not (site.parent / unquote(link)).is_file()]


def test_a_verdict_leads_to_its_figure_its_runs_and_their_manifests(visit, site):
    page = visit(390)
    claim = page.locator("#claim-F3")
    claim.get_by_role("link", name="figure C").click()
    assert page.url.endswith("#figure-ftfl_C")
    assert page.locator("#figure-ftfl_C").evaluate("e => Math.abs(e.getBoundingClientRect().top) < innerHeight")
    claim.get_by_role("link", name="runs of C").click()
    page.locator("#exp-ftfl_C summary", has_text="Runs of C").click()
    page.locator("#exp-ftfl_C a[href$='manifest.json']").first.click()
    page.wait_for_url("**/manifest.json")
    assert set(json.loads(page.inner_text("body"))) >= {"identity", "config", "seed"}
    page.go_back()
    assert page.url.startswith(site.as_uri())


def test_a_link_into_what_is_folded_opens_it(visit):
    page = visit()
    folded = page.locator("#exp-ftfl_C details table").first
    folded.evaluate("table => { table.id = 'inside'; }")
    assert not folded.is_visible()
    page.evaluate("location.hash = 'inside'")
    folded.wait_for(state="visible")


# -- figures in full screen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["#figure-ftfl_C", "#dial-beyond_D2 .others"])  # a picture, and a reference to one
def test_a_figure_is_enlarged_zoomed_and_closed_by_keyboard_and_focus_returns(visit, where):
    page = visit()
    frame = page.locator(f"{where} .scroll").first
    frame.focus()
    frame.press("Enter")
    dialog, drawn = page.get_by_role("dialog"), page.locator("#stage > *")
    assert dialog.is_visible()
    assert dialog.evaluate("e => e.clientWidth === innerWidth && Math.abs(e.clientHeight - innerHeight) < 2")
    at_first = drawn.bounding_box()
    assert at_first["width"] > frame.bounding_box()["width"] * 0.9
    assert at_first["height"] == pytest.approx(at_first["width"] * 300 / 374, rel=0.02), "squeezed"
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert drawn.bounding_box()["width"] == pytest.approx(at_first["width"] * 1.25**2, rel=0.01)
    assert page.locator("#level").inner_text().endswith("%")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.getElementById('stage').scrollTop > 0")
    page.keyboard.press("-")
    assert drawn.bounding_box()["width"] == pytest.approx(at_first["width"] * 1.25, rel=0.01)
    page.keyboard.press("0")
    assert drawn.bounding_box()["width"] == pytest.approx(at_first["width"], rel=0.01)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert frame.evaluate("e => e === document.activeElement"), "where was the reader?"
    assert page.locator("#stage > *").count() == 0


def test_a_figure_is_enlarged_by_mouse_and_the_wheel_zooms_about_the_pointer(visit):
    page = visit()
    opener = page.get_by_role("button", name=f"Enlarge table {WIDE}")
    opener.click()
    drawn, stage = page.locator("#stage > *"), page.locator("#stage").bounding_box()
    x, y = stage["x"] + 900, stage["y"] + 200
    before = drawn.bounding_box()
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    page.wait_for_function("w => document.querySelector('#stage > *').clientWidth > 1.5 * w", arg=before["width"])
    after = drawn.bounding_box()
    share = [(x - box["x"]) / box["width"] for box in (before, after)]
    assert share[0] == pytest.approx(share[1], abs=0.02), "what is under the pointer ran away"
    page.mouse.down()
    page.mouse.move(x + 120, y)
    page.mouse.up()
    assert drawn.bounding_box()["x"] == pytest.approx(after["x"] + 120, abs=3), "dragging moves it"
    page.get_by_role("button", name="Zoom out").click()
    assert drawn.bounding_box()["width"] == pytest.approx(after["width"] * 0.8, rel=0.01)
    page.get_by_role("button", name="Close").click()
    assert not page.get_by_role("dialog").is_visible()
    assert opener.evaluate("e => e === document.activeElement")


def test_behind_a_dialog_nothing_can_be_reached(visit):
    page = visit()
    page.get_by_role("button", name="Enlarge figure C", exact=True).click()
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.closest('dialog') !== null || document.activeElement.tagName")
        )
    assert set(seen) <= {True, "BODY"}, "BODY is the browser's own bar"
    assert seen.count(True) > 4


# -- keyboard, screen reader, phone, print ------------------------------------------------------------------------


def test_tab_goes_through_the_page_in_reading_order(visit):
    page = visit()
    words = []
    for _ in range(24):
        page.keyboard.press("Tab")
        words.append(page.evaluate("document.activeElement.textContent.trim()"))
        box = page.locator(":focus").bounding_box()
        assert box["width"] > 0, words[-1]
        assert box["height"] > 0, words[-1]
        assert 0 <= box["y"] + box["height"] / 2 <= 900, f"{words[-1]} is focused out of sight"
    assert words[:2] == ["Skip to the verdicts", "Verdicts"]
    order = [words.index(word) for word in ("How it was made", "All verdicts", "All papers", "All tiers")]
    assert order == sorted(order)
    assert words[-1] != words[-2]
    assert page.locator("[tabindex]:not([tabindex='0'])").count() == 0, "an order of its own"


def test_the_skip_link_skips(visit):
    page = visit()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#verdicts') !== null")


def test_whatever_can_be_used_or_looked_at_has_a_name(visit):
    page = visit()
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    heard = page.locator("body").aria_snapshot()
    assert len(re.findall(r"^\s*- button \"", heard, re.MULTILINE)) > 40
    assert len(re.findall(r"^\s*- table \"", heard, re.MULTILINE)) > 30
    nameless = re.findall(r"^\s*- (?:button|link|img|region|table|group|dialog)(?::| \[.*)?$", heard, re.MULTILINE)
    assert [line.strip() for line in nameless if "group" not in line] == []
    levels = page.evaluate("Array.from(document.querySelectorAll('h1,h2,h3,h4'), e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "a level is skipped"


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(visit, width):
    page = visit(width)
    assert width_needed(page) <= width
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert width_needed(page) <= width, "something folded is too wide"
    if width == 390:
        page.get_by_role("button", name=f"Enlarge table {WIDE}").click()
        assert page.locator("#stage > *").bounding_box()["width"] <= 390, "the whole table first"
        assert page.get_by_role("button", name="Close").bounding_box()["x"] < 350


def test_buttons_and_links_of_a_phone_can_be_hit(visit):
    page = visit(390, has_touch=True, is_mobile=True)
    boxes = [button.bounding_box() for button in page.locator("#filters button").all()]
    assert min(box["height"] for box in boxes) >= 30
    assert max(box["x"] + box["width"] for box in boxes) <= 390
    page.get_by_role("button", name="Enlarge figure C", exact=True).tap()
    assert page.get_by_role("dialog").is_visible()


def test_on_paper_everything_but_controls_is_there(visit):
    page = visit()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("button:visible").count() == 0
    assert page.locator("nav:visible").count() == 0
    assert page.locator("#claim-F3 dl").is_visible(), "details are unfolded"
    assert page.locator("#exp-ftfl_C details:not(.long) table").first.is_visible()
    assert not page.locator("details.long pre").first.is_visible(), "thousands of commands"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#claim-F3 dl").is_visible(), "folded again"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_text_can_be_read_in_the_dark_as_well(visit):
    """Contrast of text and paper as WCAG computes it: 4.5 is enough for text."""
    ratio = """selector => {
      const light = text => {
        const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(x => x / 255)
          .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const pair = [light(getComputedStyle(document.querySelector(selector)).color),
                    light(getComputedStyle(document.body).backgroundColor)].sort();
      return (pair[1] + 0.05) / (pair[0] + 0.05);
    }"""
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        for selector in ("body", "a.id", ".soft", "summary", *(f".verdict.{name}" for name in report.VERDICTS)):
            assert page.evaluate(ratio, selector) >= 4.5, f"{scheme}: {selector}"
