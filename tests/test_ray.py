"""Runs on a Ray cluster of two nodes, both on this machine: the same records, whatever is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from leantrain import paths, ray_engine, records, runner
from leantrain.catalog import load_catalog
from leantrain.cli import main
from leantrain.parameters import ParameterError, Resources, read_profile, read_resources

ray = pytest.importorskip("ray")
LIBRARY = Path(ray_engine.__file__).parents[1]

#: Faster than Ray's own patience with a node that answers no more, slow enough for a busy machine.
HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster():
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import the tests' own tasks
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(LIBRARY))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": HEALTH}
    )
    patch.setenv("RAY_ADDRESS", made.address)
    made.add_node(num_cpus=2, num_gpus=1)  # as far as Ray knows: nothing here computes on it
    yield made
    made.shutdown()
    patch.undo()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def joined(house, cluster):
    """The small project, and this process as a caller of the cluster."""
    with ray_engine.connected():
        yield house


def job(**changes):
    made = runner.plan(load_catalog().paper("toy"), "book", changes.pop("given", None))
    return dataclasses.replace(made, **changes)


def run(*jobs, task=ray_engine.run_chapter, spec=ray_engine.spec_of, patience=30.0, **options):
    engine = ray_engine.RayEngine(patience, task, spec)
    return runner.run_jobs(list(jobs) or [job()], execute=engine.execute, **options)


def ask(house, resources):
    """Let the profile file say what a run needs."""
    (house.root / "notebooks/profiles/book/toy.yml").write_text(
        f"profile: book\nseeds: [0, 1, 2]\nresources: {resources}\n"
    )


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def ancestors(pid):
    """Command lines of a process and of those that it descends from, by their ids."""
    found = {}
    while pid > 1:
        found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def lasting(record):
    """A record without what differs between two runs on one machine."""
    fields = record.model_dump()
    for name in ("started", "wall_s", "threads"):
        del fields["provenance"][name]
    return fields


def content(path):
    """An executed notebook without the times of its run."""
    cells = json.loads(path.read_text())["cells"]
    return [(c["cell_type"], c["source"], c.get("execution_count"), c["metadata"]) for c in cells]


def once(marker, then):
    """A cell that leaves its process id and waits in the first run, and does nothing in the next."""
    return (
        "import os, time\nfrom pathlib import Path\n"
        f"first = not Path({str(marker)!r}).exists()\n"
        f"Path({str(marker)!r}).open('a').write(f'{{os.getpid()}}\\n')\n"
        f"if first:\n    {then}"
    )


def pids(marker):
    return [int(line) for line in marker.read_text().splitlines()] if marker.exists() else []


def test_a_run_on_the_cluster_leaves_the_record_of_a_local_run(joined):
    (here,) = runner.run_jobs([job()])
    assert here.ok, here.cause
    record, cells = records.read_record(joined.chapter), content(joined.chapter)
    joined.chapter.unlink()
    seen = []
    (there,) = run(progress=lambda *step: seen.append(step))
    assert (there.status, there.cause) == ("done", "")
    assert lasting(records.read_record(joined.chapter)) == lasting(record)
    assert content(joined.chapter) == cells
    assert [fields["index"] for _, event, fields in seen if event == "cell"] == [2, 3, 4, 5, 6, 7]
    text = joined.chapter.read_text()
    assert str(joined.root) not in text
    assert "leantrain-" not in text
    assert not joined.partial.exists()
    assert run()[0].status == "fresh"


def test_a_run_that_fails_by_itself_is_not_repeated(joined):
    marker = joined.root / "runs"
    joined.write_notebook(f"open({str(marker)!r}, 'a').write('x')\n1/0")
    (outcome,) = run()
    assert outcome.status == "failed"
    assert "ZeroDivisionError" in outcome.cause
    assert marker.read_text() == "x"
    assert json.loads(joined.partial.read_text())["metadata"]["leantrain"]["complete"] is False
    assert not joined.chapter.exists()


def test_a_worker_that_is_killed_is_survived_with_the_same_result(joined):
    assert runner.run_jobs([job()])[0].ok
    expected = records.read_record(joined.chapter).measurements
    joined.chapter.unlink()
    marker = joined.root / "runs"
    joined.write_notebook(once(marker, "time.sleep(600)"))

    def kill():
        wait_for(lambda: pids(marker))
        worker = next(pid for pid, command in ancestors(pids(marker)[0]).items() if command.startswith("ray::"))
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    seen = []
    (outcome,) = run(progress=lambda *step: seen.append(step))
    killer.join()
    assert (outcome.status, outcome.cause) == ("done", "")
    retried = [fields for _, event, fields in seen if event == "retried"]
    assert retried == [{"cause": "its worker died", "attempt": 1, "limit": ray_engine.RETRIES}]
    record = records.read_record(joined.chapter)
    assert (record.measurements, record.parameters["seeds"]) == (expected, [0, 1, 2])
    first, second = pids(marker)
    wait_for(lambda: not alive(first), 30)
    assert first != second


def test_a_node_that_is_lost_is_survived_with_the_same_result(joined, cluster):
    extra = cluster.add_node(num_cpus=4)
    marker = joined.root / "runs"
    joined.write_notebook(once(marker, "time.sleep(600)"))
    ask(joined, "{cpus: 4}")
    seen = []
    # Ray sets signal handlers when it starts a node, so the run goes into the other thread.
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(run, progress=lambda *step: seen.append(step), patience=120)
        wait_for(lambda: pids(marker))
        cluster.remove_node(extra, allow_graceful=False)
        replaced = cluster.add_node(num_cpus=4)
        (outcome,) = ran.result()
    cluster.remove_node(replaced)
    assert (outcome.status, outcome.cause) == ("done", "")
    retried = [fields for _, event, fields in seen if event == "retried"]
    assert retried == [{"cause": "its node was lost", "attempt": 1, "limit": ray_engine.RETRIES}]
    assert records.read_record(joined.chapter).measurements["toy.answer"]["main"].value == 42.0
    wait_for(lambda: not alive(pids(marker)[0]), 30)


def crash(spec):
    """A task whose worker dies in every run."""
    with open(spec.parameters["path"], "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    yield "end", {}


def test_a_run_that_kills_every_worker_is_given_up(joined):
    marker = joined.root / "runs"
    (outcome,) = run(job(parameters={"path": str(marker)}), task=crash)
    assert outcome.status == "failed"
    assert outcome.cause == "it was started 4 times, and lost every time; at last, its worker died"
    assert len(marker.read_text()) == ray_engine.RETRIES + 1


def test_a_node_with_another_tree_refuses(joined, monkeypatch):
    real = ray_engine._tree

    def other(paper):
        return real(paper) | {"module leantrain.experiment": "0" * 16, "the commit": "1" * 40}

    monkeypatch.setattr(ray_engine, "_tree", other)
    (outcome,) = run()
    assert outcome.status == "failed"
    assert "another tree than the caller (module leantrain.experiment): give every node the same" in outcome.cause


def test_trees_are_compared_by_content_and_by_commit_where_it_is_known():
    tree = {"the commit": "a", "module m": "1"}
    assert ray_engine._differences(tree, tree) == []
    assert ray_engine._differences(tree, tree | {"the commit": None}) == []
    assert ray_engine._differences(tree | {"the commit": None}, tree) == []
    assert ray_engine._differences(tree, tree | {"the commit": "b"}) == ["the commit"]
    assert ray_engine._differences(tree, {"the commit": "a", "module n": "1"}) == ["module m", "module n"]


def look(spec):
    """A task that tells what it was given."""
    given = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "LEANTRAIN_ROOT")}
    given["cpus"] = ray.get_runtime_context().get_assigned_resources()["CPU"]
    yield "end", {"cause": json.dumps(given), "notebook": None}


@pytest.mark.parametrize(
    ("asked", "missing"), [("{cpus: 64}", "64 CPUs and 0 GPUs"), ("{gpus: 2}", "2 CPUs and 2 GPUs")]
)
def test_a_run_that_no_node_has_room_for_is_told_so(joined, asked, missing):
    ask(joined, asked)
    started = time.monotonic()
    (outcome,) = run(patience=1)
    assert outcome.status == "failed"
    assert f"needs {missing}, and no node of the cluster has them (the largest have 2 CPUs and 1 GPUs" in outcome.cause
    assert time.monotonic() - started < 30


def test_a_run_gets_what_its_profile_file_asks_for(joined):
    ask(joined, "{cpus: 1, gpus: 1}")
    assert ray_engine.needs_of(job()) == Resources(1, 1)
    given = json.loads(run(task=look)[0].cause)
    assert given == {"CUDA_VISIBLE_DEVICES": "0", "LEANTRAIN_ROOT": str(joined.root), "cpus": 1}
    toy = load_catalog().paper("toy")
    assert ray_engine.needs_of(runner.plan(toy, "quick")) == Resources(2, 0)
    assert ray_engine.needs_of(runner.plan(toy, "paper")) == Resources(8, 1)
    assert ray_engine.needs_of(runner.plan(toy, "paper", {"dry_run": True})) == Resources(2, 0)
    ask(joined, "{cpus: 1}")
    seen = ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1")
    joined.write_notebook(
        "import os\n" + "\n".join(f"assert os.environ[{name!r}] == {value!r}" for name, value in seen)
    )
    (outcome,) = run()
    assert (outcome.status, outcome.cause) == ("done", "")


def overlap(spec):
    """A task that notes when it begins and ends."""
    with open(spec.parameters["path"], "a") as file:
        file.write("+")
    time.sleep(1)
    with open(spec.parameters["path"], "a") as file:
        file.write("-")
    yield "end", {"cause": "it is a trial", "notebook": None}


def bare(cpus):
    """What a task of the tests is called with: the job's source as it stands, and so many CPUs."""

    def spec(job):
        source = job.source.read_text()
        return ray_engine.Spec(job.paper.slug, "book", job.parameters, source, "python3", 60, Resources(cpus, 0), {})

    return spec


def many(count, **changes):
    """Jobs of as many papers."""
    toy = load_catalog().paper("toy")
    base = runner.plan(toy, "book")
    for number in range(count):
        slug = f"toy-{number}"
        target = paths.BUILD / "runs" / f"{slug}.ipynb"
        paper = toy.model_copy(update={"slug": slug})
        yield dataclasses.replace(base, paper=paper, target=target, **changes)


def test_no_more_runs_go_on_than_the_cluster_has_processors_for(joined):
    marker = joined.root / "runs"
    outcomes = run(*many(6, parameters={"path": str(marker)}), task=overlap, spec=bare(2), parallel=6)
    assert [o.cause for o in outcomes] == ["it is a trial"] * 6
    depths, depth = [], 0
    for sign in marker.read_text():
        depth += 1 if sign == "+" else -1
        depths.append(depth)
    assert max(depths) == 2, "two nodes of two processors each"


def nothing(spec):
    """A no-op run: the notebook that came with it was executed before, for another slug."""
    yield "end", {"cause": None, "notebook": spec.source.replace('"toy"', f'"{spec.slug}"').encode()}


def test_a_long_queue_needs_little_memory(executed, cluster):
    """Some hundred runs here; benchmarks/ray_throughput.py queues ten thousand."""
    options = {"task": nothing, "spec": bare(1), "parallel": 6, "force": True}
    under_way, most = set(), [0]

    def watch(slug, event, fields):
        (under_way.add if event == "started" else under_way.discard)(slug)
        most.append(len(under_way))

    with ray_engine.connected():
        assert all(o.ok for o in run(*many(50, source=executed.chapter), **options))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = run(*many(400, source=executed.chapter), **options, progress=watch)
    assert {(o.status, o.cause) for o in outcomes} == {("done", "")}
    assert max(most) <= 6
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 30, f"{grown:.0f} MiB more for four hundred runs"
    assert records.read_record(paths.BUILD / "runs" / "toy-399.ipynb").slug == "toy-399"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_stopped_caller(house, cluster, number):
    marker = house.root / "runs"
    house.write_notebook(once(marker, "time.sleep(600)"))
    command = [sys.executable, "-m", "leantrain.cli", "run", "toy", "--profile", "book", "--engine", "ray"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: pids(marker))
    process.send_signal(number)
    code = process.wait(60)
    wait_for(lambda: not alive(pids(marker)[0]), 60)
    assert not house.chapter.exists()
    if number == signal.SIGINT:
        assert code == 130
        assert "toy: stopped: interrupted" in process.stderr.read()


def test_the_command_runs_on_the_cluster(house, cluster):
    result = CliRunner().invoke(main, ["run", "toy", "--profile", "book", "--engine", "ray"])
    assert result.exit_code == 0, result.output
    assert "reproduced" in result.output
    assert house.chapter.exists()


@pytest.mark.parametrize(
    ("resources", "address", "says"),
    [
        ("{cpus: 0}", "", "expected cpus (1 to 1024)"),
        ("{}", "127.0.0.1:1", "no Ray cluster could be joined (nothing answers at 127.0.0.1:1)"),
        ("{}", "somewhere", "no Ray cluster could be joined (RAY_ADDRESS is 'somewhere', not HOST:PORT)"),
    ],
)
def test_a_call_that_cannot_work_is_one_clear_error(house, monkeypatch, resources, address, says):
    ask(house, resources)
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = CliRunner().invoke(main, ["run", "toy", "--profile", "book", "--engine", "ray"])
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output
    assert not house.partial.exists()


def test_without_ray_the_command_says_how_to_get_it(house, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["run", "toy", "--engine", "ray"])
    assert result.exit_code == 1
    assert "needs Ray, which is not installed: run `pip install -e '.[ray]'`" in result.output


def test_resources_are_no_parameter_and_are_checked(tmp_path):
    path = tmp_path / "p.yml"
    path.write_text("epochs: 3\nresources: {cpus: 16, gpus: 4}\n")
    assert read_profile(path) == {"epochs": 3}
    assert read_resources(path, Resources()) == Resources(16, 4)
    path.write_text("resources: {gpus: 1}")
    assert read_resources(path, Resources(8, 0)) == Resources(8, 1)
    for faulty in ("{cpus: 1.5}", "{cpu: 1}", "[1]", "{gpus: -1}", "{gpus: true}", "null"):
        path.write_text(f"resources: {faulty}")
        with pytest.raises(ParameterError, match="expected cpus"):
            read_resources(path, Resources())


def test_plain_papermill_passes_a_profile_with_resources(house):
    import papermill

    given = {"resources": {"cpus": 1}, "answer": 41.0}
    output = house.root / "out.ipynb"
    papermill.execute_notebook(
        house.root / "notebooks/toy.ipynb", output, parameters=given, progress_bar=False, cwd=house.root
    )
    assert '"answer": 41.0' in output.read_text()
