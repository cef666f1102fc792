r"""Progressive layer dropping: skip whole transformer blocks at random, ever more of them as training goes on.

Paper: Zhang and He, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping",
NeurIPS 2020, arXiv 2010.13369.

A *switchable* block is a transformer block with its norms in front (PreLN) and one gate :math:`G_i` for both of its
branches, a coin that shows 1 with probability :math:`p_i`:

.. math::

    h_i = x_i + \frac{G_i}{p_i} f_\mathrm{attention}(\mathrm{LN}(x_i)), \qquad
    x_{i+1} = h_i + \frac{G_i}{p_i} f_\mathrm{MLP}(\mathrm{LN}(h_i)) .

If the coin shows 0 the block is the identity, and neither its forward nor its backward pass is computed. One coin is
thrown for a block and a micro-batch. Two schedules set the probabilities of the :math:`L` blocks after :math:`t`
updates, one over time and one over depth:

.. math::

    \theta(t) = (1 - \bar\theta)\, e^{-\gamma t} + \bar\theta, \qquad
    p_i(t) = 1 - \frac{i}{L} \bigl(1 - \theta(t)\bigr), \quad i = 0, \dots, L - 1 .

Training starts with the whole stack (:math:`\theta(0) = 1`) and soon keeps the last block with a probability close to
the limit :math:`\bar\theta`. The rule of thumb for the speed is :math:`\gamma = 100 / T` in a run of :math:`T` updates.
In evaluation all blocks run, unscaled. There are no new parameters.

:class:`KeepSchedule` holds the two schedules, :class:`ProgressiveStack` throws the coins for any sequence of residual
blocks, :class:`SwitchableBlock` is the paper's block, and :class:`LayerDropping` is the Lightning callback that moves
the schedule on.

Example:
    A vision transformer of timm, in a loop of one's own:

    >>> from timm.models import VisionTransformer
    >>> _ = torch.manual_seed(0)
    >>> vit = VisionTransformer(img_size=8, patch_size=4, num_classes=10, embed_dim=24, depth=6, num_heads=2)
    >>> vit.blocks = ProgressiveStack(*vit.blocks, seed=1)
    >>> optimizer = torch.optim.AdamW(vit.parameters(), 1e-3)
    >>> steps = 30
    >>> schedule = KeepSchedule(limit=0.5, gamma=100 / steps)
    >>> for t in range(steps):
    ...     vit.blocks.begin_step(t, schedule.keep(t, len(vit.blocks)))
    ...     loss = vit(torch.randn(4, 3, 8, 8)).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> vit.blocks.gates  # which of the six blocks ran in the last step
    (True, True, False, True, True, False)
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.training.masked_language_model import MaskedTransformer

__all__ = [
    "KeepSchedule",
    "LayerDropping",
    "ProgressiveStack",
    "SwitchableBlock",
    "forward_macs",
    "pre_ln_bert",
    "theta",
]


def theta(step: int, limit: float, gamma: float) -> float:
    r"""The temporal schedule: :math:`\theta(t) = (1 - \bar\theta) e^{-\gamma t} + \bar\theta`.

    Args:
        step: Optimiser updates made so far, t, at least 0.
        limit: The keep limit that it falls to, 0 to 1; 1 switches dropping off.
        gamma: Rate of the decay per update, at least 0; 0 never drops, `math.inf` is at the limit from the start.

    Returns:
        The lowest probability that the depth schedule reaches towards, from 1 (no update made) down to `limit`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(theta(t, limit=0.5, gamma=0.001), 3) for t in (0, 100, 1000, 5000)]
        [1.0, 0.952, 0.684, 0.503]
    """
    if step < 0:
        raise ValueError(f"step counts updates made and cannot be negative, got {step}")
    _check_rates(limit, gamma)
    decayed = 0.0 if gamma == math.inf else math.exp(-gamma * step)
    return (1 - limit) * decayed + limit


@dataclass(frozen=True)
class KeepSchedule:
    """With which probability each block of a stack is kept, over time and over depth.

    The paper's method is the default for the two shapes. The other shapes are controls: they show what a schedule
    is good for.

    Attributes:
        limit: The keep limit, 0 to 1; 1 switches dropping off.
        gamma: Rate of the decay per update, at least 0. `math.inf` drops at full strength from the first update.
        over_depth: "linear": the deeper, the more often dropped. "uniform": all blocks alike, with the linear
            schedule's mean, so that as much is computed.
        first_kept: Whether the blocks are counted i = 0..L-1 in the linear formula, so that the first is always kept,
            or i = 1..L. The two differ by half a block of work at a limit of 0.5.

    Raises:
        ValueError: If a value is out of range.
    """

    limit: float = 0.5
    gamma: float = 1e-3
    over_depth: Literal["linear", "uniform"] = "linear"
    first_kept: bool = True

    def __post_init__(self) -> None:
        _check_rates(self.limit, self.gamma)
        if self.over_depth not in ("linear", "uniform"):
            raise ValueError(f"over_depth must be 'linear' or 'uniform', got {self.over_depth!r}")

    def keep(self, step: int, depth: int) -> tuple[float, ...]:
        """Keep probabilities of the blocks, first to last.

        Args:
            step: Optimiser updates made so far, at least 0.
            depth: Number of blocks L, at least 1.

        Returns:
            L probabilities, each above 0 and at most 1.

        Raises:
            ValueError: If an argument is out of range, or a block would never run (limit 0 with `first_kept=False`).

        Example:
            >>> [round(p, 2) for p in KeepSchedule(limit=0.5, gamma=math.inf).keep(0, depth=5)]
            [1.0, 0.9, 0.8, 0.7, 0.6]
        """
        if depth < 1:
            raise ValueError(f"a stack has at least one block, got depth {depth}")
        away = 1 - theta(step, self.limit, self.gamma)
        offset = 0 if self.first_kept else 1
        shares = [(i + offset) / depth for i in range(depth)]
        if self.over_depth == "uniform":
            shares = [sum(shares) / depth] * depth
        kept = tuple(1 - share * away for share in shares)
        if min(kept) <= 0:
            raise ValueError(
                f"block {kept.index(min(kept))} of {depth} would never run, and 1 / p would be infinite: "
                f"raise the limit (now {self.limit}) or keep the first block (first_kept=True)"
            )
        return kept

    def mean_depth(self, step: int, depth: int) -> float:
        """Expected number of blocks that run in the step after `step` updates.

        Example:
            >>> KeepSchedule(limit=0.5, gamma=math.inf).mean_depth(0, depth=12)
            9.25
        """
        return math.fsum(self.keep(step, depth))

    def mean_depth_of_run(self, steps: int, depth: int) -> float:
        """Expected number of blocks per step, on average over a run of `steps` updates, at least 1."""
        if steps < 1:
            raise ValueError(f"a run has at least one step, got {steps}")
        return math.fsum(self.mean_depth(t, depth) for t in range(steps)) / steps


class SwitchableBlock(nn.Module):
    """A PreLN transformer block whose two branches share one scale.

    Args:
        dim: Width D of the tokens, divisible by `heads`.
        heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        dropout: Probability with which an attention weight, or an element of a branch's output, is dropped in
            training; at least 0 and below 1.
        causal: Whether token n sees only tokens up to n (a decoder); False for an encoder.

    Raises:
        ValueError: If the width is no multiple of the heads, or a number is out of range.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, *, dropout: float = 0.1, causal: bool = False
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {heads}")
        if not mlp_ratio * dim >= 1:
            raise ValueError(f"mlp_ratio must leave the MLP at least one hidden unit, got {mlp_ratio} for width {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.heads, self.causal, self.attention_dropout = heads, causal, dropout
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, branch_scale: float = 1.0) -> Tensor:
        """Tokens `(B, N, D)` to tokens `(B, N, D)`.

        Args:
            x: Tokens.
            attn_mask: Boolean (True: may be seen) or additive mask, broadcastable to `(B, heads, N, N)`; not with
                `causal`.
            branch_scale: What both branches are multiplied with, 1 / p for a block that is kept with probability p.
        """
        # One fused operation each: scaling costs no pass over memory, and at scale 1 it is a plain sum to the last bit.
        h = torch.add(x, self.drop(self._attend(self.norm1(x), attn_mask)), alpha=branch_scale)
        return torch.add(h, self.drop(self.mlp(self.norm2(h))), alpha=branch_scale)

    def _attend(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=self.causal)
        return self.proj(heads.transpose(1, 2).reshape(batch, tokens, dim))


class ProgressiveStack(nn.Sequential):
    """A sequence of residual blocks, of which some are skipped in training; in evaluation all run.

    It holds its blocks under the same names as `nn.Sequential`, so weights can be loaded from and into a plain stack.
    Before :meth:`begin_step` was called, nothing is skipped.

    A block that takes `branch_scale`, as :class:`SwitchableBlock` does, is given 1 / p and scales its own branches. Any
    other block :math:`f` is scaled as a whole, :math:`x + (f(x) - x) / p`. The first way is the paper's, the second is
    unbiased for every block; they differ where a second branch looks at the scaled output of the first.

    The coins depend on `seed`, the step and the number of the micro-batch alone. PyTorch's random numbers are left
    untouched, a resumed run throws the same coins as one that was never interrupted, and data-parallel processes that
    share the seed skip the same blocks. Two stacks of one model want two seeds.

    Blocks are skipped when the stack is called. A model that loops over its blocks itself, as timm's vision transformer
    does when it is given a mask, runs them all.

    Args:
        blocks: The blocks, each mapping its first argument to a tensor of the same shape; at least one.
        seed: Seed of the coins.

    Attributes:
        keep: The keep probability of each block.
        gates: Which blocks ran in the last forward pass, in training or not; empty before the first.

    Raises:
        ValueError: If there is no block.
    """

    def __init__(self, *blocks: nn.Module, seed: int = 0) -> None:
        if not blocks:
            raise ValueError("a stack needs at least one block, got none")
        super().__init__(*blocks)
        self.seed = seed
        self.keep: tuple[float, ...] = (1.0,) * len(blocks)
        self.gates: tuple[bool, ...] = ()
        self._step, self._micro_batch = 0, 0

    def begin_step(self, step: int, keep: Sequence[float], micro_batch: int = 0) -> None:
        """Set the probabilities of a training step and start its coins.

        Call it once before the forward passes of an optimiser step. Each of them throws its own coins.

        Args:
            step: Optimiser updates made so far; names the coins.
            keep: Keep probability of each block, 0 to 1. A block of probability 1 always runs, one of 0 never.
            micro_batch: Number of the next forward pass within the step, if it is not the first.

        Raises:
            ValueError: If there is not one probability for each block, or one is out of range.
        """
        if len(keep) != len(self):
            raise ValueError(f"expected {len(self)} keep probabilities, one for each block, got {len(keep)}")
        if not all(0 <= p <= 1 for p in keep):
            raise ValueError(f"keep probabilities must be from 0 to 1, got {tuple(keep)}")
        self.keep, self._step, self._micro_batch = tuple(keep), step, micro_batch

    def throw(self, step: int, micro_batch: int = 0) -> tuple[bool, ...]:
        """The gates of a forward pass in training, under the present probabilities: True for a block that runs."""
        # A text as the seed: Python hashes it, so that neighbouring steps have unrelated coins.
        coins = random.Random(f"{self.seed} {step} {micro_batch}")
        return tuple(coins.random() < p for p in self.keep)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Run the blocks that are kept.

        Args:
            x: What flows through the stack, such as tokens `(B, N, D)`.
            context: Handed to every block as it is, such as a mask.

        Raises:
            ValueError: If a block changes the shape, so that it cannot be skipped.
        """
        if not self.training:
            self.gates = (True,) * len(self)
            for block in self:
                x = block(x, *context)
            return x
        self.gates = self.throw(self._step, self._micro_batch)
        self._micro_batch += 1
        for block, runs, p in zip(self, self.gates, self.keep, strict=True):
            if runs:
                x = _scaled(block, x, context, 1 / p)
        return x

    def extra_repr(self) -> str:
        """The seed, for the printed model."""
        return f"seed={self.seed}"


class LayerDropping(L.Callback):
    """Move the schedule of every :class:`ProgressiveStack` in a module on, step by step.

    It logs `kept_blocks`, the number of blocks that ran in a forward pass, on average over the epoch.

    Training on several processes needs a strategy that tolerates unused parameters, such as Lightning's
    `ddp_find_unused_parameters_true`.

    Args:
        limit: The keep limit, 0 to 1; 1 switches dropping off.
        decay: Rate of the decay times the length T of the run in updates, at least 0: gamma = decay / T. `math.inf`
            drops at full strength from the first update.
        over_depth: "linear" or "uniform", see :class:`KeepSchedule`.
        first_kept: Whether the first block is always kept, see :class:`KeepSchedule`.

    Attributes:
        schedule: The schedule of the run, from its start on; before, that of a run of a single update.

    Raises:
        ValueError: If a value is out of range; at the start of a run, if the module holds no such stack or the run has
            no end.
    """

    def __init__(
        self,
        limit: float = 0.5,
        decay: float = 100.0,
        *,
        over_depth: Literal["linear", "uniform"] = "linear",
        first_kept: bool = True,
    ) -> None:
        self.decay = decay
        self.schedule = KeepSchedule(limit, decay, over_depth, first_kept)
        self._stacks: list[ProgressiveStack] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the stacks and lay the schedule over the run."""
        self._stacks = [m for m in pl_module.modules() if isinstance(m, ProgressiveStack)]
        if not self._stacks:
            raise ValueError(f"{type(pl_module).__name__} holds no ProgressiveStack: there is nothing to drop")
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs or max_steps")
        self.schedule = replace(self.schedule, gamma=self.decay / total)
        for stack in self._stacks:  # an impossible schedule must fail before the first step
            self.schedule.keep(int(total), len(stack))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the probabilities of the coming step."""
        step = trainer.global_step
        for stack in self._stacks:
            stack.begin_step(step, self.schedule.keep(step, len(stack)), batch_idx % trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many blocks ran."""
        ran = sum(sum(stack.gates) for stack in self._stacks)
        pl_module.log("kept_blocks", float(ran), on_step=False, on_epoch=True, batch_size=1)


def pre_ln_bert(
    vocab_size: int,
    *,
    max_length: int = 512,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp_ratio: float = 4.0,
    dropout: float = 0.1,
    seed: int = 0,
) -> MaskedTransformer:
    """A PreLN BERT whose encoder is a :class:`ProgressiveStack`; by default of BERT-base's size.

    Args:
        vocab_size: Number of tokens.
        max_length: Most tokens in a text.
        dim: Width, a multiple of `heads`.
        depth: Number of blocks, at least 1.
        heads: Attention heads of a block.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        dropout: Of attention weights, branches and the embedding, at least 0 and below 1.
        seed: Seed of the coins.

    Raises:
        ValueError: If a number is out of range.
    """
    blocks = [SwitchableBlock(dim, heads, mlp_ratio, dropout=dropout) for _ in range(depth)]
    encoder = ProgressiveStack(*blocks, seed=seed)
    return MaskedTransformer(encoder, vocab_size=vocab_size, max_length=max_length, dim=dim, dropout=dropout)


def forward_macs(
    dim: int, tokens: int, vocab_size: int, *, mlp_ratio: float = 4.0, predicted: float = 0.15
) -> dict[str, float]:
    """Multiply-accumulates of one text in a forward pass of :func:`pre_ln_bert`, by part.

    Args:
        dim: Width D.
        tokens: Tokens N in the text.
        vocab_size: Number of tokens V.
        mlp_ratio: Hidden width of the MLPs over D.
        predicted: Share of the tokens that the head predicts, 0 to 1.

    Returns:
        "block": one block; "head": everything that is never dropped, with the M = N * predicted places that are
        predicted, M (D^2 + D V).
    """
    return {
        "block": 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * int(mlp_ratio * dim),
        "head": predicted * tokens * (dim**2 + dim * vocab_size),
    }


def _scaled(block: nn.Module, x: Tensor, context: tuple[Any, ...], scale: float) -> Tensor:
    if _takes_scale(type(block).forward):
        out = block(x, *context, branch_scale=scale)
    else:
        out = block(x, *context)
        if scale != 1 and out.shape == x.shape:  # at scale 1 the block's own output, to the last bit
            out = torch.add(x, out - x, alpha=scale)
    if out.shape != x.shape:
        raise ValueError(
            f"a block that can be skipped must keep the shape: {type(block).__name__} maps {tuple(x.shape)} to "
            f"{tuple(out.shape)}; leave it outside the stack"
        )
    return out


@cache
def _takes_scale(forward: Callable[..., Any]) -> bool:
    return "branch_scale" in inspect.signature(forward).parameters


def _check_rates(limit: float, gamma: float) -> None:
    if not 0 <= limit <= 1:
        raise ValueError(f"the keep limit must be from 0 to 1, got {limit}")
    if not gamma >= 0:
        raise ValueError(f"the rate of the decay must be at least 0, got {gamma}")
