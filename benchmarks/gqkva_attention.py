"""How the heads of grouped attention are best formed: folded, indexed, expanded, or by PyTorch's `enable_gqa`.

    python benchmarks/gqkva_attention.py [--batch 4] [--tokens 197] [--repeats 25]

Times forward and backward of one attention layer of ViT-small (width 384, six heads) in 32 bits. All ways compute
the same heads from the same projections; the ways are timed in turn, and every time stands beside its ratio to
multi-head attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from leantrain.measure import paired_timing
from leantrain.techniques.gqkva import GroupedAttention, attend, variant

WIDTH, HEADS = 384, 6


def indexed(q: Tensor, k: Tensor, v: Tensor, layer: GroupedAttention) -> Tensor:
    return attend(q, k, v, layer.pairs)


def expanded(q: Tensor, k: Tensor, v: Tensor, layer: GroupedAttention) -> Tensor:
    """Views with stride 0, which become copies where the heads are laid side by side."""
    q = q.unsqueeze(2).expand(-1, -1, HEADS // layer.n_q, -1, -1).flatten(1, 2)
    # In a grid the queries repeat and the keys tile; otherwise both repeat.
    place = 1 if layer.pairing == "grid" else 2
    sizes = [-1, -1, -1, -1, -1]
    sizes[place] = HEADS // layer.n_kv
    k, v = (x.unsqueeze(place).expand(sizes).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def enable_gqa(q: Tensor, k: Tensor, v: Tensor, layer: GroupedAttention) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def folded(q: Tensor, k: Tensor, v: Tensor, layer: GroupedAttention) -> Tensor:
    return layer._attend_folded(q, k, v, 0.0)


def step(layer: GroupedAttention, x: Tensor, heads: Callable[..., Tensor]) -> None:
    batch, tokens, width = x.shape
    shape = (batch, tokens, -1, layer.head_dim)
    q, k, v = (project(x).view(shape).transpose(1, 2) for project in (layer.q, layer.k, layer.v))
    out = heads(q, k, v, layer).transpose(1, 2).reshape(batch, tokens, width)
    layer.proj(out).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    x = torch.randn(options.batch, options.tokens, WIDTH)
    arms = {}
    for name in ("MHA", "GKVA-3", "GQA-3", "MQA", "GQKVA-3.2"):
        v = variant(name, HEADS)
        layer = GroupedAttention(WIDTH, HEADS, v.n_q, v.n_kv, v.pairing)
        ways = {"folded": folded, "indexed": indexed, "expanded": expanded}
        if name in ("GQA-3", "MQA"):
            ways["enable_gqa"] = enable_gqa
        with torch.no_grad():
            parts = [torch.randn(2, n, 5, layer.head_dim) for n in (v.n_q, v.n_kv, v.n_kv)]
            for label, way in ways.items():
                torch.testing.assert_close(way(*parts, layer), indexed(*parts, layer), msg=f"{name}, {label}")
        arms |= {f"{name}, {label}": partial(step, layer, x, way) for label, way in ways.items()}
    table = paired_timing(arms, repeats=options.repeats).table("MHA, folded")
    table["median_s"] *= 1e3
    print(f"batch {options.batch}, {options.tokens} tokens, {torch.get_num_threads()} threads; ratio to MHA")
    print(table.rename(columns={"median_s": "median_ms"}).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
