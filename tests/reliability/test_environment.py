"""Poor machines and strange ones: no home, one processor, little memory, an older processor, no network."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from leantrain import records

GIB = 2**30


def one_slow_core():
    """One processor and 4 GiB of memory."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))


@pytest.mark.parametrize("home", [{}, {"HOME": "/dev/null/none"}], ids=["no home", "a home that is none"])
def test_a_chapter_runs_without_a_home_on_one_core_with_little_memory_into_another_folder(workshop, home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LEANTRAIN_ROOT", "LEDGER")}
    environment = {**kept, **home, "LEANTRAIN_BUILD": str(elsewhere)}
    process = workshop.start("run", "toy", env=environment, preexec_fn=one_slow_core)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    notebook = elsewhere / "runs" / "quick" / "toy.ipynb"
    assert records.read_record(notebook).provenance.accelerator is None
    cells = json.loads(notebook.read_text())["cells"]
    noise = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "stream"]
    assert noise == [], "no library complains in the chapter"
    assert not (workshop.root / "_build").exists()


#: Everything that a program may do to the world around it, and that an import must not.
WATCH = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"):
        print(event, arguments)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        print(event, arguments)

sys.dont_write_bytecode = True
sys.addaudithook(watch)
import leantrain.book, leantrain.cli, leantrain.data, leantrain.measure, leantrain.runner, leantrain.training
heavy = {"torch", "numpy", "pandas", "matplotlib", "lightning", "numba", "papermill", "requests"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_importing_the_library_touches_nothing_and_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", done.stdout
