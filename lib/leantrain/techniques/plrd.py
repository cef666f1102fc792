r"""Progressive low-rank decomposition: a family of models from one parent.

Paper: Hajimolahoseini and others, "Single Parent Family: A Spectrum of Family Members from a Single Pre-Trained
Foundation Model", arXiv 2406.19995.

Every linear layer of a trained parent becomes a pair of factors of rank :math:`R = \lfloor CS / P(C+S) \rfloor`, the
model is trained on for a while, and that is a family member. Then the rank is lowered again: the member's pairs are
replaced by pairs of a lower rank, so that a layer never becomes more than two. :math:`P` is measured against the
*original* layer and rises from member to member.

How a pair is decomposed again is told in two ways in the authors' earlier papers. *Product*: the best approximation of
:math:`W_0 W_1` at the new rank. With :math:`W_0 = Q_0 R_0` and :math:`W_1^\top = Q_1 R_1` only the small matrix
:math:`R_0 R_1^\top` needs a singular value decomposition. *Second*: :math:`W_1 \approx AB` at the new rank, and
:math:`W_0 A` takes the place of :math:`W_0`. Right after a decomposition both give the same; after training the product
is never worse.

>>> parent = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
>>> def recover(member):
...     "Train the member here, with an optimiser of its own."
>>> for member in family_members(parent, family_ranks(parent, (2.0, 4.0)), recover):
...     print(member[0].rank, sum(weight.numel() for weight in member.parameters()))
16 4224
8 2176
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.low_rank.factors import (
    Rank,
    SVDPair,
    TuckerTriple,
    choose_ranks,
    decompose,
    decompose_model,
    linear_pair,
    svd_factors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Again",
    "FactoredEmbedding",
    "factor_tied_embedding",
    "family_members",
    "family_ranks",
    "lower_ranks",
    "lowered",
    "plain_linears",
]

Again = Literal["product", "second"]


def plain_linears(model: nn.Module) -> nn.Module:
    """Replace the `Conv1D` layers of Hugging Face's GPT-2 by equal linear layers, in place.

    That layer stores its weight as (inputs, outputs), a linear layer as (outputs, inputs).

    Args:
        model: Any model.

    Returns:
        The same model.
    """
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            inputs, outputs = layer.weight.shape
            options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            linear = nn.utils.skip_init(nn.Linear, inputs, outputs, **options)
            with torch.no_grad():
                linear.weight.copy_(layer.weight.T)
                linear.bias.copy_(layer.bias)
            model.set_submodule(name, linear.train(layer.training))
    return model


def family_ranks(
    model: nn.Module, compressions: Sequence[float], where: Callable[[str, nn.Module], bool] | None = None
) -> list[dict[str, Rank]]:
    """Ranks of every member, from the sizes of the parent's layers.

    Args:
        model: The parent, not decomposed.
        compressions: P of each member, rising; each above 0.
        where: See `leantrain.low_rank.factors.choose_ranks`.

    Returns:
        For each member, name -> rank. A layer that would not shrink is left out; it may be there in later members.

    Raises:
        ValueError: If the compressions do not rise, or one is out of range.
    """
    if not compressions or any(a >= b for a, b in pairwise(compressions)):
        raise ValueError(f"compressions={list(compressions)}: expected at least one, each above the one before")
    return [choose_ranks(model, compression=p, where=where) for p in compressions]


def lowered(first: Tensor, second: Tensor, rank: int, again: Again = "product") -> tuple[Tensor, Tensor]:
    """Two factors at a lower rank.

    Args:
        first: (C, R).
        second: (R, S).
        rank: From 1 to R.
        again: `product` or `second`, see the module.

    Returns:
        Factors (C, rank) and (rank, S), in 64-bit. On the meta device only the shapes are made.

    Raises:
        ValueError: If there is no such way, or the rank is out of range.
    """
    if again not in get_args(Again):
        raise ValueError(f"again={again!r}: expected one of {', '.join(get_args(Again))}")
    if not 1 <= rank <= first.shape[1]:
        raise ValueError(f"rank={rank}: expected from 1 to {first.shape[1]}, the rank of the factors")
    first, second = first.detach().double(), second.detach().double()
    if first.is_meta:
        return first[:, :rank], second[:rank]
    if again == "second":
        left, right = svd_factors(second, rank)
        return first @ left, right
    q0, r0 = torch.linalg.qr(first)
    q1, r1 = torch.linalg.qr(second.T)
    left, right = svd_factors(r0 @ r1.T, rank)
    return q0 @ left, right @ q1.T


def lower_ranks(model: nn.Module, ranks: Mapping[str, Rank], *, again: Again = "product") -> nn.Module:
    """Make the next member from a member, or the first from the parent, in place.

    An optimiser made before holds the old weights: make a new one. A pair that stands in several places, as that of a
    factored embedding does, is replaced in all of them.

    Args:
        model: A member or the parent.
        ranks: Name of a layer -> its new rank, from `family_ranks`; names of decomposed layers are those of the pairs.
        again: How a pair is decomposed again: `product` or `second`.

    Returns:
        The same model.

    Raises:
        ValueError: If a layer does not exist, a rank is above that of the pair that is there, or there is no such way;
            nothing is changed then.
    """
    if again not in get_args(Again):
        raise ValueError(f"again={again!r}: expected one of {', '.join(get_args(Again))}")
    places = dict(model.named_modules(remove_duplicate=False))
    pairs = {name: place for name, place in places.items() if isinstance(place, SVDPair | TuckerTriple)}
    dense: dict[str, Rank] = {name: rank for name, rank in ranks.items() if name not in pairs}
    for name, rank in ranks.items():
        pair = pairs.get(name)
        if pair is None:
            continue
        if not isinstance(pair, SVDPair) or not isinstance(pair.first, nn.Linear) or not isinstance(rank, int):
            raise ValueError(f"layer {name!r} is no pair of linear layers: only these are decomposed again")
        if not 1 <= rank <= pair.rank:
            raise ValueError(f"rank={rank} for layer {name!r}: expected from 1 to {pair.rank}, which it has now")
    missing = [name for name in dense if name not in places]
    if missing:
        raise ValueError(f"the model has no layers {missing}")
    decompose_model(model, dense)
    for name, rank in ranks.items():
        pair = pairs.get(name)
        if isinstance(pair, SVDPair) and pair.rank != rank:
            thinner = _thinner(pair, cast(int, rank), again)
            for alias in [other for other, place in pairs.items() if place is pair]:
                model.set_submodule(alias, thinner)
    return model


def _thinner(pair: SVDPair, rank: int, again: Again) -> SVDPair:
    first, second = lowered(pair.first.weight.flatten(1).T, pair.second.weight.flatten(1).T, rank, again)
    return linear_pair(first, second, pair.first.weight, cast(Tensor | None, pair.second.bias)).train(pair.training)


def family_members(
    parent: nn.Module,
    family: Iterable[Mapping[str, Rank]],
    recover: Callable[[nn.Module], object],
    *,
    again: Again = "product",
) -> Iterator[nn.Module]:
    """Compress, recover, and again: the members of a family, one after the other.

    Each member is a copy of the one before with lower ranks, trained on. Nothing is done before a member is asked for,
    and only the last one is kept here.

    Args:
        parent: The trained parent; it is not changed.
        family: Ranks of each member, from `family_ranks`.
        recover: Trains the model that it is given, in place, by any means: a plain loop, or
            ``lambda member: trainer().fit(MyModule(member), data)``. Its optimiser must be a new one each time.
        again: How a pair is decomposed again: `product` or `second`.

    Yields:
        The members, from the largest to the smallest.

    Raises:
        ValueError: As `lower_ranks`, when the member is asked for.
    """
    member = parent
    for ranks in family:
        member = lower_ranks(copy.deepcopy(member), ranks, again=again)
        recover(member)
        yield member


class FactoredEmbedding(nn.Module):
    """The embedding of a language model whose output layer, tied to it, was decomposed.

    A tied embedding is the transpose of the output layer's matrix. So a token's vector is its row of the second factor,
    times the first.

    Args:
        pair: The output layer, D -> R -> V. The embedding has no weights of its own.
    """

    def __init__(self, pair: SVDPair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (..., D) of token ids (...)."""
        return F.embedding(ids, self.pair.second.weight) @ self.pair.first.weight


def factor_tied_embedding(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Decompose the embedding and the output layer of a language model that shares one matrix between them, in place.

    They share the factors then. The layer is a pair under the old name of the output layer: `lower_ranks` lowers it
    further.

    Args:
        model: A language model of transformers with tied embeddings.
        rank: From 1 to the width of a token.

    Returns:
        The same model.

    Raises:
        ValueError: If the embedding and the output layer do not share their weight, or the rank is out of range.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight is not getattr(head, "weight", None):
        raise ValueError(f"{type(model).__name__} has no embedding that shares its weight with the output layer")
    pair = cast(SVDPair, decompose(cast(nn.Module, head), rank))
    model.set_output_embeddings(pair)
    model.set_input_embeddings(FactoredEmbedding(pair))
    return model
