r"""SkipViT: tokens that the class token hardly attends to bypass some blocks of a vision transformer.

Paper: Ataiefard and others, "SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection",
arXiv 2401.15293.

A vision transformer sends all :math:`P` patches of an image through all blocks. Here a share :math:`\rho` of them skips
the blocks :math:`s, \dots, e-1` and is put back, unchanged and in its old places, before block :math:`e`. Who
skips is decided for every image by the class token: the attention that it pays to patch :math:`j` in the block before
the split, averaged over the :math:`h` heads of width :math:`d`,

.. math::

    a_j = \frac1h \sum_{m=1}^{h} \operatorname{softmax}_j
          \Big( \frac{q^{(m)}_{\mathrm{cls}} \cdot k^{(m)}_j}{\sqrt d} \Big),

and the :math:`K = P - \operatorname{round}(\rho P)` patches with the largest :math:`a_j` stay in the main path,
together with the class token. There is no new parameter. Nobody learns to skip: the choice has no gradient. With
:math:`\rho = 0` or :math:`s = e` the model is the one it was, to the last bit.

The head average, the block that gives the score, its detachment and the rounding are our reading; so are the places
:math:`s` and :math:`e`, which are arguments.

:func:`skip_tokens` puts the bypass into any timm vision transformer that classifies by its class token:

>>> import timm, torch
>>> from leantrain.techniques.skipvit import skip_tokens
>>> model = timm.create_model("vit_small_patch16_224")
>>> model = skip_tokens(model, split=5, rejoin=8, drop_ratio=0.55)
>>> logits = model(torch.randn(2, 3, 224, 224))  # trains and evaluates as before
>>> model.blocks.kept.shape  # the patches of each image that went through blocks 5, 6 and 7
torch.Size([2, 88])
>>> model.blocks.skipping = False  # all tokens through all blocks, for instance to evaluate
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal, NoReturn, get_args

import torch
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = [
    "Selection",
    "SkipBlocks",
    "block_macs",
    "class_attention",
    "gather_tokens",
    "kept_patches",
    "most_attended",
    "restore_tokens",
    "skip_tokens",
]

Selection = Literal["class attention", "inverted", "random"]
"""Who stays: the patches with the largest score, those with the smallest, or a uniformly random set."""


def kept_patches(patches: int, drop_ratio: float) -> int:
    """How many patches stay in the main path: K = P - round(ratio P).

    Args:
        patches: Number of patches P of an image, at least 1; the class token is not one of them.
        drop_ratio: Share of them that skips, at least 0 and below 1.

    Raises:
        ValueError: If an argument is out of range, or if no patch would stay.

    Example:
        >>> kept_patches(196, 0.55)
        88
    """
    if patches < 1:
        raise ValueError(f"an image must have at least 1 patch, got {patches}")
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"drop_ratio must be at least 0 and below 1, got {drop_ratio}")
    kept = patches - round(drop_ratio * patches)
    if kept < 1:
        raise ValueError(f"drop_ratio {drop_ratio} leaves none of {patches} patches: choose a smaller one")
    return kept


def block_macs(tokens: int, dim: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of one transformer block in a forward pass of one image.

    Args:
        tokens: Number of tokens N, the class token included, at least 1.
        dim: Width D of a token, at least 1.
        mlp_ratio: Hidden width of the MLP over D, above 0.

    Returns:
        4 N D^2 for the projections, 2 N^2 D for the attention core and 2 N D (ratio D) for the MLP.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> round(block_macs(89, 384) / block_macs(197, 384), 3)
        0.432
    """
    if tokens < 1 or dim < 1 or not mlp_ratio > 0:
        raise ValueError(f"sizes must be positive, got {tokens} tokens, width {dim} and MLP ratio {mlp_ratio}")
    return 4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * int(dim * mlp_ratio)


@torch.no_grad()
def class_attention(attention: Attention, x: Tensor) -> Tensor:
    r"""How much the class token attends to every token, averaged over the heads.

    Fused attention does not give its weights away. But one row of them is cheap, and without the keys: the weight of
    token j depends on it through :math:`q \cdot (W_K x_j + b_K) = (W_K^\top q) \cdot x_j + q \cdot b_K`. So one vector
    a head, :math:`W_K^\top q`, meets the tokens themselves. The last term is the same for all tokens, and the softmax
    does not see it. (If the layer normalises its keys, this does not hold, and the keys are computed.)

    Args:
        attention: A timm attention layer with h heads.
        x: What enters the layer, (B, N, D); token 0 is the class token.

    Returns:
        Weights (B, N) without gradient. They are positive and sum to 1 for every image, the class token's weight for
        itself included. In 32 bits at least, whatever the precision of the model or of autocast.
    """
    heads, width = attention.num_heads, attention.head_dim
    parameter_dtype = attention.qkv.weight.dtype
    with _full_precision(x.device):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        query, key, _ = attention.qkv.weight.to(x.dtype).unflatten(0, (3, heads, width))
        q = torch.einsum("hdc,bc->bhd", query, x[:, 0])
        if attention.qkv.bias is not None:
            q = q + attention.qkv.bias.to(x.dtype).unflatten(0, (3, heads, width))[0]
        q = attention.q_norm(q.to(parameter_dtype)).to(x.dtype)
        if isinstance(attention.k_norm, nn.Identity):
            logits = torch.einsum("bhd,hdc->bhc", q, key) @ x.mT
        else:
            k = torch.einsum("hdc,bnc->bhnd", key, x)
            if attention.qkv.bias is not None:
                k = k + attention.qkv.bias.to(x.dtype).unflatten(0, (3, heads, 1, width))[1]
            k = attention.k_norm(k.to(parameter_dtype)).to(x.dtype)
            logits = torch.einsum("bhd,bhnd->bhn", q, k)
        return (logits * attention.scale).softmax(dim=-1).mean(dim=1)


def most_attended(score: Tensor, keep: int) -> Tensor:
    """The patches with the largest scores, in the order of their places.

    Args:
        score: One score a patch, (B, P). Among equal ones the patch with the lower index wins.
        keep: How many to take, 1 to P.

    Returns:
        Indices (B, keep), int64, ascending in every row.

    Example:
        >>> most_attended(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), keep=2)
        tensor([[1, 3]])
    """
    return score.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Some tokens of every image.

    Args:
        x: Tokens (B, N, D).
        index: Which ones, (B, K), int64.

    Returns:
        Tokens (B, K, D).
    """
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def restore_tokens(full: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """All tokens as they were, with those at the given places replaced: what :func:`gather_tokens` took is put back.

    `full` is not changed, so the gradient reaches the replaced tokens, through `x`, and the others, through `full`.

    Args:
        full: Tokens (B, N, D).
        index: Places (B, K), int64, different within a row.
        x: Tokens for these places, (B, K, D). Mixed precision may have changed their type; the result has `full`'s.

    Returns:
        Tokens (B, N, D).
    """
    return full.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x.to(full.dtype))


class SkipBlocks(nn.Module):
    """The blocks of a vision transformer with a bypass around some of them; takes the place of `model.blocks`.

    Its children have the names that they have in an `nn.Sequential`, so checkpoints fit both ways.

    Args:
        blocks: The transformer blocks, L of them. The one before the split must be timm's `Block` with timm's
            `Attention`, unless the selection is random.
        split: Block s before which the tokens part, counted from 0; 1 to L, because block s - 1 gives the score.
        rejoin: Block e before which they come together again; s to L. L puts them back after the last block, which for
            a classifier that reads the class token means that they are dropped for good.
        drop_ratio: Share of the patches that skips, at least 0 and below 1.
        select: Who stays in the main path: "class attention" is the method; "inverted" keeps the least attended
            patches and "random" a new random set in every forward pass (from PyTorch's global generator).
        prefix: Number of tokens before the patches, at least 1; the first is the class token. They never skip.

    Attributes:
        skipping: Set it to False to send all tokens through all blocks.
        kept: The patches of each image that stayed in the main path in the last forward pass, (B, K), ascending; None
            if nothing skipped.

    Shapes: tokens (B, N, D) to tokens (B, N, D).

    Raises:
        ValueError: If an argument is out of range or the block before the split does not fit.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        *,
        split: int,
        rejoin: int,
        drop_ratio: float,
        select: Selection = "class attention",
        prefix: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= split <= rejoin <= len(blocks):
            raise ValueError(
                f"expected 1 <= split <= rejoin <= {len(blocks)} blocks, got split {split} and rejoin {rejoin}; "
                "the block before the split gives the score, so the tokens cannot part before block 0"
            )
        if not (math.isfinite(drop_ratio) and 0 <= drop_ratio < 1):
            raise ValueError(f"drop_ratio must be at least 0 and below 1, got {drop_ratio}")
        if select not in get_args(Selection):
            raise ValueError(f"select must be one of {', '.join(get_args(Selection))}, got {select!r}")
        if prefix < 1:
            raise ValueError(f"there must be a class token before the patches, got {prefix} tokens there")
        scorer = blocks[split - 1]
        # A subclass may compute something else in its forward pass, so only the classes themselves will do.
        if select != "random" and (type(scorer) is not Block or type(scorer.attn) is not Attention):
            inside = type(getattr(scorer, "attn", None)).__name__
            raise ValueError(
                f"block {split - 1} must be timm's Block with timm's Attention to give the score, "
                f"got {type(scorer).__name__} with {inside}"
            )
        for place, block in enumerate(blocks):
            self.add_module(str(place), block)
        self.split, self.rejoin = split, rejoin
        self.drop_ratio = drop_ratio
        self.select: Selection = select
        self.prefix = prefix
        self.skipping = True
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on the tokens (B, N, D), those between split and rejoin on the kept ones."""
        blocks = list(self.children())
        patches = x.shape[1] - self.prefix
        keep = kept_patches(patches, self.drop_ratio)
        if not self.skipping or self.split == self.rejoin or keep == patches:
            self.kept = None
            return _run(blocks, x)
        x = _run(blocks[: self.split - 1], x)
        x, score = self._score(blocks[self.split - 1], x)
        self.kept = most_attended(score, keep)
        always = torch.arange(self.prefix, device=x.device).expand(len(x), -1)
        index = torch.cat([always, self.kept + self.prefix], dim=1)
        main = _run(blocks[self.split : self.rejoin], gather_tokens(x, index))
        return _run(blocks[self.rejoin :], restore_tokens(x, index, main))

    def _score(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block before the split; also return a score (B, P) by which patches are kept."""
        if self.select == "random" or not (isinstance(block, Block) and isinstance(block.attn, Attention)):
            return block(x), torch.rand(len(x), x.shape[1] - self.prefix, device=x.device)
        # Block.forward, written out: the score needs what enters attention, and should not normalise it again.
        normed = block.norm1(x)
        score = class_attention(block.attn, normed.detach())[:, self.prefix :]
        x = x + block.drop_path1(block.ls1(block.attn(normed)))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, -score if self.select == "inverted" else score

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, place: int) -> nn.Module:
        return list(self.children())[place]

    def __iter__(self) -> NoReturn:
        """Refuse: timm runs the blocks one by one for activation checkpointing, masks and intermediate features.

        That would pass by the bypass without a word. `children()` lists the blocks.
        """
        raise TypeError(
            "blocks with a token skip cannot be run one by one: switch activation checkpointing off, call the model "
            "without a mask, or set model.blocks.skipping and use children() to list the blocks"
        )

    def extra_repr(self) -> str:
        """The settings, for the printed model."""
        return f"split={self.split}, rejoin={self.rejoin}, drop_ratio={self.drop_ratio}, select={self.select!r}"


def skip_tokens(
    model: VisionTransformer,
    *,
    split: int,
    rejoin: int,
    drop_ratio: float = 0.55,
    select: Selection = "class attention",
) -> VisionTransformer:
    """Let tokens bypass the blocks from `split` to `rejoin` - 1 of a timm vision transformer, in place.

    No parameter is added, renamed or drawn; an optimiser made before stays valid.

    Args:
        model: A timm vision transformer of any size that classifies by its class token.
        split: Block before which the tokens part, counted from 0; at least 1.
        rejoin: Block before which they come together again; `split` (no bypass) to the number of blocks.
        drop_ratio: Share of the patches that skips, at least 0 and below 1.
        select: Who stays, see :class:`SkipBlocks`.

    Returns:
        The same model.

    Raises:
        ValueError: If the model does not fit or an argument is out of range. The model is then as it was before.
    """
    if not isinstance(model, VisionTransformer) or not isinstance(model.blocks, nn.Sequential):
        raise ValueError(
            f"expected a timm VisionTransformer without a token skip, got {type(model).__name__} "
            f"with blocks {type(getattr(model, 'blocks', None)).__name__}"
        )
    if model.cls_token is None or model.global_pool != "token":
        raise ValueError(
            "the class token chooses the tokens and must be what is classified: expected a model with "
            f"class_token=True and global_pool='token', got global_pool={model.global_pool!r}"
        )
    if model.grad_checkpointing:
        raise ValueError("activation checkpointing runs the blocks one by one; switch it off before adding the skip")
    kept_patches(model.patch_embed.num_patches, drop_ratio)
    model.blocks = SkipBlocks(  # type: ignore[assignment]  # timm only calls it, and it refuses to be iterated
        list(model.blocks),
        split=split,
        rejoin=rejoin,
        drop_ratio=drop_ratio,
        select=select,
        prefix=model.num_prefix_tokens,
    )
    return model


def _run(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast; a device without autocast, such as meta, needs nothing."""
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
