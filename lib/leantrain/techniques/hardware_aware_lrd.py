r"""Layers targeted by their latency: decompose only what gets faster.

Paper: Ahmed and others, "Speeding up ResNet Architecture with Layers Targeted Low Rank Decomposition",
arXiv 2309.12412.

A low-rank decomposition of half the weights saves about half the operations of every layer, but not half the time of
any: more and thinner layers read and write more, and some of them are slower than the layer they replace. Which ones
depends on the processor, the precision and the shapes. So each layer is timed by itself, as it is and decomposed, and
only the layers that gain are decomposed. The paper says that the choice must follow an analysis of the hardware; the
procedure here is ours:

1. find every layer's input shape (`leantrain.low_rank.latency.layer_calls`);
2. time it beside its factors at the rank of the compression and at the multiples just below (`rank_candidates`,
   `leantrain.low_rank.latency.profile_layers`);
3. keep the layers whose factors take at most 95 % of the time, with the fastest of the ranks
   (`leantrain.low_rank.latency.select_ranks` with the rule `fastest`);
4. predict the time of the whole network (`predicted_time`) and check it against a measurement.

`policy` gives the choices that need no measurement, to compare with.

>>> import timm
>>> model = timm.create_model("resnet50")
>>> [len(policy(model, name)) for name in ("none", "late", "static", "all")]
[0, 28, 13, 49]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, cast, get_args

import pandas as pd
import torch
from torch import nn

from leantrain.low_rank.factors import Dense, Rank, choose_ranks, decompose, reconstruct

__all__ = [
    "Policy",
    "forward_cost",
    "in_blocks",
    "policy",
    "predicted_time",
    "rank_candidates",
    "relative_error",
    "until_fast_enough",
]

Policy = Literal["none", "all", "late", "static"]


def in_blocks(name: str, layer: nn.Module) -> bool:
    """Whether a layer of a ResNet may be decomposed: the main path of the blocks and the classifier.

    Args:
        name: Its name, as in timm and torchvision.
        layer: The module; it does not matter.
    """
    return name == "fc" or (name.startswith("layer") and "downsample" not in name)


def _is_late(name: str, layer: nn.Module) -> bool:
    return in_blocks(name, layer) and not name.startswith(("layer1", "layer2"))


def _is_wide_kernel(name: str, layer: nn.Module) -> bool:
    return (
        in_blocks(name, layer)
        and isinstance(layer, nn.Conv2d)
        and min(layer.kernel_size) > 2
        and min(layer.in_channels, layer.out_channels) > 64
        and max(layer.stride) < 3
        and max(layer.dilation) == 1
    )


_WHERE: dict[Policy, Callable[[str, nn.Module], bool]] = {
    "none": lambda name, layer: False,
    "all": in_blocks,
    "late": _is_late,
    "static": _is_wide_kernel,
}


def policy(model: nn.Module, name: Policy, *, compression: float = 2.0, multiple: int = 1) -> dict[str, Rank]:
    """Layers of a ResNet and their ranks, chosen without a measurement.

    Args:
        model: A ResNet of timm or torchvision.
        name: `none`; `all` of `in_blocks`; `late`, those of the last two stages and the classifier; `static`, a rule of
            thumb for one family of hardware: kernels larger than 2x2 with more than 64 channels, not dilated and with
            a stride of at most 2.
        compression: See `leantrain.low_rank.factors.choose_ranks`.
        multiple: See there.

    Returns:
        Name -> rank.

    Raises:
        ValueError: If there is no such policy, or a number is out of range.
    """
    if name not in _WHERE:
        raise ValueError(f"policy {name!r}: expected one of {', '.join(get_args(Policy))}")
    return choose_ranks(model, compression=compression, multiple=multiple, where=_WHERE[name])


def rank_candidates(rank: Rank, multiples: Sequence[int] = (8, 16, 32, 64)) -> list[Rank]:
    """A rank, and the multiples just below it.

    Args:
        rank: The rank of the compression.
        multiples: Steps at which a processor may be faster; each 1 or more.

    Returns:
        The distinct ranks, the largest first; multiples that are zero are left out.

    Raises:
        ValueError: If a multiple is below 1.

    >>> rank_candidates(102)
    [102, 96, 64]
    """
    if min(multiples, default=1) < 1:
        raise ValueError(f"multiples={list(multiples)}: each is expected to be 1 or more")
    both = rank if isinstance(rank, tuple) else (rank,)
    below = {tuple(r // m * m for r in both) for m in multiples}
    kept = sorted({both, *(ranks for ranks in below if min(ranks) > 0)}, reverse=True)
    return [cast(Rank, ranks) if isinstance(rank, tuple) else ranks[0] for ranks in kept]


def forward_cost(parts: Iterable[nn.Module], shape: Sequence[int]) -> tuple[int, int]:
    """Work and memory traffic of layers that follow each other, without caches.

    Args:
        parts: A layer by itself, or the factors of one.
        shape: Shape of the first one's input, with the batch.

    Returns:
        Multiply-accumulates of the forward pass, and values read and written: inputs, outputs and weights of each. A
        training step has three times as many of both.
    """
    x, macs, moved = torch.empty(*shape, device="meta"), 0, 0
    for part in parts:
        y = copy.deepcopy(part).to("meta")(x)
        weight = cast(Dense, part).weight
        macs += y.numel() * weight[0].numel()
        moved += x.numel() + y.numel() + weight.numel()
        x = y
    return macs, moved


def predicted_time(table: pd.DataFrame, ranks: Mapping[str, Rank], total: float) -> float:
    """Time of the whole network if every decomposed layer saves what it saved by itself.

    Args:
        table: From `leantrain.low_rank.latency.profile_layers`.
        ranks: Name -> rank of the layers that are decomposed.
        total: Time of the network as it is, in seconds.

    Returns:
        Seconds: the total less, for every layer, its calls times what its factors save.

    Raises:
        ValueError: If the table has no such layer at that rank.
    """
    saved = 0.0
    for name, rank in ranks.items():
        row = table[(table["layer"] == name) & (table["rank"] == rank)]
        if len(row) != 1:
            raise ValueError(f"the table has {len(row)} rows for layer {name!r} at rank {rank}: expected one")
        saved += float((row["calls"] * (row["original_s"] - row["factored_s"])).iloc[0])
    return total - saved


def relative_error(layer: nn.Module, rank: Rank) -> float:
    """What a decomposition loses of a layer's weight.

    Args:
        layer: A layer that can be decomposed.
        rank: Its rank.

    Returns:
        Frobenius norm of the difference over that of the weight, from 0 to 1.

    Raises:
        ValueError: If the rank does not fit the layer.
    """
    weight = cast(Dense, layer).weight.detach()
    return float((weight - reconstruct(decompose(layer, rank)).detach()).norm() / weight.norm())


def until_fast_enough(
    table: pd.DataFrame, ranks: Mapping[str, Rank], errors: Mapping[str, float], total: float, target: float
) -> dict[str, Rank]:
    """Decompose layers in the order of what they save for what they lose, until the network is predicted fast enough.

    Args:
        table: From `leantrain.low_rank.latency.profile_layers`.
        ranks: Layers that gain, with their ranks.
        errors: Name -> `relative_error` at that rank, above 0.
        total: Time of the network as it is, in seconds.
        target: Wanted time, in seconds.

    Returns:
        The chosen layers, the best first; all of them if even these are not enough.

    Raises:
        ValueError: If the table or the errors lack a layer.
    """
    missing = [name for name in ranks if name not in errors]
    if missing:
        raise ValueError(f"errors: {missing} are missing")
    gain = {name: total - predicted_time(table, {name: rank}, total) for name, rank in ranks.items()}
    chosen: dict[str, Rank] = {}
    for name in sorted(ranks, key=lambda n: gain[n] / errors[n], reverse=True):
        if predicted_time(table, chosen, total) <= target:
            break
        chosen[name] = ranks[name]
    return chosen
