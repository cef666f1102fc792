r"""SwiftLearn: a warm-up on all samples, then training on the few that matter most.

Paper: Hajimolahoseini et al., "SwiftLearn: A Data-Efficient Training Method of Deep Learning Models using Importance
Sampling", arXiv 2311.15134.

Train on all :math:`n` samples for :math:`W` of :math:`E` epochs and measure an importance :math:`I_i` of every sample
in these warm-up stages. Train the other epochs on the :math:`\lceil rn \rceil` samples of the greatest importance.
Every :math:`R` epochs measure all samples again, so that dropped ones can return. The model stays as it is.

The abstract says that much. The formula of the importance was not available to us; the default here is our choice:
how far the predicted probabilities of a sample moved between two stages,

.. math:: I_i = \lVert f(x_i; \theta_b) - f(x_i; \theta_a) \rVert_2 ,

with the usual measures of data pruning (EL2N, loss) and a random choice beside it. With the cost :math:`c` of a forward
pass in units of a training pass, and :math:`N_I` measurements of all samples, the run is faster by

.. math:: S = E \,/\, \bigl(W + (E - W)\, r + c\, N_I\bigr) .

:class:`ActiveSampler` hands out the active samples of a map-style data set; it needs no Lightning. :class:`SwiftLearn`
is the callback that measures and selects. It works with any LightningModule, on one device, and lets a learning-rate
schedule that is built over ``trainer.estimated_stepping_batches`` see the shortened run. With ``warmup`` at the number
of epochs, or ``keep=1``, it is plain training to the last bit.

Example:
    >>> import lightning as L
    >>> from functools import partial
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from leantrain.training import ImageClassifier
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(200, 1, 4, 4)
    >>> data = TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long())
    >>> train = DataLoader(data, batch_size=20, sampler=ActiveSampler(len(data)))  # in place of shuffle=True
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> model = ImageClassifier(net, partial(torch.optim.AdamW, lr=0.1), num_classes=2)
    >>> swiftlearn = SwiftLearn(keep=0.1, warmup=2)
    >>> trainer = L.Trainer(max_epochs=10, accelerator="cpu", callbacks=[swiftlearn], logger=False,
    ...                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    >>> trainer.fit(model, train)
    >>> swiftlearn.trained_samples, swiftlearn.evaluated_samples, len(train.sampler)
    (560, 400, 20)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from leantrain.data.seeded import Loader, SeededData, check_seed, epoch_generator
from leantrain.training.diverged import Diverged

__all__ = [
    "CRITERIA",
    "ActiveData",
    "ActiveSampler",
    "Criterion",
    "SwiftLearn",
    "el2n",
    "evaluate_all",
    "importance_epochs",
    "kept_count",
    "output_change",
    "sample_loss",
    "sample_passes",
    "select",
    "selection_epochs",
]


# ------------------------------------------------------------------ importance


def output_change(new: Tensor, old: Tensor) -> Tensor:
    """How far every sample's output moved between two stages of training.

    Args:
        new: Outputs at the later stage, ``(n, C)``: logits, probabilities, or predictions of a regression.
        old: Outputs at the earlier stage, ``(n, C)``.

    Returns:
        Euclidean distances, ``(n,)``, at least 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if new.shape != old.shape:
        raise ValueError(f"outputs of two stages must have one shape, got {tuple(new.shape)} and {tuple(old.shape)}")
    return torch.linalg.vector_norm((new - old).flatten(1), dim=1)


def el2n(logits: Tensor, y: Tensor) -> Tensor:
    """Distance between the predicted probabilities and the label (EL2N of the literature on data pruning).

    Args:
        logits: ``(n, C)``.
        y: Classes, int64 ``(n,)``.

    Returns:
        Euclidean distances, ``(n,)``, from 0 to the root of 2.
    """
    return torch.linalg.vector_norm(logits.softmax(1) - F.one_hot(y, logits.shape[1]), dim=1)


def sample_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample, ``(n,)``; arguments as in :func:`el2n`."""
    return F.cross_entropy(logits, y, reduction="none")


@dataclass(frozen=True)
class Criterion:
    """A way to score samples.

    Attributes:
        looks: Measurements of all samples that the first selection needs: 0, 1 or 2.
        labels: Whether it needs classes.
        score: Function of the new outputs ``(n, C)``, the old ones and the classes ``(n,)``; returns ``(n,)``. What
            the criterion does not need is None.
        classes: Whether it takes the outputs as logits of classes, of which there must be two or more.
    """

    looks: int
    labels: bool
    score: Callable[[Any, Any, Any], Tensor] | None = None
    classes: bool = False


#: The criteria by name. `random` is the control: it looks at nothing.
CRITERIA: dict[str, Criterion] = {
    "output_change": Criterion(2, False, lambda new, old, y: output_change(new.softmax(1), old.softmax(1)), True),
    "logit_change": Criterion(2, False, lambda new, old, y: output_change(new, old)),
    "el2n": Criterion(1, True, lambda new, old, y: el2n(new, y), True),
    "loss": Criterion(1, True, lambda new, old, y: sample_loss(new, y), True),
    "random": Criterion(0, False),
}


def kept_count(size: int, keep: float) -> int:
    """Samples that stay active, the ceiling of ``keep * size``.

    Raises:
        ValueError: If the size is below 1 or `keep` is not above 0 and at most 1.
    """
    if size < 1:
        raise ValueError(f"a data set needs at least one sample, got {size}")
    _check_keep(keep)
    # Rounded first: 0.07 * 100 is a little more than 7 in floating point.
    return math.ceil(round(keep * size, 9))


def select(importance: Tensor, keep: float, labels: Tensor | None = None) -> Tensor:
    """The samples of the greatest importance.

    Args:
        importance: One number a sample, ``(n,)``. Minus infinity ranks last; NaN is refused.
        keep: Share of the samples to keep, above 0 and at most 1.
        labels: Classes ``(n,)``. If given, every class keeps its share, give or take one sample, and loses its own
            least important ones.

    Returns:
        Places of the kept samples, ascending, int64 ``(ceil(keep * n),)``. Of equals, the first ones are kept.

    Raises:
        ValueError: If an importance is NaN, shapes differ, or `keep` is out of range.

    Example:
        >>> select(torch.tensor([0.1, 0.7, 0.3, 0.7]), keep=0.5)
        tensor([1, 3])
    """
    if importance.ndim != 1 or torch.isnan(importance).any():
        raise ValueError(f"importance must be (n,) without NaN, got shape {tuple(importance.shape)}")
    count = kept_count(len(importance), keep)
    ranked = importance.argsort(descending=True, stable=True)
    if labels is not None:
        if labels.shape != importance.shape:
            raise ValueError(f"expected labels of shape {tuple(importance.shape)}, got {tuple(labels.shape)}")
        # The k-th best of a class of m is due at the share (k + 1/2) / m; the first `count` that are due are kept.
        due = torch.empty(len(ranked), dtype=torch.float64)
        of = labels[ranked]
        for label in of.unique():
            places = (of == label).nonzero().flatten()
            due[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
        ranked = ranked[due.argsort(stable=True)]
    return ranked[:count].sort().values


@torch.no_grad()
def evaluate_all(
    module: nn.Module,
    batches: Any,
    outputs: Callable[[Any, Any], Tensor],
    targets: Callable[[Any], Tensor] | None = None,
    move: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of all samples in evaluation mode, leaving no trace.

    Training goes on as if nothing had happened: gradients, the state of the random number generators, the statistics
    of normalisation layers and the mode of every submodule stay what they are.

    Args:
        module: The model.
        batches: Batches of all samples in order, iterated once.
        outputs: Function of the module and a batch that returns outputs ``(B, C)``.
        targets: Function of a batch that returns classes ``(B,)``; None to collect none.
        move: Brings a batch to the model's device.

    Returns:
        Outputs ``(n, C)`` and classes ``(n,)`` (or None) on the CPU; outputs at least in single precision.
    """
    found, classes = [], []
    with _evaluating(module):
        for batch in map(move, batches):
            found.append(_kept(outputs(module, batch)))
            if targets is not None:
                classes.append(targets(batch).cpu())
    return torch.cat(found), torch.cat(classes) if targets is not None else None


# ------------------------------------------------------------------ cost


def selection_epochs(epochs: int, warmup: int, refresh: int = 0) -> list[int]:
    """Epochs, counted from 0, after which a new active set is chosen; none after the last one.

    Raises:
        ValueError: If `warmup` is not 1 to `epochs` or `refresh` is negative.
    """
    if not 1 <= warmup <= epochs:
        raise ValueError(f"warmup must be 1 to the number of epochs, {epochs}, got {warmup}")
    _check_refresh(refresh)
    return [
        e for e in range(warmup - 1, epochs - 1) if e == warmup - 1 or (refresh and (e - warmup + 1) % refresh == 0)
    ]


def importance_epochs(epochs: int, warmup: int, refresh: int = 0, looks: int = 2) -> list[int]:
    """Epochs, counted from 0, after which all samples are measured; -1 stands for before the first one.

    Args:
        epochs: Epochs E of the run.
        warmup: Epochs W on all samples, 1 to E.
        refresh: Epochs R between selections; 0 for a single one.
        looks: What `Criterion.looks` says.

    Raises:
        ValueError: As in :func:`selection_epochs`.

    Example:
        >>> importance_epochs(5, 1), importance_epochs(25, 5, refresh=5)
        ([-1, 0], [3, 4, 9, 14, 19])
    """
    selections = selection_epochs(epochs, warmup, refresh)
    if not selections or looks == 0:
        return []
    return ([warmup - 2] if looks == 2 else []) + selections


def sample_passes(epochs: int, warmup: int, keep: float, evaluations: int = 0, forward_cost: float = 1 / 3) -> float:
    r"""Cost of a run in passes over all samples, :math:`W + (E - W) r + c N_I`; plain training costs `epochs`.

    Args:
        epochs: Epochs E.
        warmup: Epochs W on all samples, 1 to E.
        keep: Share r of the samples that stay.
        evaluations: Measurements of all samples, :math:`N_I`.
        forward_cost: Time c of a forward pass without gradients, in units of a training pass.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> round(5 / sample_passes(5, 1, 0.1), 2), round(5 / sample_passes(5, 1, 0.1, evaluations=2), 2)
        (3.57, 2.42)
    """
    selection_epochs(epochs, warmup)
    _check_keep(keep)
    if evaluations < 0 or forward_cost < 0:
        raise ValueError(f"evaluations and forward_cost must be at least 0, got {evaluations} and {forward_cost}")
    return warmup + (epochs - warmup) * keep + forward_cost * evaluations


# ------------------------------------------------------------------ sampler and data


class ActiveSampler(Sampler[int]):
    """Hands out the active samples of a data set, in a fresh order every epoch.

    The order depends on the seed, the epoch and the active set only. Lightning calls :meth:`set_epoch` by itself.

    Args:
        size: Samples in the data set, at least 1.
        seed: Seed of the orders, 0 to 2**63 - 1.

    Attributes:
        size: Samples in the data set.
        order: The order of the iteration that began last, int64 ``(len(sampler),)``.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a data set needs at least one sample, got {size}")
        check_seed("seed", seed)
        self.size = size
        self.seed = seed
        self.epoch = 0
        self._active = torch.arange(size)
        self.order = self._active

    @property
    def active(self) -> Tensor:
        """Places of the active samples, ascending, int64; all of them at first."""
        return self._active

    @active.setter
    def active(self, rows: Tensor) -> None:
        rows = rows.long().cpu().sort().values
        if rows.ndim != 1 or len(rows) == 0 or rows[0] < 0 or rows[-1] >= self.size or (rows.diff() == 0).any():
            raise ValueError(f"the active set must hold different places from 0 to {self.size - 1}, at least one")
        self._active = rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._active)

    def __iter__(self) -> Iterator[int]:
        shuffled = torch.randperm(len(self._active), generator=epoch_generator(self.seed, self.epoch, "order"))
        self.order = self._active[shuffled]
        return iter(self.order.tolist())


class ActiveData(L.LightningDataModule):
    """A map-style training set under an :class:`ActiveSampler`, with the validation batches of another data module.

    Args:
        source: The data module that the samples are from; its validation batches, checksums and name are taken over.
        train: Its training samples as a map-style data set.
        batch_size: Samples in a training batch. The last batch of an epoch may be short.
        collate: Makes a batch of a list of samples; None for PyTorch's default.

    Attributes:
        sampler: The sampler of the seed given last.
    """

    def __init__(
        self,
        source: SeededData,
        train: Dataset[Any],
        *,
        batch_size: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.train = train
        self.batch_size = batch_size
        self.collate = collate
        self.sampler = ActiveSampler(len(train))  # type: ignore[arg-type]

    @property
    def checksums(self) -> Mapping[str, str]:
        """File or array -> SHA-256."""
        return self.source.checksums

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything but seed and epoch that a batch depends on."""
        parts = f"active/{self.source.fingerprint}/{len(self.train)}/{self.batch_size}"  # type: ignore[arg-type]
        return hashlib.sha256(parts.encode()).hexdigest()

    def set_seed(self, seed: int) -> None:
        """Fix the orders, and make all samples active again."""
        self.sampler = ActiveSampler(len(self.train), seed)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the active samples."""
        return DataLoader(self.train, batch_size=self.batch_size, sampler=self.sampler, collate_fn=self.collate)

    def val_dataloader(self) -> Loader:
        """The validation batches of the source."""
        return self.source.val_dataloader()


# ------------------------------------------------------------------ callback


def _first_and_forward(module: Any, batch: Any) -> Tensor:
    return module(batch[0])


def _second(batch: Any) -> Tensor:
    return batch[1]


class SwiftLearn(L.Callback):
    """Measure the importance of all training samples, and train on the most important ones.

    The training loader must be a DataLoader with an :class:`ActiveSampler`. All samples are measured right after the
    last training batch of an epoch, before validation, so that a clock that runs while training runs includes it. An
    epoch logs, as totals of the run: ``trained_samples``, ``evaluated_samples`` (forward passes for importance alone)
    and ``importance_s`` (seconds that they took).

    Args:
        keep: Share r of the samples that stay active, above 0 and at most 1.
        warmup: Epochs W on all samples, at least 1. With as many as the run has, nothing is measured or dropped.
        refresh: Epochs R between selections; 0 for a single one.
        criterion: A name in `CRITERIA`, or a `Criterion`. For a regression take `logit_change`: one output has no
            probabilities and no classes.
        observe: `evaluation` measures with forward passes of their own, in evaluation mode, all with the same weights.
            `training` collects the outputs of the last warm-up epochs' own forward passes: it costs nothing, but every
            sample is seen with other weights and with dropout, and dropped samples cannot return. It needs a module
            whose `training_step` calls itself once.
        balanced: Whether every class keeps its share of samples.
        outputs: Function of the module and a batch that returns outputs ``(B, C)``; by default the module's output for
            the batch's first part.
        targets: Function of a batch that returns classes ``(B,)``; by default the batch's second part.
        batch_size: Samples in a batch of a measurement; None for that of training.

    Attributes:
        importance: Importance at the last selection, ``(n,)``; None before, and for `random`.
        planned_steps: Optimiser steps of the whole run, known when it starts.
        trained_samples: Samples trained on so far.
        evaluated_samples: Samples measured so far, by passes of their own.
        importance_s: Seconds that these passes and the selections took.

    Raises:
        ValueError: If an argument is out of range; when training starts, if `warmup` exceeds the epochs, the run has no
            end, several devices take part, or the loader has no `ActiveSampler`.
        Diverged: In training, if an importance is not a number.
    """

    def __init__(
        self,
        keep: float = 0.1,
        warmup: int = 1,
        *,
        refresh: int = 0,
        criterion: str | Criterion = "output_change",
        observe: str = "evaluation",
        balanced: bool = False,
        outputs: Callable[[Any, Any], Tensor] = _first_and_forward,
        targets: Callable[[Any], Tensor] = _second,
        batch_size: int | None = None,
    ) -> None:
        _check_keep(keep)
        _check_refresh(refresh)
        if isinstance(criterion, str):
            if criterion not in CRITERIA:
                raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
            criterion = CRITERIA[criterion]
        if observe not in ("evaluation", "training"):
            raise ValueError(f"observe must be 'evaluation' or 'training', got {observe!r}")
        free = observe == "training"
        if free and refresh:
            raise ValueError("training passes do not see dropped samples: refresh needs observe='evaluation'")
        if warmup < max(1, criterion.looks if free else 1):
            needed = f" to see every sample {criterion.looks} times" if free else ""
            raise ValueError(f"warmup must be at least {max(1, criterion.looks if free else 1)}{needed}, got {warmup}")
        if balanced and criterion.looks == 0:
            raise ValueError("a random choice is balanced on average only: balanced needs a criterion that looks")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        self.keep = keep
        self.warmup = warmup
        self.refresh = refresh
        self.criterion = criterion
        self.observe = observe
        self.balanced = balanced
        self.outputs = outputs
        self.targets = targets
        self.batch_size = batch_size
        self.importance: Tensor | None = None
        self.planned_steps = 0
        self.trained_samples = 0
        self.evaluated_samples = 0
        self.importance_s = 0.0
        self._new: Tensor | None = None
        self._old: Tensor | None = None
        self._labels: Tensor | None = None
        self._active: Tensor | None = None
        self._place = 0
        self._captured: list[Tensor] = []
        self._hook: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the run, and plan its updates."""
        if stage != "fit":
            return
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError("the length of the run must be known: give the Trainer max_epochs")
        if trainer.world_size > 1:
            raise ValueError(f"SwiftLearn runs on one device, the trainer has {trainer.world_size}")
        self._selections = selection_epochs(epochs, self.warmup, self.refresh)
        self._looks = importance_epochs(epochs, self.warmup, self.refresh, self.criterion.looks)
        trainer.fit_loop.setup_data()
        loader = self._loader(trainer)
        full = int(trainer.num_training_batches)
        kept = kept_count(loader.sampler.size, self.keep)  # type: ignore[attr-defined]
        few = kept // loader.batch_size if loader.drop_last else -(-kept // loader.batch_size)  # type: ignore[operator]
        if few < 1:
            raise ValueError(f"{kept} samples are kept, less than one batch; drop_last=True leaves none of them")
        few = _limited(few, trainer) if self._selections else full
        every = trainer.accumulate_grad_batches
        steps = self.warmup * math.ceil(full / every) + (epochs - self.warmup) * math.ceil(few / every)
        self._limit = trainer.max_steps
        self.planned_steps = steps if self._limit < 0 else min(self._limit, steps)
        # Schedules ask the trainer for the number of steps; laid over the full run they would never come to their end.
        # It stands only while optimisers are built: a run limited by steps goes on differently from a checkpoint.
        trainer.fit_loop.epoch_loop.max_steps = self.planned_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the trainer its own limit back; the schedules are built."""
        trainer.fit_loop.epoch_loop.max_steps = self._limit

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the active set of a run that goes on."""
        if self._active is not None:
            sampler: ActiveSampler = self._loader(trainer).sampler  # type: ignore[assignment]
            sampler.active = self._active
            sampler.set_epoch(trainer.current_epoch)
            every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            trainer.fit_loop.setup_data()
            trainer.reload_dataloaders_every_n_epochs = every  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first epoch, the first look of a warm-up of one epoch; listen to training passes if they count."""
        self._place = 0
        if self.observe == "evaluation":
            if trainer.current_epoch == 0 and -1 in self._looks:
                self._look(trainer, pl_module)
        elif trainer.current_epoch in self._looks:
            self._old, self._new = self._new, None
            self._hook = pl_module.register_forward_hook(lambda module, inputs, output: self._captured.append(output))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; collect outputs; after the last batch of an epoch, measure and select if it is time."""
        loader = self._loader(trainer)
        sampler: ActiveSampler = loader.sampler  # type: ignore[assignment]
        rows = sampler.order[self._place : self._place + loader.batch_size]  # type: ignore[operator]
        self._place += len(rows)
        self.trained_samples += len(rows)
        if self._hook is not None:
            self._collect(rows, batch, sampler.size)
        if not trainer.is_last_batch:
            return
        epoch = trainer.current_epoch
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        elif epoch in self._looks:
            self._look(trainer, pl_module)
        if epoch in self._selections:
            began = time.perf_counter()
            sampler.active = self._choose(sampler, epoch, trainer.global_step)
            self.importance_s += time.perf_counter() - began
        for name in ("trained_samples", "evaluated_samples", "importance_s"):
            total = float(getattr(self, name))
            pl_module.log(name, total, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the trainer how many batches the next epoch has."""
        # A reload of the loader would do it too, but it draws from the global random number generator.
        trainer.fit_loop.max_batches = _limited(len(self._loader(trainer)), trainer)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(trainer.fit_loop.max_batches * trainer.val_check_interval))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on from the end of an epoch needs."""
        return {
            "active": self._active,
            "new": self._new,
            "old": self._old,
            "labels": self._labels,
            "counts": (self.trained_samples, self.evaluated_samples, self.importance_s),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._active = state_dict["active"]
        self._new, self._old, self._labels = (state_dict[name] for name in ("new", "old", "labels"))
        self.trained_samples, self.evaluated_samples, self.importance_s = state_dict["counts"]

    def _loader(self, trainer: L.Trainer) -> DataLoader[Any]:
        loader = trainer.train_dataloader
        if not isinstance(getattr(loader, "sampler", None), ActiveSampler) or loader.batch_size is None:  # type: ignore[union-attr]
            raise ValueError(
                "the training loader must be a DataLoader with a batch_size and sampler=ActiveSampler(len(dataset)), "
                f"got {type(loader).__name__}"
            )
        return loader  # type: ignore[return-value]

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        began = time.perf_counter()
        train = self._loader(trainer)
        batches: DataLoader[Any] = DataLoader(
            train.dataset,
            batch_size=self.batch_size or train.batch_size,
            collate_fn=train.collate_fn,
            num_workers=train.num_workers,
            # Its own generator: a loader without one draws from the global one.
            generator=epoch_generator(0, 0, "workers"),
        )
        self._old = self._new
        self._new, self._labels = evaluate_all(
            module,
            batches,
            self.outputs,
            self.targets if self.balanced or self.criterion.labels else None,
            lambda batch: trainer.strategy.batch_to_device(batch, module.device),
        )
        self.evaluated_samples += len(self._new)
        self.importance_s += time.perf_counter() - began

    def _collect(self, rows: Tensor, batch: Any, size: int) -> None:
        captured, self._captured = self._captured, []
        if len(captured) != 1 or len(captured[0]) != len(rows):
            raise ValueError(
                f"observe='training' needs a training_step that calls the module once on the batch of {len(rows)}, got "
                f"{len(captured)} calls; use observe='evaluation'"
            )
        found = _kept(captured[0].detach())
        if self._new is None:
            self._new = found.new_full((size, *found.shape[1:]), float("nan"))
        self._new[rows] = found
        if self.balanced or self.criterion.labels:
            if self._labels is None:
                self._labels = torch.zeros(size, dtype=torch.int64)
            self._labels[rows] = self.targets(batch).cpu()

    def _choose(self, sampler: ActiveSampler, epoch: int, step: int) -> Tensor:
        if self.criterion.score is None:
            importance = torch.rand(sampler.size, generator=epoch_generator(sampler.seed, epoch, "importance"))
        else:
            if self.criterion.classes and self._new is not None and self._new.shape[1] < 2:
                raise ValueError(
                    "this criterion needs the logits of two classes or more, got one output a sample; for a regression "
                    "use criterion='logit_change'"
                )
            importance = self.criterion.score(self._new, self._old, self._labels)
            if self.observe == "training":
                # Samples of batches that were left out were never seen; they rank last.
                importance = importance.nan_to_num(nan=float("-inf"))
            elif torch.isnan(importance).any():
                raise Diverged(step, float("nan"))
            self.importance = importance
        self._active = select(importance, self.keep, self._labels if self.balanced else None)
        return self._active


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and random numbers of its own; afterwards every submodule and generator is as before."""
    modes = [(part, part.training) for part in module.modules()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices], enabled=True):
        try:
            module.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training


def _limited(batches: int, trainer: L.Trainer) -> int:
    """Batches that the trainer takes of an epoch."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))


def _kept(outputs: Tensor) -> Tensor:
    """Outputs as they are kept: on the CPU, ``(B, C)``, not in half precision."""
    outputs = outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    return (outputs if outputs.ndim > 1 else outputs[:, None]).cpu()


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of the samples that stay, above 0 and at most 1, got {keep}")


def _check_refresh(refresh: int) -> None:
    if refresh < 0:
        raise ValueError(f"refresh counts epochs and must be at least 0, got {refresh}")
