"""The scoreboard at a glance, as a picture: one square a claim, in two columns of papers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from leantrain import paths
from leantrain.book import ScoreRow, tally
from leantrain.catalog import Verdict

__all__ = ["scoreboard_picture", "write_picture"]

#: Ink and paper of each verdict: the light colours of the book's pages.
_LOOK = {
    Verdict.REPRODUCED: ("#00602f", "#c9ebd5"),
    Verdict.PARTLY: ("#6d4300", "#fbe3b0"),
    Verdict.NOT_REPRODUCED: ("#8f1d44", "#f6cfdc"),
    Verdict.OUT_OF_REACH: ("#414b57", "#e3e7ec"),
    Verdict.PLANNED: ("#414b57", "#f3f5f7"),
}
_WIDTH, _MARGIN, _LINE, _NAME, _SQUARE = 860, 20, 26, 214, 22


def _square(verdict: Verdict, x: float, y: float, *, edge: bool = False) -> str:
    """A verdict's sign on its colour; (x, y) is top left."""
    ink, back = _LOOK[verdict]
    stroke = f' stroke="{ink}" stroke-width="1.5"' if edge else ""
    return (
        f'<rect x="{x}" y="{y}" width="{_SQUARE}" height="{_SQUARE}" rx="4" fill="{back}"{stroke}/>'
        f'<text x="{x + _SQUARE / 2:g}" y="{y + 16}" text-anchor="middle" fill="{ink}">{verdict.sign}</text>'
    )


def _row(rows: Sequence[ScoreRow], x: int, y: int, *, linked: bool) -> str:
    """A paper's name and the squares of its claims, headlines first in the catalogue's order; (x, y) is top left."""
    name = f'<text x="{x}" y="{y + 16}">{html.escape(rows[0].paper.short)}</text>'
    parts = [f'<a href="#score-{rows[0].paper.slug}">{name}</a>' if linked else name]
    for place, row in enumerate(rows):
        square = _square(row.decision.verdict, x + _NAME + place * (_SQUARE + 4), y + 1, edge=row.claim.headline)
        title = f"{html.escape(row.claim.sentence)} {row.decision.verdict.value}."
        parts.append(f"<g><title>{title}</title>{square}</g>")
    return "".join(parts)


def _legend(rows: Sequence[ScoreRow], y: int) -> str:
    parts, x = [], _MARGIN
    for verdict, count in tally(rows).items():
        if count:
            parts.append(_square(verdict, x, y))
            parts.append(f'<text x="{x + _SQUARE + 6}" y="{y + 16}">{count} {verdict.value}</text>')
            x += 165
    return "".join(parts)


def scoreboard_picture(rows: Sequence[ScoreRow], *, linked: bool = False) -> str:
    """The scoreboard as SVG.

    Args:
        rows: Every claim of the book, in its order; the squares of headline claims have an edge. The claims of the
            book's own studies are left out: the picture is about papers.
        linked: Whether names lead to the papers' rows of the table, which stands on the same page.

    Returns:
        The picture, with a description and every claim's sentence as text.
    """
    rows = [row for row in rows if row.paper.kind != "study"]
    blocks = []  # each: the part's title, and the rows of each of its papers
    for title, group in groupby(rows, key=lambda row: row.part.title):
        blocks.append((title, [list(claims) for _, claims in groupby(group, key=lambda row: row.paper.slug)]))
    heights = [1.6 + len(papers) for _, papers in blocks]
    # The first column takes whole parts, as long as that brings both columns nearer to each other.
    first = min(range(len(blocks) + 1), key=lambda k: abs(sum(heights[:k]) - sum(heights[k:])))
    drawn, lowest = [], 0
    for place, (title, papers) in enumerate(blocks):
        x = _MARGIN if place < first else _WIDTH // 2 + _MARGIN // 2
        above = sum(heights[:place]) if place < first else sum(heights[first:place])
        y = round(_MARGIN + above * _LINE)
        drawn.append(f'<text x="{x}" y="{y + 16}" font-weight="600">{html.escape(title)}</text>')
        drawn += [_row(claims, x, y + (k + 1) * _LINE, linked=linked) for k, claims in enumerate(papers)]
        lowest = max(lowest, y + (len(papers) + 1) * _LINE)
    height = lowest + 2 * _LINE + _MARGIN
    counts = ", ".join(f"{count} {verdict.value}" for verdict, count in tally(rows).items() if count)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="{"group" if linked else "img"}" aria-label="Verdicts on {len(rows)} claims: {counts}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13" fill="#1c222a">'
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>'
        + "\n".join(drawn)
        + _legend(rows, lowest + _LINE)
        + "</svg>\n"
    )


def write_picture(rows: Sequence[ScoreRow]) -> Path:
    """Write `book/_static/scoreboard.svg` if it would change."""
    return paths.write_if_changed(paths.ROOT / "book" / "_static" / "scoreboard.svg", scoreboard_picture(rows))
