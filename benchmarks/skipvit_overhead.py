"""What the token skip costs besides the blocks: ways to get the score, and ways to take tokens out and put them back.

    python benchmarks/skipvit_overhead.py [--batch 8] [--tokens 197] [--repeats 25]

Times, in turn and in 32 bits, at the width of ViT-small (384, six heads): the score of the class token, forward only,
since it has no gradient; and taking 45 % of the tokens out and putting them back, forward and backward. Every time
stands beside its ratio to one transformer block on all tokens: the block's forward pass for the score, its forward and
backward pass for the routing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from leantrain.measure import paired_timing
from leantrain.techniques.skipvit import class_attention, gather_tokens, kept_patches, restore_tokens

WIDTH, HEADS = 384, 6


@torch.no_grad()
def from_keys(block: Block, x: Tensor) -> Tensor:
    """The class token's query against keys that are computed once more."""
    attn = block.attn
    q, k, _ = attn.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return (q[:, :, :1] @ k.transpose(-1, -2) * attn.scale).softmax(-1).squeeze(2).mean(1)


@torch.no_grad()
def from_all_weights(block: Block, x: Tensor) -> Tensor:
    """The whole attention matrix, of which one row is used: what unfused attention has to hand."""
    attn = block.attn
    q, k, _ = attn.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-1, -2) * attn.scale).softmax(-1).mean(1)[:, 0]


def fancy_index(x: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(x)).unsqueeze(1)
    out = x.clone()
    out[rows, index] = x[rows, index]
    return out


def gather_scatter(x: Tensor, index: Tensor) -> Tensor:
    return restore_tokens(x, index, gather_tokens(x, index))


def permute_and_slice(x: Tensor, index: Tensor) -> Tensor:
    """One permutation of all tokens, a slice, a concatenation, and the permutation undone."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, index, True)
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    sorted_tokens = gather_tokens(x, order)
    kept = index.shape[1]
    together = torch.cat([sorted_tokens[:, :kept], sorted_tokens[:, kept:]], dim=1)
    return gather_tokens(together, order.argsort(dim=1))


def report(title: str, arms: dict[str, Callable[[], object]], baseline: str, repeats: int) -> None:
    table = paired_timing(arms, repeats=repeats).table(baseline)
    table["median_s"] *= 1e3
    print(title)
    print(table.rename(columns={"median_s": "median_ms"}).round(4).to_string(index=False), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    torch.manual_seed(0)
    block, x = Block(WIDTH, HEADS, qkv_bias=True), torch.randn(options.batch, options.tokens, WIDTH)
    expected = from_all_weights(block, x)
    torch.testing.assert_close(class_attention(block.attn, x), expected)
    torch.testing.assert_close(from_keys(block, x), expected)
    print(f"batch {options.batch}, {options.tokens} tokens, {torch.get_num_threads()} threads\n")

    def forward() -> None:
        with torch.no_grad():
            block(x)

    arms = {
        "block, forward": forward,
        "score, folded": lambda: class_attention(block.attn, x),
        "score, from keys": lambda: from_keys(block, x),
        "score, from all weights": lambda: from_all_weights(block, x),
    }
    report("score (ratio to a block)", arms, "block, forward", options.repeats)

    index = torch.rand(x.shape[:2]).argsort(dim=1)[:, : 1 + kept_patches(options.tokens - 1, 0.55)].sort(dim=1).values

    def both_ways(route: Callable[[Tensor], Tensor]) -> None:
        route(x.detach().requires_grad_()).sum().backward()

    ways = {"gather, scatter": gather_scatter, "index, assign": fancy_index, "permute, slice": permute_and_slice}
    for way in ways.values():
        torch.testing.assert_close(way(x, index), x)
    arms = {"block, forward and backward": lambda: both_ways(block)}
    arms |= {name: (lambda way=way: both_ways(lambda t: way(t, index))) for name, way in ways.items()}
    report("routing (ratio to a block)", arms, "block, forward and backward", options.repeats)


if __name__ == "__main__":
    main()
