"""The rendered book: its table of contents, its scoreboard, the checks on its chapters, its build.

The table of contents and the scoreboard are made from the catalogue and from the records in the executed
chapters; neither is written by hand. `build` refuses to render a book with a missing, incomplete or unclean
chapter, and turns every Sphinx warning into an error; `build_pdf` prints the same pages into one PDF.
"""

from __future__ import annotations

import contextlib
import csv
import getpass
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from leantrain import paths
from leantrain.catalog import Catalog, Claim, Decision, Paper, Part, Quantity, Verdict, load_catalog
from leantrain.parameters import ParameterError
from leantrain.records import IncompleteRun, Record, freshness, published_records, read_record

__all__ = [
    "BookError",
    "Result",
    "ScoreRow",
    "build",
    "build_pdf",
    "changes_since",
    "chapter_faults",
    "primary_quantity",
    "scoreboard_rows",
    "scoreboard_table",
    "scrub",
    "table_of_contents",
    "tally",
    "write_scoreboard",
    "write_toc",
]

#: Names under which systems install the browser that prints the PDF.
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

_LOCAL_LINK = re.compile(r'(<a\b[^>]*?) href="(?!https?:|mailto:|#)[^"]*"')

#: Text output of one cell beyond which a page gets slow to load and nobody reads it.
LONGEST_OUTPUT = 100_000

_TOC_HEADER = "# Made from book/papers.yml by `leantrain book`; edits here are lost.\n"


class BookError(RuntimeError):
    """The book cannot be built; the message names every chapter at fault and the reason."""


# ---------------------------------------------------------------- table of contents


def table_of_contents(catalog: Catalog) -> dict[str, Any]:
    """The table of contents in Jupyter Book's `jb-book` format.

    Every part has its opening page; a paper has an entry as soon as it has a chapter.
    """

    def group(caption: str, names: Iterable[str]) -> dict[str, Any]:
        return {"caption": caption, "chapters": [{"file": f"book/{name}"} for name in names]}

    parts = [
        group(
            part.title,
            [f"parts/{part.slug}", *(f"chapters/{p.slug}" for p in catalog.entries if p.part == part.slug and p.built)],
        )
        for part in catalog.parts
    ]
    return {
        "format": "jb-book",
        "root": "book/index",
        "parts": [
            group("Start here", ["how-to-read", "scoreboard", "costs"]),
            *parts,
            group("Reference", ["scaling", "glossary", "bibliography"]),
        ],
    }


def write_toc(catalog: Catalog) -> Path:
    """Write `_toc.yml` if the catalogue says something else than the file; a reader never sees half of it."""
    import yaml

    text = _TOC_HEADER + yaml.safe_dump(table_of_contents(catalog), sort_keys=False, allow_unicode=True)
    return paths.write_if_changed(paths.ROOT / "_toc.yml", text)


# ---------------------------------------------------------------- scoreboard


@dataclass(frozen=True)
class Result:
    """What one run says about one claim.

    Attributes:
        decision: The verdict, made from the measurement by the claim's rule of today.
        quantity: The measured quantity that stands beside the paper's value; None if the claim was not measured.
        reason: Why there is no measurement; empty if there is one.
        record: The run.
        changes: What changed in the tree since the run; empty for a fresh one.
    """

    decision: Decision
    quantity: Quantity | None
    reason: str
    record: Record
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreRow:
    """One claim on the scoreboard.

    Attributes:
        part: The part of the book.
        paper: The paper.
        claim: The claim.
        published: The result of the chapter as published; None for a paper without one.
        local: The result of this machine's own run; None if it made none.
    """

    part: Part
    paper: Paper
    claim: Claim
    published: Result | None = None
    local: Result | None = None

    @property
    def decision(self) -> Decision:
        """The published verdict; `planned` without a published chapter."""
        return self.published.decision if self.published else Decision(Verdict.PLANNED)

    @property
    def verified(self) -> bool:
        """Whether the paper's value was checked against a citable source."""
        return self.claim.stated not in ("unverified", "own")


def primary_quantity(claim: Claim) -> str:
    """Name of the quantity that stands beside the paper's value: the first that the claim's rule names."""
    return claim.rule.reproduced[0].of


def changes_since(record: Record, paper: Paper) -> list[str]:
    """What changed in the tree since the record was made; empty for a fresh one."""
    try:
        return freshness(record, paper).changes
    except ParameterError as error:
        return [f"the parameters, which are faulty now: {error}"]


def _result(claim: Claim, record: Record, changes: Iterable[str]) -> Result:
    measured = record.measurements.get(claim.id)
    changes = tuple(changes)
    if measured is None:
        reason = claim.out_of_reach.get(record.profile, "The claim came into the catalogue after this run.")
        return Result(Decision(Verdict.OUT_OF_REACH), None, reason, record, changes)
    try:
        decision = claim.decide(measured)
    except ValueError:
        # The rule of today names a quantity that the older run did not measure.
        reason = "The rule of the claim changed after this run."
        return Result(Decision(Verdict.OUT_OF_REACH), None, reason, record, changes)
    return Result(decision, measured[primary_quantity(claim)], "", record, changes)


def scoreboard_rows(
    catalog: Catalog,
    published: Mapping[str, Record],
    local: Mapping[str, Record],
    changes: Callable[[Record, Paper], list[str]] = changes_since,
) -> list[ScoreRow]:
    """Every claim of the book with what the paper says and what was found, in the order of the book.

    Args:
        catalog: The papers and claims.
        published: Records of the published chapters, by slug.
        local: Records of this machine's own runs, by slug.
        changes: Says what changed in the tree since a record was made.
    """
    rows = []
    for part in catalog.parts:
        for paper in catalog.entries:
            if paper.part != part.slug:
                continue
            runs = [records.get(paper.slug) for records in (published, local)]
            since = [changes(run, paper) if run else [] for run in runs]
            for claim in paper.claims:
                results = [_result(claim, run, what) if run else None for run, what in zip(runs, since, strict=True)]
                rows.append(ScoreRow(part, paper, claim, *results))
    return rows


def tally(rows: Iterable[ScoreRow]) -> dict[Verdict, int]:
    """How many claims have which verdict, every verdict named, in the order of the closed set."""
    count = Counter(row.decision.verdict for row in rows)
    return {verdict: count[verdict] for verdict in Verdict}


def scoreboard_table(rows: Iterable[ScoreRow]) -> list[dict[str, Any]]:
    """The scoreboard as flat rows of plain values, one a claim, for spreadsheets and programs.

    What this machine's own runs found has the prefix `local_`. A value that does not exist is None.
    """
    table = []
    for row in rows:
        claim, published, local = row.claim, row.published, row.local
        table.append(
            {
                "claim": claim.id,
                "paper": row.paper.short,
                "kind": row.paper.kind,
                "title": row.paper.title,
                "part": row.part.title,
                "headline": claim.headline,
                "sentence": claim.sentence,
                "metric": claim.metric,
                "unit": claim.unit,
                "tested": claim.tested,
                "paper_value": None if claim.paper is None else claim.paper_text,
                "paper_value_verified": row.verified,
                "verdict": row.decision.verdict.value,
                "indicative": row.decision.indicative,
                **_flat(published, ""),
                "local_verdict": local.decision.verdict.value if local and local.quantity else None,
                **_flat(local, "local_"),
            }
        )
    return table


#: What the exported scoreboard says of a run's provenance.
_RUN_FACTS = (
    "processor", "cores", "threads", "accelerator", "wall_s", "runs", "runs_from_cache",
    "started", "commit", "modified",
)  # fmt: skip


def _flat(result: Result | None, prefix: str) -> dict[str, Any]:
    quantity = result.quantity if result else None
    run = result.record if result else None
    values = {
        **{name: getattr(quantity, name) if quantity else None for name in ("value", "low", "high", "n")},
        "reason": result.reason or None if result else None,
        "profile": run.profile if run else None,
        "freshness": None if result is None else "stale" if result.changes else "fresh",
        "changes": "; ".join(result.changes) if result else None,
        **{name: getattr(run.provenance, name) if run else None for name in _RUN_FACTS},
    }
    return {f"{prefix}{name}": value for name, value in values.items()}


def write_scoreboard(rows: Iterable[ScoreRow], folder: Path) -> list[Path]:
    """Write the scoreboard as `scoreboard.csv` and `scoreboard.json` into a folder."""
    table = scoreboard_table(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    contents = {"csv": text.getvalue(), "json": json.dumps(table, indent=1, ensure_ascii=False) + "\n"}
    for kind, content in contents.items():
        paths.write_atomically(folder / f"scoreboard.{kind}", content)
    return [folder / f"scoreboard.{kind}" for kind in contents]


# ---------------------------------------------------------------- checks on executed chapters

_FORBIDDEN_TAGS = {
    **dict.fromkeys(("iframe", "frame", "object", "embed", "applet"), "an embedded frame or object"),
    "script": "a script",
    "link": "a linked style sheet",
    "meta": "a meta element",
    "base": "a base address",
    "form": "a form",
    "progress": "a progress bar left behind",
}
_REMOTE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_LOADING = {"src", "srcset", "poster", "background", "data"}
_TEXT_FAULTS = (
    (re.compile(r"Traceback \(most recent call last\)"), "a traceback"),
    (re.compile(r"\r(?!\n)"), "a carriage return (progress-bar debris)"),
    (re.compile(r"\x1b\["), "terminal control codes (progress-bar debris)"),
    (re.compile(r"\d+%\|[ █▏▎▍▌▋▊▉#]*\||\d\s?it/s\b|\ds/it\b"), "a progress bar's text"),
    (re.compile(r"\bat 0x[0-9a-f]{6,}"), "a memory address"),
    (re.compile(r"(?:^|[\s\"'(\[=,>])(?:/[A-Za-z_][\w.+-]*){2,}"), "an absolute path"),
    (re.compile(r"(?:^|[\s\"'(\[=,>])~/\w|\bfile://|(?<![\w/])[A-Za-z]:\\\w"), "a path of one machine"),
    (
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,})"),
        "an access token",
    ),
)
#: Account names that say nothing about a person or a machine, and are ordinary words.
_COMMON_ACCOUNTS = {"root", "user", "runner", "admin", "ubuntu", "builder", "jovyan", "nobody", "test"}


class _Markup(HTMLParser):
    """Collects what an HTML output must not hold, and the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _FORBIDDEN_TAGS:
            self.faults.append(f"{_FORBIDDEN_TAGS[tag]} (<{tag}>)")
        for name, given in attrs:
            value = given or ""
            if name.startswith("on") or re.match(r"\s*(?:java|vb)script:", value, re.IGNORECASE):
                self.faults.append(f"a script in the attribute {name}")
            elif name in _LOADING or (name.endswith("href") and tag in {"image", "use"}):
                if _REMOTE.match(value):
                    self.faults.append(f"a remote resource (<{tag} {name}>)")
                elif not value.startswith("data:"):
                    self.text.append(f" {value} ")
            elif name == "style" and re.search(r"url\(\s*['\"]?(?:https?:)?//", value, re.IGNORECASE):
                self.faults.append(f"a remote resource (<{tag} style>)")
            else:
                self.text.append(f" {value} ")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _text_faults(text: str, private: Iterable[str]) -> Iterator[str]:
    for pattern, what in _TEXT_FAULTS:
        if found := pattern.search(text):
            yield f"{what} ({found.group().strip()[:60]!r})"
    for name in private:
        word = re.escape(name)
        # A name that is an ordinary word (an account called "adam") counts only in a path or an address.
        alone = re.search(r"[\d_.-]", name)
        if re.search(rf"(?<!\w){word}(?!\w)" if alone else rf"[/\\@]{word}\b|\b{word}@", text):
            yield f"a name of the machine or account that ran it ({name!r})"


def _output_faults(output: Mapping[str, Any], private: Iterable[str]) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"an error output ({output.get('ename')})"
        return
    bundle = {"text/plain": output["text"]} if output["output_type"] == "stream" else output.get("data", {})
    for mime, content in bundle.items():
        if "javascript" in mime:
            yield f"a script ({mime})"
        elif "widget" in mime:
            yield f"a widget, which a page cannot show ({mime})"
        elif mime.startswith("text/") or mime == "image/svg+xml":
            text = content if isinstance(content, str) else "".join(content)
            if len(text) > LONGEST_OUTPUT and mime != "image/svg+xml":
                yield f"{len(text):,} characters of {mime}; at most {LONGEST_OUTPUT:,} make a readable page"
                continue  # searching it would take longer than anyone waits
            if mime == "text/markdown" and re.search(r"!\[[^\]]*\]\(\s*<?(?:https?:)?//", text):
                yield "a remote image"
            if mime in {"text/html", "image/svg+xml", "text/markdown"}:
                markup = _Markup()
                markup.feed(text)
                markup.close()
                yield from markup.faults
                text = "".join(markup.text)
            yield from _text_faults(text, private)
        elif mime.endswith("json"):
            yield from _text_faults(" ".join(_strings(content)), private)


def _strings(node: object) -> Iterator[str]:
    """Every text inside nested lists and mappings."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value)


def scrub(notebook: Mapping[str, Any], private: Iterable[str] = ()) -> list[str]:
    """What an executed notebook shows that a published page must not.

    Looked for: error outputs, code cells that did not run in order, scripts, frames, remote images, absolute
    paths, names of a machine or account, access tokens, tracebacks, traces of progress bars, and outputs too
    long to read. The notebook's metadata, which readers download with it, are searched as well.

    Args:
        notebook: The notebook as parsed JSON.
        private: Names that must not appear, such as the account's and the machine's.

    Returns:
        One sentence fragment a fault, naming the cell; empty for a clean notebook.
    """
    private = tuple(private)
    faults = []
    position = 0
    for cell in notebook["cells"]:
        place = f"code cell {position + 1}"
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            position += 1
            if cell["execution_count"] != position:
                count = cell["execution_count"]
                faults.append(
                    f"{place} " + ("did not run" if count is None else f"ran out of order, as number {count}")
                )
        for output in cell.get("outputs", ()):
            faults += [f"{place} shows {what}" for what in dict.fromkeys(_output_faults(output, private))]
        named = " ".join(_strings(cell.get("metadata", {})))
        faults += [f"the metadata of {place} hold {what}" for what in _text_faults(named, private)]
    named = " ".join(_strings(notebook.get("metadata", {})))
    return faults + [f"the notebook's metadata hold {what}" for what in _text_faults(named, private)]


def _private_names() -> tuple[str, ...]:
    """This machine's and account's names, unless they are words that may stand in a text."""
    import platform

    names = {platform.node(), platform.node().partition(".")[0]}
    # Many containers have no entry for the account.
    with contextlib.suppress(OSError, KeyError):
        names.add(getpass.getuser())
    return tuple(sorted(n for n in names if len(n) > 3 and n.lower() not in _COMMON_ACCOUNTS | {"localhost"}))


def chapter_faults(catalog: Catalog) -> list[str]:
    """Why the published chapters cannot be shown, one line a fault; empty if all can.

    A stale chapter is no fault: its page and the scoreboard say that it is stale.
    """
    faults = []
    for paper in catalog.built():
        where = f"{paper.slug} (book/chapters/{paper.slug}.ipynb)"
        try:
            record = read_record(paper.chapter_path)
        except IncompleteRun as error:
            faults.append(f"{where}: {error}")
            continue
        if record.slug != paper.slug:
            faults.append(f"{where}: holds the record of {record.slug}")
        if record.profile != "book":
            faults.append(f"{where}: was run at the profile {record.profile!r}, the book shows 'book'")
        if record.parameters.get("dry_run"):
            faults.append(f"{where}: is a dry run")
        notebook = json.loads(paper.chapter_path.read_text(encoding="utf-8"))
        faults += [f"{where}: {fault}" for fault in scrub(notebook, _private_names())]
    return faults


# ---------------------------------------------------------------- build


def build(output: Path | None = None, *, timeout: float = 1800) -> Path:
    """Check the published chapters and render the book.

    Args:
        output: The folder that gets `_build/html`; by default the project's root.
        timeout: Seconds after which the renderer is stopped.

    Returns:
        The book's first page, `_build/html/index.html`.

    Raises:
        BookError: If a chapter is missing, incomplete or unclean, Sphinx warns of anything, or another build is
            running. Every fault is named.
    """
    from filelock import FileLock, Timeout

    from leantrain.picture import write_picture

    output = output or paths.ROOT
    catalog = load_catalog()
    _refuse_faults(catalog)
    folder = output / "_build"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".book.lock", timeout=0):
            write_toc(catalog)
            write_picture(scoreboard_rows(catalog, published_records(catalog), {}))
            _render(output, timeout)
    except Timeout:
        raise BookError("another build of the book is running") from None
    index = folder / "html" / "index.html"
    if not index.is_file():
        raise BookError("the renderer ended without an error but left no index.html")
    return index


def _refuse_faults(catalog: Catalog) -> None:
    if faults := chapter_faults(catalog):
        slugs = " ".join(dict.fromkeys(fault.partition(" ")[0] for fault in faults))
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise BookError(
            f"these chapters cannot be shown:\n{lines}\nMake them with: leantrain run --profile book {slugs}"
        )


def _browser() -> str:
    """Chromium's program: that of the variable `CHROMIUM`, or the first of its usual names on the path."""
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else _BROWSERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise BookError(
        f"a PDF is printed by Chromium or Chrome, and there is no program named {' or '.join(names)}: install one "
        "(on Debian: apt install chromium), or set CHROMIUM to the path of its program"
    )


def build_pdf(output: Path | None = None, *, timeout: float = 1800) -> Path:
    """Render the whole book as one page and print it with Chromium.

    Args:
        output: The folder that gets `_build/training-for-less.pdf`; by default the project's root.
        timeout: Seconds after which the renderer, and then the browser, is stopped.

    Returns:
        The PDF. An older one stands until the new one is complete.

    Raises:
        BookError: As `build`; or if there is no Chromium, or it prints nothing.
    """
    browser = _browser()
    folder = (output or paths.ROOT) / "_build"
    catalog = load_catalog()
    _refuse_faults(catalog)
    write_toc(catalog)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pdf-") as scratch:
        place = Path(scratch)
        _render(place, timeout, "--builder", "custom", "--custom-builder", "singlehtml")
        pages, printed = place / "_build" / "singlehtml", place / "book.pdf"
        # Sphinx writes the one page below book/, with addresses that are right one level higher. Links to the page
        # itself must name no file, and other files are not there for the PDF's reader.
        text = (pages / "book" / "index.html").read_text(encoding="utf-8").replace('href="book/index.html#', 'href="#')
        page = pages / "all.html"
        page.write_text(_LOCAL_LINK.sub(r"\1", text), encoding="utf-8")
        options = ["--headless", "--disable-gpu", f"--user-data-dir={place / 'profile'}"]
        options += ["--no-pdf-header-footer", "--generate-pdf-document-outline"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium refuses to start as root with one
        # The time is the page's own clock: it gives MathJax as long as it needs.
        options += ["--virtual-time-budget=120000", f"--print-to-pdf={printed}", page.as_uri()]
        try:
            done = subprocess.run(
                [browser, *options], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise BookError(f"printing took longer than {timeout:.0f} s and was stopped") from None
        if done.returncode or not printed.is_file() or not printed.read_bytes().startswith(b"%PDF"):
            raise BookError(f"{browser} printed no PDF (status {done.returncode}):\n{done.stderr.strip()[-2000:]}")
        return printed.replace(folder / "training-for-less.pdf")


def _render(output: Path, timeout: float, *options: str) -> None:
    """Run jupyter-book; its output is shown only when it fails."""
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(paths.ROOT), "--path-output", str(output)]
    environment = {**os.environ, "LEANTRAIN_ROOT": str(paths.ROOT), "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            [*command, "--warningiserror", "--nitpick", "--keep-going", *options],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            cwd=paths.ROOT,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BookError(f"rendering took longer than {timeout:.0f} s and was stopped") from None
    if done.returncode:
        log = re.sub(r"\x1b\[[0-9;]*m", "", f"{done.stdout}\n{done.stderr}").strip()
        named = [line for line in log.splitlines() if re.search(r"\b(?:WARNING|ERROR|CRITICAL)\b", line)]
        shown = "\n".join(dict.fromkeys(named)) or log[-4000:]
        raise BookError(f"jupyter-book ended with status {done.returncode}:\n{shown}")
