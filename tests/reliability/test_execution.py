"""Runs under fire: nothing is lost, nothing is done twice, nothing outlives its run, and the cause is exact.

Faults are injected for real: processes are killed, disks are full, runs are started twice.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import pytest

from leantrain import paths, records, runner
from leantrain.catalog import load_catalog

KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
SLEEP = "import time\ntime.sleep(600)"
#: A process in a session of its own, which neither the kernel's end nor that of its process group reaches.
SPAWN = """\
import os, subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
open(os.environ["LEDGER"], "w").write(str(child.pid))"""

TRAINING = """\
import os

import lightning as L


class Points:
    fingerprint = "points"
    checksums = {}

    def set_seed(self, seed):
        pass


class Entry(L.LightningModule):
    def __init__(self, seed):
        self.seed = seed

    def epoch(self):
        with open(os.environ["LEDGER"], "a") as ledger:
            ledger.write(f"{chapter.paper.slug} {self.seed}\\n")
        return {"score": self.seed / 2}


def build(seed):
    return Entry(seed)


frame = chapter.experiment({"arm": build}, Points(), epochs=1).run(progress=False)"""


def quick(**changes):
    return dataclasses.replace(runner.plan(load_catalog().paper("toy"), "quick"), **changes)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        ("1/0", r"ZeroDivisionError: division by zero \(in the cell that begins '1/0'\)"),
        (KILL, r"the kernel died: out of memory, or killed \(in the cell that begins 'import os, signal'\)"),
        (SLEEP, r"a cell ran longer than the limit of 5 s \(in the cell that begins 'import time'\)"),
        ("done = True", "the notebook holds 0 records"),
    ],
    ids=["exception", "killed", "timeout", "end"],
)
def test_what_a_run_started_ends_with_it(workshop, ending, cause):
    workshop.bare(SPAWN, ending)
    (outcome,) = runner.run_jobs([quick(cell_timeout=5)])
    assert re.search(cause, outcome.cause), outcome.cause
    assert not workshop.runs(int(workshop.ledger.read_text()))
    assert workshop.processes() == []
    left = sorted(path.name for path in quick().partial.parent.iterdir())
    assert set(left) <= {"toy.ipynb", "toy.lock"}, "connection files and settings of the kernel are gone"


def test_what_a_killed_runner_left_behind_ends_with_the_next_run(workshop):
    workshop.bare(SPAWN, SLEEP)
    process = workshop.start("run", "toy", stdout=subprocess.DEVNULL)
    workshop.wait_for(lambda: workshop.ledger.exists() and workshop.ledger.read_text())
    child = int(workshop.ledger.read_text())
    process.kill()
    process.wait()
    workshop.wait_for(lambda: [p.pid for p in workshop.processes()] == [child], 30)
    workshop.bare("done = True")
    runner.run_jobs([quick()])
    assert not workshop.runs(child)


def test_a_worker_that_is_killed_is_named_and_its_kernel_goes_too(workshop):
    ledger = "import os\nopen(os.environ['LEDGER'], 'w').write(str(os.getppid()))"
    workshop.bare(ledger, "import time\nos.kill(os.getppid(), 9)\ntime.sleep(600)")
    (outcome,) = runner.run_jobs([quick()])
    assert (outcome.status, outcome.cause) == ("failed", "the run was killed by SIGKILL")
    assert workshop.processes() == []


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a Jupyter kernel of a name that starts with these words."""

    def install(name, *words):
        folder = tmp_path / "jupyter" / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": [*words, "-f", "{connection_file}"], "display_name": name, "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    return install


@pytest.mark.parametrize("failures", [2, 3])
def test_a_kernel_that_does_not_come_up_is_started_again_twice(workshop, install, failures):
    flaky = f"""\
import os, runpy, sys
with open(os.environ["LEDGER"], "a+") as ledger:
    ledger.write("start\\n")
    ledger.seek(0)
    if len(ledger.readlines()) <= {failures}:
        sys.exit(1)
runpy.run_module("ipykernel_launcher", run_name="__main__")"""
    install("flaky", sys.executable, "-c", flaky)
    workshop.bare("done = True")
    seen = []
    (outcome,) = runner.run_jobs([quick(kernel="flaky")], progress=lambda *event: seen.append(event))
    cause = "the kernel did not start: Kernel died before replying to kernel_info"
    retried = [fields for _, event, fields in seen if event == "retried"]
    assert retried == [{"cause": cause, "attempt": attempt, "limit": 2} for attempt in (1, 2)]
    expected = "the notebook holds 0 records" if failures == 2 else r"the kernel did not start: .* \(tried 3 times\); "
    assert re.search(expected, outcome.cause), outcome.cause
    assert workshop.ledger.read_text().count("start") == 3
    assert workshop.processes() == []


#: Starts of a kernel, of which the first goes wrong in a way of its own.
ONCE = """\
import os, runpy, signal, time
if not os.path.exists(os.environ["LEDGER"]):
    open(os.environ["LEDGER"], "w").close()
    {fault}
runpy.run_module("ipykernel_launcher", run_name="__main__")"""


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", "Kernel didn't respond in 8 seconds"),
        ("os.kill(os.getppid(), signal.SIGSTOP); time.sleep(600)", "the run stood still for 16 s"),
    ],
    ids=["kernel", "worker"],
)
def test_a_start_that_hangs_is_broken_off_and_made_again(workshop, install, monkeypatch, fault, cause):
    monkeypatch.setattr(runner, "START_TIMEOUT", 8)
    install("hanging", sys.executable, "-c", ONCE.format(fault=fault))
    workshop.bare("done = True")
    seen = []
    (outcome,) = runner.run_jobs([quick(kernel="hanging")], progress=lambda *event: seen.append(event))
    assert "the notebook holds 0 records" in outcome.cause
    retried = [fields["cause"] for _, event, fields in seen if event == "retried"]
    assert retried[0] == f"the kernel did not start: {cause}"
    assert workshop.processes() == []


def test_a_run_that_stands_still_in_a_cell_is_broken_off(workshop, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 3)
    workshop.bare("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)")
    (outcome,) = runner.run_jobs([quick(cell_timeout=2)])
    assert (outcome.status, outcome.cause) == ("failed", "the run stood still for 5 s")
    assert workshop.processes() == []


@pytest.mark.parametrize(("ending", "status"), [("done = True", "done"), ("1/0", "failed")])
def test_a_run_that_stands_still_after_its_last_cell_loses_nothing(house, workshop, monkeypatch, ending, status):
    monkeypatch.setattr(runner, "GRACE", 3)
    house.write_notebook(
        f"import atexit, os, signal\natexit.register(lambda: os.kill(os.getppid(), signal.SIGSTOP))\n{ending}"
    )
    (outcome,) = runner.run_jobs([quick()])
    assert outcome.status == status, outcome.cause
    assert ("ZeroDivisionError" in outcome.cause) == (status == "failed")
    assert workshop.processes() == []


@pytest.mark.parametrize("length", [0, 150])
def test_a_kernel_is_reached_through_files_of_the_run_alone(workshop, tmp_path, monkeypatch, length):
    """No ports are given out in advance: two kernels that start at once could get the same."""
    if length:
        folder = tmp_path / ("x" * length)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
    workshop.bare(
        "import json, os\nfrom ipykernel.connect import get_connection_file\n"
        "connection = json.load(open(get_connection_file()))\n"
        "folder, place = os.path.split(connection['ip'])\n"
        "assert (connection['transport'], folder) == ('ipc', os.environ['JUPYTER_RUNTIME_DIR'])\n"
        "assert sum(name.startswith(place) for name in os.listdir(folder)) == 5\n"
        "assert os.stat(folder).st_mode & 0o777 == 0o700\n"
        "open(os.environ['LEDGER'], 'w').write(folder)"
    )
    (outcome,) = runner.run_jobs([quick()])
    assert "the notebook holds 0 records" in outcome.cause
    assert not os.path.exists(workshop.ledger.read_text())


def test_a_kernel_whose_program_is_gone_is_named(workshop, install):
    install("orphan", "/no/such/python")
    workshop.bare("done = True")
    (outcome,) = runner.run_jobs([quick(kernel="orphan")])
    assert "the kernel 'orphan' needs /no/such/python, which cannot be started; `make env`" in outcome.cause


def test_signals_at_random_moments_leave_the_old_result_and_no_process(executed, workshop):
    executed.write_notebook("import time\ntime.sleep(1)")
    old = executed.chapter.read_text()
    moments = random.Random(0)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = workshop.start("run", "toy", "--profile", "book", stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 6))
        process.send_signal(number)
        process.wait(60)
        workshop.wait_for(lambda: not workshop.processes(), 30)
        if executed.chapter.read_text() != old:
            records.read_record(executed.chapter)  # the signal came too late: then the new result is whole
    (outcome,) = runner.run_jobs([runner.plan(load_catalog().paper("toy"), "book")])
    assert outcome.ok, outcome.cause
    hidden = [p.name for p in executed.chapter.parent.iterdir() if p.name != "toy.ipynb"]
    assert hidden == []


def test_a_library_file_that_is_being_edited_fails_the_run_by_name(executed):
    (executed.root / "lib" / "leantrain" / "experiment.py").write_text("def (")
    (outcome,) = runner.run_jobs([runner.plan(load_catalog().paper("toy"), "book")])
    assert outcome.status == "failed"
    assert "SyntaxError" in outcome.cause


# ---------------------------------------------------------------- two at once, and many


def test_of_two_runs_of_one_chapter_one_refuses(workshop):
    go = workshop.ledger.with_name("go")
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists():\n    time.sleep(0.1)"
    workshop.house.write_notebook(TRAINING, wait)
    first = workshop.start("run", "toy")
    workshop.wait_for(workshop.ledger.exists)
    second = workshop.start("run", "toy")
    said = second.communicate(timeout=120)[0]
    go.touch()
    assert second.returncode == 1
    assert "another run of toy at quick is under way" in said
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0, said
    assert Counter(workshop.ledger.read_text().splitlines()) == {"toy 0": 1, "toy 1": 1}
    assert records.read_record(workshop.root / "_build/runs/quick/toy.ipynb").provenance.runs == 2


@pytest.mark.slow
def test_thirty_two_runs_start_at_once_with_one_thread_each(workshop, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    note = "import os\nopen(os.environ['LEDGER'], 'a').write(os.environ['OMP_NUM_THREADS'] + '\\n')"
    workshop.bare(note)
    slugs = workshop.multiply(32)
    catalog = load_catalog()
    outcomes = runner.run_jobs([runner.plan(catalog.paper(slug), "quick") for slug in slugs], parallel=32)
    assert {outcome.cause for outcome in outcomes} == {"the notebook holds 0 records; its verdict cell makes one"}
    threads = str(max(1, (os.cpu_count() or 1) // 32))
    assert workshop.ledger.read_text().split() == [threads] * 32
    assert workshop.processes() == []


@pytest.mark.slow
def test_twenty_three_chapters_with_five_seeds_survive_two_deaths_of_the_runner(workshop):
    source = workshop.house.write_notebook(TRAINING)
    source.write_text(source.read_text().replace("= [0, 1] ", "= [0, 1, 2, 3, 4] "))
    slugs = workshop.multiply(23)
    done, kept = workshop.root / "_build" / "runs" / "quick", workshop.root / "_build" / "experiments"
    finished: dict[str, int] = {}
    for chapters in (5, 13):
        process = workshop.start("run", "--all", "--jobs", "2", stdout=subprocess.DEVNULL)
        workshop.wait_for(lambda count=chapters: len(list(done.glob("*.ipynb"))) >= count, 300)
        process.kill()
        process.wait()
        for result in done.glob("*.ipynb"):
            records.read_record(result)
        finished |= {str(file): file.stat().st_mtime_ns for file in (*done.glob("*.ipynb"), *kept.rglob("*.json"))}
    last = workshop.start("run", "--all", "--jobs", "2")
    said = last.communicate(timeout=600)[0]
    assert last.returncode == 0, said

    found = {slug: records.read_record(done / f"{slug}.ipynb") for slug in slugs}
    assert sorted(path.stem for path in done.glob("*.ipynb")) == slugs
    assert {(record.slug, record.provenance.runs) for record in found.values()} == {(slug, 5) for slug in slugs}
    trained = [json.loads(file.read_text()) for file in kept.rglob("*.json")]
    assert len(trained) == 23 * 5, "one file for each chapter and seed, none twice"
    # What was finished before a death was kept, not made again; only what the two deaths broke off was trained anew.
    assert all(os.stat(file).st_mtime_ns == then for file, then in finished.items())
    ledger = Counter(workshop.ledger.read_text().splitlines())
    assert set(ledger) == {f"{slug} {seed}" for slug in slugs for seed in range(5)}
    assert ledger.total() <= 23 * 5 + 2 * 2
    assert workshop.processes() == []


# ---------------------------------------------------------------- disks


def test_a_disk_that_is_full_is_named_and_the_old_result_stands(executed, workshop):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk; the next test limits the size of files instead")
    executed.write_notebook("print('x' * 2_000_000)")
    old = executed.chapter.read_text()
    (executed.root / "_build").mkdir(exist_ok=True)
    run = shlex.join([sys.executable, "-m", "leantrain.cli", "run", "toy", "--profile", "book"])
    script = f"mount -t tmpfs -o size=1M none {shlex.quote(str(executed.root / '_build'))} && exec {run}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=executed.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr, done.stderr
    assert executed.chapter.read_text() == old
    assert workshop.processes() == []


def test_a_file_that_may_not_grow_is_named_and_the_old_result_stands(executed, workshop):
    executed.write_notebook("print('x' * 2_000_000)")
    old = executed.chapter.read_text()
    process = workshop.start(
        "run", "toy", "--profile", "book", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    )
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "cannot write the notebook: File too large" in said, said
    assert executed.chapter.read_text() == old


def test_a_build_folder_that_is_none_fails_cleanly(house):
    (house.root / "_build").write_text("")
    (outcome,) = runner.run_jobs([quick()])
    assert outcome.status == "failed"
    assert "cannot write" in outcome.cause


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_that_is_being_replaced_is_whole_at_every_moment(tmp_path):
    target = tmp_path / "target"
    paths.write_atomically(target, json.dumps([0] * 200_000))
    moments = random.Random(0)
    seen = set()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for number in range(10_000):
                    paths.write_atomically(target, json.dumps([number] * 200_000))
            os._exit(0)
        time.sleep(moments.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = json.loads(target.read_text())
        assert len(content) == 200_000
        assert len(set(content)) == 1
        seen.add(content[0])
    assert len(seen) > 1, "the writers did write"


# ---------------------------------------------------------------- clocks


def test_durations_come_from_a_clock_that_does_not_jump():
    """The wall clock may be set back while a chapter runs; it is read for the date alone, which is in UTC."""
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "time.localtime"}
    for path in sorted((paths.ROOT / "lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ".".join(ast.unparse(node.func).split(".")[-2:])
                dated = name == "datetime.now" and [ast.unparse(a) for a in node.args] == ["datetime.UTC"]
                assert name not in wall or dated, f"{path.name}: {ast.unparse(node)}"


# ---------------------------------------------------------------- folders


def test_a_project_with_an_odd_name_reached_through_the_home_sign(workshop, tmp_path, monkeypatch):
    odd = tmp_path / "less – für {alle} & 'andere' %s"
    shutil.copytree(workshop.root, odd)
    environment = {**os.environ, "HOME": str(tmp_path), "LEANTRAIN_ROOT": f"~/{odd.name}"}
    process = workshop.start("run", "toy", cwd=tmp_path, env=environment)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert records.read_record(odd / "_build/runs/quick/toy.ipynb").slug == "toy"
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {odd.name, "house", "stand-ins"}
    assert not (workshop.root / "_build").exists()
