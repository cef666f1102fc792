"""The one shape of a comparison: arms x seeds -> a tidy table.

Every arm is trained under every seed. Runs are interleaved (seed 0: A, B, C; seed 1: A, B, C; ...), so that a
noisy machine wrongs all arms alike. Within a seed, every arm starts from the same state of the random number
generators and sees the same batches in the same order. A finished run is kept on disk under a key made of
everything it depends on; an interrupted experiment goes on with the first run that is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import pandas as pd

from leantrain import paths
from leantrain.training import Diverged

__all__ = ["Arm", "Build", "Data", "Experiment", "describe", "final"]

Build = Callable[[int], L.LightningModule]


class Data(Protocol):
    """What an experiment asks of a data module, besides Lightning's own interface."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a batch could change."""

    @property
    def checksums(self) -> Mapping[str, str]:
        """SHA-256 by file or array, for the record."""

    def set_seed(self, seed: int) -> None:
        """Fix the order of the batches and their augmentation."""


@dataclass(frozen=True)
class Arm:
    """An arm with its own data or its own length, where the comparison is about those.

    Attributes:
        build: Builds the arm's LightningModule from the seed.
        data: The data module, in place of the experiment's.
        epochs: Passes over the training data, in place of the experiment's.
    """

    build: Build
    data: Data | None = None
    epochs: int | None = None


class _Log(L.Callback):
    """One row at the end of every validation, with the time spent in training so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int]] = []
        self._train_s = 0.0
        self._since: float | None = None

    def _stop(self) -> None:
        if self._since is not None:
            self._train_s += time.perf_counter() - self._since
            self._since = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        place = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "train_s": self._train_s}
        self.rows.append({**place, **metrics})


@dataclass
class Experiment:
    """Train every arm under every seed.

    Attributes:
        arms: Name of an arm -> function of the seed that builds its LightningModule, or an `Arm`. The function is
            called right after all random number generators were seeded.
        data: The data module of the arms that have none of their own.
        seeds: One run per seed and arm; all different.
        epochs: Passes over the training data of each run, unless its arm says otherwise.
        cache: Folder that keeps finished runs; None keeps none.
        salt: Text that belongs to the key of every run (the chapter puts the hashes of the library modules here).
        precision: Lightning's precision, such as `32-true` or `bf16-mixed`.
        limit_batches: Stop every epoch, in training and in validation, after this many batches; None for all.
        after: Called with the trained module at the end of each run; returns columns for the run's last row.

    Raises:
        ValueError: If arms or seeds are empty, a seed stands twice or is negative, or a budget is not positive.
    """

    arms: Mapping[str, Build | Arm]
    data: Any
    seeds: Sequence[int]
    epochs: int
    cache: Path | None = None
    salt: str = ""
    precision: Any = "32-true"
    limit_batches: int | None = None
    after: Callable[[L.LightningModule], Mapping[str, float]] | None = None
    trained: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("an experiment needs at least one arm, got none")
        seeds = list(self.seeds)
        if not seeds or len(set(seeds)) < len(seeds) or any(s < 0 for s in seeds):
            raise ValueError(f"seeds must be different non-negative integers, at least one, got {seeds}")
        for name in self.arms:
            if (epochs := self._plan(name)[2]) < 1:
                raise ValueError(f"epochs must be at least 1, got {epochs} for arm {name!r}")
        if self.limit_batches is not None and self.limit_batches < 1:
            raise ValueError(f"limit_batches must be at least 1 or None, got {self.limit_batches}")

    def _plan(self, name: str) -> tuple[Build, Any, int]:
        """How an arm is built, its data and its length."""
        arm = self.arms[name]
        if not isinstance(arm, Arm):
            return arm, self.data, self.epochs
        return arm.build, self.data if arm.data is None else arm.data, self.epochs if arm.epochs is None else arm.epochs

    @property
    def sources(self) -> list[Data]:
        """The data modules of the arms, each once."""
        return list({id(data): data for _, data, _ in map(self._plan, self.arms)}.values())

    def run(self, progress: bool = True) -> pd.DataFrame:
        """Train what is not yet on disk and return all rows.

        Args:
            progress: Show one progress bar in a notebook while runs are under way; it vanishes at the end.

        Returns:
            One row per arm, seed and epoch with the columns arm, seed, epoch, step, train_s (seconds of training so
            far, validation excluded), diverged, and every metric that the module logs. A run whose loss stopped
            being finite keeps the rows it has and ends with one more, whose `diverged` is True and whose metrics
            are missing.
        """
        plan = [(seed, name) for seed in self.seeds for name in self.arms]
        rows: list[dict[str, Any]] = []
        with _quiet(), _progress(len(plan), progress) as report:
            for done, (seed, name) in enumerate(plan):
                report(done, f"{name}, seed {seed}")
                rows += [{"arm": name, "seed": seed, **row} for row in self._one(name, seed)]
        frame = pd.DataFrame(rows)
        first = ["arm", "seed", "epoch", "step", "train_s", "diverged"]
        return frame[first + [c for c in frame.columns if c not in first]]

    def key(self, name: str, seed: int) -> str:
        """Everything that the run of an arm under a seed depends on, hashed."""
        build, data, epochs = self._plan(name)
        parts = {
            "arm": describe(build),
            "data": data.fingerprint,
            "seed": seed,
            "epochs": epochs,
            "precision": str(self.precision),
            "limit_batches": self.limit_batches,
            "after": describe(self.after),
            "salt": self.salt,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _one(self, name: str, seed: int) -> list[dict[str, Any]]:
        file = self.cache / f"{self.key(name, seed)}.json" if self.cache else None
        if file and file.exists():
            try:
                rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
                self.reused += 1
                return rows
            except (ValueError, KeyError):
                file.unlink()
        rows = self._train(name, seed)
        self.trained += 1
        if file:
            paths.write_atomically(file, json.dumps({"arm": name, "seed": seed, "rows": rows}, indent=1))
        return rows

    def _train(self, name: str, seed: int) -> list[dict[str, Any]]:
        L.seed_everything(seed, verbose=False)
        build, data, epochs = self._plan(name)
        module = build(seed)
        data.set_seed(seed)
        log = _Log()
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=1,
            precision=self.precision,
            limit_train_batches=self.limit_batches,
            limit_val_batches=self.limit_batches,
            num_sanity_val_steps=0,
            callbacks=[log],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic=True,
        )
        # An arm may have drawn random numbers that another did not: start all arms of a seed alike.
        L.seed_everything(seed, verbose=False)
        diverged = False
        try:
            trainer.fit(module, datamodule=data)
        except Diverged:
            diverged = True
        rows = [{**row, "diverged": False} for row in log.rows]
        if diverged:
            spent = rows[-1]["train_s"] if rows else 0.0
            rows.append(
                {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "train_s": spent, "diverged": True}
            )
        elif self.after is not None:
            rows[-1].update({key: float(value) for key, value in self.after(module).items()})
        return rows


def final(frame: pd.DataFrame, metric: str, miss: float | None = None) -> pd.DataFrame:
    """The last value of a metric in every run.

    Args:
        frame: What `Experiment.run` returned.
        metric: Name of a column.
        miss: The value that a diverged run counts with; needed only if one diverged.

    Returns:
        One row per seed, one column per arm in the order of the frame.

    Raises:
        ValueError: If the metric is no column, or a run diverged and `miss` was not given.
    """
    if metric not in frame.columns:
        raise ValueError(f"the table has no column {metric!r}; it has {', '.join(frame.columns)}")
    last = frame.groupby(["arm", "seed"], sort=False).tail(1).copy()
    if last["diverged"].any():
        if miss is None:
            lost = ", ".join(f"{r.arm} seed {r.seed}" for r in last[last["diverged"]].itertuples())
            raise ValueError(f"these runs diverged: {lost}; give `miss`, the value that a diverged run counts with")
        last.loc[last["diverged"], metric] = miss
    return last.pivot(index="seed", columns="arm", values=metric)[list(frame["arm"].unique())]


def describe(value: object) -> Any:
    """A stable description of a function and all it refers to, as JSON.

    Two functions that compute the same from the same values in the same way have one description; a change in
    code, defaults, captured variables or constants changes it. Library code is named, not followed: its
    hashes belong to the experiment's salt.

    Raises:
        ValueError: If the function refers to an object whose state cannot be told.
    """
    return _describe(value, frozenset())


def _describe(value: object, inside: frozenset[int]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_describe(v, inside) for v in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, Mapping):
        return {str(k): _describe(v, inside) for k, v in value.items()}
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, Path):
        return f"path {value.name}"
    if isinstance(value, types.FunctionType) and (value.__module__ == "__main__" or "<locals>" in value.__qualname__):
        return "recursion" if id(value) in inside else _describe_function(value, inside | {id(value)})
    name = getattr(value, "__qualname__", None)
    if name and isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType):
        return f"{value.__module__}.{name}"
    mark = getattr(value, "fingerprint", None)
    if isinstance(mark, str):
        return mark
    if dataclasses.is_dataclass(value):
        fields = {f.name: _describe(getattr(value, f.name), inside) for f in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    partial = getattr(value, "func", None), getattr(value, "args", None), getattr(value, "keywords", None)
    if all(part is not None for part in partial):
        return [_describe(part, inside) for part in partial]
    raise ValueError(
        f"cannot tell what {value!r:.80} ({type(value).__name__}) holds, so a finished run could not be recognised; "
        "let the arm build it, or refer to plain values only"
    )


def _describe_function(function: types.FunctionType, inside: frozenset[int]) -> dict[str, Any]:
    code, names = function.__code__, set()
    stack = [code]
    body = []
    while stack:
        part = stack.pop()
        names |= set(part.co_names)
        constants = [c for c in part.co_consts if not isinstance(c, types.CodeType)]
        stack += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        body.append([part.co_code.hex(), [repr(c) for c in constants], list(part.co_names), list(part.co_varnames)])
    used = {n: function.__globals__[n] for n in sorted(names) if n in function.__globals__}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return {
        "code": body,
        "defaults": _describe([function.__defaults__, function.__kwdefaults__ or {}], inside),
        "closure": {n: _describe(cell.cell_contents, inside) for n, cell in cells},
        "globals": {n: _describe(v, inside) for n, v in used.items()},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice, which a reader of a chapter cannot act on."""
    loggers = [
        logging.getLogger(n) for n in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*(num_workers|LeafSpec|tensorboardX).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """One bar in a notebook; it vanishes at the end, so that no output is left of it."""
    handle = None
    if shown:
        from IPython import get_ipython
        from IPython.display import HTML, display

        if get_ipython() is not None:
            handle = display(HTML(""), display_id=True)

    def report(done: int, doing: str) -> None:
        if handle is not None:
            bar = f'<progress max="{total}" value="{done}"></progress> run {done + 1} of {total}: {doing}'
            handle.update(HTML(bar))

    yield report
    if handle is not None:
        handle.update(HTML(""))
