"""The Sphinx extension that puts the catalogue and the records into the book's pages.

Directives: `{scoreboard}` (every claim, its paper's value, what was found), `{tally}` (how many claims have
which verdict), `{part-list}` (the parts of the book), `{paper-list}` (the papers of one part),
`{replication-costs}` (what the `paper` profiles cost) and `{combinations}` (which techniques can share one run).

Roles: ``{result}`claim-id` `` prints the published value of a claim with its interval, ``{verdict}`claim-id` ``
its badge, so that no number is typed into prose; ``claim-id/name`` asks for a named quantity.

The page of a stale chapter opens with what changed since its run. An unknown claim, quantity or part is a
Sphinx warning, which fails the book's build.

The extension also brings MathJax along, so that formulas show without a network.
"""

from __future__ import annotations

import html
import importlib.util
import json
import posixpath
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from leantrain import paths
from leantrain.book import (
    Result,
    ScoreRow,
    changes_since,
    primary_quantity,
    scoreboard_rows,
    tally,
    write_scoreboard,
)
from leantrain.catalog import Catalog, CatalogError, Claim, Decision, Paper, Part, Quantity, Verdict, load_catalog
from leantrain.chapter import badge, format_quantity
from leantrain.picture import scoreboard_picture
from leantrain.records import MIME, Provenance, Record, published_records
from leantrain.replication import Assumptions, Cost, replication_costs

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config
    from sphinx.environment import BuildEnvironment
    from sphinx.util.typing import ExtensionMetadata
    from sphinx.writers.html5 import HTML5Translator

__all__ = ["setup"]

_LOG = logging.getLogger(__name__)

#: One file with all that formulas need: no fonts, which browsers may refuse to load from a local folder.
_MATHJAX = ("static", "mathjax", "tex-svg.js")

_REFERENCE_ROLES = re.compile(r' role="doc-biblioentry"|(?<=<div) role="list"(?= class="citation-list")')
#: What is written otherwise in the tables of pandas.
_TABLES = (
    (re.compile(r"<th((?: [^>]*)?)>(?:\s|&nbsp;)*</th>"), r"<td\1></td>"),  # a screen reader would announce it
    (re.compile(r'<table (id="T_)'), r'<table class="dataframe" \1'),  # one with a format has no class
    (re.compile(r"<td>NaN</td>"), "<td>–</td>"),  # there is no such value
)


class _Book:
    """Catalogue and records, read once a build."""

    @cached_property
    def catalog(self) -> Catalog:
        return load_catalog()

    @cached_property
    def published(self) -> dict[str, Record]:
        return published_records(self.catalog)

    @cached_property
    def rows(self) -> list[ScoreRow]:
        return scoreboard_rows(self.catalog, self.published, published_records(self.catalog, "quick"))

    def claim(self, claim_id: str) -> tuple[Paper, Claim]:
        """The claim with this id, and its paper.

        Raises:
            CatalogError: If there is none.
        """
        paper = self.catalog.paper(claim_id.partition(".")[0])
        return paper, paper.claim(claim_id)

    def row(self, claim: Claim) -> ScoreRow:
        """The claim's row on the scoreboard."""
        return next(row for row in self.rows if row.claim.id == claim.id)


def _book(env: BuildEnvironment) -> _Book:
    """The book's data; notes that the page depends on them."""
    env.note_dependency(str(paths.CATALOG))
    return env.app.leantrain  # type: ignore[attr-defined]


def _chapter(paper: Paper) -> str:
    """Document name of a paper's chapter, seen from the source folder."""
    return f"book/chapters/{paper.slug}"


# ---------------------------------------------------------------- markup


class BookHtml(nodes.General, nodes.Element):
    """Ready markup; `doc:NAME` as a link's target becomes the address of the document NAME."""


def _visit_book_html(self: HTML5Translator, node: BookHtml) -> None:
    here = self.builder.current_docname

    def address(match: re.Match[str]) -> str:
        return f'href="{html.escape(self.builder.get_relative_uri(here, match[1]))}"'

    self.body.append(re.sub(r'href="doc:([^"]+)"', address, node["markup"]))
    raise nodes.SkipNode


def _visit_elsewhere(self: nodes.NodeVisitor, node: BookHtml) -> None:
    """Only HTML has the scoreboard."""
    raise nodes.SkipNode


class Fold(nodes.General, nodes.Element):
    """What stands in it is hidden until the reader opens it; its `summary` is what shows."""


def _visit_fold(self: HTML5Translator, node: Fold) -> None:
    classes = " ".join(["lt-fold", *node["classes"]])
    self.body.append(f"<details class='{classes}'><summary>{html.escape(node['summary'])}</summary>\n")


def _depart_fold(self: HTML5Translator, node: Fold) -> None:
    self.body.append("</details>\n")


def _unfolded(self: nodes.NodeVisitor, node: Fold) -> None:
    """Other formats show what stands in a fold."""


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _freshness_html(changes: tuple[str, ...] | list[str]) -> str:
    if not changes:
        return "<span class='lt-fresh'>fresh</span>"
    return f"<span class='lt-stale'><span aria-hidden='true'>⚠</span> stale: {html.escape(', '.join(changes))}</span>"


def _duration(p: Provenance) -> str:
    """How long a run took; trainings that an earlier, interrupted run had finished are not in it."""
    kept = f", {p.runs_from_cache} of {p.runs} trainings kept from an earlier run" if p.runs_from_cache else ""
    return _minutes(p.wall_s) + kept


def _run_html(result: Result, label: str) -> str:
    """Where, when and for how long a run was made."""
    e, p = html.escape, result.record.provenance
    machine = f"{p.processor}, {p.cores} cores, {p.threads} thread{'' if p.threads == 1 else 's'}"
    facts = [
        f"profile <code>{e(result.record.profile)}</code>",
        e(machine + (f", {p.accelerator}" if p.accelerator else "")),
        _duration(p),
        e(p.started) + (", tree with local changes" if p.modified else ""),
        _freshness_html(result.changes),
    ]
    return f"<span class='lt-run'><b>{label}:</b> {' · '.join(facts)}</span>"


def _value(quantity: Quantity, unit: str) -> str:
    """A value as text whose interval and n are not broken across lines."""
    text = format_quantity(quantity, unit)
    return re.sub(r"\[[^\]]*\]|n = \d+", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _found_html(result: Result | None, claim: Claim, missing: str) -> str:
    if result is None:
        return f"<span class='lt-muted'>{missing}</span>"
    if result.quantity is None:
        return f"<span class='lt-muted'>{html.escape(result.reason)}</span>"
    return f"<span class='lt-value'>{html.escape(_value(result.quantity, claim.unit))}</span>"


_TESTED = {"exact": "counted at full size", "full-size": "measured at full size", "scaled": "scaled down"}


def _claim_html(row: ScoreRow, with_local: bool) -> str:
    e, claim = html.escape, row.claim
    value = e(claim.paper_text)
    if claim.paper is not None and not row.verified:
        value += " <span class='lt-unverified'>unverified</span>"
    cells = [
        ("The paper", value),
        ("This book", _found_html(row.published, claim, "no complete run")),
        ("Verdict", badge(row.decision)),
    ]
    if with_local:
        found = _found_html(row.local, claim, "not run")
        measured = row.local is not None and row.local.quantity is not None
        cells.append(("This machine", found + (f" {badge(row.local.decision)}" if row.local and measured else "")))
    body = "".join(f"<td role='cell' data-label='{label}'><div>{content}</div></td>" for label, content in cells)
    head = f"{e(claim.sentence)} <small>{e(claim.metric)}; {_TESTED[claim.tested]}</small>"
    verdict = row.decision.verdict.value
    marks = f"data-verdict='{verdict}' data-tested='{claim.tested}'{' data-headline' if claim.headline else ''}"
    return f"<tr class='lt-claim' role='row' {marks}><th scope='row' role='rowheader'>{head}</th>{body}</tr>"


def _paper_html(rows: list[ScoreRow], with_local: bool) -> str:
    """The rows of one paper: its name and runs, then its claims; one line while it is planned."""
    e, paper = html.escape, rows[0].paper
    name = e(paper.short)
    if paper.built:
        name = f'<a href="doc:{_chapter(paper)}">{name}</a>'
    head = f"<span class='lt-paper-name'>{name}</span> <span class='lt-paper-title'>{e(paper.title)}</span>"
    if not paper.built:
        head = f"{head} {badge(Decision(Verdict.PLANNED))}"
        rows = []
    else:
        runs = {"This book": rows[0].published, "This machine": rows[0].local}
        head += "".join(_run_html(run, label) for label, run in runs.items() if run)
    kind = "lt-paper" if paper.built else "lt-paper lt-paper--planned"
    cell = f"<th scope='rowgroup' role='rowheader' colspan='{5 if with_local else 4}'>{head}</th>"
    claims = "".join(_claim_html(row, with_local) for row in rows)
    return f"<tbody id='score-{paper.slug}' role='rowgroup'><tr class='{kind}' role='row'>{cell}</tr>{claims}</tbody>"


def scoreboard_html(part: Part, rows: list[ScoreRow], with_local: bool) -> str:
    """One part's table of the scoreboard: papers with a chapter, then planned ones."""
    columns = ["Claim", "The paper", "This book", "Verdict", *(["This machine"] if with_local else [])]
    head = "".join(f"<th scope='col' role='columnheader'>{column}</th>" for column in columns)
    papers = sorted({row.paper.slug: row.paper for row in rows}.values(), key=lambda paper: not paper.built)
    bodies = "".join(_paper_html([row for row in rows if row.paper is paper], with_local) for paper in papers)
    asked = "the book asked" if all(paper.kind == "study" for paper in papers) else "the papers claim"
    caption = f"<caption>{html.escape(part.title)}: what {asked} and what was found</caption>"
    kind = "lt-scoreboard lt-scoreboard--local" if with_local else "lt-scoreboard"
    # Without a chapter there is nothing below the columns' names. The roles keep it a table for screen readers
    # where a phone's style lays the cells out as cards.
    names = f"<thead role='rowgroup'><tr role='row'>{head}</tr></thead>" if papers and papers[0].built else ""
    return f"<table class='{kind}' role='table'>{caption}{names}{bodies}</table>"


def tally_html(rows: list[ScoreRow]) -> str:
    """How many claims have which verdict, as a list of badges."""
    studies = [row for row in rows if row.paper.kind == "study" and row.published]
    rows = [row for row in rows if row.paper.kind != "study"]
    items = "".join(
        f"<li>{badge(Decision(verdict))} <b>{count}</b></li>"
        for verdict, count in tally(rows).items()
        if count and verdict is not Verdict.PLANNED
    )
    built = {row.paper.slug for row in rows if row.published}
    papers = {row.paper.slug for row in rows}
    claims = sum(row.paper.slug in built for row in rows)
    text = f"{len(built)} of {len(papers)} papers have a chapter; together they test {claims} claims."
    if studies:
        text += f" A study of the book's own tests {len(studies)} more, which are not counted here."
    return f"<div class='lt-tally'><p>{text}</p><ul>{items}</ul></div>" if items else f"<p>{text}</p>"


def _wide(label: str, content: str) -> str:
    """Content that may be wider than the page, in a box that the mouse and the keyboard can scroll."""
    return f"<div class='lt-wide' tabindex='0' role='region' aria-label='{label}'>{content}</div>"


def _amount(x: float) -> str:
    """A number to two digits or the nearest whole."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _cost_cells(cost: Cost, five: Cost) -> str:
    numbers = [cost.operations / 1e18, cost.hours, cost.energy, cost.memory / 2**30, five.hours]
    return "".join(f"<td>{_amount(number)}</td>" for number in numbers)


def replication_html(catalog: Catalog, costs: dict[str, tuple[Cost, Cost]], assumed: Assumptions) -> str:
    """The assumptions, and a table with a row for each chapter and the sum."""
    e = html.escape
    facts = {
        "Accelerator": f"{assumed.peak / 1e12:,.0f} × 10¹² operations a second in bfloat16, {assumed.watts:,.0f} W",
        "Share of that reached": (
            f"{assumed.convolutional:.0%} by convolutional networks, {assumed.transformer:.0%} by transformers"
        ),
        "Machine around it, and cooling": f"{assumed.overhead - 1:.0%} more power",
    }
    listed = "".join(f"<dt>{e(name)}</dt><dd>{e(fact)}</dd>" for name, fact in facts.items())
    columns = ["Chapter", "Trains", "10¹⁸ operations", "GPU-hours", "kWh", "GiB of memory", "GPU-hours with five seeds"]
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    body = ""
    for paper in catalog.entries:
        if paper.slug in costs:
            cost, five = costs[paper.slug]
            name = f'<a href="doc:{_chapter(paper)}">{e(paper.short)}</a>'
            body += (
                f"<tr><th scope='row'>{name}</th><td>{e('; '.join(cost.networks))}</td>{_cost_cells(cost, five)}</tr>"
            )
    sums = [sum(getattr(pair[i], what) for pair in costs.values()) for i, what in
            ((0, "operations"), (0, "hours"), (0, "energy"), (1, "hours"))]  # fmt: skip
    total = [_amount(sums[0] / 1e18), _amount(sums[1]), _amount(sums[2]), "", _amount(sums[3])]
    foot = "<tr><th scope='row'>All</th><td></td>" + "".join(f"<td>{cell}</td>" for cell in total) + "</tr>"
    caption = "<caption>What each chapter's paper profile costs</caption>"
    table = (
        f"<table class='lt-costs'>{caption}"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
    )
    return f"<dl class='lt-assumptions'>{listed}</dl>" + _wide("Costs", table)


def _pair_cell(outcome: Mapping[str, Any]) -> str:
    """One pair: whether it trains, its loss, and the share of the usual rate that it needed."""
    mark = "reproduced" if outcome["trains"] else "not-reproduced"
    word, sign = ("trains", "✓") if outcome["trains"] else ("does not train", "✗")
    text = f"<span class='lt-badge lt-badge--{mark}' role='img' aria-label='{word}'>{sign}</span>"
    if outcome["loss"] is not None:
        text += f" {outcome['loss']:.2f}"
    if outcome["trains"] and outcome["share"] != 1:
        text += f" <small>rate ÷ {1 / outcome['share']:g}</small>"
    return text


def combinations_html(found: Mapping[str, Any], address: Callable[[str], str]) -> str:
    """The matrix of pairs, the pairs that do not train with their reasons, and the traces.

    Args:
        found: What `book/combinations.json` holds.
        address: From a chapter's slug to the address of its page.
    """
    e = html.escape
    outcomes = {frozenset(one["techniques"]): one for one in found["outcomes"]}
    names = list(found["chapters"])
    head = "".join(f"<th scope='col'>{e(name)}</th>" for name in names)
    body = ""
    for row, name in enumerate(names):
        cells = "<td></td>" * row + "".join(
            f"<td>{_pair_cell(outcomes[frozenset((name, n))])}</td>" for n in names[row:]
        )
        link = f'<a href="{address(found["chapters"][name])}">{e(name)}</a>'
        body += f"<tr><th scope='row'>{link}</th>{cells}</tr>"
    pairs = [one for one in outcomes.values() if len(one["techniques"]) == 2]
    fitting = sum(one["trains"] for one in pairs)
    legend = (
        f"{fitting} of {len(pairs)} pairs train. A number is the loss on the validation images after {found['epochs']} "
        f"epochs; below {found['mark']:.2f} counts, plain training has {outcomes[frozenset()]['loss']:.2f}. "
        "On the diagonal: the technique alone."
    )
    faults = "".join(
        f"<li><b>{e(' and '.join(one['techniques']))}:</b> {e(one['reason'])}.</li>"
        for one in pairs
        if not one["trains"]
    )
    traces = "".join(
        f"<dt>{e(name)}</dt><dd>{e(outcomes[frozenset((name,))]['traces'].get(name, 'none'))}</dd>" for name in names
    )
    table = (
        f"<table class='lt-pairs'><caption>Pairs of techniques</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    return (
        f"<p>{e(legend)}</p>"
        + _wide("Pairs of techniques", table)
        + (f"<p>Pairs that do not train:</p><ul>{faults}</ul>" if faults else "")
        + f"<p>The trace that each technique leaves, here alone:</p><dl class='lt-assumptions'>{traces}</dl>"
    )


# ---------------------------------------------------------------- directives and roles


_SCOREBOARD = "book/scoreboard"

#: The files are written when the build ends; scoreboard.js puts its controls into the first element.
_SCOREBOARD_HEAD = (
    "<div id='lt-score-controls'></div><p class='lt-score-files'>The whole table as data: "
    "<a href='scoreboard.csv' download>CSV</a>, <a href='scoreboard.json' download>JSON</a>.</p>"
)


class ScoreboardDirective(SphinxDirective):
    """`{scoreboard}`: its picture, controls and files, and a section for each part of the book with its table."""

    def run(self) -> list[nodes.Node]:
        book = _book(self.env)
        # A machine's own results are news only beside published ones or on the machine that made them.
        with_local = any(row.local for row in book.rows)
        glance = _wide("At a glance", scoreboard_picture(book.rows, linked=True))
        sections: list[nodes.Node] = [BookHtml(markup=glance + _SCOREBOARD_HEAD)]
        for part in book.catalog.parts:
            rows = [row for row in book.rows if row.part.slug == part.slug]
            if not rows:
                continue
            section = nodes.section(ids=[f"scoreboard-{part.slug}"], names=[f"scoreboard-{part.slug}"])
            section += nodes.title("", part.title)
            section += BookHtml(markup=scoreboard_html(part, rows, with_local))
            sections.append(section)
        return sections


class TallyDirective(SphinxDirective):
    """`{tally}`: how many claims have which verdict."""

    def run(self) -> list[nodes.Node]:
        return [BookHtml(markup=tally_html(_book(self.env).rows))]


def _link(env: BuildEnvironment, docname: str, text: nodes.Node) -> nodes.Node:
    """A link to a page; Sphinx warns if there is no such page."""
    target = f"/{docname}"
    link = addnodes.pending_xref(
        "", text, refdomain="std", reftype="doc", reftarget=target, refexplicit=True, refwarn=True
    )
    link["refdoc"] = env.docname
    return link


class ReplicationCostsDirective(SphinxDirective):
    """`{replication-costs}`: what the `paper` profiles cost, with the assumptions."""

    def run(self) -> list[nodes.Node]:
        catalog, assumed = _book(self.env).catalog, Assumptions()
        self.env.note_dependency(str(paths.NETWORK_COSTS))
        return [BookHtml(markup=replication_html(catalog, replication_costs(catalog, assumed), assumed))]


class CombinationsDirective(SphinxDirective):
    """`{combinations}`: which techniques can share one training run."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(paths.COMBINATIONS))
        found = json.loads(paths.COMBINATIONS.read_text(encoding="utf-8"))
        return [BookHtml(markup=combinations_html(found, lambda slug: f"doc:book/chapters/{slug}"))]


class PartListDirective(SphinxDirective):
    """`{part-list}`: the parts of the book, each with a sentence and the number of its papers."""

    def run(self) -> list[nodes.Node]:
        catalog = _book(self.env).catalog
        items = []
        for part in catalog.parts:
            count = sum(paper.part == part.slug for paper in catalog.papers)
            name = _link(self.env, f"book/parts/{part.slug}", nodes.strong("", part.title))
            papers = f"{count} paper{'' if count == 1 else 's'}" if count else "a study of the book's own"
            term = nodes.term("", "", name, nodes.Text(f" ({papers})"))
            items.append(nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", part.blurb))))
        return [nodes.definition_list("", *items, classes=["lt-papers"])]


class PaperListDirective(SphinxDirective):
    """`{paper-list}`: the papers of the part named by the option `part`, with idea and status."""

    option_spec = {"part": directives.unchanged_required}  # noqa: RUF012 - docutils reads a plain dictionary

    def run(self) -> list[nodes.Node]:
        book = _book(self.env)
        slug = self.options.get("part", "")
        if slug not in {part.slug for part in book.catalog.parts}:
            known = ", ".join(part.slug for part in book.catalog.parts)
            _LOG.warning("paper-list: no part %r; the parts are %s", slug, known, location=self.get_location())
            return []
        items = [self._item(book, paper) for paper in book.catalog.entries if paper.part == slug]
        return [nodes.definition_list("", *items, classes=["lt-papers"])]

    def _item(self, book: _Book, paper: Paper) -> nodes.definition_list_item:
        name: nodes.Node = nodes.strong("", paper.short)
        if paper.built:
            name = _link(self.env, _chapter(paper), name)
        headlines = [book.row(claim).decision for claim in paper.claims if claim.headline]
        badges = "".join(badge(decision) for decision in dict.fromkeys(headlines))
        term = nodes.term("", "", name, nodes.Text(f" ({paper.year}) "), nodes.raw("", badges, format="html"))
        title = nodes.paragraph("", "", nodes.emphasis("", paper.title))
        return nodes.definition_list_item("", term, nodes.definition("", title, nodes.paragraph("", paper.idea)))


class _ClaimRole(SphinxRole):
    def _find(self) -> tuple[Claim, str] | None:
        """The claim and the quantity that the text names, or None after a warning."""
        claim_id, _, quantity = self.text.partition("/")
        book = _book(self.env)
        try:
            _, claim = book.claim(claim_id)
        except CatalogError as error:
            _LOG.warning("%s role: %s", self.name, error, location=self.get_location())
            return None
        published = book.row(claim).published
        # A chapter may measure more than the rule asks for.
        known = claim.rule.quantities | set(published.record.measurements.get(claim.id, {}) if published else ())
        if quantity and quantity not in known:
            problem = f"claim {claim_id} has no quantity {quantity!r}; it has {', '.join(sorted(known))}"
            _LOG.warning("%s role: %s", self.name, problem, location=self.get_location())
            return None
        return claim, quantity or primary_quantity(claim)


class ResultRole(_ClaimRole):
    """``{result}`claim-id` `` or ``{result}`claim-id/quantity` ``: the published value with its interval."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        found = self._find()
        if found is None:
            return [nodes.problematic("", self.text)], []
        claim, name = found
        published = _book(self.env).row(claim).published
        measured = published.record.measurements.get(claim.id, {}) if published else {}
        text = _value(measured[name], claim.unit_of(name)) if name in measured else "not measured here"
        return [nodes.inline("", text, classes=["lt-value"])], []


class VerdictRole(_ClaimRole):
    """``{verdict}`claim-id` ``: the badge of the published verdict."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        found = self._find()
        if found is None:
            return [nodes.problematic("", self.text)], []
        decision = _book(self.env).row(found[0]).decision
        return [nodes.raw("", badge(decision), format="html")], []


# ---------------------------------------------------------------- events


def _read_data(app: Sphinx) -> None:
    app.leantrain = _Book()  # type: ignore[attr-defined]


def _live_pages(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Pages whose text depends on records or on their freshness: they are read at every build."""
    catalog = str(paths.CATALOG)
    chapters = {_chapter(paper) for paper in app.leantrain.catalog.built()}  # type: ignore[attr-defined]
    live = {name for name, files in env.dependencies.items() if catalog in map(str, files)} | chapters
    return sorted(live & set(env.found_docs))


def _prepare_chapter(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change a chapter's outputs as the page is read; the file itself, which readers may download, stays as it is.

    The record is taken out: it is data for the scoreboard, and a type of output that MyST-NB cannot show and would
    warn of. Tables of pandas are made fit for screen readers and for the book's look.
    """
    if posixpath.dirname(docname) != "book/chapters":
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            shown = output.get("data", {})
            shown.pop(MIME, None)
            if "text/html" in shown:
                content = "".join(shown["text/html"])
                for written, instead in _TABLES:
                    content = written.sub(instead, content)
                shown["text/html"] = content
    source[0] = json.dumps(notebook)


def _mark_stale(app: Sphinx, doctree: nodes.document) -> None:
    """Open the page of a stale chapter with what changed since it was run."""
    book: _Book = app.leantrain  # type: ignore[attr-defined]
    folder, slug = posixpath.split(app.env.docname)
    if folder != "book/chapters" or slug not in book.published:
        return
    changes = changes_since(book.published[slug], book.catalog.paper(slug))
    if not changes:
        return
    text = (
        "Since this chapter was run, something that it depends on has changed. "
        "Its numbers are those of the older version until it is run again. What changed:"
    )
    listed = nodes.bullet_list("", *(nodes.list_item("", nodes.paragraph("", change)) for change in changes))
    banner = nodes.admonition("", nodes.title("", "Stale results"), nodes.paragraph("", text), listed)
    banner["classes"] += ["warning", "lt-stale-banner"]
    section = next(iter(doctree.findall(nodes.section)), None)
    if section is None:
        doctree.insert(0, banner)
    else:
        section.insert(section.first_child_matching_class(nodes.title) + 1, banner)


def _fold_solutions(app: Sphinx, doctree: nodes.document) -> None:
    """Fold every solution of a chapter's exercises: its words together with the hidden cells that follow them."""
    if posixpath.dirname(app.env.docname) != "book/chapters":
        return
    for mark in list(doctree.findall(nodes.strong)):
        words = mark.parent
        begins = mark.astext() == "Solution." and words.astext().startswith("Solution.")
        if not begins or not isinstance(words.parent, nodes.section):
            continue
        around, start = words.parent, words.parent.index(words)
        end = next((i for i in range(start, len(around)) if around[i].get("hide_mode")), start + 1)
        while end < len(around) and around[end].get("hide_mode"):
            del around[end]["hide_mode"]  # one fold is enough
            end += 1
        del words[: words.index(mark) + 1]
        if words.children and isinstance(words[0], nodes.Text):
            words[0] = nodes.Text(words[0].lstrip())
        fold = Fold("", *around[start:end], summary="Solution")
        around[start:end] = [fold]


def _fold_opening(app: Sphinx, doctree: nodes.document) -> None:
    """Open a chapter with its card, and fold the code that stands before it: the parameters and the imports."""
    if posixpath.dirname(app.env.docname) != "book/chapters":
        return
    first = next((cell for cell in doctree.findall(nodes.container) if "tag_parameters" in cell["classes"]), None)
    if first is None:
        return
    around, start = first.parent, first.parent.index(first)
    end = next((i for i in range(start, len(around)) if _outputs(around[i])), None)
    if end is None:
        return
    card = around[end]
    code = nodes.container("", *(part for part in card if part not in _outputs(card)), classes=["cell"])
    card.children = _outputs(card)
    fold = Fold("", *around[start:end], code, summary="Parameters and imports", classes=["lt-fold--code"])
    around[start : end + 1] = [card, fold]


def _outputs(cell: nodes.Element) -> list[nodes.Node]:
    return [part for part in cell if isinstance(part, nodes.container) and "cell_output" in part["classes"]]


def _mathjax_file() -> Path:
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError(
            "the package sphinx-mathjax-offline is missing; install the environment of requirements.lock"
        )
    return Path(spec.origin).parent.joinpath(*_MATHJAX)


def _use_own_mathjax(app: Sphinx, config: Config) -> None:
    config.mathjax_path = f"mathjax/{_MATHJAX[-1]}"


def _bring_mathjax(app: Sphinx) -> None:
    target = Path(app.outdir, "_static", "mathjax", _MATHJAX[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_mathjax_file(), target)


def _adapt_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Give a page the scripts that it needs, and lists of references the roles that browsers know.

    The scoreboard and the chapters have one each, and no page needs those that would run code on a server elsewhere:
    Jupyter Book declares these twice, which is an error in the browser's console. The role that docutils gives to a
    reference has been withdrawn from the standard, and leaves its list without an item.
    """
    if page == _SCOREBOARD:
        app.add_js_file("scoreboard.js", loading_method="defer")
    elif page.startswith("book/chapters/"):
        app.add_js_file("scrolling.js", loading_method="defer")
    if "body" in context:
        context["body"] = _REFERENCE_ROLES.sub("", context["body"])
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, ()) if not _runs_elsewhere(file)]


def _runs_elsewhere(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "THEBE_JS_URL" in body or "sphinx-thebe" in str(getattr(file, "filename", None) or "")


def _export_scoreboard(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        write_scoreboard(app.leantrain.rows, Path(app.outdir, _SCOREBOARD).parent)  # type: ignore[attr-defined]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension with Sphinx."""
    app.add_node(
        BookHtml,
        html=(_visit_book_html, None),
        latex=(_visit_elsewhere, None),
        text=(_visit_elsewhere, None),
        man=(_visit_elsewhere, None),
        texinfo=(_visit_elsewhere, None),
    )
    app.add_node(
        Fold,
        html=(_visit_fold, _depart_fold),
        latex=(_unfolded, None),
        text=(_unfolded, None),
        man=(_unfolded, None),
        texinfo=(_unfolded, None),
    )
    app.add_directive("scoreboard", ScoreboardDirective)
    app.add_directive("tally", TallyDirective)
    app.add_directive("replication-costs", ReplicationCostsDirective)
    app.add_directive("combinations", CombinationsDirective)
    app.add_directive("part-list", PartListDirective)
    app.add_directive("paper-list", PaperListDirective)
    app.add_role("result", ResultRole())
    app.add_role("verdict", VerdictRole())
    app.connect("config-inited", _use_own_mathjax)
    app.connect("builder-inited", _read_data)
    app.connect("builder-inited", _bring_mathjax)
    app.connect("env-get-outdated", _live_pages)
    app.connect("source-read", _prepare_chapter)
    app.connect("doctree-read", _mark_stale)
    app.connect("doctree-read", _fold_solutions)
    app.connect("doctree-read", _fold_opening)
    app.connect("html-page-context", _adapt_page)
    app.connect("build-finished", _export_scoreboard)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
