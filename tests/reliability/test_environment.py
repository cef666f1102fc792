"""Poor machines and strange ones: no home, one processor, little memory, an older processor, no network."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from leantrain import paths, records

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


#: Two chapters whose quick runs are short: attention with a bypass, and convolutions.
CHAPTERS = ("skipvit", "conv3d-4d")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the settings are those of x86 processors")
def test_checked_outputs_hold_with_one_thread_on_an_older_processor(tmp_path):
    """What the notebooks' check cells print is the same without AVX-512; `make portable` does it with all chapters."""
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    library = {"PYTHONPATH": os.pathsep.join([str(paths.ROOT / "lib"), os.environ.get("PYTHONPATH", "")])}
    # A folder of its own: runs that were kept from this processor would prove nothing.
    environment = {**os.environ, **older, **threads, **library, "LEANTRAIN_BUILD": str(tmp_path)}
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider", "-q"]
    notebooks = [str(Path("notebooks") / f"{slug}.ipynb") for slug in CHAPTERS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *notebooks],
        cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    trained = {file.parent.name for file in (tmp_path / "experiments").rglob("*.json")}
    assert trained == set(CHAPTERS), "the chapters did train"
