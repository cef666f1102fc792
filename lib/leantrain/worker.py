"""Runs one notebook in a process of its own: `python -m leantrain.worker SPEC`, started by the runner.

Reports one JSON object a line on standard output. Ends when its standard input closes, so that no run outlives
the runner, however that one died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["main"]

#: How often a kernel that did not come up is started again: a run that has executed no cell can lose nothing.
RETRIES = 2

OWN = "`make env` installs the project's own"


def _report(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    # The raw descriptor: a thread that holds the buffered reader's lock would abort the interpreter at its end.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(signum: int, frame: object) -> NoReturn:
    # An exception rather than an exit: nbclient shuts the kernel down on the way out.
    raise SystemExit(128 + signum)


def _literal(path: str) -> str:
    """A path that papermill, which fills parameters into paths, leaves as it is."""
    return path.replace("{", "{{").replace("}", "}}")


def _place(sources: Sequence[str]) -> str:
    """Names the last of the cells that were started; empty if none was."""
    if not sources:
        return ""
    line = next((line for line in sources[-1].splitlines() if line.strip()), "")
    return f" (in the cell that begins {line[:60]!r})"


def _register_engine(started_cells: list[str]) -> None:
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):
        """nbclient's engine, telling the runner which cell is running."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            started = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                if cell.cell_type == "code":
                    started_cells.append(cell.source)
                    _report("cell", index=cell_index, total=len(nb_man.nb.cells))
                started(cell, cell_index, **rest)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("leantrain", ReportingEngine)


class KernelNeverStarted(Exception):
    """A kernel ended or stayed silent before the first cell, each time that it was started."""


def _with_retries(execute: Callable[[], None], cells: Sequence[str]) -> None:
    """Execute; a few times where the kernel does not come up, as when another program has just taken its port."""
    for attempt in range(1, RETRIES + 2):
        try:
            return execute()
        except RuntimeError as error:  # jupyter_client has no class of its own for this
            if cells:
                raise
            cause = f"the kernel did not start: {error}"
        if attempt <= RETRIES:
            _report("retried", cause=cause, attempt=attempt, limit=RETRIES)
            time.sleep(attempt)
    raise KernelNeverStarted(cause)


def main() -> int:
    """Run the notebook that the specification names; 0 when papermill is content, 1 after a failure it reported."""
    spec = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    import warnings

    warnings.filterwarnings("ignore")
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    cells: list[str] = []
    program = ""

    def execute() -> None:
        papermill.execute_notebook(
            _literal(spec["source"]),
            _literal(spec["output"]),
            parameters=spec["parameters"],
            engine_name="leantrain",
            kernel_name=spec["kernel"],
            cwd=spec["cwd"],
            progress_bar=False,
            log_output=False,
            start_timeout=180,
            execution_timeout=spec["cell_timeout"],
        )

    try:
        program = KernelSpecManager().get_kernel_spec(spec["kernel"]).argv[0]
        _register_engine(cells)
        _with_retries(execute, cells)
    except papermill.PapermillExecutionError as error:
        _report("failed", cause=f"{error.ename}: {error.evalue}{_place([error.source])}")
    except DeadKernelError:
        _report("failed", cause=f"the kernel died: out of memory, or killed{_place(cells)}")
    except CellTimeoutError:
        limit = spec["cell_timeout"]
        _report("failed", cause=f"a cell ran longer than the limit of {limit} s{_place(cells)}")
    except NoSuchKernel as error:
        _report("failed", cause=f"no Jupyter kernel is named {error.name!r}; {OWN}")
    except KernelNeverStarted as error:
        _report("failed", cause=f"{error} (tried {RETRIES + 1} times); {OWN}")
    except OSError as error:
        if error.filename == program:
            _report("failed", cause=f"the kernel {spec['kernel']!r} needs {program}, which cannot be started; {OWN}")
        else:
            _report("failed", cause=f"cannot write the notebook: {error.strerror or error}")
    else:
        _report("executed")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
