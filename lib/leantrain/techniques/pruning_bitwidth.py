r"""Unstructured pruning, fewer bits, and convolutions that skip the zeros.

Paper: Pietroń, Żurek, "Speedup deep learning models on GPU by taking advantage of efficient unstructured pruning and
bit-width reduction", arXiv 2112.15445. Its kernels and settings were not available to us; the forms below are ours.

*Pruning.* The smallest weights are set to zero while the network is trained on. With :math:`e` the share of the ramp
that is over, the sparsity follows a cubic and the masks only grow:

.. math:: s(e) = s^{\text{final}} \bigl(1 - (1 - \min(1, e))^3\bigr), \qquad M = \mathbb 1[\,|W| > t\,] ,

where :math:`t` is the :math:`s`-quantile of all :math:`|W|` together, or of each layer's. After every optimiser step
:math:`W \leftarrow W \odot M`: momentum and weight decay would bring pruned weights back.

*Fewer bits.* Linear, for each output channel: :math:`\Delta_c = \max_j |W_{cj}| / (2^{b-1} - 1)` and
:math:`\hat W = \Delta_c \operatorname{round}(W / \Delta_c)`. Or a codebook: :math:`2^b - 1` values found by k-means
among the non-zero weights, and an exact zero. Both leave zeros zero.

*Direct sparse convolution.* The input is padded with zeros to :math:`H_p \times W_p` and laid flat. Each weight
:math:`w` at :math:`(o, c, r, s)` that is left adds a shifted row of it to output plane :math:`o`:

.. math:: y[o, p] \mathrel{+}= w \cdot x\bigl[(c H_p + r) W_p + s + p\bigr], \qquad p = h W_p + w' .

No matrix of patches is built. `DirectConv2d` does this in a compiled loop, `ShiftedCSRConv2d` with PyTorch's sparse
matrices. Both are for inference on a processor, at stride 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import numba
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from leantrain.measure.timing import PairedTiming, paired_timing
from leantrain.training.image_classifier import ImageClassifier

__all__ = [
    "Codebook",
    "CostModel",
    "DirectConv2d",
    "GradualPruning",
    "LinearCode",
    "PruningClassifier",
    "ShiftedCSRConv2d",
    "SparseRows",
    "accuracy",
    "apply_masks",
    "bearable",
    "break_even_sparsity",
    "bsr_bytes",
    "codebook",
    "crossover",
    "csr_bytes",
    "cubic_sparsity",
    "dense_arm",
    "int8_convolution",
    "linear_code",
    "magnitude_masks",
    "prunable",
    "prune_randomly",
    "quantise_inputs",
    "quantise_weights",
    "sensitivity_scan",
    "sparsity_of",
    "time_convolution",
    "two_of_four_bytes",
]

Scope = Literal["global", "layer"]
Kind = Literal["linear", "codebook"]

# ---------------------------------------------------------------------------------------------------------- pruning


def prunable(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The weights that may be pruned: those of convolutions and linear layers, never biases or normalisations.

    Args:
        model: Any model.
        skip: Names of layers to leave out.

    Returns:
        Name of the layer -> its weight, in the model's order; a weight that two layers share stands once.

    Raises:
        ValueError: If a name in `skip` is no such layer, or nothing is left.
    """
    found: dict[str, nn.Parameter] = {}
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            names.add(name)
            if name not in skip and not any(module.weight is weight for weight in found.values()):
                found[name] = module.weight
    if unknown := [name for name in skip if name not in names]:
        raise ValueError(f"skip names {unknown}; the layers are {', '.join(sorted(names))}")
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer that could be pruned")
    return found


def cubic_sparsity(progress: float, final: float) -> float:
    """The sparsity on the way to the final one: fast at first, slow at the end.

    Args:
        progress: Share of the ramp that is over, at least 0; from 1 on the final sparsity is returned.
        final: Sparsity at the end, at least 0 and below 1.

    >>> [round(cubic_sparsity(e / 4, 0.9), 3) for e in range(5)]
    [0.0, 0.52, 0.787, 0.886, 0.9]
    """
    _check_sparsity(final)
    if not progress >= 0:
        raise ValueError(f"progress is {progress}; expected at least 0")
    return final * (1 - (1 - min(1.0, progress)) ** 3)


@torch.no_grad()
def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "global",
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks that leave the largest weights.

    `torch.nn.utils.prune` does the same once, but renames the parameters of the model, so that its weights could not
    be loaded into an ordinary one.

    Args:
        weights: Name -> weight, from `prunable`.
        sparsity: Share of weights to prune, at least 0 and below 1, rounded to whole weights; or one for each name.
        scope: `global` ranks all weights together, `layer` each layer by itself. A sparsity for each name is always
            `layer`.
        kept: Masks that may only grow: what they have pruned stays pruned, and is counted.

    Returns:
        Name -> booleans of the weight's shape, False where a weight is pruned.

    Raises:
        ValueError: If a sparsity is out of range, names differ, or the scope is unknown.
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is {scope!r}; expected 'global' or 'layer'")
    if isinstance(sparsity, Mapping):
        if set(sparsity) != set(weights):
            raise ValueError(f"sparsity is given for {sorted(sparsity)}; the weights are {sorted(weights)}")
        groups = [([name], sparsity[name]) for name in weights]
    else:
        groups = [([name], sparsity) for name in weights] if scope == "layer" else [(list(weights), sparsity)]
    masks: dict[str, Tensor] = {}
    for names, share in groups:
        _check_sparsity(share)
        # Pruned weights come first in the order, whatever they hold.
        sizes = {name: _size_of(weights[name], None if kept is None else kept[name]) for name in names}
        flat = torch.cat(list(sizes.values()))
        mask = torch.ones_like(flat, dtype=torch.bool)
        mask[flat.topk(round(share * flat.numel()), largest=False, sorted=False).indices] = False
        for name, part in zip(names, mask.split([size.numel() for size in sizes.values()]), strict=True):
            masks[name] = part.view(weights[name].shape)
            if kept is not None:
                masks[name] &= kept[name]
    return masks


def _size_of(weight: Tensor, kept: Tensor | None) -> Tensor:
    size = weight.detach().abs()
    return (size if kept is None else size.masked_fill(~kept, -1.0)).reshape(-1)


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set what the masks have pruned to zero, in place; weights without a mask stay."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask, 0.0)


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros among the weights, 0 to 1."""
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


class GradualPruning(L.Callback):
    """Prune the `model` of a Lightning module while it is trained.

    During the ramp the masks grow every few optimiser steps; then they stand still, and the network recovers. The
    masks are applied after every optimiser step, so pruned weights stay zero whatever the optimiser remembers. At a
    sparsity of 0 the run is the one without this callback, to the last bit.

    After each validation the module logs `sparsity`, in %.

    Args:
        sparsity: Final share of pruned weights, at least 0 and below 1, or one for each layer by name.
        ramp: Share of the run's optimiser steps in which the sparsity grows, 0 to 1; 0 prunes at once before the
            first step.
        every: Optimiser steps between two growths, at least 1.
        scope: See `magnitude_masks`.
        skip: Names of layers that are never pruned.

    Attributes:
        masks: Name -> mask, as far as anything is pruned; part of a checkpoint. A second run goes on with them.

    Raises:
        ValueError: If an argument is out of range; at the start of a run, if it has no end or the names do not fit.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        ramp: float = 0.6,
        every: int = 10,
        scope: Scope = "global",
        skip: Collection[str] = (),
    ) -> None:
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            _check_sparsity(share)
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp is {ramp}; expected 0 to 1")
        if every < 1:
            raise ValueError(f"every is {every}; expected at least 1 step")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope is {scope!r}; expected 'global' or 'layer'")
        self.sparsity, self.ramp, self.every, self.scope, self.skip = sparsity, ramp, every, scope, tuple(skip)
        self.masks: dict[str, Tensor] = {}
        self._ramp_steps = self._seen = 0
        self._weights: dict[str, nn.Parameter] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay the ramp over the run; without one, prune now."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the ramp needs the length of the run: give the Trainer max_epochs or max_steps")
        self._ramp_steps, self._seen = round(self.ramp * total), trainer.global_step
        if not isinstance(pl_module.model, nn.Module):
            raise ValueError(f"the module's `model` must be a torch module, got {type(pl_module.model).__name__}")
        self._weights = weights = prunable(pl_module.model, self.skip)
        if isinstance(self.sparsity, Mapping) and set(self.sparsity) != set(weights):
            raise ValueError(f"sparsity is given for {sorted(self.sparsity)}; the layers are {sorted(weights)}")
        self.masks = {name: mask.to(pl_module.device) for name, mask in self.masks.items()}
        if self._ramp_steps == 0:
            self._grow(weights, 1.0)
        apply_masks(weights, self.masks)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: grow the masks if it is time, and apply them."""
        step = trainer.global_step
        if step == self._seen:  # gradients are being accumulated
            return
        self._seen = step
        if step <= self._ramp_steps and (step % self.every == 0 or step == self._ramp_steps):
            self._grow(self._weights, step / self._ramp_steps)
        apply_masks(self._weights, self.masks)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the sparsity, in %."""
        if self._weights:
            pl_module.log("sparsity", 100 * sparsity_of(self._weights))

    def state_dict(self) -> dict[str, Any]:
        """The masks, for a checkpoint."""
        return {"masks": self.masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint."""
        self.masks = dict(state_dict["masks"])

    def _grow(self, weights: Mapping[str, Tensor], progress: float) -> None:
        final = self.sparsity
        now: float | dict[str, float]
        if isinstance(final, Mapping):
            now = {name: cubic_sparsity(progress, share) for name, share in final.items()}
            nothing = not any(now.values())
        else:
            now = cubic_sparsity(progress, final)
            nothing = now == 0
        if not nothing:
            self.masks = magnitude_masks(weights, now, scope=self.scope, kept=self.masks or None)


class PruningClassifier(ImageClassifier):
    """An image classifier that is pruned while it is trained.

    Args:
        model: Maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``.
        optimizer: See `leantrain.training.ImageClassifier`.
        pruning: What is pruned and when.
        num_classes: Number of classes.
        warmup_fraction: Share of the optimiser steps that warm up.
        label_smoothing: Share of the target that is spread over all classes.
        channels_last: See `leantrain.training.ImageClassifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        pruning: GradualPruning,
        num_classes: int,
        warmup_fraction: float = 0.1,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            num_classes=num_classes,
            warmup_fraction=warmup_fraction,
            label_smoothing=label_smoothing,
            channels_last=channels_last,
        )
        self.pruning = pruning

    def configure_callbacks(self) -> list[L.Callback]:
        """Hand the pruning to the trainer."""
        return [self.pruning]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of hits in %, in evaluation mode; the model is in its former mode afterwards.

    Args:
        model: Maps images ``(B, C, H, W)`` to logits.
        batches: Pairs of images and classes, at least one image in all.
    """
    was_training = model.training
    model.eval()
    hits = seen = 0
    for x, y in batches:
        hits += int((model(x).argmax(1) == y).sum())
        seen += len(y)
    model.train(was_training)
    if not seen:
        raise ValueError("batches is empty: there is nothing to classify")
    return 100 * hits / seen


@torch.no_grad()
def sensitivity_scan(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    *,
    skip: Collection[str] = (),
) -> pd.DataFrame:
    """Prune one layer at a time, without retraining, and see what it costs.

    Args:
        model: A trained model; its weights are as before afterwards, also if `score` fails.
        score: Of the model, higher is better; it must not train.
        sparsities: What to try in each layer.
        skip: Names of layers to leave alone.

    Returns:
        One row a layer and sparsity: layer, weights (their number), sparsity, score, drop (score of the whole model
        minus this one).
    """
    whole, rows = score(model), []
    for name, weight in prunable(model, skip).items():
        kept = weight.detach().clone()
        try:
            for sparsity in sparsities:
                apply_masks({name: weight}, magnitude_masks({name: kept}, sparsity))
                here = score(model)
                rows.append((name, weight.numel(), sparsity, here, whole - here))
                weight.copy_(kept)
        finally:
            weight.copy_(kept)
    return pd.DataFrame(rows, columns=["layer", "weights", "sparsity", "score", "drop"])


def bearable(scan: pd.DataFrame, most: float = 1.0) -> dict[str, float]:
    """The largest sparsity that each layer bears by itself.

    Args:
        scan: From `sensitivity_scan`.
        most: Drops below this count as borne.

    Returns:
        Layer -> sparsity, 0 where none is borne. The sum of what layers lose is not what they lose together.
    """
    borne = scan["sparsity"].where(scan["drop"] < most, 0.0).groupby(scan["layer"], sort=False).max()
    return {str(name): float(value) for name, value in borne.items()}


@torch.no_grad()
def prune_randomly(conv: nn.Conv2d, sparsity: float, *, seed: int = 0) -> nn.Conv2d:
    """A copy of a convolution in which exactly the given share of weights, at random places, is zero."""
    _check_sparsity(sparsity)
    weight = conv.weight.detach().clone(memory_format=torch.contiguous_format)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[places[: round(sparsity * weight.numel())]] = 0.0
    made = _like(conv)
    made.weight.copy_(weight)
    return made


def _like(conv: nn.Conv2d) -> nn.Conv2d:
    made = nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None, conv.padding_mode, dtype=conv.weight.dtype,
    )  # fmt: skip
    if conv.bias is not None:
        with torch.no_grad():
            made.bias.copy_(conv.bias)
    return made


# ------------------------------------------------------------------------------------------------------- fewer bits


@dataclass(frozen=True, eq=False)
class LinearCode:
    """A weight as whole numbers, one step size for each output channel.

    Attributes:
        codes: (C, ...) whole numbers, at most 2^(bits-1) - 1 in size.
        steps: (C,) what one unit is worth; 0 in a channel of zeros.
        bits: Bits of a code.
    """

    codes: Tensor
    steps: Tensor
    bits: int

    def decode(self) -> Tensor:
        """The weight that the codes stand for, (C, ...), in the type of the steps."""
        return self.codes.to(self.steps.dtype) * self.steps.view(-1, *[1] * (self.codes.ndim - 1))


@dataclass(frozen=True, eq=False)
class Codebook:
    """A weight as places in a short list of values, the first of which is zero.

    Attributes:
        indices: Places in the list, of the weight's shape.
        values: The list, at most 2^bits values.
        bits: Bits of a place.
    """

    indices: Tensor
    values: Tensor
    bits: int

    def decode(self) -> Tensor:
        """The weight that the places stand for."""
        return self.values[self.indices.long()]


@torch.no_grad()
def linear_code(weight: Tensor, bits: int = 8) -> LinearCode:
    """Round a weight to multiples of a step, symmetric about zero, one step for each output channel.

    Args:
        weight: (C, ...), floating point.
        bits: Bits of a code, 2 to 32.

    Returns:
        The code; no weight is off by more than half a step, and zeros stay zeros.

    Raises:
        ValueError: If the number of bits is out of range.

    >>> code = linear_code(torch.tensor([[0.5, -1.27, 0.0, 1.0]]))
    >>> code.codes.tolist(), round(code.steps.item(), 6)
    ([[50, -127, 0, 100]], 0.01)
    """
    _check_bits(bits, 32)
    most = 2 ** (bits - 1) - 1
    exact = weight.detach().double()
    steps = exact.abs().flatten(1).amax(dim=1) / most
    # A channel of zeros has no step; dividing by 1 instead gives zeros.
    divisor = torch.where(steps > 0, steps, 1.0).view(-1, *[1] * (weight.ndim - 1))
    codes = (exact / divisor).round().clamp(-most, most)
    kind = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
    return LinearCode(codes.to(kind), steps.to(weight.dtype), bits)


@torch.no_grad()
def codebook(weight: Tensor, bits: int = 4, *, sweeps: int = 100) -> Codebook:
    """Replace every non-zero weight by the nearest of a few values, found by k-means in one dimension.

    The means start evenly spread over the negative and the positive weights that are left, so that large weights, which
    are few, get values too, and the gap that pruning tears around zero gets none.

    Args:
        weight: Floating point, any shape.
        bits: Bits of a place, 1 to 16. Of the 2^bits places one is for zero.
        sweeps: Most sweeps of k-means; it stops when nothing moves.

    Returns:
        The codebook. Values that no weight uses stay where they started.

    Raises:
        ValueError: If the number of bits is out of range or there is no sweep.
    """
    _check_bits(bits, 16, least=1)
    if sweeps < 1:
        raise ValueError(f"sweeps is {sweeps}; expected at least 1")
    flat = weight.detach().reshape(-1).double().cpu()
    there = flat != 0
    ordered = flat[there].sort().values
    indices = torch.zeros(flat.numel(), dtype=torch.int32)
    values = torch.zeros(2**bits, dtype=torch.float64)
    if len(ordered):
        means = _spread(ordered, 2**bits - 1)
        sums = F.pad(ordered.cumsum(0), (1, 0))
        for _ in range(sweeps):
            # In sorted order a cluster is a stretch, which ends half-way to the next mean.
            ends = F.pad(torch.searchsorted(ordered, (means[1:] + means[:-1]) / 2), (1, 1))
            ends[-1] = len(ordered)
            count = ends.diff()
            moved = torch.where(count > 0, sums[ends].diff() / count.clamp(min=1), means)
            if torch.equal(moved, means):
                break
            means = moved
        values[1:] = means
        indices[there] = 1 + torch.searchsorted((means[1:] + means[:-1]) / 2, flat[there]).int()
    small = indices.to(torch.uint8) if bits <= 8 else indices
    return Codebook(small.view(weight.shape).to(weight.device), values.to(weight), bits)


def _spread(ordered: Tensor, count: int) -> Tensor:
    """Evenly spaced values from the smallest to the largest, as if there were no gap around zero."""
    low, high = float(ordered[0]), float(ordered[-1])
    below, above = ordered[ordered < 0], ordered[ordered > 0]
    if not (len(below) and len(above)):
        return torch.linspace(low, high, count, dtype=torch.float64)
    gap, negative = float(above[0] - below[-1]), float(below[-1]) - low
    along = torch.linspace(0, high - low - gap, count, dtype=torch.float64)
    return low + along + torch.where(along > negative, gap, 0.0)


@torch.no_grad()
def quantise_weights(
    model: nn.Module, bits: int, *, kind: Kind = "linear", skip: Collection[str] = ()
) -> dict[str, LinearCode | Codebook]:
    """Give the weights of convolutions and linear layers fewer bits, in place.

    The model computes in floating point with what the codes stand for; its accuracy is that of the coded network.

    Args:
        model: A trained, perhaps pruned model.
        bits: Bits of a weight.
        kind: `linear` or `codebook`.
        skip: Names of layers that stay as they are.

    Returns:
        Layer -> its code.

    Raises:
        ValueError: If the kind is unknown or the bits are out of range.
    """
    if kind not in ("linear", "codebook"):
        raise ValueError(f"kind is {kind!r}; expected 'linear' or 'codebook'")
    codes: dict[str, LinearCode | Codebook] = {}
    for name, weight in prunable(model, skip).items():
        codes[name] = linear_code(weight, bits) if kind == "linear" else codebook(weight, bits)
        weight.copy_(codes[name].decode())
    return codes


@torch.no_grad()
def quantise_inputs(
    model: nn.Module, batches: Iterable[Tensor], bits: int = 8, *, skip: Collection[str] = ()
) -> list[RemovableHandle]:
    """Round the inputs of convolutions and linear layers to few levels, from now on.

    The largest inputs that the batches show decide the steps; larger ones are cut off later. Inputs that are never
    negative, as behind ReLU, get 2^bits - 1 steps; others are treated as `linear_code` treats weights, with one step.
    Calibrate after pruning and after the weights have been quantised.

    Args:
        model: The model; it runs in evaluation mode here.
        batches: Images to calibrate on, at least one batch.
        bits: Bits of an input, 2 to 16.
        skip: Names of layers whose inputs stay as they are.

    Returns:
        Handles; ``handle.remove()`` on each gives the model its own inputs back.

    Raises:
        ValueError: If the bits are out of range or there is no batch.
    """
    _check_bits(bits, 16)
    layers = {name: model.get_submodule(name) for name in prunable(model, skip)}
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low[name] = min(low.get(name, math.inf), float(inputs[0].min()))
            high[name] = max(high.get(name, -math.inf), float(inputs[0].max()))

        return hook

    watching = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        model.eval()
        for batch in batches:
            model(batch)
    finally:
        model.train(was_training)
        for handle in watching:
            handle.remove()
    if not low:
        raise ValueError("batches is empty: the range of the inputs is not known")
    handles = []
    for name, smallest in low.items():
        levels = 2**bits - 1 if smallest >= 0 else 2 ** (bits - 1) - 1
        step = max(high[name], -smallest) / levels
        if step > 0:
            rounded = partial(_rounded, step=step, low=0 if smallest >= 0 else -levels, high=levels)
            handles.append(layers[name].register_forward_pre_hook(rounded))
    return handles


def _rounded(module: nn.Module, inputs: tuple[Tensor, ...], *, step: float, low: int, high: int) -> tuple[Tensor, ...]:
    return ((inputs[0] / step).round().clamp(low, high) * step, *inputs[1:])


# ---------------------------------------------------------------------------------------------------------- storage


def csr_bytes(nonzeros: int, rows: int, value_bytes: float, index_bytes: float) -> float:
    """Bytes of compressed sparse rows: values, a column for each, and rows + 1 pointers of four bytes.

    Args:
        nonzeros: Values that are left.
        rows: Rows of the matrix, that is, output channels.
        value_bytes: Bytes of a value, above 0; a fraction for fewer than eight bits.
        index_bytes: Bytes of a column index.
    """
    _check_counts(nonzeros=nonzeros, rows=rows)
    _check_positive(value_bytes=value_bytes, index_bytes=index_bytes)
    return nonzeros * (value_bytes + index_bytes) + 4 * (rows + 1)


def bsr_bytes(blocks: int, block: int, rows: int, value_bytes: float, index_bytes: float) -> float:
    """Bytes of block sparse rows: dense blocks, a block column for each, and a pointer for each row of blocks.

    Args:
        blocks: Blocks that hold a non-zero.
        block: Rows and columns of a block, a divisor of `rows`.
        rows: Rows of the matrix.
        value_bytes: Bytes of a value.
        index_bytes: Bytes of a block column.
    """
    _check_counts(blocks=blocks, block=block, rows=rows)
    _check_positive(value_bytes=value_bytes, index_bytes=index_bytes)
    if block < 1 or rows % block:
        raise ValueError(f"block is {block}; expected a divisor of the {rows} rows")
    return blocks * (block**2 * value_bytes + index_bytes) + 4 * (rows // block + 1)


def two_of_four_bytes(weights: int, value_bytes: float) -> float:
    """Bytes if of every four weights two are kept, each with its place in two bits: always half of them are zero."""
    _check_counts(weights=weights)
    _check_positive(value_bytes=value_bytes)
    return weights * (value_bytes / 2 + 1 / 8)


def break_even_sparsity(value_bytes: float, index_bytes: float) -> float:
    """The sparsity from which on compressed sparse rows are smaller than the dense matrix, pointers left out.

    >>> break_even_sparsity(4, 4), round(break_even_sparsity(1, 2), 4)
    (0.5, 0.6667)
    """
    _check_positive(value_bytes=value_bytes, index_bytes=index_bytes)
    return index_bytes / (value_bytes + index_bytes)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix as compressed sparse rows, with an index type of one's choice.

    PyTorch's own takes 32- and 64-bit indices only.

    Attributes:
        values: (nnz,) what is left, row by row.
        columns: (nnz,) its columns.
        pointers: (rows + 1,) int32, where each row starts, and the end.
        width: Columns of the matrix.
    """

    values: NDArray[Any]
    columns: NDArray[Any]
    pointers: NDArray[np.int32]
    width: int

    @classmethod
    def of(cls, weight: Tensor, index: type[np.integer[Any]] = np.int32) -> SparseRows:
        """Compress a weight (C, ...), flattened to C rows.

        Raises:
            ValueError: If the type of the index is too small for the columns.
        """
        matrix = weight.detach().cpu().flatten(1).numpy()
        width, most = matrix.shape[1], int(np.iinfo(index).max)
        if width - 1 > most:
            raise ValueError(
                f"a row has {width} columns and {np.dtype(index).name} counts to {most}: give a wider index"
            )
        rows, columns = np.nonzero(matrix)
        pointers = np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int32)
        return cls(matrix[rows, columns], columns.astype(index), pointers, width)

    def dense(self) -> NDArray[Any]:
        """The matrix, (rows, width)."""
        matrix = np.zeros((len(self.pointers) - 1, self.width), dtype=self.values.dtype)
        matrix[np.repeat(np.arange(len(matrix)), np.diff(self.pointers)), self.columns] = self.values
        return matrix

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.values.nbytes + self.columns.nbytes + self.pointers.nbytes


# ------------------------------------------------------------------------------------------------------ convolution


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile like `leantrain.kernels.compiled`, and let a product and a sum become one instruction.

    That rounds once instead of twice, which the emulators must not do; here it saves a sixth of the time.
    """
    try:
        return numba.njit(nogil=True, cache=True, fastmath={"contract"})(function)
    except RuntimeError:  # no folder for the cache, as in a read-only installation
        return numba.njit(nogil=True, fastmath={"contract"})(function)


@_fused
def _direct(
    values: NDArray[Any],
    offsets: NDArray[np.int32],
    pointers: NDArray[np.int32],
    x: NDArray[Any],
    pitch: int,
    bias: NDArray[Any],
    out: NDArray[Any],
    first: int,
    last: int,
    rows: int,
) -> None:
    """Output channels `first` to `last` of one image, `rows` output rows at a time.

    The sum of a tile stays in the nearest cache. Eight weights share one pass over it: its loads and stores would
    otherwise cost more than the products.
    """
    height, width = out.shape[1], out.shape[2]
    room = np.empty(rows * pitch, dtype=out.dtype)
    for top in range(0, height, rows):
        here = min(rows, height - top)
        start = top * pitch
        size = here * pitch
        tile = room[:size]
        for o in range(first, last):
            for p in range(size):
                tile[p] = bias[o]
            k, end = pointers[o], pointers[o + 1]
            while k + 8 <= end:
                w0, w1, w2, w3 = values[k], values[k + 1], values[k + 2], values[k + 3]
                w4, w5, w6, w7 = values[k + 4], values[k + 5], values[k + 6], values[k + 7]
                x0 = x[offsets[k] + start : offsets[k] + start + size]
                x1 = x[offsets[k + 1] + start : offsets[k + 1] + start + size]
                x2 = x[offsets[k + 2] + start : offsets[k + 2] + start + size]
                x3 = x[offsets[k + 3] + start : offsets[k + 3] + start + size]
                x4 = x[offsets[k + 4] + start : offsets[k + 4] + start + size]
                x5 = x[offsets[k + 5] + start : offsets[k + 5] + start + size]
                x6 = x[offsets[k + 6] + start : offsets[k + 6] + start + size]
                x7 = x[offsets[k + 7] + start : offsets[k + 7] + start + size]
                for p in range(size):
                    a = w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + w3 * x3[p]
                    tile[p] += a + w4 * x4[p] + w5 * x5[p] + w6 * x6[p] + w7 * x7[p]
                k += 8
            while k + 2 <= end:
                w0, w1 = values[k], values[k + 1]
                x0 = x[offsets[k] + start : offsets[k] + start + size]
                x1 = x[offsets[k + 1] + start : offsets[k + 1] + start + size]
                for p in range(size):
                    tile[p] += w0 * x0[p] + w1 * x1[p]
                k += 2
            if k < end:
                w0 = values[k]
                x0 = x[offsets[k] + start : offsets[k] + start + size]
                for p in range(size):
                    tile[p] += w0 * x0[p]
            for row in range(here):
                line = tile[row * pitch : row * pitch + width]
                target = out[o, top + row]
                for p in range(width):
                    target[p] = line[p]


#: Output pixels in a tile. Its sum takes 4 kB, and the inputs that it needs fit into the second cache for up to a few
#: hundred channels.
_TILE = 1024


class _SparseConv2d(nn.Module):
    """What the two direct convolutions share: which layers they take, and the padded input laid flat."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        settings = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
        for name, value in settings.items():
            if set(np.atleast_1d(value)) != {1}:
                raise ValueError(
                    f"{name} is {value}; the direct path takes 1 only. A 1x1 convolution of a larger stride is one of "
                    "stride 1 on every so many pixels of its input"
                )
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ValueError(f"padding is {conv.padding!r}, {conv.padding_mode}; expected numbers, and zeros")
        if conv.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the weight is {conv.weight.dtype}; expected float32 or float64")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel: tuple[int, int] = (conv.kernel_size[0], conv.kernel_size[1])
        self.padding: tuple[int, int] = (int(conv.padding[0]), int(conv.padding[1]))
        weight = conv.weight.detach().cpu().contiguous()
        self.nonzeros = int(weight.count_nonzero())
        bias = torch.zeros(conv.out_channels, dtype=weight.dtype) if conv.bias is None else conv.bias.detach().cpu()
        self.bias = bias.clone()
        self._take(weight)

    def _take(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _one(self, flat: Tensor, rows: int, pitch: int, out: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Convolve images.

        Args:
            x: (B, C, H, W) on the processor, in the weight's type; it gets no gradient.

        Returns:
            (B, C', H', W').

        Raises:
            ValueError: If channels, type, device or size do not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {self.in_channels}, H, W)")
        if x.dtype != self.bias.dtype or x.device.type != "cpu":
            raise ValueError(f"x is {x.dtype} on {x.device.type}; expected {self.bias.dtype} on cpu")
        rows, pitch = x.shape[2] + 2 * self.padding[0], x.shape[3] + 2 * self.padding[1]
        size = rows - self.kernel[0] + 1, pitch - self.kernel[1] + 1
        if min(size) < 1:
            raise ValueError(f"images of {tuple(x.shape[2:])} with padding {self.padding} are below the kernel's size")
        out = x.new_empty(len(x), self.out_channels, *size)
        for image, target in zip(x, out, strict=True):
            self._one(self._laid_flat(image, rows, pitch), rows, pitch, target)
        return out

    def _laid_flat(self, image: Tensor, rows: int, pitch: int) -> Tensor:
        """The padded planes one behind the other, and room for the last plane's last view, which runs over its end."""
        above, beside = self.padding
        if not (above or beside) and self.kernel[1] == 1:
            return image.contiguous().view(-1)
        flat = image.new_zeros(self.in_channels * rows * pitch + self.kernel[1] - 1)
        planes = flat[: self.in_channels * rows * pitch].view(self.in_channels, rows, pitch)
        planes[:, above : above + image.shape[1], beside : beside + image.shape[2]] = image
        return flat


def _as_csr(part: SparseRows) -> Tensor:
    arrays = (torch.from_numpy(array) for array in (part.pointers, part.columns, part.values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        # What `SparseRows` makes is sound; torch asks to be told.
        return torch.sparse_csr_tensor(*arrays, size=(len(part.pointers) - 1, part.width), check_invariants=False)


class ShiftedCSRConv2d(_SparseConv2d):
    r"""Direct sparse convolution with PyTorch's sparse matrices: one matrix for each place in the kernel.

    :math:`y = \sum_{r,s} A_{rs}\, x[\,\cdot\,, r W_p + s + p\,]` with :math:`A_{rs} = W[:, :, r, s]` in compressed rows
    and the input as a view. The columns that the padding adds to each row of the output are dropped at the end.

    Args:
        conv: The pruned convolution: stride 1, no groups, no dilation, padding with zeros, float32 or float64. Its
            weight is copied.

    Raises:
        ValueError: If the convolution is not of that kind.

    Example:
        >>> conv = prune_randomly(nn.Conv2d(8, 4, 3, padding=1), 0.9)
        >>> x = torch.randn(2, 8, 6, 5)
        >>> torch.allclose(ShiftedCSRConv2d(conv)(x), conv(x), atol=1e-6)
        True
    """

    def _take(self, weight: Tensor) -> None:
        self._parts = []
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                part = SparseRows.of(weight[:, :, row, column])
                if len(part.values):
                    self._parts.append((row, column, _as_csr(part)))

    def _one(self, flat: Tensor, rows: int, pitch: int, out: Tensor) -> None:
        positions = out.shape[1] * pitch
        total = self.bias[:, None].expand(-1, positions)
        for row, column, matrix in self._parts:
            start = flat.storage_offset() + row * pitch + column
            view = flat.as_strided((self.in_channels, positions), (rows * pitch, 1), start)
            total = torch.addmm(total, matrix, view)
        out.copy_(total.view(self.out_channels, out.shape[1], pitch)[:, :, : out.shape[2]])


class DirectConv2d(_SparseConv2d):
    """Direct sparse convolution in a compiled loop over the weights that are left.

    The output channels are shared out among as many threads as PyTorch uses, by their number of weights.

    Args:
        conv: The pruned convolution: stride 1, no groups, no dilation, padding with zeros, float32 or float64. Its
            weight is copied.

    Raises:
        ValueError: If the convolution is not of that kind.

    Example:
        >>> conv = prune_randomly(nn.Conv2d(8, 4, 3, padding=1), 0.9)
        >>> x = torch.randn(2, 8, 6, 5)
        >>> torch.allclose(DirectConv2d(conv)(x), conv(x), atol=1e-6)
        True
    """

    def _take(self, weight: Tensor) -> None:
        self._rows = SparseRows.of(weight)
        self._offsets: dict[tuple[int, int], NDArray[np.int32]] = {}

    def _stretched(self, rows: int, pitch: int) -> NDArray[np.int32]:
        """The columns as places in the padded input, worked out once for each size of image."""
        if (rows, pitch) not in self._offsets:
            if self.in_channels * rows * pitch > np.iinfo(np.int32).max:
                raise ValueError(f"{self.in_channels} padded planes of {rows} by {pitch} have more places than int32")
            channel, place = np.divmod(self._rows.columns, self.kernel[0] * self.kernel[1])
            row, column = np.divmod(place, self.kernel[1])
            self._offsets[rows, pitch] = ((channel * rows + row) * pitch + column).astype(np.int32)
        return self._offsets[rows, pitch]

    def _one(self, flat: Tensor, rows: int, pitch: int, out: Tensor) -> None:
        pointers = self._rows.pointers
        fixed = (self._rows.values, self._stretched(rows, pitch), pointers, flat.numpy(), pitch)
        in_tile = max(1, _TILE // pitch)
        threads = min(torch.get_num_threads(), self.out_channels)
        ends = np.searchsorted(pointers, np.linspace(0, pointers[-1], threads + 1)[1:-1])
        cuts = [0, *np.clip(ends, 0, self.out_channels).tolist(), self.out_channels]

        def share(first: int, last: int) -> None:
            _direct(*fixed, self.bias.numpy(), out.numpy(), first, last, in_tile)

        if threads == 1:
            share(0, self.out_channels)
        else:
            list(_pool(threads).map(share, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait between layers; starting them anew would take longer than a small layer."""
    return ThreadPoolExecutor(threads)


# ------------------------------------------------------------------------------------------------- cost and timing


@dataclass(frozen=True)
class CostModel:
    r"""When skipping zeros pays: dense arithmetic is faster, sparse arithmetic has less to do.

    .. math:: T_{\text{dense}} = F / P_d, \qquad T_{\text{sparse}} = \max\bigl((1 - s) F / P_s,\; \text{bytes}/B\bigr).

    Attributes:
        dense_rate: Multiply-accumulates a second of the dense library, above 0.
        sparse_rate: Those of the sparse loop, counting the weights that are left, above 0.
        bandwidth: Bytes a second that inputs and outputs can move; infinite if left out.

    Raises:
        ValueError: If a rate is not above 0.

    Example:
        >>> CostModel(dense_rate=50e9, sparse_rate=10e9).break_even_sparsity
        0.8
    """

    dense_rate: float
    sparse_rate: float
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        for name in ("dense_rate", "sparse_rate", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected above 0")

    @property
    def handicap(self) -> float:
        """How many times faster a dense multiplication is than a sparse one."""
        return self.dense_rate / self.sparse_rate

    @property
    def break_even_sparsity(self) -> float:
        """The sparsity from which on the sparse loop is faster, 0 if it always is."""
        return max(0.0, 1 - 1 / self.handicap)

    def sparse_seconds(self, macs: float, sparsity: float, moved: float = 0.0) -> float:
        """Time of the sparse loop.

        Args:
            macs: Multiply-accumulates of the dense layer.
            sparsity: Share of its weights that are zero.
            moved: Bytes of input and output.
        """
        _check_sparsity(sparsity)
        return max((1 - sparsity) * macs / self.sparse_rate, moved / self.bandwidth)


@torch.no_grad()
def int8_convolution(conv: nn.Conv2d, x: Tensor, bits: int = 8) -> Callable[[], Tensor]:
    """The vendor's 8-bit convolution, prepared for one input: weights packed, the input already 8-bit.

    Args:
        conv: A convolution in float32, without padding by name.
        x: (B, C, H, W), float32 and not negative; its largest value decides the step of the input.
        bits: Bits of the weights, 2 to 8.

    Returns:
        A function without arguments that gives the output, (B, C', H', W') in float32.

    Raises:
        ValueError: If the input has negative values, or this build of PyTorch has no such convolution.
    """
    if not hasattr(torch.ops, "onednn") or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        raise ValueError("this build of PyTorch has no 8-bit convolution of oneDNN: leave int8 out")
    if float(x.min()) < 0:
        raise ValueError("x has negative values; 8-bit inputs are those behind a ReLU")
    _check_bits(bits, 8)
    code = linear_code(conv.weight.detach().contiguous(), bits)
    step = float(x.max()) / 255 or 1.0
    coded = (x / step).round().to(torch.uint8).contiguous(memory_format=torch.channels_last)
    how = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    packed = torch.ops.onednn.qconv_prepack(code.codes, code.steps, step, 0, *how, list(x.shape))
    bias = None if conv.bias is None else conv.bias.detach()
    zeros = torch.zeros(len(code.steps), dtype=torch.int32)

    def call() -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            coded, step, 0, packed, code.steps, zeros, bias, *how, 1.0, 0, torch.float32, "none", [], ""
        )

    return call


@torch.no_grad()
def time_convolution(
    conv: nn.Conv2d,
    shape: Sequence[int],
    *,
    direct: Sequence[float] = (),
    shifted: Sequence[float] = (),
    reduced: Collection[str] = (),
    repeats: int = 9,
    seed: int = 0,
) -> PairedTiming:
    """Time a convolution as the vendor's dense library does it and as direct sparse ones, in turn.

    Input and output are counted, the conversion of the weights is not: it is done once. Dense 32-bit runs in three
    memory formats, the third being the library's own, where there is one; the fastest is what sparse has to beat.

    Args:
        conv: A convolution in float32; random places of its weight are pruned.
        shape: Shape of the input, (B, C, H, W).
        direct: Sparsities at which `DirectConv2d` runs.
        shifted: Sparsities at which `ShiftedCSRConv2d` runs.
        reduced: Dense precisions to time too: `bf16`, `int8`.
        repeats: Rounds.
        seed: Of the input and the masks.

    Returns:
        The times of `dense`, `dense, channels-last`, `dense, packed`, `dense, bf16`, `dense, int8`, `direct 0.8` and so
        on.

    Raises:
        ValueError: If a precision is unknown, or see `DirectConv2d` and `int8_convolution`.
    """
    if unknown := set(reduced) - {"bf16", "int8"}:
        raise ValueError(f"reduced holds {sorted(unknown)}; known are bf16 and int8")
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    beside = x.contiguous(memory_format=torch.channels_last)
    channels_last = prune_randomly(conv, 0.0).to(memory_format=torch.channels_last)
    arms: dict[str, Callable[[], object]] = {
        "dense": partial(conv, x),
        "dense, channels-last": partial(channels_last, beside),
    }
    if torch.backends.mkldnn.is_available():
        packed = (x.to_mkldnn(), conv.weight.detach().to_mkldnn(), conv.bias)
        arms["dense, packed"] = partial(F.conv2d, *packed, conv.stride, conv.padding, conv.dilation, conv.groups)
    if "bf16" in reduced:
        half = prune_randomly(conv, 0.0).to(torch.bfloat16, memory_format=torch.channels_last)
        arms["dense, bf16"] = partial(half, beside.to(torch.bfloat16))
    if "int8" in reduced:
        arms["dense, int8"] = int8_convolution(conv, x)
    for name, kind, sparsities in (("direct", DirectConv2d, direct), ("shifted", ShiftedCSRConv2d, shifted)):
        for sparsity in sparsities:
            arms[f"{name} {sparsity:g}"] = partial(kind(prune_randomly(conv, sparsity, seed=seed)), x)
    with torch.inference_mode():
        return paired_timing(arms, repeats=repeats, warmup=1)


def dense_arm(timing: PairedTiming) -> str:
    """The memory format in which dense 32-bit was the fastest: an arm of `time_convolution`."""
    formats = ("dense", "dense, channels-last", "dense, packed")
    return min((arm for arm in formats if arm in timing.seconds), key=timing.median)


def crossover(ratios: Mapping[float, float]) -> float | None:
    """The sparsity at which sparse becomes the faster one, by straight lines between the measured ones.

    Args:
        ratios: Sparsity -> time of sparse over dense.

    Returns:
        The lowest sparsity from which on all measured ones are faster; None if the highest is not faster. If all
        are, the lowest one measured.
    """
    if not ratios:
        raise ValueError("ratios is empty: at least one sparsity must have been timed")
    points = sorted(ratios.items(), reverse=True)
    if points[0][1] >= 1:
        return None
    for (above, fast), (below, slow) in pairwise(points):
        if slow >= 1:
            return above - (above - below) * (1 - fast) / (slow - fast)
    return points[-1][0]


# ------------------------------------------------------------------------------------------------------------ checks


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected at least 0 and below 1")


def _check_bits(bits: int, most: int, least: int = 2) -> None:
    if not least <= bits <= most:
        raise ValueError(f"bits is {bits}; expected {least} to {most}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} is {count}; expected at least 0")


def _check_positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name} is {size}; expected above 0")
