"""The rendered pages: no broken link, no heavy page, nothing from elsewhere, and nothing that is only to be seen."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from leantrain.catalog import load_catalog

pytestmark = pytest.mark.slow

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


def test_every_solution_is_folded_with_its_words(rendered):
    for paper in load_catalog().built():
        written = paper.chapter_path.read_text(encoding="utf-8").count("**Solution.**")
        page = (rendered / f"book/chapters/{paper.slug}.html").read_text(encoding="utf-8")
        assert page.count("<details class='lt-fold'>") == written >= 2, paper.slug
        assert "<strong>Solution" not in page, paper.slug


def test_the_card_opens_every_chapter_and_the_code_before_it_is_folded(rendered):
    for paper in load_catalog().built():
        page = (rendered / f"book/chapters/{paper.slug}.html").read_text(encoding="utf-8")
        article = page[page.index("<article") :]
        card, fold = article.index("lt-card"), article.index("<details class='lt-fold lt-fold--code'>")
        assert card < fold < article.index("cell_input") < article.index("globals") < article.index("</details>")


def test_every_table_of_a_chapter_has_a_class_that_gives_it_its_look_and_no_value_of_pandas_own(rendered):
    for paper in load_catalog().built():
        page = (rendered / f"book/chapters/{paper.slug}.html").read_text(encoding="utf-8")
        tables = re.findall(r"<table[^>]*>", page)
        assert tables, paper.slug
        assert [table for table in tables if " class=" not in table] == [], paper.slug
        assert ">NaN<" not in page, paper.slug
