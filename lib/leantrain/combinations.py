"""Which techniques can share one training run: every pair tried for a few epochs on the digits.

A pair *trains* if the loss on the validation images falls below `MARK`, half of what guessing costs, and each technique
has left its trace in the run: a run without an error is no proof that both were at work. A pair may try a few shares of
its optimiser's rate, `SHARES`, and the first that trains counts.

`python -m leantrain.combinations` tries all pairs and writes `book/combinations.json`, from which the book's page is
made.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import lightning as L
import torch

from leantrain import paths
from leantrain.experiment import _quiet  # a public name there would make all published runs stale
from leantrain.low_rank.factors import factors_of
from leantrain.studies.stacking import SWITCHES, Stack, StackedClassifier, active_images, stacked
from leantrain.techniques.adan import Adan
from leantrain.techniques.clars import CLARS
from leantrain.techniques.gqkva import GroupedAttention
from leantrain.techniques.progressive_layer_dropping import ProgressiveStack
from leantrain.techniques.skipvit import SkipBlocks
from leantrain.techniques.swiftlearn import SwiftLearn
from leantrain.training.diverged import Diverged
from leantrain.training.vit import small_vit

__all__ = ["CHAPTERS", "EPOCHS", "MARK", "RATES", "SHARES", "Outcome", "pairs", "stored", "try_out", "write_all"]

#: The chapter of each technique.
CHAPTERS = {
    "SkipViT": "skipvit",
    "GQKVA": "gqkva",
    "SwiftLearn": "swiftlearn",
    "layer dropping": "progressive-layer-dropping",
    "low rank": "lrd-rank-freeze",
    "Adan": "adan",
    "CLARS": "clars",
    "sharpness-aware": "hardware-aware-resnet9",
}
EPOCHS = 6
#: Mean cross-entropy of the validation images below which a run has learned: half of what guessing among ten costs.
MARK = math.log(10) / 2
#: Peak rate of each optimiser, from its chapter, and the shares of it that a pair may try, in this order.
RATES = {"adamw": 1e-2, "adan": 2e-2, "clars": 20.0}
SHARES = (1.0, 0.25, 0.0625)
_VIT = {"image_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "dim": 36, "depth": 4, "heads": 6}


@dataclass(frozen=True)
class Outcome:
    """What became of techniques that were tried together.

    Attributes:
        techniques: Their names; none for plain training.
        trains: Whether the loss fell below the mark and every technique left its trace.
        loss: Mean cross-entropy of the validation images at the end; None if no run was made or it diverged.
        share: Share of the optimiser's rate that the run had.
        traces: What each technique left in the run.
        reason: Why it does not train; empty if it does.
    """

    techniques: tuple[str, ...]
    trains: bool
    loss: float | None
    share: float
    traces: dict[str, str]
    reason: str = ""


class _Watch(L.Callback):
    """Notes how many blocks ran in every step, and which factors trained in every epoch."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.trained: dict[int, set[str]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ran += [sum(stack.gates) for stack in pl_module.modules() if isinstance(stack, ProgressiveStack)]
        factors = {f"{name}.{i}": f for name, pair in factors_of(pl_module).items() for i, f in enumerate(pair)}
        # In one step, layers that were dropped have no gradient either.
        seen = self.trained.setdefault(trainer.current_epoch, set())
        seen.update(name for name, factor in factors.items() if cast(torch.Tensor, factor.weight).grad is not None)


@dataclass(frozen=True)
class _Run:
    """A finished run, for those who look for traces in it."""

    module: StackedClassifier
    watch: _Watch
    images: torch.Tensor
    steps: int
    samples: int

    def callback(self, kind: type[Any]) -> Any:
        return next(c for c in cast(Any, self.module.trainer).callbacks if isinstance(c, kind))

    def parts(self, kind: type[Any]) -> list[Any]:
        return [part for part in self.module.modules() if isinstance(part, kind)]


# Each returns what it found as text, or None if the technique has left no trace.


def _of_skipvit(run: _Run) -> str | None:
    (blocks,) = run.parts(SkipBlocks)
    patches = cast(Any, run.module.model).patch_embed.num_patches

    def kept() -> torch.Tensor:
        with torch.no_grad():
            run.module(run.images)
        return blocks.kept

    run.module.eval()
    chosen = kept()
    # A random choice is another one each time; one that ignores the image is the same for all.
    if not torch.equal(chosen, kept()) or len(chosen.unique(dim=0)) == 1 or chosen.shape[1] >= patches:
        return None
    return f"{chosen.shape[1]} of {patches} patches stay, chosen by attention"


def _of_gqkva(run: _Run) -> str | None:
    grouped = [part for part in run.parts(GroupedAttention) if part.n_q + part.n_kv < 2 * part.num_heads]
    return f"{len(grouped)} of {_VIT['depth']} attention layers grouped" if grouped else None


def _of_swiftlearn(run: _Run) -> str | None:
    seen, whole = run.callback(SwiftLearn).trained_samples, EPOCHS * run.samples
    return f"trained on {seen:,} samples, not {whole:,}" if seen < whole else None


def _of_layer_dropping(run: _Run) -> str | None:
    (stack,) = run.parts(ProgressiveStack)
    mean = sum(run.watch.ran) / len(run.watch.ran)
    return f"{mean:.1f} of {len(stack)} blocks ran" if mean < len(stack) else None


def _of_low_rank(run: _Run) -> str | None:
    pairs = factors_of(run.module.model)
    odd, even = (set[str]().union(*(run.watch.trained[e] for e in range(start, EPOCHS, 2))) for start in (1, 0))
    if not (len(odd) == len(even) == len(pairs) > 0 and odd.isdisjoint(even)):
        return None
    return f"{len(pairs)} layers decomposed, halves trained in turns"


def _of_adan(run: _Run) -> str | None:
    optimizer = _optimizer(run)
    if not isinstance(optimizer, Adan) or not any(s["exp_avg_diff"].any() for s in optimizer.state.values()):
        return None
    return "averages of gradient differences kept"


def _of_clars(run: _Run) -> str | None:
    optimizer = _optimizer(run)
    if not isinstance(optimizer, CLARS) or len({round(r, 6) for r in optimizer.ratios().values()}) < 2:
        return None
    return "each layer at a rate of its own"


def _of_sharpness(run: _Run) -> str | None:
    return f"{run.module.passes} gradients in {run.steps} steps" if run.module.passes == 2 * run.steps else None


_TRACES: dict[str, Callable[[_Run], str | None]] = {
    "SkipViT": _of_skipvit,
    "GQKVA": _of_gqkva,
    "SwiftLearn": _of_swiftlearn,
    "layer dropping": _of_layer_dropping,
    "low rank": _of_low_rank,
    "Adan": _of_adan,
    "CLARS": _of_clars,
    "sharpness-aware": _of_sharpness,
}


def _optimizer(run: _Run) -> Any:
    return cast(Any, run.module.optimizers()).optimizer


def pairs() -> list[tuple[str, ...]]:
    """Nothing, each technique alone, and all pairs, in the order of the switches."""
    return [(), *((name,) for name in SWITCHES), *itertools.combinations(SWITCHES, 2)]


def try_out(techniques: Sequence[str]) -> Outcome:
    """Train a small vision transformer on the digits with some techniques.

    Args:
        techniques: Names in `SWITCHES`.

    Returns:
        What became of it, at the first share of the rate that trains, or at the last one.

    Raises:
        ValueError: If a name is unknown.
    """
    names = tuple(techniques)
    for name in names:
        stacked([name])
    try:
        stack = stacked(names)
    except ValueError as error:
        return Outcome(names, False, None, 1.0, {}, str(error))
    outcome = Outcome(names, False, None, 1.0, {})
    for share in SHARES:
        outcome = _train(names, stack, share)
        if outcome.trains:
            break
    return outcome


def _train(names: tuple[str, ...], stack: Stack, share: float) -> Outcome:
    data = active_images("digits", batch_size=64)
    L.seed_everything(0, verbose=False)
    model = small_vit(**_VIT, mlp_ratio=2.0)
    model.init_weights("jax")  # from timm's own start, narrow models stay on a plateau for most of so short a run
    # That start leaves the head at zero, where an optimiser that steps in proportion to the weights keeps it for good.
    torch.nn.init.trunc_normal_(cast(torch.nn.Linear, model.head).weight, std=0.02)
    module = StackedClassifier(model, stack, rate=share * RATES[stack.optimizer], num_classes=10)
    data.set_seed(0)
    watch = _Watch()
    with _quiet():
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[watch],
            check_val_every_n_epoch=EPOCHS,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic=True,
        )
        try:
            trainer.fit(module, datamodule=data)
        except Diverged:
            return Outcome(names, False, None, share, {}, "the loss is not finite")
    loss = float(trainer.callback_metrics["val_loss"])
    images = next(iter(data.val_dataloader()))[0]
    run = _Run(module, watch, images, trainer.global_step, len(data.train))  # type: ignore[arg-type]
    found = {name: _TRACES[name](run) for name in names}
    missing = [name for name, trace in found.items() if trace is None]
    reason = f"{' and '.join(missing)} left no trace" if missing else "" if loss < MARK else "the loss stays high"
    traces = {name: trace for name, trace in found.items() if trace is not None}
    return Outcome(names, not reason, round(loss, 2), share, traces, reason)


def stored() -> list[Outcome]:
    """The outcomes that the book shows.

    Raises:
        FileNotFoundError: If the book's file of outcomes is missing.
    """
    rows = json.loads(paths.COMBINATIONS.read_text(encoding="utf-8"))["outcomes"]
    return [Outcome(**row | {"techniques": tuple(row["techniques"])}) for row in rows]


def write_all() -> None:
    """Try everything and write the book's file of outcomes."""
    outcomes = [asdict(try_out(names)) for names in pairs()]
    found = {"epochs": EPOCHS, "mark": round(MARK, 4), "chapters": CHAPTERS, "outcomes": outcomes}
    paths.write_atomically(paths.COMBINATIONS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write_all()
