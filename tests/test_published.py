"""The book as it is committed: published chapters are complete, clean and of this source; the pages render."""

from __future__ import annotations

import json

import pytest
import yaml

from leantrain import book, paths
from leantrain.catalog import load_catalog
from leantrain.records import freshness, read_record

BUILT = load_catalog().built()


def test_no_published_chapter_is_missing_incomplete_or_unclean():
    assert book.chapter_faults(load_catalog()) == []


def test_the_table_of_contents_is_up_to_date():
    committed = yaml.safe_load((paths.ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert committed == book.table_of_contents(load_catalog()), "run `leantrain book`"


@pytest.mark.parametrize("paper", BUILT, ids=lambda paper: paper.slug)
def test_a_published_chapter_is_fresh_and_from_a_commit(paper):
    record = read_record(paper.chapter_path)
    assert freshness(record, paper).changes == []
    assert record.provenance.commit
    assert not record.provenance.modified
    in_reach = {claim.id for claim in paper.claims if record.profile not in claim.out_of_reach}
    assert set(record.measurements) == in_reach


@pytest.mark.parametrize("paper", BUILT, ids=lambda paper: paper.slug)
def test_a_published_chapter_has_the_text_of_its_source(paper):
    def text(path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]

    assert text(paper.chapter_path) == text(paper.notebook_path), "run `leantrain run SLUG --profile book`"


@pytest.mark.slow
def test_the_book_renders_without_a_warning(rendered):
    score = (rendered / "book" / "scoreboard.html").read_text(encoding="utf-8")
    for paper in load_catalog().papers:
        assert paper.short in score
    for paper in BUILT:
        chapter = (rendered / "book" / "chapters" / f"{paper.slug}.html").read_text(encoding="utf-8")
        assert "lt-badge--" in chapter
        article = chapter.split("<article", 1)[1].split("</article>", 1)[0]
        assert article.count("<h1>") == 1
