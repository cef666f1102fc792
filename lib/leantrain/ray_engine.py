"""Run chapters on a Ray cluster: `leantrain run --engine ray`.

One task is one run. The runner keeps its bookkeeping on the machine that calls (locks, freshness, publishing), with
:meth:`RayEngine.execute` in the place of the local process: it submits the run with its needs, passes on which cell is
running, and writes the notebook that comes back through Ray's object store. So no node has to share a file system with
the caller for a result to land; every node needs the same tree, installed, and a task refuses to run from another one.

Ray repeats nothing by itself. A run whose worker or node was lost is submitted again, a bounded number of times and
with the same parameters and seeds; a run that failed by itself is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantrain import paths, runner
from leantrain.catalog import Paper, load_catalog
from leantrain.chapter import commit_of_tree
from leantrain.parameters import Resources, parameters_of, read_resources
from leantrain.records import fingerprint, strip_paths
from leantrain.runner import Job, Progress

__all__ = ["RETRIES", "ClusterError", "RayEngine", "Spec", "connected", "needs_of", "run_chapter", "spec_of", "window"]

#: How often a run is submitted again after the loss of its worker or its node.
RETRIES = 3

#: What a run needs where its profile file does not say.
_DEFAULTS = {"quick": Resources(), "book": Resources(), "paper": Resources(cpus=8, gpus=1)}

#: Variables of the caller that the runs need as well.
_PASSED_ON = ("LEANTRAIN_ROOT", "LEANTRAIN_DATA")

_POLL_S = 0.25


class ClusterError(RuntimeError):
    """There is no cluster to run on; the message says what to do."""


@dataclass(frozen=True)
class Spec:
    """A run as it travels to a node.

    Attributes:
        slug: The paper's slug.
        profile: quick, book or paper.
        parameters: All parameters, checked.
        source: The chapter's source notebook, as text.
        kernel: Name of the Jupyter kernel.
        cell_timeout: Longest time for one cell, in seconds.
        needs: The CPUs and GPUs that the run may use.
        tree: What the run depends on in the caller's tree.
    """

    slug: str
    profile: str
    parameters: Mapping[str, Any]
    source: str
    kernel: str
    cell_timeout: int
    needs: Resources
    tree: Mapping[str, str | None]


#: What a task yields: ("cell", index and total) as it goes on, ("end", cause and notebook) at last.
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class _NodeJob(Job):
    """A job on a node: it executes in a folder of its own, which a repeated run cannot get in the way of."""

    folder: Path = Path()

    @property
    def partial(self) -> Path:
        return self.folder / "executed.ipynb"


def needs_of(job: Job) -> Resources:
    """The CPUs and GPUs that a run asks for, from its profile file; a dry run needs no GPU.

    Raises:
        ParameterError: If the profile file's `resources` are faulty.
    """
    default = _DEFAULTS[job.profile]
    if job.profile != "quick":
        default = read_resources(paths.PROFILES / job.profile / f"{job.paper.slug}.yml", default)
    return Resources(_DEFAULTS["quick"].cpus, 0) if job.parameters.get("dry_run") else default


def spec_of(job: Job) -> Spec:
    """A job as it travels to a node, with what it depends on in this tree.

    Raises:
        ParameterError: If the profile file's `resources` are faulty.
    """
    source = job.source.read_text(encoding="utf-8")
    return Spec(
        job.paper.slug,
        job.profile,
        job.parameters,
        source,
        job.kernel,
        job.cell_timeout,
        needs_of(job),
        _tree(job.paper),
    )


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A connection to the running cluster that `RAY_ADDRESS` names, or else to the one on this machine.

    Raises:
        ClusterError: If Ray is not installed, no cluster answers, or it runs another version.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError("--engine ray needs Ray, which is not installed: run `pip install -e '.[ray]'`") from None
    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    try:
        _knock(os.environ.get("RAY_ADDRESS", "auto"))
        ray.init(
            address="auto",
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": environment} if environment else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster could be joined ({_first_line(error)}): start one on this machine with "
            "`ray start --head`, or set RAY_ADDRESS to HOST:PORT of its head"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once where Ray itself would try for a minute."""
    if address in ("", "auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConnectionError(f"RAY_ADDRESS is {address!r}, not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError:
        raise ConnectionError(f"nothing answers at {address}") from None


def window() -> int:
    """How many runs to keep submitted: enough that a node which gets free finds one, few enough for the memory."""
    import ray

    return min(256, 2 + 2 * int(ray.cluster_resources().get("CPU", 1)))


def run_chapter(spec: Spec) -> Iterator[Event]:
    """Run one chapter on the node that calls this, as the local runner does, and yield what happens."""
    paper = load_catalog().paper(spec.slug)
    if differing := _differences(spec.tree, _tree(paper)):
        shown = ", ".join(differing[:5]) + (", …" if len(differing) > 5 else "")
        cause = f"a node of the cluster has another tree than the caller ({shown}): give every node the same commit"
        yield "end", {"cause": cause, "notebook": None}
        return
    if spec.needs.gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="leantrain-") as name:
        source = Path(name) / "source.ipynb"
        source.write_text(spec.source, encoding="utf-8")
        job = _NodeJob(
            paper, spec.profile, spec.parameters, source, source,
            kernel=spec.kernel, cell_timeout=spec.cell_timeout, folder=Path(name),
        )  # fmt: skip
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                cause = runner._execute(
                    job, spec.needs.cpus, stop, lambda slug, event, fields: events.put((event, dict(fields)))
                )
            except OSError as error:
                cause = f"cannot write: {error.strerror}"
            events.put(("end", {"cause": cause and strip_paths(cause)}))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            event = ""
            while event != "end":
                try:
                    # Ray interrupts a cancelled task between two steps of Python, not within a wait.
                    event, fields = events.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if event == "end":
                    fields["notebook"] = job.partial.read_bytes() if job.partial.exists() else None
                yield event, fields
        finally:
            stop.set()
            thread.join()


def _tree(paper: Paper) -> dict[str, str | None]:
    """What a run of the paper's chapter depends on in this tree, by its name in words."""
    mark = fingerprint(paper)
    parameters = repr(sorted(parameters_of(paper.notebook_path).items()))
    return {
        "the commit": commit_of_tree()[0],
        "the notebook's code": mark.notebook,
        "the notebook's parameters": hashlib.sha256(parameters.encode()).hexdigest(),
        **{f"module {name}": digest for name, digest in mark.modules.items()},
        **{f"the rule of claim {name}": digest for name, digest in mark.claims.items()},
        **{f"package {name}": version for name, version in mark.packages.items()},
    }


def _differences(caller: Mapping[str, str | None], node: Mapping[str, str | None]) -> list[str]:
    # An image may hold the tree without its history; what the run depends on is compared all the same.
    unknown = {"the commit"} if None in (caller["the commit"], node["the commit"]) else set()
    return sorted(name for name in (caller.keys() | node.keys()) - unknown if caller.get(name) != node.get(name))


class RayEngine:
    """Executes jobs on the cluster that this process is connected to.

    Args:
        patience: Seconds that a run waits for a node of its size to appear while the cluster has none, for clusters
            that start nodes on demand.
        task: Generator function that runs on a node; tests and benchmarks put cheaper ones in its place.
        spec: What it is called with.

    Raises:
        ValueError: If the patience is negative.
    """

    def __init__(
        self,
        patience: float = 30.0,
        task: Callable[[Spec], Iterator[Event]] = run_chapter,
        spec: Callable[[Job], Spec] = spec_of,
    ) -> None:
        import ray

        if patience < 0:
            raise ValueError(f"patience must be at least 0 seconds, got {patience}")
        self._ray = ray
        self._patience = patience
        self._spec = spec
        self._task = ray.remote(max_retries=0, num_returns="streaming")(task)

    def execute(self, job: Job, stop: threading.Event, report: Progress) -> str | None:
        """Run a job on a node of the cluster and write what comes back into its partial file.

        Returns:
            None when every cell was executed, else what went wrong.
        """
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayError, WorkerCrashedError

        lost = {
            NodeDiedError: "its node was lost",
            ObjectLostError: "its result was lost with a node",
            OutOfMemoryError: "its node ran out of memory",
            WorkerCrashedError: "its worker died",
        }
        job.partial.unlink(missing_ok=True)
        spec = self._spec(job)
        for attempt in itertools.count(1):
            try:
                return self._attempt(job, spec, stop, report)
            except tuple(lost) as error:
                cause = next(words for kind, words in lost.items() if isinstance(error, kind))
                if attempt > RETRIES:
                    return f"it was started {attempt} times, and lost every time; at last, {cause}"
                report(job.paper.slug, "retried", {"cause": cause, "attempt": attempt, "limit": RETRIES})
            except RayError as error:
                return f"the cluster could not run it: {_first_line(error)}"
        raise AssertionError  # the count has no end

    def _attempt(self, job: Job, spec: Spec, stop: threading.Event, report: Progress) -> str | None:
        ray, needs = self._ray, spec.needs
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "name": f"{spec.slug} at {spec.profile}"}
        events = self._task.options(**options).remote(spec)
        give_up: float | None = None
        begun = ended = False
        try:
            while not stop.is_set():
                ready, _ = ray.wait([events], timeout=_POLL_S)
                if not ready:
                    if begun or self._has_room(needs):
                        give_up = None
                    elif give_up is None:
                        give_up = time.monotonic() + self._patience
                    elif time.monotonic() > give_up:
                        return f"it needs {needs}, and no node of the cluster has them ({self._largest()})"
                    continue
                event, fields = ray.get(next(events))
                begun = True
                if event != "end":
                    report(spec.slug, event, fields)
                    continue
                ended = True
                if fields["notebook"] is not None:
                    paths.write_atomically(job.partial, fields["notebook"])
                return fields["cause"]
            return "interrupted"
        finally:
            if not ended:
                with contextlib.suppress(Exception):
                    ray.cancel(events)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _has_room(self, needs: Resources) -> bool:
        return any(n.get("CPU", 0) >= needs.cpus and n.get("GPU", 0) >= needs.gpus for n in self._nodes())

    def _largest(self) -> str:
        nodes = self._nodes()
        cpus, gpus = (int(max((n.get(kind, 0) for n in nodes), default=0)) for kind in ("CPU", "GPU"))
        return f"the largest have {cpus} CPUs and {gpus} GPUs; `resources` in the profile file says what it needs"


def _first_line(error: Exception) -> str:
    """The message of one of Ray's errors in one line; of an error in the task, that error's own."""
    origin = getattr(error, "cause", None)
    if isinstance(origin, Exception):
        return f"{type(origin).__name__}: {origin}".splitlines()[0]
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
