"""The pages in a browser: what axe, the console, the network and a reader's hands find, in light and dark.

Chromium is looked for as `leantrain book --pdf` looks for it; these tests are skipped where there is none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from leantrain import book, paths
from leantrain.catalog import load_catalog

pytestmark = pytest.mark.slow

OPTIONS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-sandbox",  # the pages are the project's own, and Chromium refuses to start as root with a sandbox
]

#: A large and a small screen, in CSS pixels.
SCREENS = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}

#: Rules of the Web Content Accessibility Guidelines 2, levels A and AA, and the order of the headings. `preload` would
#: have axe fetch the style sheets again, which a page opened from a folder may not.
RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa"]},
    "rules": {"heading-order": {"enabled": True}},
    "resultTypes": ["violations"],
    "preload": False,
}
CONTRAST = {"runOnly": ["color-contrast"], "resultTypes": ["violations"], "preload": False}

#: A chapter has thousands of coloured words of code in a dozen pairs of colours, and axe needs milliseconds for each.
#: One word of every pair stays; the others give their place to their text.
ONE_WORD_A_COLOUR = """() => {
  const seen = new Set();
  for (const word of document.querySelectorAll(".highlight pre span")) {
    if (word.childElementCount) continue;
    const own = getComputedStyle(word), ground = getComputedStyle(word.closest("pre"));
    const pair = [own.color, own.backgroundColor, own.fontWeight, ground.color, ground.backgroundColor].join();
    if (seen.has(pair)) word.replaceWith(word.textContent);
    seen.add(pair);
  }
}"""

#: Every element that is wider than its page without standing in a box that scrolls.
TOO_WIDE = """() => {
  const scrolls = (element) => element && (
    /auto|scroll|hidden|clip/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width && document.body.scrollWidth <= width) return [];
  const wide = [...document.querySelectorAll("main *")].filter(
    (element) => element.getBoundingClientRect().right > width + 1 && !scrolls(element.parentElement));
  const sum = `scrolls to ${document.documentElement.scrollWidth} of ${width} pixels`;
  return [sum, ...wide.map((element) => element.outerHTML.slice(0, 120))];
}"""

#: Cells of the scoreboard whose text is cut off, leaves the cell, or lies over other text.
COLLISIONS = """() => {
  const found = [];
  const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
  for (const row of document.querySelectorAll("table.lt-scoreboard tbody tr")) {
    if (!row.checkVisibility()) continue;
    const boxes = [...row.cells].map((cell) => {
      const range = document.createRange();
      range.selectNodeContents(cell);
      const text = range.getBoundingClientRect(), own = cell.getBoundingClientRect();
      if (cell.scrollWidth > cell.clientWidth + 1 || text.right > own.right + 1 || text.bottom > own.bottom + 1)
        found.push(`cut off: ${cell.textContent}`);
      return text;
    });
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
      if (before(a, b) || before(b, a)) return;
      found.push(`over each other: ${row.cells[i].textContent} / ${row.cells[i + j + 1].textContent}`);
    }));
  }
  return found;
}"""


def names_of_pages() -> list[str]:
    """Every page of the book, as its table of contents has it, and the two that Sphinx adds."""
    table = book.table_of_contents(load_catalog())
    return [
        table["root"],
        *(entry["file"] for part in table["parts"] for entry in part["chapters"]),
        "search",
        "genindex",
    ]


PAGES = names_of_pages()
CHAPTERS = [name for name in PAGES if name.startswith("book/chapters/")]
PAGES_APART = [name for name in PAGES if name not in CHAPTERS[1:]]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """A log line a request would drown what the tests say."""


@pytest.fixture(scope="module")
def site(rendered: Path) -> Iterator[str]:
    """Address under which the book is served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(rendered)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # For this module only: playwright keeps an event loop running, beside which the thread can have no other.
    try:
        program = book._browser()
    except book.BookError as missing:
        pytest.skip(str(missing))
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield started
        started.close()


class Reader:
    """A page of a context that may reach the book only, and what went wrong in it."""

    def __init__(self, context: BrowserContext, site: str) -> None:
        self.site = site
        self.faults: list[str] = []
        context.set_default_timeout(20_000)
        context.route("**/*", self._let_through)
        self.page = context.new_page()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("requestfailed", lambda request: self.faults.append(f"not loaded: {request.url}"))
        self.page.on("response", self._receive)

    def _let_through(self, route: Route) -> None:
        if route.request.url.startswith((self.site, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    def _hear(self, message) -> None:
        if message.type in {"error", "warning"}:
            self.faults.append(f"{message.type} in the console: {message.text}")

    def _receive(self, response) -> None:
        if response.status >= 400:
            self.faults.append(f"status {response.status}: {response.url}")

    def open(self, name: str) -> Page:
        """Open a page of the book with its formulas set; forgets the faults of the page before."""
        self.faults.clear()
        self.page.goto(f"{self.site}/{name}.html")
        self.page.evaluate("window.MathJax?.startup?.promise")
        return self.page


@pytest.fixture(scope="module")
def readers(browser: Browser, rendered: Path, site: str) -> Iterator[dict[str, Reader]]:
    """One reader at a large screen, who has the book from a server, and one at a phone, who has it as a folder."""
    where = {"desktop": site, "phone": rendered.as_uri()}
    contexts = {
        screen: browser.new_context(viewport=size, reduced_motion="reduce", accept_downloads=True)
        for screen, size in SCREENS.items()
    }
    yield {screen: Reader(context, where[screen]) for screen, context in contexts.items()}
    for context in contexts.values():
        context.close()


@pytest.fixture(scope="module")
def desktop(readers) -> Reader:
    return readers["desktop"]


def inaccessible(page: Page, options: dict) -> list[str]:
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]} ({node['failureSummary']})" for rule in found for node in rule["nodes"]
    ]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_is_sound_and_open_to_everyone(screen, name, readers):
    """All rules by day on the large screen and by night on the small one; the contrast in the other two as well.

    Chapters are made of the same parts, so one of them is enough for these other two.
    """
    reader = readers[screen]
    first, second = ("light", "dark") if screen == "desktop" else ("dark", "light")
    reader.page.emulate_media(color_scheme=first)
    page = reader.open(name)
    faults = page.evaluate(TOO_WIDE)
    page.evaluate(ONE_WORD_A_COLOUR)
    looks = [(first, RULES)]
    if name in PAGES_APART:
        looks.append((second, CONTRAST))
    for scheme, rules in looks:
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        faults += [f"{scheme}: {fault}" for fault in inaccessible(page, rules)]
    assert reader.faults + faults == []


def test_the_pages_are_those_of_the_table_of_contents(rendered):
    made = {path.relative_to(rendered).with_suffix("").as_posix() for path in rendered.rglob("*.html")}
    assert {name for name in made if not name.startswith(("_static/", "_sources/"))} == {*PAGES, "index"}


@pytest.mark.parametrize("width", [320, 390, 701, 1000, 1280])
def test_no_text_of_the_scoreboard_is_cut_off_or_lies_over_other_text(width, desktop):
    page = desktop.open("book/scoreboard")
    page.set_viewport_size({"width": width, "height": 800})
    try:
        assert page.evaluate(COLLISIONS) == []
        assert page.evaluate(TOO_WIDE) == []
    finally:
        page.set_viewport_size(SCREENS["desktop"])


def test_search_finds_a_term_and_the_result_opens(desktop):
    page = desktop.open("book/index")
    page.keyboard.press("Control+k")
    page.locator("dialog input[type=search]").fill("Procrustes")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=Procrustes*")
    page.locator("#search-results li a", has_text="Procrustes").first.click()
    page.wait_for_url("**/book/**")
    expect(page.locator("main")).to_contain_text("Procrustes")
    assert desktop.faults == []


def test_a_solution_is_folded_until_it_is_asked_for(desktop):
    page = desktop.open("book/chapters/gqkva")
    folds = page.locator("details.lt-fold", has=page.locator("summary", has_text="Solution"))
    assert folds.count() == 3
    words, code = folds.last.locator("p").first, folds.last.locator("pre").first
    for hidden in (words, code):
        expect(hidden).to_be_hidden()
    folds.last.locator("summary").click()
    for shown in (words, code):
        expect(shown).to_be_visible()


def test_a_note_stands_in_the_margin_or_where_there_is_none_in_the_text(desktop):
    page = desktop.open("book/chapters/gqkva")
    note, text = page.locator("aside.margin"), page.locator("article section section > p").first
    try:
        for screen, beside in (("desktop", True), ("phone", False)):
            page.set_viewport_size(SCREENS[screen])
            expect(note).to_contain_text("grouped-query attention")
            here, column = note.bounding_box(), text.bounding_box()
            assert (here["x"] >= column["x"] + column["width"]) == beside
            assert here["x"] + here["width"] <= SCREENS[screen]["width"]
    finally:
        page.set_viewport_size(SCREENS["desktop"])


def test_a_chapter_downloads_as_it_was_executed_and_no_button_starts_it_elsewhere(desktop):
    page = desktop.open("book/chapters/gqkva")
    page.get_by_role("button", name="Download this page").click()
    expect(page.locator(".btn-download-pdf-button")).to_be_visible()
    with page.expect_download() as download:
        page.locator(".btn-download-source-button").click()
    assert Path(download.value.path()).read_bytes() == (paths.CHAPTERS / "gqkva.ipynb").read_bytes()
    assert page.locator("[class*=launch]").count() == 0


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_the_scoreboard_downloads_as_data(kind, desktop, rendered):
    page = desktop.open("book/scoreboard")
    with page.expect_download() as download:
        page.get_by_role("link", name=kind.upper()).click()
    assert Path(download.value.path()).read_bytes() == (rendered / f"book/scoreboard.{kind}").read_bytes()


def claims_shown(page: Page) -> list[str]:
    return page.locator("tr.lt-claim:visible > th").all_inner_texts()


def test_the_scoreboard_is_searched_filtered_and_sorted(desktop):
    page = desktop.open("book/scoreboard")
    every = [claim for paper in load_catalog().built() for claim in paper.claims]
    status = page.locator("#lt-score-controls [role=status]")
    expect(status).to_contain_text(f"{len(every)} of {len(every)} claims")
    assert len(claims_shown(page)) == len(every)

    page.get_by_label("Headline claims only").check()
    assert len(claims_shown(page)) == sum(claim.headline for claim in every)
    page.get_by_role("combobox", name="Verdict").select_option("not reproduced")
    badges = page.locator("tr.lt-claim:visible .lt-badge").all_inner_texts()
    assert badges
    assert all("not reproduced" in text for text in badges)
    page.get_by_label("Headline claims only").uncheck()
    page.get_by_role("combobox", name="Verdict").select_option("all")

    page.get_by_role("searchbox", name="Search", exact=True).fill("gqkva parameters")
    found = page.locator("tr.lt-claim:visible").count()
    assert 0 < found < len(every)
    page.get_by_role("searchbox", name="Search", exact=True).fill("no such words")
    expect(status).to_contain_text(f"0 of {len(every)} claims")
    page.get_by_role("searchbox", name="Search", exact=True).fill("")

    page.get_by_role("combobox", name="In the order of").select_option("paper")
    papers = page.locator("tr.lt-claim:visible .lt-paper-name").all_inner_texts()
    assert len(papers) == len(every)
    assert papers == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b))", papers)
    page.locator("tr.lt-claim:visible .lt-paper-name a").first.click()
    page.wait_for_url("**/book/chapters/*.html")
    assert desktop.faults == []


def test_the_scoreboard_is_readable_without_scripts(browser, site):
    context = browser.new_context(java_script_enabled=False, viewport=SCREENS["desktop"])
    try:
        page = Reader(context, site).page
        page.goto(f"{site}/book/scoreboard.html")
        assert len(claims_shown(page)) == sum(len(paper.claims) for paper in load_catalog().built())
        assert page.locator("#lt-score-controls :is(input, select)").count() == 0
    finally:
        context.close()
