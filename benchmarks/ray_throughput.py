"""How fast runs go through a Ray cluster on this machine, and how much memory a long queue takes.

    python benchmarks/ray_throughput.py [--runs 8] [--repeats 3] [--queued 10000]

Makes a small project with chapters that measure nothing, and runs them at `quick` on clusters of its own, with one
worker and with two, and with the local engine with as many jobs at a time: runs a minute, the median of the repeats
and their range, all kinds in turn. Two workers only help where there are two idle processors. Then a long queue of
runs that do nothing: runs a second, and by how much the caller's memory grows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import yaml

if TYPE_CHECKING:
    from leantrain.ray_engine import Event, Spec
    from leantrain.runner import Job

PARAMETERS = """\
profile: str = "quick"  # scale of the run; one of quick, book, paper
seeds: list[int] = [0]  # no use is made of it; each 0 to 1
dry_run: bool = False  # a test"""


def lay_out(root: Path, chapters: int) -> None:
    """A project of so many chapters in a folder."""
    claim: dict[str, Any] = {
        "headline": True, "sentence": "One is one.", "metric": "number", "unit": "", "paper": 1, "conditions": "all",
        "stated": "abstract", "tested": "exact", "how": "It is counted.", "min_n": 1,
        "rule": {"reproduced": [{"at_least": 1}]},
    }  # fmt: skip
    paper = {
        "title": "A paper", "short": "Paper", "authors": ["A. Author"], "year": 2023, "venue": "a venue", "part": "all",
        "kind": "technique", "problem": "None.", "idea": "None.", "tests": "None.",
    }  # fmt: skip
    (root / "notebooks").mkdir()
    (root / "book").mkdir()
    (root / "requirements.lock").touch()
    papers = []
    for slug in (f"chapter-{number}" for number in range(chapters)):
        papers.append({"slug": slug, **paper, "claims": [{"id": f"{slug}.one", **claim}]})
        v4 = nbformat.v4
        cells = [
            v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            v4.new_code_cell(f"from leantrain.chapter import Chapter\nchapter = Chapter('{slug}', globals())"),
            v4.new_code_cell(
                "from leantrain.measure.statistics import Estimate\n"
                f"chapter.measure('{slug}.one', Estimate.exact(1.0))\nchapter.verdicts()"
            ),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, root / "notebooks" / f"{slug}.ipynb")
    parts = [{"slug": "all", "title": "All", "blurb": "All."}]
    (root / "book" / "papers.yml").write_text(yaml.safe_dump({"parts": parts, "papers": papers}))


@contextlib.contextmanager
def cluster(processors: int) -> Iterator[None]:
    from ray.cluster_utils import Cluster

    from leantrain import ray_engine

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": processors, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = made.address
    try:
        with ray_engine.connected():
            yield
    finally:
        made.shutdown()


def nothing(spec: Spec) -> Iterator[Event]:
    """A run that does nothing: its notebook was executed before, as the first chapter."""
    yield "end", {"cause": None, "notebook": spec.source.replace('"chapter-0"', f'"{spec.slug}"').encode()}


def queued(first: Job, count: int) -> Iterator[Job]:
    """Jobs of as many papers, whose source is the executed notebook of the first."""
    for number in range(count):
        slug = f"queued-{number}"
        paper = first.paper.model_copy(update={"slug": slug})
        target = first.target.with_name(f"{slug}.ipynb")
        yield dataclasses.replace(first, paper=paper, source=first.target, target=target)


def compare(runs: int, repeats: int, long: int) -> None:
    from leantrain.catalog import load_catalog
    from leantrain.parameters import Resources
    from leantrain.ray_engine import RayEngine, spec_of, window
    from leantrain.runner import plan, run_jobs

    def seconds(jobs: list[Job], **options: Any) -> float:
        started = time.perf_counter()
        causes = {o.cause for o in run_jobs(jobs, force=True, **options)}
        if causes != {""}:
            raise SystemExit(f"not all runs were done: {sorted(causes)}")
        return time.perf_counter() - started

    def one_processor(job: Job) -> Spec:
        return dataclasses.replace(spec_of(job), needs=Resources(1, 0))

    jobs = [plan(paper, "quick") for paper in load_catalog().built()]
    seconds(jobs[:1])  # what is imported for the first time comes from the disk
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for workers in (1, 2):
            taken = seconds(jobs, parallel=workers)
            rates.setdefault(f"local, {workers} at a time", []).append(60 * runs / taken)
            with cluster(workers):
                engine = RayEngine(spec=one_processor)
                seconds(jobs[:workers], parallel=workers, execute=engine.execute)  # Ray starts its workers with these
                taken = seconds(jobs, parallel=window(), execute=engine.execute)
            rates.setdefault(f"Ray, {workers} worker{'s'[: workers - 1]}", []).append(60 * runs / taken)
    for kind, found in rates.items():
        middle, low, high = statistics.median(found), min(found), max(found)
        print(f"{kind:18} {middle:5.1f} [{low:.1f}, {high:.1f}] runs a minute", flush=True)

    first = spec_of(jobs[0])

    def bare(job: Job) -> Spec:
        source = job.source.read_text(encoding="utf-8")
        return dataclasses.replace(first, slug=job.paper.slug, source=source, needs=Resources(1, 0))

    with cluster(2):
        engine = RayEngine(task=nothing, spec=bare)
        seconds(list(queued(jobs[0], 100)), parallel=window(), execute=engine.execute)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = seconds(list(queued(jobs[0], long)), parallel=window(), execute=engine.execute)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{long:,} runs that do nothing: {long / taken:.0f} a second, {grown:.0f} MiB more memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8, help="chapters of the small project")
    parser.add_argument("--repeats", type=int, default=3, help="how often each kind is measured")
    parser.add_argument("--queued", type=int, default=10_000, help="length of the queue")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["LEANTRAIN_ROOT"] = name  # before anything of the library is imported
        lay_out(Path(name), given.runs)
        compare(given.runs, given.repeats, given.queued)


if __name__ == "__main__":
    main()
