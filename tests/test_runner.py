"""The runner under faults: what counts as done, what is kept, what is said."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import papermill
import pytest
from filelock import FileLock

from leantrain import records, runner
from leantrain.catalog import load_catalog
from leantrain.parameters import ParameterError

KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def job(**changes):
    made = runner.plan(load_catalog().paper("toy"), "book", changes.pop("given", None))
    return dataclasses.replace(made, **changes)


def run(*jobs, **options):
    return runner.run_jobs(list(jobs) or [job()], **options)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_complete_run_lands_with_its_record_and_is_not_repeated(house):
    seen = []
    (outcome,) = run(progress=lambda *step: seen.append(step))
    assert (outcome.status, outcome.cause) == ("done", "")
    assert (seen[0][1], seen[-1][1]) == ("started", "finished")
    assert [fields["index"] for _, event, fields in seen if event == "cell"] == [2, 3, 4, 5, 6, 7]
    record = records.read_record(house.chapter)
    assert record.parameters == {"profile": "book", "seeds": [0, 1, 2], "answer": 42.0, "dry_run": False}
    toy = load_catalog().paper("toy")
    assert str(toy.claims[0].decide(record.measurements["toy.answer"])) == "reproduced"
    text = house.chapter.read_text()
    assert str(house.root) not in text
    assert "papermill" not in json.loads(text)["metadata"]
    assert "lt-badge--reproduced" in str(json.loads(text)["cells"][3]["outputs"]), "the card shows the verdict"
    assert not house.partial.exists()

    before = house.chapter.stat().st_mtime_ns
    assert run()[0].status == "fresh"
    assert house.chapter.stat().st_mtime_ns == before

    source = house.root / "notebooks/toy.ipynb"
    source.write_text(source.read_text().replace("# Toy", "# A better title"))
    assert run()[0].status == "fresh", "prose alone makes nothing stale"
    assert "# A better title" in house.chapter.read_text()
    assert "injected-parameters" in house.chapter.read_text()
    assert records.read_record(house.chapter) == record

    assert run(force=True)[0].status == "done"
    assert house.chapter.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ("1/0", r"ZeroDivisionError: division by zero \(in the cell that begins '1/0'\)"),
        (KILL, "the kernel died"),
        ("import sys\nsys.exit(0)", "code cell 4 .* did not run|SystemExit"),
    ],
    ids=["exception", "killed", "exit"],
)
def test_a_failed_run_says_why_and_keeps_what_there_is(executed, cell, cause):
    old = executed.chapter.read_text()
    executed.write_notebook(cell)
    (outcome,) = run()
    assert outcome.status == "failed"
    assert re.search(cause, outcome.cause), outcome.cause
    stamp = json.loads(executed.partial.read_text())["metadata"]["leantrain"]
    assert stamp == {"complete": False, "cause": outcome.cause}
    with pytest.raises(records.IncompleteRun):
        records.read_record(executed.partial)
    assert executed.chapter.read_text() == old


def test_a_cell_that_takes_too_long_is_stopped(house):
    house.write_notebook("import time\ntime.sleep(60)")
    started = time.monotonic()
    (outcome,) = run(job(cell_timeout=2))
    assert "longer than the limit of 2 s" in outcome.cause
    assert time.monotonic() - started < 40


def test_other_chapters_go_on_after_a_failure(house):
    house.write_notebook("1/0")
    good = job(given={"answer": 41.0})
    source = house.root / "notebooks" / "good.ipynb"
    bad = job()
    source.write_text(bad.source.read_text().replace("1/0", "1/1"))
    paper = good.paper.model_copy(update={"short": "Good"})
    good = dataclasses.replace(good, paper=paper, source=source, profile="book-custom")
    first, second = run(bad, good)
    assert (first.status, second.status) == ("failed", "done")
    assert second.job.target.exists()


def test_an_unknown_kernel_is_named_before_anything_is_written(house):
    (outcome,) = run(job(kernel="no-such-kernel"))
    assert "no Jupyter kernel is named 'no-such-kernel'" in outcome.cause
    assert not house.partial.exists()


def test_a_target_that_cannot_be_written_fails_cleanly(house):
    (house.root / "file").write_text("")
    (outcome,) = run(job(target=house.root / "file" / "toy.ipynb"))
    assert outcome.status == "failed"
    assert "cannot write" in outcome.cause
    assert house.partial.exists(), "the executed notebook is kept"


def test_a_second_run_of_the_same_chapter_is_refused(house):
    house.partial.parent.mkdir(parents=True)
    with FileLock(house.partial.with_suffix(".lock")):
        (outcome,) = run()
    assert (outcome.status, outcome.cause) == ("failed", "another run of toy at book is under way")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_stopped_runner(house, number):
    pid = house.root / "pid"
    house.write_notebook(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)")
    command = [sys.executable, "-m", "leantrain.cli", "run", "toy", "--profile", "book"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: pid.exists() and pid.read_text())
    kernel = int(pid.read_text())
    assert alive(kernel)
    process.send_signal(number)
    code = process.wait(30)
    wait_for(lambda: not alive(kernel), 20)
    assert not house.chapter.exists()
    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert "interrupted" in process.stderr.read()
        assert json.loads(house.partial.read_text())["metadata"]["leantrain"]["complete"] is False
    house.write_notebook()
    assert run()[0].status == "done", "the next run is not in the way of the stopped one"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sedes": [1]}, "unknown parameter 'sedes'"),
        ({"seeds": ["a"]}, "expected list"),
        ({"answer": 1e9}, "from 0 to 100"),
    ],
)
def test_plain_papermill_refuses_faulty_parameters_before_anything_runs(house, given, says):
    marker = house.root / "ran"
    house.write_notebook(f"open({str(marker)!r}, 'w')")
    output = house.root / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=says):
        papermill.execute_notebook(
            house.root / "notebooks/toy.ipynb", output, parameters=given, progress_bar=False, cwd=house.root
        )
    assert not marker.exists()


def test_a_plan_checks_before_it_runs(house):
    catalog = load_catalog()
    with pytest.raises(ValueError, match="has no chapter yet"):
        runner.plan(catalog.paper("other"), "quick")
    with pytest.raises(ParameterError, match="unknown parameter 'x'"):
        runner.plan(catalog.paper("toy"), "quick", {"x": 1})
    with pytest.raises(ValueError, match="--store keeps the reference outputs"):
        runner.plan(catalog.paper("toy"), "book", store=True)
    (house.root / "notebooks/profiles/book/toy.yml").write_text("seeds: [0]\nprofile: paper\n")
    with pytest.raises(ParameterError, match="sets profile to 'paper'"):
        runner.plan(catalog.paper("toy"), "book")
    with pytest.raises(ValueError, match="at least one job"):
        runner.run_jobs([], parallel=0)


def test_runs_with_other_parameters_never_take_the_published_place(house):
    toy = load_catalog().paper("toy")
    assert runner.plan(toy, "book").target == house.chapter
    for given in ({"answer": 1.0}, {"dry_run": True}):
        assert house.chapter != runner.plan(toy, "book", given).target
