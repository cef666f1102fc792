"""The `leantrain` command."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leantrain import paths
from leantrain.catalog import Catalog, CatalogError, Paper, load_catalog
from leantrain.parameters import ParameterError, parameters_of
from leantrain.records import IncompleteRun, Record, freshness, read_record, run_path

if TYPE_CHECKING:
    from leantrain.runner import Job, Outcome

__all__ = ["main"]

PROFILES = click.Choice(["quick", "book", "paper"])


class _Failure(click.ClickException):
    """A message on standard error and exit status 1."""

    def show(self, file: Any = None) -> None:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(self.message, err=True)


def _catalog() -> Catalog:
    try:
        return load_catalog()
    except CatalogError as error:
        raise _Failure(str(error)) from None


def _papers(slugs: Sequence[str]) -> list[Paper]:
    catalog = _catalog()
    try:
        return [catalog.paper(slug) for slug in dict.fromkeys(slugs)]
    except CatalogError as error:
        raise _Failure(str(error)) from None


def _record(paper: Paper, path: Path) -> tuple[Record | None, str]:
    """The record in an executed notebook, with its state in words."""
    try:
        record = read_record(path)
    except IncompleteRun as error:
        return None, "missing" if "is missing" in str(error) else f"incomplete: {error}"
    try:
        changes = freshness(record, paper).changes
    except ParameterError as error:
        return record, f"stale: {error}"
    return record, f"stale: {', '.join(changes)}" if changes else "fresh"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leantrain")
def main() -> None:
    """Training for Less: list, run and render the book's chapters."""


@main.command("list")
def list_papers() -> None:
    """All papers and studies, with their part of the book and what is built."""
    catalog = _catalog()
    titles = {part.slug: part.title for part in catalog.parts}
    rows = [(p.slug, str(p.year), titles[p.part], "built" if p.built else "planned", p.title) for p in catalog.entries]
    _table(["slug", "year", "part", "chapter", "title"], rows)


@main.command()
@click.argument("slug")
def show(slug: str) -> None:
    """A paper: its claims, their verdicts here, and its chapter's parameters."""
    from leantrain.chapter import format_quantity

    (paper,) = _papers([slug])
    click.secho(paper.title, bold=True)
    where = [", ".join(paper.authors), f"{paper.venue}, {paper.year}", f"arXiv {paper.arxiv}" if paper.arxiv else ""]
    click.echo("; ".join(filter(None, where)))
    click.echo(f"\n{paper.idea}\n")
    profile = "book"
    record, state = _record(paper, run_path(paper, profile)) if paper.built else (None, "planned")
    if record is None and paper.built:
        profile = "quick"
        record, state = _record(paper, run_path(paper, profile))
    rows = []
    for claim in paper.claims:
        measured = record.measurements.get(claim.id) if record else None
        here = "; ".join(format_quantity(q, claim.unit_of(n)) for n, q in measured.items()) if measured else "–"
        verdict = str(claim.decide(measured)) if record else "–"
        rows.append((claim.id, claim.sentence, claim.paper_text, here, verdict))
    _table(["claim", "sentence", "paper", "here", "verdict"], rows)
    click.echo(f"Result at {profile}: {state}" if paper.built else "No chapter yet.")
    if paper.built:
        parameters = parameters_of(paper.notebook_path).values()
        _table(
            ["parameter", "quick value", "expected", "meaning"],
            [(p.name, repr(p.default), p.expected, p.help) for p in parameters],
        )


@main.command()
@click.argument("slugs", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every chapter that is built.")
@click.option("--profile", type=PROFILES, default="quick", show_default=True, help="Scale of the run.")
@click.option("-p", "pairs", multiple=True, metavar="NAME=VALUE", help="Set one parameter; may be given again.")
@click.option("--seeds", help="Seeds, such as 0,1,2: short for -p seeds=0,1,2.")
@click.option("--dry-run", is_flag=True, help="The profile's real models on two batches of stand-in data.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    help="Chapters at a time; by default 1, and on a cluster as many as it has room for.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where to run: here, or on the Ray cluster that RAY_ADDRESS names.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0, 86400),
    default=30,
    show_default=True,
    help="Seconds that a run waits for a node of its size to join the cluster.",
)
@click.option("--force", is_flag=True, help="Run also what has a fresh result.")
@click.option("--store", is_flag=True, help="Put the outputs into notebooks/, as the reference that nbval checks.")
def run(
    slugs: Sequence[str],
    everything: bool,
    profile: str,
    pairs: Sequence[str],
    seeds: str | None,
    dry_run: bool,
    jobs: int | None,
    engine: str,
    patience: float,
    force: bool,
    store: bool,
) -> None:
    """Run chapters; a finished one is kept, a failed one says why and the others go on."""
    from leantrain.runner import plan, run_jobs

    if bool(slugs) == everything:
        raise click.UsageError("name the chapters to run, or give --all")
    papers = list(_catalog().built()) if everything else _papers(slugs)
    texts = _pairs(pairs)
    if seeds is not None:
        texts["seeds"] = seeds
    if dry_run:
        texts["dry_run"] = "true"
    planned: list[Job] = []
    try:
        for paper in papers:
            planned.append(plan(paper, profile, _typed(paper, texts), store=store))
    except ValueError as error:
        raise _Failure(f"{paper.slug}: {error}") from None
    with contextlib.ExitStack() as stack:
        parallel, execute = jobs or 1, None
        if engine == "ray":
            from leantrain import ray_engine

            try:
                for job in planned:
                    ray_engine.needs_of(job)
                stack.enter_context(ray_engine.connected())
            except (ParameterError, ray_engine.ClusterError) as error:
                raise _Failure(str(error)) from None
            parallel, execute = jobs or ray_engine.window(), ray_engine.RayEngine(patience).execute
        progress = stack.enter_context(_display(planned))
        outcomes = run_jobs(planned, parallel=parallel, force=force, progress=progress, execute=execute)
    _summary(outcomes)
    if any(o.status == "stopped" for o in outcomes):
        sys.exit(130)
    if not all(o.ok for o in outcomes):
        sys.exit(1)


def _pairs(pairs: Sequence[str]) -> dict[str, str]:
    texts = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise _Failure(f"-p was given {pair!r}; expected NAME=VALUE, such as -p epochs=3")
        texts[name] = text
    return texts


def _typed(paper: Paper, texts: Mapping[str, str]) -> dict[str, object]:
    if not paper.built:
        return {}
    known = parameters_of(paper.notebook_path)
    unknown = [name for name in texts if name not in known]
    if unknown:
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}; this chapter has {', '.join(known)}")
    return {name: known[name].from_text(text) for name, text in texts.items()}


class _display:
    """The one progress display: chapter, cell, elapsed. Plain lines where the output is no terminal."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = [
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells"),
            TimeElapsedColumn(),
        ]
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Any:
        self._progress.start()
        return self._step

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _step(self, slug: str, event: str, fields: Mapping[str, Any]) -> None:
        if event == "started":
            self._tasks[slug] = self._progress.add_task(slug, total=None)
            if not self._console.is_terminal:
                click.echo(f"{time.strftime('%H:%M:%S')} {slug}: started", err=True)
        elif event == "cell":
            self._progress.update(self._tasks[slug], completed=fields["index"], total=fields["total"])
        elif event == "retried":
            again = f"started again ({fields['attempt']} of {fields['limit']}): {fields['cause']}"
            self._console.print(f"{time.strftime('%H:%M:%S')} {slug}: {again}", markup=False, highlight=False)
        elif event == "finished":
            outcome: Outcome = fields["outcome"]
            if slug in self._tasks:
                self._progress.stop_task(self._tasks[slug])
            if not self._console.is_terminal:
                seconds = f" in {outcome.seconds:.0f} s" if outcome.seconds else ""
                click.echo(f"{time.strftime('%H:%M:%S')} {slug}: {outcome.status}{seconds}", err=True)


def _shown(path: Path) -> Path:
    """A path as a reader of the project sees it; one that lies elsewhere in full."""
    return path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path


def _summary(outcomes: Sequence[Outcome]) -> None:
    rows = []
    for outcome in outcomes:
        if not outcome.ok:
            continue
        record = read_record(outcome.job.target)
        for claim in outcome.job.paper.claims:
            measured = record.measurements.get(claim.id)
            if measured is not None or claim.headline:
                rows.append((outcome.job.paper.slug, claim.sentence, str(claim.decide(measured))))
    if rows:
        _table(["chapter", "claim", "verdict"], rows)
    for outcome in outcomes:
        if outcome.status == "fresh":
            click.echo(f"{outcome.job.paper.slug}: fresh already; --force runs it again")
        elif not outcome.ok:
            click.secho(f"{outcome.job.paper.slug}: {outcome.status}: {outcome.cause}", fg="red", err=True)
            if outcome.job.partial.exists():
                kept = _shown(outcome.job.partial)
                click.echo(f"  what there is of it: {kept} (marked incomplete)", err=True)


@main.command()
@click.argument("slugs", nargs=-1)
def status(slugs: Sequence[str]) -> None:
    """Which results are fresh, stale (and what changed), incomplete or missing."""
    papers = _papers(slugs) if slugs else list(_catalog().built())
    rows = []
    for paper in papers:
        if not paper.built:
            rows.append((paper.slug, "–", "planned"))
            continue
        places = {"quick, reference outputs": paper.notebook_path}
        places |= {"quick, this machine": run_path(paper, "quick"), "book, published": run_path(paper, "book")}
        rows += [(paper.slug, place, _record(paper, path)[1]) for place, path in places.items()]
    _table(["chapter", "profile", "result"], rows)


def _verify(name: str) -> None:
    from leantrain.data import fetch as store
    from leantrain.data.registry import dataset

    if dataset(name).trees:
        from leantrain.data.detection_sets import located

        located(name)
    else:
        store.verify(name)


@main.command()
@click.argument("action", type=click.Choice(["list", "fetch", "verify"]))
@click.argument("names", nargs=-1)
def data(action: str, names: Sequence[str]) -> None:
    """List the data sets, download one with its checksums, or check what is there."""
    from leantrain.data import fetch as store

    if action == "list":
        rows = [
            (d["name"], d["kind"], "yes" if d["present"] else "no", f"{d['bytes'] / 1e6:.1f}", d["terms"], d["title"])
            for d in store.describe()
        ]
        _table(["name", "kind", "here", "MB", "terms", "title"], rows)
        return
    if not names:
        raise click.UsageError(f"name the data sets to {action}; `leantrain data list` shows them")
    failed = False
    for name in names:
        try:
            (store.fetch if action == "fetch" else _verify)(name)
        except (ValueError, OSError) as error:
            failed = True
            click.secho(f"{name}: {error}", fg="red", err=True)
        else:
            click.echo(f"{name}: {'here and verified' if action == 'fetch' else 'verified'}")
    if failed:
        sys.exit(1)


@main.command()
@click.argument("slug")
def new(slug: str) -> None:
    """Lay down the files of a paper's chapter from the template."""
    from leantrain.scaffold import lay_down

    (paper,) = _papers([slug])
    try:
        written = lay_down(paper)
    except FileExistsError as error:
        raise _Failure(str(error)) from None
    for path in written:
        click.echo(path.relative_to(paths.ROOT))


@main.command()
@click.option("--pdf", is_flag=True, help="Print the whole book into one PDF; needs Chromium or Chrome.")
def book(pdf: bool) -> None:
    """Render the book from the complete chapters; fails on a missing or incomplete one."""
    from leantrain import book as rendering

    try:
        page = rendering.build_pdf() if pdf else rendering.build()
    except rendering.BookError as error:
        raise _Failure(str(error)) from None
    click.echo(f"The book is at {_shown(page)}")


if __name__ == "__main__":
    main()
