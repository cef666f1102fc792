"""The Sphinx extension: its markup, and small books rendered with it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from leantrain import book, sphinx_ext
from leantrain.book import BookError, Result, ScoreRow, scoreboard_rows
from leantrain.catalog import Quantity, Study, load_catalog
from leantrain.records import finish, read_record

PROSE = """
## Prose

We found {result}`toy.answer` and {result}`toy.large/main`, so {verdict}`toy.answer`; later {result}`other.claim`.
The softmax is $e^{x}$. See {cite:t}`toy`.
"""


def add_prose(house, text):
    notebook = json.loads(house.chapter.read_text())
    notebook["cells"].append({"cell_type": "markdown", "id": "prose", "source": text, "metadata": {}})
    finish(notebook)
    house.chapter.write_text(json.dumps(notebook))


class Outline(HTMLParser):
    """The elements of a page that the tests look at, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in wanted.items())]


# ---------------------------------------------------------------- markup


def rows_of(executed, **changes):
    record = read_record(executed.chapter).model_copy(update=changes)
    return scoreboard_rows(load_catalog(), {"toy": record}, {}, lambda record, paper: [])


def test_the_scoreboard_escapes_what_comes_from_the_catalogue_and_the_machine(executed):
    papers = executed.root / "book" / "papers.yml"
    papers.write_text(papers.read_text().replace("The answer is about 42.", '"<script>alert(1)</script> & <b>."'))
    record = read_record(executed.chapter)
    provenance = record.provenance.model_copy(update={"processor": "<img src=x onerror=alert(1)>"})
    rows = rows_of(executed, provenance=provenance)
    markup = sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=False)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;." in markup
    assert "&lt;img src=x onerror=alert(1)&gt;" in markup
    assert "<script" not in markup
    assert "<img" not in markup


def test_the_scoreboard_is_a_table_that_a_screen_reader_can_walk(executed):
    rows = rows_of(executed)
    markup = sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=False)
    assert "<caption>First part: what the papers claim and what was found</caption>" in markup
    assert re.findall(r"<th scope='col'[^>]*>([^<]+)<", markup) == ["Claim", "The paper", "This book", "Verdict"]
    assert len(re.findall(r"<th scope='rowgroup'", markup)) == 2
    assert len(re.findall(r"<th scope='row' ", markup)) == 2
    assert re.findall(r"data-label='([^']+)'", markup) == ["The paper", "This book", "Verdict"] * 2
    # Every row, cell and heading keeps its role where the style turns the table into cards.
    assert not re.findall(r"<(?:table|thead|tbody|tr|td|th)\b(?![^>]*\brole=)[^>]*>", markup)


def test_the_scoreboard_marks_what_needs_a_mark(executed):
    few = {"toy.large": {"main": Quantity(value=2.0, low=1.0, high=2.2, n=2)}}
    rows = rows_of(executed, measurements=few)
    markup = sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=False)
    assert "2 x <span class='lt-unverified'>unverified</span>" in markup
    assert re.search(r"not reproduced <span class='lt-indicative'>indicative</span>", markup)
    # toy.answer was not measured in this run, and `other` has no chapter: one line, without its claims.
    assert "The claim came into the catalogue after this run." in markup
    assert "lt-badge--planned" in markup
    assert "It is faster." not in markup


def test_the_scoreboard_says_when_a_runs_time_is_not_all_of_it(executed):
    provenance = read_record(executed.chapter).provenance
    rows = rows_of(executed)
    assert "· 62 s · 2026-01-02" in sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=False)
    rows = rows_of(executed, provenance=provenance.model_copy(update={"runs_from_cache": 4}))
    kept = "· 62 s, 4 of 6 trainings kept from an earlier run · 2026-01-02"
    assert kept in sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=False)


def test_the_scoreboard_sets_this_machines_result_beside_the_published_one(executed):
    record = read_record(executed.chapter)
    local = record.model_copy(
        update={
            "profile": "quick",
            "measurements": {"toy.answer": {"main": Quantity(value=20, low=20, high=20, n=1, method="exact")}},
        }
    )
    rows = scoreboard_rows(
        load_catalog(), {"toy": record}, {"toy": local}, lambda record, paper: ["the notebook's code"]
    )
    markup = sphinx_ext.scoreboard_html(rows[0].part, rows, with_local=True)
    answer = re.search(r"The answer is about 42.*?</tr>", markup)[0]
    assert re.search(r"data-label='This book'><div><span class='lt-value'>42 points<", answer)
    assert re.search(r"data-label='This machine'><div><span class='lt-value'>20 points</span> .*not reproduced", answer)
    assert markup.count("stale: the notebook&#x27;s code") == 2


def test_the_tally_counts_only_papers_with_a_chapter(executed):
    markup = sphinx_ext.tally_html(rows_of(executed))
    assert "1 of 2 papers have a chapter; together they test 2 claims." in markup
    assert re.findall(r"</span> (\w[\w ]*)</span> <b>(\d+)</b>", markup) == [("reproduced", "2")]


def test_a_study_is_tallied_apart(executed):
    (row, *_), record = rows_of(executed), rows_of(executed)[0].published.record
    study = Study(
        slug="own", title="Own", short="Own", year=2026, part="first", problem="A.", idea="An.", tests="A.",
        claims=[row.claim.model_dump() | {"id": "own.answer", "paper": None, "stated": "own"}],
    )  # fmt: skip
    own = ScoreRow(row.part, study, study.claims[0], Result(row.published.decision, None, "", record))
    markup = sphinx_ext.tally_html([*rows_of(executed), own])
    assert "1 of 2 papers have a chapter; together they test 2 claims." in markup
    assert "A study of the book's own tests 1 more, which are not counted here." in markup
    assert re.findall(r"</span> (\w[\w ]*)</span> <b>(\d+)</b>", markup) == [("reproduced", "2")]
    assert "what the book asked and what was found" in sphinx_ext.scoreboard_html(row.part, [own], with_local=False)


# ---------------------------------------------------------------- rendered books


def test_a_small_book_renders_without_a_warning_and_notices_when_a_chapter_goes_stale(small_book):
    add_prose(small_book, PROSE)
    index = book.build()
    assert index == small_book.root / "_build" / "html" / "index.html"
    html = index.parent

    chapter = Outline(html / "book" / "chapters" / "toy.html")
    assert re.search(
        r"We found 42 points and 2 x \[1\.8,\s2\.2\], n\s=\s3, so ✓ reproduced; later not measured here", chapter.text
    )
    assert "Stale results" not in chapter.text
    # Formulas need no network: nothing is loaded from elsewhere.
    scripts = [a["src"] for a in chapter.all("script") if a.get("src")]
    assert any("mathjax/tex-svg.js" in source for source in scripts)
    for page in html.rglob("*.html"):
        outline = Outline(page)
        loaded = [a.get("src") or a.get("href") for t, a in outline.found if t in {"script", "img", "link", "iframe"}]
        assert not [address for address in loaded if address and "//" in address], page.name
    assert (html / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    # The download keeps the record that the page leaves out.
    assert (
        "application/vnd.leantrain.record+json" in (html / "_sources" / "book" / "chapters" / "toy.ipynb").read_text()
    )

    scores = Outline(html / "book" / "scoreboard.html")
    assert {row["claim"] for row in json.loads((html / "book" / "scoreboard.json").read_text())} == {
        claim.id for paper in load_catalog().papers for claim in paper.claims
    }
    assert scores.all("a", href="scoreboard.csv")
    assert (html / "book" / "scoreboard.csv").exists()
    assert [a["data-tested"] for a in scores.all("tr") if "data-tested" in a] == ["exact", "scaled"]
    scripted = [p.name for p in html.rglob("*.html") if "scoreboard.js" in p.read_text(encoding="utf-8")]
    assert scripted == ["scoreboard.html"], "only the scoreboard loads its script"
    watched = [p.name for p in html.rglob("*.html") if "scrolling.js" in p.read_text(encoding="utf-8")]
    assert watched == ["toy.html"], "only chapters have boxes that scroll"
    assert [a.get("href") for a in scores.all("a") if a.get("href") == "chapters/toy.html"]
    assert "stale" not in scores.text
    front = Outline(html / "book" / "index.html")
    assert re.search(r"First part \(2 papers\) ?The first\.", front.text)
    assert re.search(
        r'<dt>\s*<a class="reference internal" href="parts/first\.html"', (html / "book/index.html").read_text()
    )
    part = Outline(html / "book" / "parts" / "first.html")
    assert "Toy (2023) ✓ reproduced" in part.text
    assert "Other (2024) … planned" in part.text
    assert part.all("a", href="../chapters/toy.html", **{"class": "reference internal"})

    # No page changed, but the tree did: the pages that depend on it are made again.
    (small_book.root / "requirements.lock").write_text("torch==2.15.0\n")
    book.build()
    stale = Outline(html / "book" / "chapters" / "toy.html")
    assert "Stale results" in stale.text
    assert "package torch (2.14.1 then, 2.15.0 now)" in stale.text
    assert "stale: package sympy" in Outline(html / "book" / "scoreboard.html").text


def test_unknown_names_fail_the_build_and_are_all_named(small_book):
    add_prose(small_book, "{result}`toy.nothing` {verdict}`nobody.claim` {result}`toy.answer/half`")
    part = small_book.root / "book" / "parts" / "first.md"
    part.write_text("# Opening\n\n```{paper-list}\n:part: second\n```\n")
    with pytest.raises(BookError) as error:
        book.build()
    message = str(error.value)
    assert "paper 'toy' has no claim 'toy.nothing'" in message
    assert "no paper has the slug 'nobody'" in message
    assert "claim toy.answer has no quantity 'half'; it has main" in message
    assert "paper-list: no part 'second'; the parts are first" in message


def test_without_its_package_the_mathjax_step_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sphinx_ext.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sphinx_ext.ExtensionError, match="sphinx-mathjax-offline is missing"):
        sphinx_ext._mathjax_file()


@pytest.mark.slow
def test_a_real_browser_prints_the_book_with_pages_and_bookmarks(small_book):
    try:
        book._browser()
    except BookError as missing:
        pytest.skip(str(missing))
    add_prose(small_book, PROSE)
    printed = book.build_pdf().read_bytes()
    # Every page of the book begins a page, the scoreboard among them.
    assert len(re.findall(rb"/Type /Page\s", printed)) >= 7
    for title in ("How to read a chapter", "Scoreboard", "Opening", "Toy", "Prose", "Glossary"):
        assert f"/Title ({title})".encode() in printed, title
