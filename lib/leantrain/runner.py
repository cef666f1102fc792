"""Run chapters with papermill: on this machine, or through `ray_engine` on a cluster.

Every run is a process of its own that executes into a partial file. Only when the runner itself has seen that
every code cell ran in order and left a valid record does the notebook take its final name, in one step. A failed
run leaves the partial file, marked incomplete with the cause, beside the untouched older result. Every process of a
run carries its mark: none outlives the run, and what a runner that was itself killed left behind is ended by the next.
No run waits without end: a worker that is silent for longer than its kernel or its cell may take is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantrain import paths
from leantrain.catalog import Paper
from leantrain.records import IncompleteRun, finish, freshness, profile_parameters, read_record, run_path, strip_paths
from leantrain.worker import OWN

__all__ = ["CELL_TIMEOUT", "Execute", "Job", "Outcome", "Progress", "plan", "run_jobs"]

#: Longest time that one cell may take, in seconds, by profile.
CELL_TIMEOUT = {"quick": 300, "book": 3600, "paper": 14 * 24 * 3600}

#: Longest time that a kernel may take to come up, and its worker to end or to answer beyond its own limits, in seconds.
START_TIMEOUT, GRACE = 180, 120

#: How often a run that got to no cell, and so can have lost nothing, is started again.
RETRIES = 2

#: Environment variable that every process of a run inherits; it names the run's partial file, which is its own alone.
_MARK = "LEANTRAIN_RUN"


@dataclass(frozen=True)
class Job:
    """One chapter to run.

    Attributes:
        paper: The paper.
        profile: quick, book or paper.
        parameters: All parameters, checked.
        source: The chapter's source notebook.
        target: Where the executed notebook lands.
        store: Whether the result becomes the source's reference outputs.
        kernel: Name of the Jupyter kernel.
        cell_timeout: Longest time for one cell, in seconds.
    """

    paper: Paper
    profile: str
    parameters: Mapping[str, Any]
    source: Path
    target: Path
    store: bool = False
    kernel: str = "python3"
    cell_timeout: int = 3600

    @property
    def partial(self) -> Path:
        """The file that the run writes until it is complete."""
        return paths.BUILD / "partial" / self.profile / f"{self.paper.slug}.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `done`, `fresh` (nothing to do), `failed` or `stopped`, with the cause in words."""

    job: Job
    status: str
    cause: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the chapter has a complete result."""
        return self.status in ("done", "fresh")


#: Called with (slug, event, fields): started, cell (index, total), retried (attempt, limit, cause), finished (outcome).
Progress = Callable[[str, str, Mapping[str, Any]], None]

#: Executes a job into its partial file. Returns None when every cell was executed, else what went wrong.
Execute = Callable[[Job, threading.Event, Progress], str | None]


def plan(
    paper: Paper,
    profile: str,
    given: Mapping[str, object] | None = None,
    *,
    store: bool = False,
    target: Path | None = None,
) -> Job:
    """Check everything that can be checked before a run starts.

    Args:
        paper: The paper; it must have a chapter.
        profile: quick, book or paper.
        given: Parameters that replace those of the profile.
        store: Put the outputs into the source notebook (only at `quick` with its own parameters).
        target: Where the executed notebook goes; by default the profile's place.

    Raises:
        ParameterError: On a faulty parameter.
        ValueError: If the paper has no chapter, or `store` is asked for with other parameters than the source's own.
    """
    if not paper.built:
        raise ValueError(f"{paper.slug!r} has no chapter yet: it is planned")
    parameters = profile_parameters(paper, profile, given)
    if store and (profile != "quick" or given):
        raise ValueError("--store keeps the reference outputs at the quick profile, with the notebook's own parameters")
    if parameters.get("dry_run") and target is None:
        target = paths.BUILD / "runs" / f"{profile}-dry" / f"{paper.slug}.ipynb"
    elif given and target is None:
        target = paths.BUILD / "runs" / f"{profile}-custom" / f"{paper.slug}.ipynb"
    target = paper.notebook_path if store else target or run_path(paper, profile)
    return Job(paper, profile, parameters, paper.notebook_path, target, store, cell_timeout=CELL_TIMEOUT[profile])


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int = 1,
    force: bool = False,
    progress: Progress | None = None,
    execute: Execute | None = None,
) -> list[Outcome]:
    """Run jobs, a few at a time; one that fails does not stop the others.

    Args:
        jobs: What to run.
        parallel: How many at a time; the processor's threads are shared out evenly among them.
        force: Run also what has a fresh, complete result.
        progress: Told of every step.
        execute: Where a job's cells are run; by default in a process on this machine.

    Returns:
        One outcome per job, in order. After an interrupt (Ctrl-C or SIGTERM) running jobs are stopped with all
        their processes, the others are not started, and both are reported as `stopped`.

    Raises:
        ValueError: If `parallel` is less than 1.
    """
    if parallel < 1:
        raise ValueError(f"at least one job must run at a time, got {parallel}")
    report = progress or (lambda slug, event, fields: None)
    outcomes: dict[int, Outcome] = {}
    waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    for item in enumerate(jobs):
        waiting.put(item)
    stop = threading.Event()
    threads_each = max(1, (os.cpu_count() or 1) // parallel)

    def here(job: Job, stop: threading.Event, report: Progress) -> str | None:
        return _execute(job, threads_each, stop, report)

    def work() -> None:
        while not stop.is_set():
            try:
                index, job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcomes[index] = _run(job, execute or here, force, stop, report)
            # A file that is being edited, say: such a job must not pass for one that was not started.
            except Exception as error:
                outcomes[index] = Outcome(job, "failed", strip_paths(f"{type(error).__name__}: {error}"))
            report(job.paper.slug, "finished", {"outcome": outcomes[index]})

    threads = [threading.Thread(target=work) for _ in range(min(parallel, len(jobs)))]
    with _on_signals(stop):
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    return [outcomes.get(i, Outcome(job, "stopped", "not started")) for i, job in enumerate(jobs)]


@contextlib.contextmanager
def _on_signals(stop: threading.Event) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a request to stop, while jobs run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _run(job: Job, execute: Execute, force: bool, stop: threading.Event, report: Progress) -> Outcome:
    from filelock import FileLock, Timeout  # writes and removes probes when it is imported

    started = time.monotonic()
    lock = FileLock(job.partial.with_suffix(".lock"))
    try:
        job.partial.parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            _end_processes(job)
            if not force and not job.store and _is_fresh(job):
                _renew_prose(job)
                return Outcome(job, "fresh")
            report(job.paper.slug, "started", {})
            # What an older run left must not pass for a part of this one.
            for file in (job.partial, *job.target.parent.glob(f".{job.target.name}.*.part")):
                file.unlink(missing_ok=True)
            cause = execute(job, stop, report)
            if cause is None:
                cause = _publish(job)
    except Timeout:
        cause = f"another run of {job.paper.slug} at {job.profile} is under way"
        return Outcome(job, "failed", cause, time.monotonic() - started)
    except OSError as error:
        cause = f"cannot write: {error.strerror}"
    seconds = time.monotonic() - started
    if cause is None:
        return Outcome(job, "done", seconds=seconds)
    cause = strip_paths(cause)
    _mark_incomplete(job.partial, cause)
    return Outcome(job, "stopped" if stop.is_set() else "failed", cause, seconds)


@contextlib.contextmanager
def _scratch(job: Job) -> Iterator[Path]:
    """A new folder of the run's own, for what a kernel keeps: sockets, connection file, settings.

    Its name follows from the job, so that the next run removes what a killed runner left. It is short, as names of
    sockets must be (108 bytes, 104 on macOS).
    """
    name = f"leantrain-{hashlib.sha256(str(job.partial).encode()).hexdigest()[:12]}"
    usual = Path(tempfile.gettempdir())
    folder = (usual if len(os.fsencode(usual)) < 60 else Path("/tmp")) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_processes(job: Job) -> None:
    """End what still runs of a job: the caller holds its lock, so no live runner can own such a process."""
    import psutil

    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    left = []
    for process in psutil.process_iter():
        # Processes of others cannot be looked into, and some end while they are looked at.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in spared and process.environ().get(_MARK) == str(job.partial):
                process.kill()
                left.append(process)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(_runs(process) for process in left):
        time.sleep(0.02)


def _runs(process: Any) -> bool:
    import psutil

    try:
        # One that has ended stays in the table until its parent asks; some parents never do.
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_fresh(job: Job) -> bool:
    try:
        record = read_record(job.target)
    except IncompleteRun:
        return False
    return freshness(record, job.paper, job.parameters).state == "fresh"


def _renew_prose(job: Job) -> None:
    """Give a fresh result the text, captions and tags of its source; what was executed stays as it is."""
    source = json.loads(job.source.read_text(encoding="utf-8"))
    executed = json.loads(job.target.read_text(encoding="utf-8"))
    ran = {cell["id"]: cell for cell in executed["cells"] if cell["cell_type"] == "code"}
    injected = [cell for cell in ran.values() if "injected-parameters" in cell["metadata"].get("tags", [])]
    cells: list[dict[str, Any]] = []
    for cell in source["cells"]:
        cells.append(ran[cell["id"]] | {"metadata": cell["metadata"]} if cell["id"] in ran else cell)
        if "parameters" in cell["metadata"].get("tags", []):
            cells += injected
    if cells != executed["cells"]:
        paths.write_atomically(job.target, json.dumps(executed | {"cells": cells}, indent=1, ensure_ascii=False) + "\n")


class _NotStarted(Exception):
    """A worker got to no cell, for a reason that another start may not meet."""


def _execute(job: Job, threads: int, stop: threading.Event, report: Progress) -> str | None:
    """Run the worker; None when every cell was executed, else what went wrong."""
    for attempt in range(1, RETRIES + 2):
        try:
            with _scratch(job) as scratch:
                return _attempt(job, threads, scratch, stop, report)
        except _NotStarted as error:
            cause = f"the kernel did not start: {error}"
        if attempt <= RETRIES:
            report(job.paper.slug, "retried", {"cause": cause, "attempt": attempt, "limit": RETRIES})
            stop.wait(attempt)
    return f"{cause} (tried {RETRIES + 1} times); {OWN}"


@dataclass
class _Watch:
    """Until when a worker may stay silent, and whether it stayed silent for longer."""

    seconds: float = 0.0
    deadline: float = 0.0
    expired: bool = False

    def allow(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, time.monotonic() + seconds


def _attempt(job: Job, threads: int, scratch: Path, stop: threading.Event, report: Progress) -> str | None:
    # Parameters that the source holds already are not injected: the quick run is the source, executed.
    own = profile_parameters(job.paper, "quick")
    injected = {name: value for name, value in job.parameters.items() if value != own[name]}
    spec = {
        "source": str(job.source),
        "output": str(job.partial),
        "parameters": injected,
        "kernel": job.kernel,
        "cwd": str(paths.ROOT),
        "scratch": str(scratch),
        "start_timeout": START_TIMEOUT,
        "cell_timeout": job.cell_timeout,
    }
    environment = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1", _MARK: str(job.partial)}
    environment |= {"LEANTRAIN_ROOT": str(paths.ROOT), "LEANTRAIN_BUILD": str(paths.BUILD)}
    # The reader's own start-up files and settings of IPython have no place in a run that others shall repeat, and the
    # home folder may be read-only.
    environment |= {"JUPYTER_RUNTIME_DIR": str(scratch), "IPYTHONDIR": str(scratch)}
    if not os.access(os.path.expanduser("~"), os.W_OK):
        # Matplotlib would say in every chapter where it keeps its fonts instead.
        environment.setdefault("MPLCONFIGDIR", str(paths.BUILD / "matplotlib"))
    # tqdm advises every notebook to install widgets, with a path of this machine in the message.
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"
    # Threads that spin for long while they wait make a small model tenfold slower as soon as something else runs.
    environment.setdefault("GOMP_SPINCOUNT", "2000")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        # One limit for all: a reader's OMP_NUM_THREADS holds for the other libraries too.
        environment.setdefault(name, os.environ.get("OMP_NUM_THREADS", str(threads)))
    process = subprocess.Popen(
        [sys.executable, "-m", "leantrain.worker", json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    watch = _Watch()
    watch.allow(2 * START_TIMEOUT)  # its own start comes before the kernel's
    watcher = threading.Thread(target=_stop_in_time, args=(process, stop, watch), daemon=True)
    watcher.start()
    errors: list[str] = []
    causes: list[str] = []
    unstarted: list[str] = []
    seen: set[str] = set()

    def follow() -> None:
        for line in process.stdout or ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            seen.add(event["event"])
            if event["event"] == "cell":
                watch.allow(job.cell_timeout + GRACE)
                report(job.paper.slug, "cell", {"index": event["index"] + 1, "total": event["total"]})
                continue
            watch.allow(GRACE)
            if event["event"] == "unstarted":
                unstarted.append(event["cause"])
            elif event["event"] == "failed":
                causes.append(event["cause"])

    readers = [
        threading.Thread(target=follow, daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    code = process.wait()
    # What the worker left behind would keep its pipes open.
    _end_processes(job)
    for reader in readers:
        reader.join(5)
    if stop.is_set():
        return "interrupted"
    if watch.expired:
        silent = f"the run stood still for {watch.seconds:g} s"
        if "cell" not in seen:
            unstarted.append(silent)
        # One that hangs after its last cell has left all that there is, which is checked before it is published.
        elif "closing" not in seen and not causes:
            causes.append(silent)
    if unstarted:
        raise _NotStarted(unstarted[-1])
    if causes:
        return causes[-1]
    if code == 0 or watch.expired:
        return None
    if code < 0 or code == 128 + signal.SIGTERM:
        return f"the run was killed by {signal.Signals(-code if code < 0 else code - 128).name}"
    return errors[-1].strip() if errors else f"the run ended with exit status {code}"


def _stop_in_time(process: subprocess.Popen[str], stop: threading.Event, watch: _Watch) -> None:
    """End a worker when that is asked for, or when it has been silent for too long."""
    while process.poll() is None:
        if stop.wait(0.2):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            return
        if time.monotonic() > watch.deadline:
            watch.expired = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return


def _publish(job: Job) -> str | None:
    """Give an executed notebook its final name if it is complete; else say what it lacks."""
    notebook = json.loads(job.partial.read_text(encoding="utf-8"))
    _clean(notebook)
    try:
        record = finish(notebook)
    except IncompleteRun as error:
        return str(error)
    if record.slug != job.paper.slug or record.parameters != dict(job.parameters):
        return f"the record belongs to another run: {record.slug} with {record.parameters}"
    paths.write_atomically(job.target, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    job.partial.unlink()
    return None


def _clean(notebook: dict[str, Any]) -> None:
    """Take out what papermill and the kernel note about this machine."""
    notebook["metadata"].pop("papermill", None)
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell["metadata"].pop(key, None)
        for output in cell.get("outputs", []):
            if "text/plain" in output.get("data", {}):
                # A styled table, as text, is the address of an object.
                lines = output["data"]["text/plain"]
                output["data"]["text/plain"] = re.sub(r" at 0x[0-9a-f]{6,}", "", "".join(lines)).splitlines(
                    keepends=True
                )
        if cell["metadata"].get("tags") == []:
            cell["metadata"].pop("tags")


def _mark_incomplete(partial: Path, cause: str) -> None:
    """Keep what there is of a failed run, and say in it that it is incomplete."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        notebook = json.loads(partial.read_text(encoding="utf-8"))
        notebook["metadata"]["leantrain"] = {"complete": False, "cause": cause}
        paths.write_atomically(partial, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
