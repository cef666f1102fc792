"""How fast is the direct sparse convolution? Against the dense library, PyTorch's sparse matrices and a patch matrix.

    python benchmarks/pruning_bitwidth_speed.py [--repeats 9] [--threads 1]

Four layers of VGG-16 and ResNet-50, one image, random masks, all ways in turn. The rate counts the multiplications
that are really done. `patches` is what libraries of sparse matrices offer: `F.unfold`, then SciPy's compressed rows
times it.
"""

from __future__ import annotations

import argparse
from functools import partial

import pandas as pd
import torch
from scipy.sparse import csr_matrix
from torch import nn
from torch.nn import functional as F

from leantrain.measure import paired_timing
from leantrain.techniques import pruning_bitwidth as pb

LAYERS = {"128→128, 3x3, 56": (128, 128, 3, 56), "256→256, 3x3, 28": (256, 256, 3, 28),
          "512→512, 3x3, 14": (512, 512, 3, 14), "256→1024, 1x1, 14": (256, 1024, 1, 14)}  # fmt: skip


def main() -> None:
    """Time the layers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, (inputs, outputs, kernel, side) in LAYERS.items():
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        macs = inputs * outputs * kernel**2 * side**2
        x = torch.rand(1, inputs, side, side)
        for sparsity in (0.8, 0.9, 0.95):
            pruned = pb.prune_randomly(conv, sparsity)
            matrix = csr_matrix(pruned.weight.detach().flatten(1).numpy())
            arms = {
                "dense": partial(conv, x),
                "direct": partial(pb.DirectConv2d(pruned), x),
                "shifted": partial(pb.ShiftedCSRConv2d(pruned), x),
                "patches": lambda m=matrix, x=x, k=kernel: m @ F.unfold(x, k, padding=k // 2)[0].numpy(),
            }
            with torch.inference_mode():
                timing = paired_timing(arms, repeats=arguments.repeats)
            row = {"layer": name, "pruned (%)": 100 * sparsity}
            row |= {f"{arm} (ms)": 1e3 * timing.median(arm) for arm in arms}
            row["direct over dense"] = timing.ratio("direct", "dense").value
            row["direct (G MAC/s)"] = (1 - sparsity) * macs / timing.median("direct") / 1e9
            rows.append(row)
    print(f"{torch.get_num_threads()} threads, {arguments.repeats} rounds")
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
