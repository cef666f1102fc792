"""The scoreboard as a picture."""

from __future__ import annotations

from xml.etree import ElementTree

from leantrain import paths
from leantrain.book import scoreboard_rows
from leantrain.catalog import load_catalog
from leantrain.picture import scoreboard_picture, write_picture
from leantrain.records import published_records, read_record

SVG = "{http://www.w3.org/2000/svg}"


def unchanged(record, paper):
    return []


def rows_of_the_book():
    catalog = load_catalog()
    rows = scoreboard_rows(catalog, published_records(catalog), {}, unchanged)
    return [row for row in rows if row.paper.kind != "study"]  # the picture is about papers


def test_the_readmes_picture_shows_the_published_verdicts():
    stored = (paths.ROOT / "book" / "_static" / "scoreboard.svg").read_text(encoding="utf-8")
    assert stored == scoreboard_picture(rows_of_the_book()), "write it anew with: leantrain book"


def test_every_claim_has_a_square_inside_the_picture_that_overlaps_no_other():
    rows = rows_of_the_book()
    picture = ElementTree.fromstring(scoreboard_picture(rows))
    width, height = (float(picture.get(side)) for side in ("width", "height"))
    groups = picture.findall(f"{SVG}g")
    assert [g.find(f"{SVG}title").text for g in groups] == [
        f"{row.claim.sentence} {row.decision.verdict.value}." for row in rows
    ]
    corners = [tuple(float(g.find(f"{SVG}rect").get(axis)) for axis in "xy") for g in groups]
    assert len(set(corners)) == len(rows)
    assert all(0 <= x <= width - 22 and 0 <= y <= height - 70 for x, y in corners), "the legend has the last lines"
    assert not any(
        a != b and abs(a[0] - b[0]) < 22 and abs(a[1] - b[1]) < 22 for a in corners for b in corners
    )  # fmt: skip


def test_signs_and_edges_say_what_the_rows_say(executed):
    rows = scoreboard_rows(load_catalog(), {"toy": read_record(executed.chapter)}, {}, unchanged)
    picture = ElementTree.fromstring(scoreboard_picture(rows))
    signs = {"reproduced": "✓", "partly": "◐", "not reproduced": "✗", "out of reach here": "–", "planned": "…"}
    for row, group in zip(rows, picture.findall(f"{SVG}g"), strict=True):
        assert group.find(f"{SVG}text").text == signs[row.decision.verdict.value]
        assert (group.find(f"{SVG}rect").get("stroke") is not None) == row.claim.headline


def test_on_the_page_of_the_table_each_name_leads_to_its_papers_rows():
    rows = rows_of_the_book()
    plain, linked = (ElementTree.fromstring(scoreboard_picture(rows, linked=linked)) for linked in (False, True))
    assert plain.get("role") == "img"
    assert not plain.findall(f"{SVG}a")
    assert linked.get("role") == "group", "what is one image to a screen reader may hold no links"
    found = [(a.find(f"{SVG}text").text, a.get("href")) for a in linked.findall(f"{SVG}a")]
    assert found == list(dict.fromkeys((row.paper.short, f"#score-{row.paper.slug}") for row in rows))


def test_names_are_escaped_and_an_unchanged_picture_is_not_written_again(executed, monkeypatch):
    rows = scoreboard_rows(load_catalog(), {}, {}, unchanged)
    sharp = [row.__class__(row.part, row.paper.model_copy(update={"short": "A<&B"}), row.claim) for row in rows]
    ElementTree.fromstring(scoreboard_picture(sharp))
    path = write_picture(rows)
    before = path.stat().st_ino
    assert write_picture(rows).stat().st_ino == before
    assert write_picture(sharp).stat().st_ino != before
