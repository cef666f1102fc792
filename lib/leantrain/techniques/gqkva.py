r"""GQKVA: heads of attention that share query projections, key and value projections, or both.

Paper: Javadi and others, "GQKVA: Efficient Pre-training of Transformers by Grouping Queries, Keys, and Values",
arXiv 2311.03426.

Multi-head attention has :math:`h` heads, each with a query, a key and a value projection of its own. Here only
:math:`n_q` queries and :math:`n_{kv}` key-value pairs are projected, and every head :math:`r` is told by two index
maps which query :math:`q(r)` meets which pair :math:`kv(r)`:

.. math::

    \mathrm{head}_r = \operatorname{softmax}\big(Q_{q(r)} K_{kv(r)}^\top / \sqrt d\big)\, V_{kv(r)}, \qquad
    Y = [\mathrm{head}_0 \dots \mathrm{head}_{h-1}]\, W_O + b_O, \qquad d = D / h .

There are still :math:`h` heads of width :math:`d`, so the output projection and the work inside attention stay; only
the input projections shrink. The variants are pairs of maps:

=================  ===========  ==============  =====================================================
variant            :math:`n_q`  :math:`n_{kv}`  head :math:`r` is the pair
=================  ===========  ==============  =====================================================
MHA                h            h               :math:`(r, r)`
GKVA-g             g            h               :math:`(\lfloor r g / h \rfloor, r)`
MKVA               1            h               :math:`(0, r)`
GQA-g              h            g               :math:`(r, \lfloor r g / h \rfloor)`
MQA                h            1               :math:`(r, 0)`
GQKVA-a.b          a            b               :math:`(\lfloor r / b \rfloor, r \bmod b)` with ab = h
=================  ===========  ==============  =====================================================

:class:`GroupedAttention` is a plain module; :func:`group_attention` puts it into any timm vision transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

__all__ = [
    "GroupedAttention",
    "Pairing",
    "Variant",
    "attend",
    "block_macs",
    "group_attention",
    "head_pairs",
    "parameters_saved",
    "variant",
    "variants",
]

Pairing = Literal["blocks", "grid"]


def head_pairs(heads: int, n_q: int, n_kv: int, pairing: Pairing) -> tuple[tuple[int, int], ...]:
    """The query and the key-value pair of every head.

    Args:
        heads: Number of attention heads h, at least 1.
        n_q: Number of different queries, a divisor of h.
        n_kv: Number of different key-value pairs, a divisor of h.
        pairing: "blocks": consecutive heads share, and one side is not shared at all (MHA, GQA, GKVA).
            "grid": every query meets every key-value pair once, which needs n_q * n_kv = h (MQA, MKVA, GQKVA).

    Returns:
        h different pairs (query, key-value pair), in the order of the heads.

    Raises:
        ValueError: If a count is not positive, or if the counts do not give h different pairs.
    """
    for label, count in (("heads", heads), ("n_q", n_q), ("n_kv", n_kv)):
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    if pairing == "grid":
        if n_q * n_kv != heads:
            raise ValueError(
                f"a grid needs n_q * n_kv = heads, got {n_q} * {n_kv} = {n_q * n_kv} for {heads} heads; "
                "with another product head pairs would repeat or be missing"
            )
        return tuple((r // n_kv, r % n_kv) for r in range(heads))
    if pairing == "blocks":
        if heads % n_q or heads % n_kv:
            raise ValueError(f"n_q = {n_q} and n_kv = {n_kv} must both divide the {heads} heads")
        if heads not in (n_q, n_kv):
            raise ValueError(
                f"blocks share on one side only: n_q = {n_q} or n_kv = {n_kv} must equal the {heads} heads; "
                "to share on both sides use the grid"
            )
        return tuple((r * n_q // heads, r * n_kv // heads) for r in range(heads))
    raise ValueError(f"pairing must be 'blocks' or 'grid', got {pairing!r}")


@dataclass(frozen=True)
class Variant:
    """A way to share projections among a number of heads.

    Attributes:
        name: The name used in tables: "MHA", "GKVA-3", "GQKVA-3.2" (first number: query groups).
        heads: Number of attention heads h.
        n_q: Number of different queries.
        n_kv: Number of different key-value pairs.
        pairing: How heads are formed from them, see :func:`head_pairs`.
    """

    name: str
    heads: int
    n_q: int
    n_kv: int
    pairing: Pairing

    def __post_init__(self) -> None:
        head_pairs(self.heads, self.n_q, self.n_kv, self.pairing)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (query, key-value pair) of every head."""
        return head_pairs(self.heads, self.n_q, self.n_kv, self.pairing)


def variants(heads: int) -> list[Variant]:
    """All variants that exist for a number of heads, from multi-head attention to the smallest.

    A prime number of heads has only MHA, MKVA and MQA; one head has only MHA.

    Args:
        heads: Number of attention heads, at least 1.
    """
    h = heads
    found = [Variant("MHA", h, h, h, "blocks")]
    groups = [g for g in range(h - 1, 1, -1) if h % g == 0]
    found += [Variant(f"GKVA-{g}", h, g, h, "blocks") for g in groups]
    if h > 1:
        found.append(Variant("MKVA", h, 1, h, "grid"))
    found += [Variant(f"GQA-{g}", h, h, g, "blocks") for g in groups]
    if h > 1:
        found.append(Variant("MQA", h, h, 1, "grid"))
    found += [Variant(f"GQKVA-{g}.{h // g}", h, g, h // g, "grid") for g in groups]
    return sorted(found, key=lambda v: -(v.n_q + 2 * v.n_kv))


def variant(name: str, heads: int) -> Variant:
    """The variant of that name for a number of heads.

    Args:
        name: "MHA", "MQA", "MKVA", "GQA-g", "GKVA-g" or "GQKVA-a.b" (a query groups, b key-value groups).
        heads: Number of attention heads, at least 1.

    Raises:
        ValueError: If the name is none of these, or if its group counts do not fit the number of heads.
    """
    legal = variants(heads)
    for candidate in legal:
        if candidate.name == name:
            return candidate
    names = ", ".join(v.name for v in legal)
    raise ValueError(
        f"there is no variant {name!r} for {heads} heads: the groups of GQA and GKVA must divide {heads}, "
        f"those of GQKVA must have the product {heads}; the variants are {names}"
    )


def parameters_saved(dim: int, heads: int, n_q: int, n_kv: int, bias: bool = True) -> int:
    """Parameters that one attention layer saves against multi-head attention: (h - n_q + 2(h - n_kv)) (D d + d).

    Args:
        dim: Width D of the tokens.
        heads: Number of heads h, a divisor of D; d = D / h.
        n_q: Number of different queries, 1 to h.
        n_kv: Number of different key-value pairs, 1 to h.
        bias: Whether the projections have a bias (the term d).
    """
    width = _head_width(dim, heads)
    return (heads - n_q + 2 * (heads - n_kv)) * (dim * width + (width if bias else 0))


def block_macs(dim: int, heads: int, n_q: int, n_kv: int, tokens: int, mlp_ratio: float = 4.0) -> dict[str, int]:
    """Multiply-accumulates of one transformer block in a forward pass of one sample, by part.

    Args:
        dim: Width D of the tokens.
        heads: Number of heads h, a divisor of D.
        n_q: Number of different queries, 1 to h.
        n_kv: Number of different key-value pairs, 1 to h.
        tokens: Number of tokens N.
        mlp_ratio: Hidden width of the MLP over D.

    Returns:
        "query, key, value": the input projections, the only part that depends on the variant;
        "attention core": scores and weighted values, 2 N^2 D; "output projection": N D^2; "MLP".
    """
    width = _head_width(dim, heads)
    return {
        "query, key, value": (n_q + 2 * n_kv) * tokens * dim * width,
        "attention core": 2 * tokens * tokens * dim,
        "output projection": tokens * dim * dim,
        "MLP": 2 * tokens * dim * int(dim * mlp_ratio),
    }


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: tuple[tuple[int, int], ...],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of heads that are pairs of shared queries and keys: the definition, by two index maps.

    Args:
        q: Queries (B, n_q, N, d).
        k: Keys (B, n_kv, N, d).
        v: Values (B, n_kv, N, d).
        pairs: The query and the key-value pair of every head, see :func:`head_pairs`.
        mask: Boolean or additive mask, broadcastable to (B, h, N, N).
        is_causal: Whether token n sees only tokens up to n.
        dropout: Probability with which an attention weight is dropped, 0 to 1.

    Returns:
        The heads (B, h, N, d).
    """
    q_of_head, kv_of_head = torch.tensor(pairs, device=q.device).unbind(1)
    q, k, v = q[:, q_of_head], k[:, kv_of_head], v[:, kv_of_head]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout)


class GroupedAttention(nn.Module):
    """Self-attention whose heads share query projections, key and value projections, or both.

    Args:
        dim: Width D of the tokens, divisible by `heads`.
        heads: Number of attention heads h.
        n_q: Number of different queries; h means that they are not shared.
        n_kv: Number of different key-value pairs; h means that they are not shared.
        pairing: "blocks" or "grid", see :func:`head_pairs`.
        qkv_bias: Whether the query, key and value projections have a bias.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Probability with which an attention weight is dropped in training, 0 to 1.
        proj_drop: Probability with which an output feature is dropped in training, 0 to 1.

    Shapes: tokens (B, N, D) to tokens (B, N, D).

    Weights start as in timm's vision transformers: truncated normal of standard deviation 0.02, biases zero.
    `q_norm` and `k_norm` act on single queries and keys (width d) and are the identity unless replaced.

    Raises:
        ValueError: If `heads` does not divide `dim`, or if the counts do not fit (see :func:`head_pairs`).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        n_q: int,
        n_kv: int,
        pairing: Pairing,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.pairs = head_pairs(heads, n_q, n_kv, pairing)
        self.pairing = pairing
        self.num_heads, self.n_q, self.n_kv = heads, n_q, n_kv
        self.head_dim = _head_width(dim, heads)
        self.q = nn.Linear(dim, n_q * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, n_kv * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, n_kv * self.head_dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @classmethod
    def from_attention(cls, attention: nn.Module, name: str) -> Self:
        """A variant of a timm attention layer, on the same device and in the same precision.

        The output projection, the norms of queries and keys and the dropouts are the layer's own. The new
        projections are those rows of the layer's fused `qkv` that belong to the first head of each group
        (:meth:`load_fused_qkv`). In a freshly initialised layer these are independent draws like any other, so
        all variants of one seed start alike and no new random number is drawn. In a trained layer it
        throws heads away; this is not a way to convert a trained model.

        Args:
            attention: The timm `Attention` to replace. Its `fused_attn` switch has no counterpart here: PyTorch's
                `scaled_dot_product_attention` is always used, which computes the same.
            name: Name of a variant, see :func:`variant`.

        Raises:
            ValueError: If the layer is not timm's plain `Attention`, if it is gated, normalises its output
                (`scale_norm`), or has heads of another width than dim / heads.
        """
        # A subclass may compute something else in its forward pass, so only the class itself will do.
        if type(attention) is not Attention:
            raise ValueError(f"expected a timm Attention layer, got {type(attention).__name__}")
        heads, dim = attention.num_heads, attention.qkv.in_features
        if attention.gate is not None:
            raise ValueError("a gated attention layer cannot be grouped; build the model with gated=False")
        if not isinstance(attention.norm, nn.Identity):
            raise ValueError("an attention layer with scale_norm cannot be grouped; build the model without it")
        if attention.attn_dim != dim or attention.proj.out_features != dim:
            raise ValueError(
                f"heads must have width dim / heads = {dim} / {heads}, got {attention.head_dim} "
                f"and an output of {attention.proj.out_features}"
            )
        chosen = variant(name, heads)
        with torch.device("meta"):  # the weights are taken from the layer: draw no random numbers
            new = cls(dim, heads, chosen.n_q, chosen.n_kv, chosen.pairing, qkv_bias=attention.qkv.bias is not None)
        new.to_empty(device=attention.qkv.weight.device).to(attention.qkv.weight.dtype)
        new.load_fused_qkv(attention.qkv)
        new.q_norm, new.k_norm = attention.q_norm, attention.k_norm
        new.attn_drop, new.proj, new.proj_drop = attention.attn_drop, attention.proj, attention.proj_drop
        return new.train(attention.training)

    @torch.no_grad()
    def load_fused_qkv(self, qkv: nn.Linear) -> None:
        """Copy the rows of a fused projection that belong to the first head of each group.

        For multi-head attention these are all rows, and the layer then computes what the fused one did.

        Args:
            qkv: Projection D -> 3D whose output is queries, keys, values, and in each of them head by head.

        Raises:
            ValueError: If the shape does not fit, or if only one of the two layers has a bias.
        """
        dim, heads = self.q.in_features, self.num_heads
        if (qkv.in_features, qkv.out_features) != (dim, 3 * dim):
            raise ValueError(f"expected a projection {dim} -> {3 * dim}, got {qkv.in_features} -> {qkv.out_features}")
        if (qkv.bias is None) != (self.q.bias is None):
            raise ValueError("either both projections must have a bias or neither")
        q_of_head, kv_of_head = zip(*self.pairs, strict=True)
        first_q = [q_of_head.index(i) for i in range(self.n_q)]
        first_kv = [kv_of_head.index(j) for j in range(self.n_kv)]
        targets = ((self.q, first_q), (self.k, first_kv), (self.v, first_kv))
        for part, (linear, rows) in enumerate(targets):
            linear.weight.copy_(qkv.weight.view(3, heads, -1, dim)[part, rows].flatten(0, 1))
            if linear.bias is not None:
                linear.bias.copy_(qkv.bias.view(3, heads, -1)[part, rows].flatten())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among the tokens (B, N, D); mask and `is_causal` as in :func:`attend`."""
        batch, tokens, dim = x.shape
        q = self.q(x).view(batch, tokens, self.n_q, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        if attn_mask is None and not is_causal:
            heads = self._attend_folded(q, k, v, dropout)
        else:
            heads = attend(q, k, v, self.pairs, mask=attn_mask, is_causal=is_causal, dropout=dropout)
        return self.proj_drop(self.proj(heads.transpose(1, 2).reshape(batch, tokens, dim)))

    def _attend_folded(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What :func:`attend` computes, without copying shared keys and values for every head.

        Without a mask a query does not know which token it came from. So the m = h / n_kv queries that meet the
        same keys can lie end to end, as one head with mN queries. Keys and values are then read in place.

        `benchmarks/gqkva_attention.py` times this against indexing, expanded views and PyTorch's `enable_gqa`.
        """
        batch, _, tokens, width = q.shape
        met = self.num_heads // self.n_kv
        if self.pairing == "grid":  # every key-value pair meets all queries: a view, repeated with stride 0
            q = q.reshape(batch, 1, met * tokens, width).expand(-1, self.n_kv, -1, -1)
        elif self.n_q < self.num_heads:  # GKVA: met = 1, and a query belongs to several keys
            q = q.repeat_interleave(self.num_heads // self.n_q, dim=1)
        else:
            q = q.reshape(batch, self.n_kv, met * tokens, width)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = out.view(batch, self.n_kv, met, tokens, width)
        if self.pairing == "grid":  # head r = i n_kv + j: the queries are the outer index
            out = out.transpose(1, 2)
        return out.flatten(1, 2)

    def extra_repr(self) -> str:
        """The counts, for the printed model."""
        return f"heads={self.num_heads}, n_q={self.n_q}, n_kv={self.n_kv}, pairing={self.pairing!r}"


def group_attention(model: VisionTransformer, name: str) -> VisionTransformer:
    """Replace the attention of every block by a variant, in place; all other parameters stay untouched.

    Call it on a freshly initialised model, before an optimiser is made. What the new layers start from is told in
    :meth:`GroupedAttention.from_attention`.

    Args:
        model: A timm vision transformer whose blocks hold timm's `Attention`.
        name: Name of a variant that exists for the model's number of heads, see :func:`variant`.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no such blocks, or if a block or the name does not fit. The model is then as it
            was before.
    """
    blocks = [block for block in model.modules() if isinstance(getattr(block, "attn", None), nn.Module)]
    if not isinstance(model, VisionTransformer) or not blocks:
        raise ValueError(f"expected a timm VisionTransformer with attention blocks, got {type(model).__name__}")
    replacements = []
    for index, block in enumerate(blocks):
        try:
            replacements.append(GroupedAttention.from_attention(block.get_submodule("attn"), name))
        except ValueError as error:
            raise ValueError(f"block {index}: {error}") from error
    for block, replacement in zip(blocks, replacements, strict=True):
        block.attn = replacement
    return model


def _head_width(dim: int, heads: int) -> int:
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {heads}")
    return dim // heads
