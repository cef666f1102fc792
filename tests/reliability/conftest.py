"""Small chapters without PyTorch: their kernels start in a second or two; the library around them is the real one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

#: Enough of Lightning for an experiment; what a module does in an epoch is its own affair.
LIGHTNING = """
class LightningModule:
    pass


class Callback:
    pass


class Trainer:
    def __init__(self, max_epochs, callbacks, **options):
        self.max_epochs, self.callbacks, self.global_step = max_epochs, callbacks, 0

    def fit(self, module, datamodule):
        for self.current_epoch in range(self.max_epochs):
            for callback in self.callbacks:
                callback.on_train_epoch_start(self, module)
            self.global_step += 1
            self.callback_metrics = module.epoch()
            for callback in self.callbacks:
                callback.on_train_epoch_end(self, module)


def seed_everything(seed, verbose):
    pass
"""

TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)


def get_num_threads():
    return 1
"""

PARAMETERS = 'profile: str = "quick"  # scale of the run; one of quick, book, paper'


class Workshop:
    """A temporary project, its chapters, and the command line that runs them in processes of its own."""

    def __init__(self, house, ledger: Path) -> None:
        self.house = house
        self.root: Path = house.root
        self.ledger = ledger

    def bare(self, *cells: str) -> None:
        """Make the one chapter a few cells of code that use nothing of the library and leave no record."""
        v4 = nbformat.v4
        code = [v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(v4.new_code_cell, cells)]
        book = v4.new_notebook(cells=code)
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, self.root / "notebooks" / "toy.ipynb")

    def multiply(self, count: int) -> list[str]:
        """Put that many copies of the one chapter in its place; returns their slugs."""
        source = self.root / "notebooks" / "toy.ipynb"
        catalog = self.root / "book" / "papers.yml"
        rows, text = yaml.safe_load(catalog.read_text()), source.read_text()
        toy = json.dumps(rows["papers"][0])
        slugs = [f"toy-{number:02}" for number in range(count)]
        rows["papers"] = [json.loads(toy.replace("toy", slug)) for slug in slugs]
        catalog.write_text(yaml.safe_dump(rows))
        for slug in slugs:
            source.with_name(f"{slug}.ipynb").write_text(text.replace("toy", slug))
        source.unlink()
        return slugs

    def start(self, *words: str, **options) -> subprocess.Popen:
        """Start the command line."""
        command = [sys.executable, "-m", "leantrain.cli", *words]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, **{"cwd": self.root, **streams, **options})

    def processes(self) -> list[psutil.Process]:
        """What runs and carries the mark of a run of this project."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mark = process.environ().get("LEANTRAIN_RUN", "")
                if mark.startswith(str(self.root)) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    @staticmethod
    def runs(pid: int) -> bool:
        """Whether a process runs; one that ended and that nobody asked for its status does not."""
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @staticmethod
    def wait_for(condition, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)


@pytest.fixture
def workshop(house, tmp_path, monkeypatch) -> Workshop:
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    (stand_ins / "lightning.py").write_text(LIGHTNING)
    (stand_ins / "torch.py").write_text(TORCH)
    path = [str(stand_ins), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))
    return Workshop(house, tmp_path / "ledger")
