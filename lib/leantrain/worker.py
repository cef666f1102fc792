"""Runs one notebook in a process of its own: `python -m leantrain.worker SPEC`, started by the runner.

Reports one JSON object a line on standard output: cell, when one begins; failed, with the cause; unstarted, when no
cell could begin because the kernel did not come up; closing, when all cells are through; executed. Ends when its
standard input closes, so that no run outlives the runner, however that one died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["OWN", "main"]

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


def _report_error(error: Any, source: str) -> None:
    _report("failed", cause=f"{error.ename}: {error.evalue}{_place([source])}")


def _register_engine(started_cells: list[str]) -> None:
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):
        """nbclient's engine, telling the runner how far it is."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            started, failed, completed = nb_man.cell_start, nb_man.cell_exception, nb_man.cell_complete
            total = len(nb_man.nb.cells)

            def cell_start(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                if cell.cell_type == "code":
                    started_cells.append(cell.source)
                    _report("cell", index=cell_index, total=total)
                started(cell, cell_index, **rest)

            def cell_exception(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                failed(cell, cell_index, **rest)
                _report_error(rest["exception"], cell.source)

            def cell_complete(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                completed(cell, cell_index, **rest)
                if cell_index == total - 1:
                    _report("closing")

            nb_man.cell_start, nb_man.cell_exception, nb_man.cell_complete = cell_start, cell_exception, cell_complete
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("leantrain", ReportingEngine)


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
    from traitlets.config import Config

    cells: list[str] = []
    program = ""
    # Files in the run's own folder instead of TCP ports: a port that was free when it was chosen may be taken when the
    # kernel binds it, above all by another kernel that starts, and then some of Jupyter's waits have no end.
    sockets = {"transport": "ipc", "connection_file": str(Path(spec["scratch"]) / "kernel.json")}
    try:
        program = KernelSpecManager().get_kernel_spec(spec["kernel"]).argv[0]
        _register_engine(cells)
        papermill.execute_notebook(
            _literal(spec["source"]),
            _literal(spec["output"]),
            parameters=spec["parameters"],
            engine_name="leantrain",
            kernel_name=spec["kernel"],
            cwd=spec["cwd"],
            config=Config(KernelManager=sockets),
            progress_bar=False,
            log_output=False,
            start_timeout=spec["start_timeout"],
            execution_timeout=spec["cell_timeout"],
        )
    except papermill.PapermillExecutionError as error:
        _report_error(error, error.source)
    except DeadKernelError:
        _report("failed", cause=f"the kernel died: out of memory, or killed{_place(cells)}")
    except CellTimeoutError:
        limit = spec["cell_timeout"]
        _report("failed", cause=f"a cell ran longer than the limit of {limit} s{_place(cells)}")
    except NoSuchKernel as error:
        _report("failed", cause=f"no Jupyter kernel is named {error.name!r}; {OWN}")
    except RuntimeError as error:  # jupyter_client has no class of its own for a kernel that does not come up
        if cells:
            raise
        _report("unstarted", cause=str(error))
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
