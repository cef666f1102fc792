"""The rendered pages: no broken link, no heavy page, nothing from elsewhere; in a browser, no error and no barrier.

The browser tests need Chromium on the path (Debian: `apt install chromium`); without it they are skipped.
"""

from __future__ import annotations

import functools
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MIB = 2**20


class _Page(HTMLParser):
    """What a page refers to, where it can be pointed at, and what its pictures say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[tuple[str, str]] = []
        self.anchors: list[str] = []
        self.without_alt: list[str] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("href", "src"):
            if target := values.get(name):
                self.references.append((tag, target))
        if anchor := values.get("id"):
            self.anchors.append(anchor)
        if tag == "img" and not values.get("alt"):
            self.without_alt.append(values.get("src") or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="session")
def pages(rendered: Path) -> dict[str, _Page]:
    """Path of each page within the book -> what stands in it."""
    found = {
        path.relative_to(rendered).as_posix(): _Page(path.read_text(encoding="utf-8"))
        for path in sorted(rendered.rglob("*.html"))
        if not {"_static", "_sources"} & set(path.relative_to(rendered).parts)
    }
    assert "book/scoreboard.html" in found
    return found


def test_every_link_within_the_book_leads_somewhere(rendered, pages):
    broken = []
    for name, page in pages.items():
        for _, target in page.references:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            here = (rendered / name).parent if parts.path else rendered / name
            there = (here / unquote(parts.path)).resolve() if parts.path else here
            if there.is_dir():
                there = there / "index.html"
            if not there.is_file():
                broken.append(f"{name}: {target}")
            elif parts.fragment and there.suffix == ".html":
                known = pages[there.relative_to(rendered.resolve()).as_posix() if parts.path else name].anchors
                if unquote(parts.fragment) not in known:
                    broken.append(f"{name}: {target}")
    assert broken == []


def test_pages_load_nothing_from_elsewhere(pages):
    loading = {"script", "link", "img", "iframe", "source", "video", "audio", "embed"}
    elsewhere = [
        f"{name}: <{tag}> {target}"
        for name, page in pages.items()
        for tag, target in page.references
        if tag in loading and urlsplit(target).netloc
    ]
    assert elsewhere == []


def test_a_page_without_its_figures_stays_under_one_megabyte(rendered, pages):
    heavy = {name: (rendered / name).stat().st_size / MIB for name in pages}
    assert {name: size for name, size in heavy.items() if size > 1} == {}


def test_every_picture_says_what_it_shows(pages):
    assert {name: page.without_alt for name, page in pages.items() if page.without_alt} == {}


def test_no_anchor_stands_twice(pages):
    twice = {
        name: sorted({a for a in page.anchors if page.anchors.count(a) > 1})
        for name, page in pages.items()
        if len(set(page.anchors)) < len(page.anchors)
    }
    assert twice == {}


def test_headings_skip_no_level(pages):
    skipping = [
        name
        for name, page in pages.items()
        if any(after > before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    ]
    assert skipping == []


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def address(rendered: Path) -> Iterator[str]:
    """The book, served on this machine only."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(rendered))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


SCREENS = {"desktop, light": ("light", 1280), "desktop, dark": ("dark", 1280), "phone, dark": ("dark", 390)}


@pytest.mark.parametrize("screen", SCREENS)
def test_every_page_is_accessible_and_quiet(browser, address, pages, screen):
    """No rule of axe is broken, nothing complains in the console, and no page is wider than its screen."""
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    scheme, width = SCREENS[screen]
    faults = []
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 844}, reduced_motion="reduce"
    )
    for name in pages:
        page, said = context.new_page(), []
        page.on("console", lambda line, said=said: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(address + name, wait_until="load")
        page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            faults.append(f"{name}: wider than the screen")
        faults += [f"{name}: console: {text}" for text in said]
        page.evaluate(axe)
        # Without `preload` axe does not fetch the style sheets once more, from wrong addresses.
        for fault in page.evaluate("axe.run({resultTypes: ['violations'], preload: false})")["violations"]:
            faults.append(
                f"{name}: {fault['id']}: {len(fault['nodes'])} times, first {fault['nodes'][0]['html'][:200]}"
            )
        page.close()
    context.close()
    assert faults == []


def test_the_scoreboard_can_be_searched_and_sorted_and_reads_without_scripts(browser, address):
    page = browser.new_page()
    page.goto(address + "book/scoreboard.html", wait_until="load")
    rows = page.locator("table.lt-scoreboard tbody tr")
    everything = rows.count()
    assert everything > 50
    page.get_by_role("searchbox").last.fill("FPRaker")
    visible = page.locator("table.lt-scoreboard tbody tr:visible")
    assert 0 < visible.count() < everything
    assert all("FPRaker" in text for text in visible.all_inner_texts())
    page.close()
    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(address + "book/scoreboard.html", wait_until="load")
    assert page.locator("table.lt-scoreboard tbody tr:visible").count() == everything
    plain.close()


def test_the_search_finds_a_chapter(browser, address):
    page = browser.new_page()
    page.goto(address + "search.html?q=TensorDash", wait_until="load")
    page.locator("#search-results li a").first.wait_for()
    assert any(
        "tensordash" in (link.get_attribute("href") or "") for link in page.locator("#search-results li a").all()
    )
    page.close()


def test_a_solution_opens_at_a_click(browser, address, pages):
    page = browser.new_page()
    page.goto(address + "book/chapters/adan.html", wait_until="load")
    folded = page.locator("details.hide").first
    assert not folded.evaluate("element => element.open")
    folded.locator("summary").click()
    assert folded.evaluate("element => element.open")
    page.close()
