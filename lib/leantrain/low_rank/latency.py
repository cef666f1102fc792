"""Ranks from measured times: a layer is decomposed only if that makes it faster on the machine at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import pandas as pd
import torch
from torch import Tensor, nn

from leantrain.low_rank.factors import Dense, Rank, decompose, is_decomposable
from leantrain.measure.timing import paired_timing

__all__ = [
    "LayerCall",
    "Precision",
    "around_multiples",
    "before_step",
    "fastest",
    "layer_calls",
    "materialise",
    "profile_layers",
    "runner",
    "select_ranks",
    "time_ranks",
]

Precision = Literal["fp32", "bf16"]


class LayerCall(NamedTuple):
    """How a model uses a layer.

    Attributes:
        shape: Shape of the layer's input.
        calls: How often one forward pass calls it.
    """

    shape: tuple[int, ...]
    calls: int


def layer_calls(model: nn.Module, shape: Sequence[int]) -> dict[str, LayerCall]:
    """Input shapes of the layers that can be decomposed, as one forward pass calls them.

    A copy of the model runs on the meta device: nothing is computed, and the model, its mode, its gradients and the
    random numbers stay as they are.

    Args:
        model: A model that takes one tensor.
        shape: Shape of that tensor, with the batch.

    Returns:
        Name -> input shape and number of calls, in the order of the first call. Layers that are not called are left
        out.

    Raises:
        ValueError: If a layer is called with inputs of several shapes: its time is then no single number.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: seen.setdefault(name, []).append(tuple(inputs[0].shape))

    for name, module in shadow.named_modules():
        if is_decomposable(module):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        shadow(torch.empty(*shape, device="meta"))
    for name, shapes in seen.items():
        if len(set(shapes)) > 1:
            raise ValueError(f"layer {name!r} is called with inputs of shapes {sorted(set(shapes))}: expected one")
    return {name: LayerCall(shapes[0], len(shapes)) for name, shapes in seen.items()}


def runner(
    module: nn.Module,
    shape: Sequence[int],
    *,
    train: bool,
    precision: Precision = "fp32",
    channels_last: bool = True,
    device: str = "cpu",
) -> Callable[[], None]:
    """A function that runs a module once, to be timed.

    Args:
        module: A layer or a model that takes one tensor; a copy of it runs.
        shape: Shape of that tensor, with the batch; the values are random.
        train: Whether the backward pass is run too, for all gradients that are asked for and that of the input.
        precision: `bf16` trains under autocast, and infers with weights stored in bfloat16: autocast would convert them
            in every call.
        channels_last: Whether the channels of a pixel lie side by side in memory, in images and kernels.
        device: Where it runs.

    Returns:
        A function without arguments. It leaves gradients behind in the copy, and frees them before the next call.
    """
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    stored = torch.bfloat16 if precision == "bf16" and not train else torch.float32
    ready = copy.deepcopy(module).to(device, dtype=stored).train(train)
    if len(shape) == 4:
        ready = ready.to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(device, dtype=stored, memory_format=layout)
    x.requires_grad_(train)
    if not train:

        def infer() -> None:
            with torch.inference_mode():
                ready(x)

        return infer

    def forward() -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            return ready(x)

    gradient = torch.ones_like(forward())

    def step() -> None:
        x.grad = None
        ready.zero_grad(set_to_none=True)
        forward().backward(gradient)

    return step


def materialise(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Give a model on the meta device random values, so that it can be timed.

    Decomposing large weights takes long, and a time does not depend on what they hold. Weights get a spread at which
    activations neither vanish nor overflow; both would change the time.

    Args:
        model: A model on the meta device; moved in place.
        device: Where to.

    Returns:
        The same model.
    """
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                module.reset_parameters()
                continue
            for parameter in module.parameters(recurse=False):
                fan_in = max(1, parameter.numel() // max(1, parameter.shape[0])) if parameter.ndim > 1 else 1
                parameter.normal_(std=fan_in**-0.5 if parameter.ndim > 1 else 0.02, generator=generator)
    return model


def time_ranks(
    layer: nn.Module,
    shape: Sequence[int],
    ranks: Sequence[Rank],
    *,
    train: bool,
    precision: Precision = "fp32",
    repeats: int = 9,
    channels_last: bool = True,
    device: str = "cpu",
) -> pd.DataFrame:
    """Time a layer and its factors at several ranks, in turn.

    The factors' values do not matter for the time; they are not computed.

    Args:
        layer: A layer that can be decomposed.
        shape: Shape of its input, with the batch.
        ranks: Ranks to time, each once.
        train: See `runner`.
        precision: See `runner`.
        repeats: Rounds in which each is run once.
        channels_last: See `runner`.
        device: See `runner`.

    Returns:
        One row a rank, in the given order: rank, original_s and factored_s (the least time of all rounds: other
        processes can only add to it), ratio (median over the rounds of factored over original), low, high.

    Raises:
        ValueError: If a rank does not fit the layer, or is given twice.
    """
    if len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks={list(ranks)}: each is expected once")
    empty = copy.deepcopy(layer).to("meta")

    options = {"train": train, "precision": precision, "channels_last": channels_last, "device": device}
    arms = {"original": runner(cast(Dense, layer), shape, **options)}  # type: ignore[arg-type]
    arms |= {f"{rank}": runner(materialise(decompose(empty, rank), device), shape, **options) for rank in ranks}  # type: ignore[arg-type]
    timing = paired_timing(arms, repeats=repeats)
    least = timing.seconds.min()
    rows = []
    for rank in ranks:
        ratio = timing.ratio(f"{rank}", "original")
        times = {"original_s": float(least["original"]), "factored_s": float(least[f"{rank}"])}
        rows.append({"rank": rank, **times, "ratio": ratio.value, "low": ratio.low, "high": ratio.high})
    return pd.DataFrame(rows)


def profile_layers(
    model: nn.Module,
    shape: Sequence[int],
    ranks: Mapping[str, Sequence[Rank]],
    *,
    train: bool,
    precision: Precision = "fp32",
    repeats: int = 9,
    channels_last: bool = True,
    device: str = "cpu",
) -> pd.DataFrame:
    """Time layers of a model, each by itself, beside their factors at several ranks.

    Layers of the same kind that meet inputs of the same shape are timed once.

    Args:
        model: A model that takes one tensor.
        shape: Shape of that tensor, with the batch.
        ranks: Name of a layer -> the ranks to time.
        train: See `runner`.
        precision: See `runner`.
        repeats: See `time_ranks`.
        channels_last: See `runner`.
        device: See `runner`.

    Returns:
        One row a layer and rank: layer, calls (in one forward pass), and the columns of `time_ranks`.

    Raises:
        ValueError: If a layer does not exist or is never called, or a rank does not fit it.
    """
    calls, modules = layer_calls(model, shape), dict(model.named_modules())
    unknown = [name for name in ranks if name not in calls]
    if unknown:
        raise ValueError(f"{unknown}: no such layers, or the model does not call them")
    timed: dict[tuple[object, ...], pd.DataFrame] = {}
    tables = []
    for name, tried in ranks.items():
        layer = modules[name]
        kind = (repr(layer), calls[name].shape, tuple(tried))
        if kind not in timed:
            timed[kind] = time_ranks(
                layer, calls[name].shape, tried,
                train=train, precision=precision, repeats=repeats, channels_last=channels_last, device=device,
            )  # fmt: skip
        tables.append(timed[kind].assign(layer=name, calls=calls[name].calls))
    table = pd.concat(tables, ignore_index=True)
    return table[["layer", "calls", *[c for c in table.columns if c not in ("layer", "calls")]]]


def select_ranks(table: pd.DataFrame, rule: Callable[[Mapping[int, float], float], int | None]) -> dict[str, Rank]:
    """Ranks for the layers that should be decomposed, by their times.

    Args:
        table: From `profile_layers`.
        rule: Told the time of each rank and of the layer as it is, says the rank, or None: `before_step`, `fastest`, or
            one of them with other options.

    Returns:
        Name -> rank, in the table's order; layers that should stay as they are are left out.
    """
    chosen: dict[str, Rank] = {}
    for name, rows in table.groupby("layer", sort=False):
        by_first = {rank[0] if isinstance(rank, tuple) else rank: rank for rank in rows["rank"]}
        times = dict(zip(by_first, rows["factored_s"].astype(float), strict=True))
        best = rule(times, float(rows["original_s"].iloc[0]))
        if best is not None:
            chosen[str(name)] = by_first[best]
    return chosen


def around_multiples(rank: Rank, multiple: int = 16, reach: int = 64) -> list[Rank]:
    """Ranks at which a step of the time can be seen: the rank itself, and each multiple below it with the one above.

    Args:
        rank: The largest rank; of two, the first counts and both become equal.
        multiple: Where a step is expected, 2 or more.
        reach: How far below the rank to look; ranks below 8 are left out.

    Returns:
        Distinct ranks, the largest first.

    Raises:
        ValueError: If the multiple or the reach is out of range.

    >>> around_multiples(38)
    [38, 33, 32, 17, 16]
    """
    if multiple < 2 or reach < 0:
        raise ValueError(f"multiple={multiple}, reach={reach}: expected at least 2 and at least 0")
    top = rank[0] if isinstance(rank, tuple) else rank
    lowest = max(8, top - reach)
    near = [r for m in range(top // multiple * multiple, lowest - 1, -multiple) for r in (m + 1, m) if r < top]
    return [(r, r) if isinstance(rank, tuple) else r for r in (top, *near)]


def _check_times(times: Mapping[int, float], original: float, margin: float) -> None:
    if not times:
        raise ValueError("times: expected at least one rank")
    if min([*times.values(), original]) <= 0:
        raise ValueError("times must be above 0")
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin}: expected at least 0 and below 1")


def before_step(times: Mapping[int, float], original: float, margin: float = 0.05) -> int | None:
    """The rank just below the steepest step of the time (rank optimisation, arXiv 2407.20266).

    The paper prints the step as :math:`t(r) - t(r-1)` and takes the :math:`r` with the largest: that is the rank just
    above the step. Here the rank below it is returned, which is what the text wants.

    Args:
        times: Rank -> time of the factors. Ranks need not be neighbours: the rise of the time per rank counts.
        original: Time of the layer as it is.
        margin: The factors must take less than 1 - margin of the original time.

    Returns:
        The rank, or None if the layer should stay as it is. Where no time rises with the rank, the largest rank.

    Raises:
        ValueError: If there are no times, one is not above 0, or the margin is out of range.
    """
    _check_times(times, original, margin)
    ranks = sorted(times)
    steps = {low: (times[high] - times[low]) / (high - low) for low, high in pairwise(ranks)}
    chosen = max(steps, key=lambda rank: (steps[rank], rank), default=ranks[-1])
    if steps and steps[chosen] <= 0:
        chosen = ranks[-1]
    return chosen if times[chosen] < (1 - margin) * original else None


def fastest(times: Mapping[int, float], original: float, margin: float = 0.05, at_least: float = 0.9) -> int | None:
    """The rank whose factors are the fastest, among those near the largest one.

    Args:
        times: Rank -> time of the factors.
        original: Time of the layer as it is.
        margin: The factors must take at most 1 - margin of the original time.
        at_least: Only ranks of at least this share of the largest count, so that accuracy is not traded for time.

    Returns:
        The rank (the larger one of two that are equally fast), or None if the layer should stay as it is.

    Raises:
        ValueError: If there are no times, one is not above 0, or the margin or the share is out of range.
    """
    _check_times(times, original, margin)
    if not 0 < at_least <= 1:
        raise ValueError(f"at_least={at_least}: expected a share above 0 and at most 1")
    near = [rank for rank in times if rank >= at_least * max(times)]
    chosen = min(near, key=lambda rank: (times[rank], -rank))
    return chosen if times[chosen] <= (1 - margin) * original else None
