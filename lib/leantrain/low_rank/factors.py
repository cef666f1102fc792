r"""Layers as products of thinner layers.

A linear layer or a 1x1 convolution with the matrix :math:`W` of C inputs and S outputs becomes an `SVDPair`: from
:math:`W = U \Sigma V^\top` the leading :math:`R` singular values are kept and split evenly,

.. math:: W \approx \big(U_R \sqrt{\Sigma_R}\big)\big(\sqrt{\Sigma_R} V_R^\top\big),

a layer :math:`C \to R` without bias and a layer :math:`R \to S` with the old one. A convolution with a larger kernel
becomes a `TuckerTriple`: a 1x1 convolution :math:`C \to r_1`, a core with the old kernel, stride and padding
:math:`r_1 \to r_2`, and a 1x1 convolution :math:`r_2 \to S`. Its outer factors have orthonormal columns, found by the
higher-order SVD and improved by a few sweeps of alternating least squares (higher-order orthogonal iteration).

All factors are computed in 64-bit and stored in the layer's own type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from leantrain.low_rank.ranks import energy_rank, pair_size, svd_rank, triple_size, tucker_ranks

__all__ = [
    "Dense",
    "Factored",
    "Part",
    "Rank",
    "SVDPair",
    "TuckerTriple",
    "choose_ranks",
    "decompose",
    "decompose_model",
    "dense_size",
    "factored_size",
    "factors_of",
    "is_decomposable",
    "linear_pair",
    "merge",
    "reconstruct",
    "svd_factors",
    "train_part",
    "tucker_factors",
]

Rank = int | tuple[int, int]
Dense = nn.Linear | nn.Conv2d
#: The factors that stand between the others (`inner`: an SVD pair's second factor, a triple's core), or the rest.
Part = Literal["outer", "inner"]


class SVDPair(nn.Sequential):
    """Two layers in place of a linear layer or a 1x1 convolution.

    Args:
        first: C -> R, without bias; a convolution's stride and padding are here.
        second: R -> S, with the bias.
    """

    def __init__(self, first: Dense, second: Dense) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def rank(self) -> int:
        """Width between the two layers."""
        return self.second.weight.shape[1]


class TuckerTriple(nn.Sequential):
    """Three convolutions in place of one.

    Args:
        first: 1x1, C -> r1, without bias.
        core: The old kernel size, stride, padding and dilation, r1 -> r2, without bias; it may be grouped.
        last: 1x1, r2 -> S, with the bias.
    """

    def __init__(self, first: nn.Conv2d, core: nn.Conv2d, last: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.core, self.last = first, core, last

    @property
    def rank(self) -> tuple[int, int]:
        """Channels into and out of the core."""
        return self.core.in_channels, self.core.out_channels


Factored = SVDPair | TuckerTriple


def is_decomposable(layer: nn.Module) -> bool:
    """Whether a layer can be decomposed: a linear layer, or a 2D convolution that is not grouped.

    Subclasses are left alone: their `forward` may do something else with the weight, or (as in
    `torch.nn.MultiheadAttention`) it may be read by another module.

    Args:
        layer: Any module.
    """
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def _is_matrix(layer: Dense) -> bool:
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


def _refuse(layer: nn.Module) -> None:
    if not is_decomposable(layer):
        what = type(layer).__name__
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            what = f"a convolution in {layer.groups} groups"
        raise ValueError(f"cannot decompose {what}: expected torch.nn.Linear, or torch.nn.Conv2d with groups=1")


def _check_rank(layer: Dense, rank: Rank) -> None:
    shape = tuple(layer.weight.shape)
    if _is_matrix(layer):
        most = min(shape[:2])
        if not isinstance(rank, int) or not 1 <= rank <= most:
            raise ValueError(f"rank={rank} for a matrix of shape {shape[:2]}: expected a whole number from 1 to {most}")
    elif not isinstance(rank, tuple) or not (1 <= rank[0] <= shape[1] and 1 <= rank[1] <= shape[0]):
        most_in, most_out = shape[1], shape[0]
        raise ValueError(
            f"rank={rank} for a convolution of shape {shape}: expected a pair, from (1, 1) to ({most_in}, {most_out})"
        )


def _check_branches(rank: Rank, branches: int) -> None:
    if branches < 1 or (branches > 1 and (isinstance(rank, int) or rank[0] % branches or rank[1] % branches)):
        raise ValueError(f"branches={branches} with rank={rank}: expected a number that divides both ranks of a triple")


def dense_size(layer: Dense) -> int:
    """Weights of a layer, biases left out.

    Args:
        layer: A linear layer or a convolution.
    """
    return layer.weight.numel()


def factored_size(layer: Dense, rank: Rank) -> int:
    """Weights of a layer's factors, biases left out.

    Args:
        layer: A layer that can be decomposed.
        rank: Its rank: one number for a matrix, two for a larger kernel.

    Raises:
        ValueError: If the rank does not fit the layer.
    """
    _refuse(layer)
    _check_rank(layer, rank)
    outputs, inputs, *kernel = layer.weight.shape
    if isinstance(rank, tuple):
        return triple_size(inputs, outputs, kernel[0] * kernel[1], rank)
    return pair_size(inputs, outputs, rank)


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD with the singular values split evenly.

    Args:
        matrix: (C, S).
        rank: From 1 to min(C, S).

    Returns:
        Factors (C, R) and (R, S) of equal Frobenius norm, in 64-bit; their product is the best approximation of that
        rank.
    """
    u, s, vt = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """Orthonormal leading left singular vectors, (rows, rank)."""
    # The Gram matrix is small; in 64-bit the vectors of all singular values that matter are exact enough.
    vectors = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors
    return vectors.flip(-1)[:, :rank]


def tucker_factors(weight: Tensor, ranks: tuple[int, int], sweeps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 decomposition on the two channel axes.

    Args:
        weight: (S, C, height, width).
        ranks: r1 from 1 to C, r2 from 1 to S.
        sweeps: Sweeps of higher-order orthogonal iteration after the higher-order SVD; 0 or more.

    Returns:
        (C, r1) and (S, r2) with orthonormal columns, and the core (r2, r1, height, width), in 64-bit.
    """
    tensor = weight.detach().double()
    first = _leading(tensor.transpose(0, 1).flatten(1), ranks[0])
    last = _leading(tensor.flatten(1), ranks[1])
    for _ in range(sweeps):
        first = _leading(torch.einsum("schw,sr->crhw", tensor, last).flatten(1), ranks[0])
        last = _leading(torch.einsum("schw,cr->srhw", tensor, first).flatten(1), ranks[1])
    return first, last, torch.einsum("schw,cp,sq->qphw", tensor, first, last)


def _new(kind: type[nn.Module], like: Tensor, **options: object) -> nn.Module:
    # Weights are set right away: no random numbers are drawn, and none of the caller's are used up.
    return nn.utils.skip_init(kind, **options, device=like.device, dtype=like.dtype)


def _filled(one: nn.Module, two: nn.Module, first: Tensor, second: Tensor) -> SVDPair:
    pair = SVDPair(cast(Dense, one), cast(Dense, two))
    _fill(pair.first, first.T)
    _fill(pair.second, second.T)
    return pair


def linear_pair(first: Tensor, second: Tensor, like: Tensor, bias: Tensor | None) -> SVDPair:
    """A pair of linear layers that holds given factors.

    Args:
        first: (C, R).
        second: (R, S).
        like: A tensor of the device and type that the layers get.
        bias: Of the second layer, (S); copied. None for none.
    """
    one = _new(nn.Linear, like, in_features=first.shape[0], out_features=first.shape[1], bias=False)
    two = _new(nn.Linear, like, in_features=first.shape[1], out_features=second.shape[1], bias=bias is not None)
    if bias is not None:
        with torch.no_grad():
            cast(Tensor, two.bias).copy_(bias)
    return _filled(one, two, first, second)


def _pair(layer: Dense, first: Tensor, second: Tensor) -> SVDPair:
    if isinstance(layer, nn.Linear):
        return linear_pair(first, second, layer.weight, layer.bias)
    rank, bias = first.shape[1], layer.bias is not None
    one = _new(
        nn.Conv2d, layer.weight, in_channels=layer.in_channels, out_channels=rank, kernel_size=1, bias=False,
        stride=layer.stride, padding=layer.padding, padding_mode=layer.padding_mode,
    )  # fmt: skip
    two = _new(nn.Conv2d, layer.weight, in_channels=rank, out_channels=layer.out_channels, kernel_size=1, bias=bias)
    return _filled(one, two, first, second)


def _triple(layer: nn.Conv2d, first: Tensor, last: Tensor, core: Tensor, groups: int) -> TuckerTriple:
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    triple = TuckerTriple(
        *(
            cast(nn.Conv2d, _new(nn.Conv2d, layer.weight, **given))
            for given in (
                {"in_channels": first.shape[0], "out_channels": first.shape[1], "kernel_size": 1, "bias": False},
                {"in_channels": first.shape[1], "out_channels": last.shape[1], "kernel_size": layer.kernel_size,
                 "bias": False, "groups": groups, "padding_mode": layer.padding_mode, **options},
                {"in_channels": last.shape[1], "out_channels": last.shape[0], "kernel_size": 1,
                 "bias": layer.bias is not None},
            )
        )
    )  # fmt: skip
    _fill(triple.first, first.T)
    _fill(triple.core, core)
    _fill(triple.last, last)
    return triple


def _fill(layer: Dense, values: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(values.reshape(layer.weight.shape))


def _finish(layer: Dense, factored: Factored) -> Factored:
    """Carry over the bias, the memory format and the mode."""
    if layer.bias is not None:
        bias = factored[-1].bias
        with torch.no_grad():
            cast(Tensor, bias).copy_(layer.bias)
    if isinstance(layer, nn.Conv2d) and layer.weight.is_contiguous(memory_format=torch.channels_last):
        factored.to(memory_format=torch.channels_last)
    return factored.train(layer.training)


def decompose(layer: nn.Module, rank: Rank, *, sweeps: int = 5, branches: int = 1) -> Factored:
    """The factors of a layer.

    Args:
        layer: A linear layer, or a convolution that is not grouped; it is not changed. On the meta device only the
            shapes are made.
        rank: One number for a linear layer or a 1x1 convolution, two for a larger kernel.
        sweeps: See `tucker_factors`.
        branches: Keep only this many equal blocks on the diagonal of a triple's core, which becomes a grouped
            convolution. Blocks off the diagonal are dropped: with more than one the approximation is coarser than its
            ranks say.

    Returns:
        An `SVDPair` or a `TuckerTriple` with the layer's device, type, memory format, stride, padding, dilation and
        bias.

    Raises:
        ValueError: If the layer cannot be decomposed, the rank does not fit it, or the branches do not divide the
            ranks.

    >>> layer = nn.Linear(64, 32)
    >>> thin = decompose(layer, 8)
    >>> [tuple(factor.weight.shape) for factor in thin]
    [(8, 64), (32, 8)]
    """
    _refuse(layer)
    dense = cast(Dense, layer)
    _check_rank(dense, rank)
    weight = dense.weight
    _check_branches(rank, branches)
    if isinstance(rank, int):
        shapes = (weight.shape[1], rank), (rank, weight.shape[0])
        first, second = (
            (weight.new_empty(s) for s in shapes) if weight.is_meta else svd_factors(weight.flatten(1).T, rank)
        )
        return _finish(dense, _pair(dense, first, second))
    if weight.is_meta:
        outputs, inputs, *kernel = weight.shape
        triple = (inputs, rank[0]), (outputs, rank[1]), (rank[1], rank[0], *kernel)
        first, last, core = (weight.new_empty(s) for s in triple)
    else:
        first, last, core = tucker_factors(weight, rank, sweeps)
    rows, columns = rank[1] // branches, rank[0] // branches
    blocks = [core[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(branches)]
    return _finish(dense, _triple(cast(nn.Conv2d, dense), first, last, torch.cat(blocks), branches))


def _core_weight(core: nn.Conv2d) -> Tensor:
    """The weight of a core as if it were not grouped: a block for each group, zeros elsewhere."""
    if core.groups == 1:
        return core.weight
    blocks = core.weight.chunk(core.groups)
    weight = core.weight.new_zeros(core.out_channels, core.in_channels, *core.kernel_size)
    out, into = core.out_channels // core.groups, core.in_channels // core.groups
    for i, block in enumerate(blocks):
        weight[i * out : (i + 1) * out, i * into : (i + 1) * into] = block
    return weight


def reconstruct(factored: Factored) -> Tensor:
    """The weight that the factors stand for, in the layout of the dense layer.

    Args:
        factored: An `SVDPair` or a `TuckerTriple`.

    Returns:
        (S, C) for a linear pair, (S, C, height, width) otherwise.
    """
    if isinstance(factored, SVDPair):
        first, second = factored.first.weight, factored.second.weight
        product = second.flatten(1) @ first.flatten(1)
        return product if first.ndim == 2 else product[..., None, None]
    first, last = factored.first.weight.flatten(1), factored.last.weight.flatten(1)
    return torch.einsum("qphw,pc,sq->schw", _core_weight(factored.core), first, last)


def merge(factored: Factored) -> Dense:
    """One dense layer that computes what the factors compute.

    Args:
        factored: An `SVDPair` or a `TuckerTriple`; it is not changed.

    Returns:
        A linear layer or a convolution with the factors' device, type, stride, padding, dilation and bias.
    """
    first, final = cast(Dense, factored[0]), cast(Dense, factored[-1])
    bias = final.bias is not None
    options: dict[str, object]
    if isinstance(first, nn.Linear):
        options = {"in_features": first.in_features, "out_features": final.weight.shape[0]}
        dense = cast(Dense, _new(nn.Linear, first.weight, bias=bias, **options))
    else:
        core = cast(nn.Conv2d, factored.core if isinstance(factored, TuckerTriple) else first)
        options = {
            "in_channels": first.weight.shape[1], "out_channels": final.weight.shape[0],
            "kernel_size": core.kernel_size, "stride": core.stride, "padding": core.padding,
            "dilation": core.dilation, "padding_mode": core.padding_mode,
        }  # fmt: skip
        dense = cast(Dense, _new(nn.Conv2d, first.weight, bias=bias, **options))
    _fill(dense, reconstruct(factored))
    if bias:
        with torch.no_grad():
            cast(Tensor, dense.bias).copy_(cast(Tensor, final.bias))
    if first.weight.ndim == 4 and first.weight.is_contiguous(memory_format=torch.channels_last):
        dense.to(memory_format=torch.channels_last)
    return cast(Dense, dense.train(factored.training))


def _candidates(model: nn.Module) -> Iterator[tuple[str, Dense]]:
    """Layers that can be decomposed, in order; those that share their weight with another module are left out."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        if name and is_decomposable(module) and owners[id(module.weight)] == 1:
            yield name, cast(Dense, module)


def _rank_of(layer: Dense, compression: float | None, energy: float | None, multiple: int) -> Rank:
    outputs, inputs, *kernel = layer.weight.shape

    def aligned(rank: int) -> int:
        return rank // multiple * multiple if rank >= multiple else rank

    if _is_matrix(layer):
        if compression is not None:
            return aligned(svd_rank(inputs, outputs, compression))
        values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
        return aligned(energy_rank(values.tolist(), cast(float, energy)))
    if compression is not None:
        first, second = tucker_ranks(inputs, outputs, kernel[0] * kernel[1], compression)
    else:
        weight = layer.weight.detach().double()
        unfolded = weight.transpose(0, 1).flatten(1), weight.flatten(1)
        first, second = (energy_rank(torch.linalg.svdvals(u).tolist(), cast(float, energy)) for u in unfolded)
    return aligned(first), aligned(second)


def choose_ranks(
    model: nn.Module,
    *,
    compression: float | None = None,
    energy: float | None = None,
    multiple: int = 1,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> dict[str, Rank]:
    """Ranks for the layers of a model that gain by decomposition.

    A layer is left alone if its factors would not have fewer weights than it has, or if it shares its weight with
    another module.

    Args:
        model: Any model.
        compression: Each layer's factors get at most 1/compression of its weights.
        energy: Or: each matrix keeps this share of its squared singular values (a larger kernel: of those of both
            its unfoldings).
        multiple: Ranks of at least this number are rounded down to a multiple of it; 1 or more.
        where: Told the name and the module, says whether a layer may be decomposed; None allows all.

    Returns:
        Name -> rank, in the model's order.

    Raises:
        ValueError: Unless exactly one of compression and energy is given, or a number is out of range.
    """
    if (compression is None) == (energy is None):
        raise ValueError(f"compression={compression}, energy={energy}: expected exactly one of the two")
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: expected 1 or more")
    ranks: dict[str, Rank] = {}
    for name, layer in _candidates(model):
        if where is not None and not where(name, layer):
            continue
        rank = _rank_of(layer, compression, energy, multiple)
        smallest = min(rank) if isinstance(rank, tuple) else rank
        if smallest >= 1 and factored_size(layer, rank) < dense_size(layer):
            ranks[name] = rank
    return ranks


def decompose_model(model: nn.Module, ranks: Mapping[str, Rank], *, sweeps: int = 5, branches: int = 1) -> nn.Module:
    """Replace layers of a model by their factors, in place.

    An optimiser made before holds the old weights: make a new one.

    Args:
        model: Any model.
        ranks: Name of a layer -> its rank, as from `choose_ranks`.
        sweeps: See `tucker_factors`.
        branches: Into how many groups the cores of triples are cut, see `decompose`; pairs have none.

    Returns:
        The same model.

    Raises:
        ValueError: If a layer does not exist, cannot be decomposed, its rank does not fit, or the branches do not
            divide it; nothing is changed then.

    >>> import timm
    >>> model = timm.create_model("resnet50")
    >>> ranks = choose_ranks(model, compression=2, where=lambda name, layer: name.startswith("layer4"))
    >>> decompose_model(model, ranks).layer4[0].conv2.rank
    (309, 309)
    """
    places = dict(model.named_modules(remove_duplicate=False))
    for name, rank in ranks.items():
        if name not in places:
            raise ValueError(f"the model has no layer {name!r}")
        _refuse(places[name])
        _check_rank(cast(Dense, places[name]), rank)
        if isinstance(rank, tuple):
            _check_branches(rank, branches)
    for name, rank in ranks.items():
        layer = places[name]
        factored = decompose(layer, rank, sweeps=sweeps, branches=branches if isinstance(rank, tuple) else 1)
        for alias in [a for a, module in places.items() if module is layer]:
            model.set_submodule(alias, factored)
    return model


def factors_of(model: nn.Module) -> dict[str, Factored]:
    """The decomposed layers of a model.

    Args:
        model: Any model.

    Returns:
        Name -> pair or triple, in the model's order.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDPair | TuckerTriple)}


def train_part(model: nn.Module, part: Part | None) -> None:
    """Train one part of each decomposed layer and freeze the other.

    A frozen weight gets no gradient, and loses the one it has, so that no optimiser touches it. Biases and all other
    layers are left as they are.

    Args:
        model: A model with decomposed layers.
        part: `inner` trains the second factor of a pair and the core of a triple, `outer` the first factor of a pair
            and both 1x1 factors of a triple, None all.

    Raises:
        ValueError: If there is no such part, or no decomposed layer.
    """
    if part not in ("inner", "outer", None):
        raise ValueError(f"part={part!r}: expected 'inner', 'outer' or None")
    layers = factors_of(model)
    if not layers:
        raise ValueError("the model has no decomposed layer: call decompose_model first")
    for factored in layers.values():
        inner = factored.core if isinstance(factored, TuckerTriple) else factored.second
        for factor in factored:
            weight = cast(Tensor, factor.weight)
            weight.requires_grad_(part is None or (factor is inner) == (part == "inner"))
            if not weight.requires_grad:
                weight.grad = None
