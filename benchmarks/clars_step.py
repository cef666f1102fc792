"""What the estimate of CLARS costs beside a large batch, and what the steps of SGD, LARS and CLARS cost, paired.

python benchmarks/clars_step.py [--batch 1000] [--physical 250] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from leantrain.measure import paired_timing
from leantrain.techniques.clars import CLARS, LARS, extra_cost, layer_groups, micro_batch_norms, sample_norms
from leantrain.training import ResNet9


def main() -> None:
    """Time the parts of a step and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1000, help="images in a large batch, at least 64")
    parser.add_argument("--physical", type=int, default=250, help="images in one pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of every part, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = ResNet9(8)
    single = ResNet9(8, norm=lambda channels: nn.Identity())  # without batch normalisation samples are by themselves
    x, y = torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,))

    def large_batch() -> None:
        net.zero_grad()
        for some, targets in zip(x.split(arguments.physical), y.split(arguments.physical), strict=True):
            (F.cross_entropy(net(some), targets) * (len(targets) / len(y))).backward()

    parts = {
        "gradient of the batch": large_batch,
        "8 micro-batches of 8": lambda: micro_batch_norms(net, zip(x[:64].split(8), y[:64].split(8), strict=True)),
        "64 single samples": lambda: sample_norms(single, x[:64], y[:64]),
    }
    print(f"ResNet-9 of width 8, {arguments.batch} images, {arguments.threads} threads; ", end="")
    print(f"64 images are {extra_cost(arguments.batch, 8, 8):.1%} of the batch")
    print(
        paired_timing(parts, arguments.repeats, warmup=1).table("gradient of the batch").round(3).to_string(index=False)
    )

    large_batch()
    norms = micro_batch_norms(net, [(x[:64], y[:64])]).mean
    clars = CLARS(layer_groups(net), lr=1e-6)
    clars.see(norms)
    steps = {
        "SGD": torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9).step,
        "LARS": LARS(layer_groups(net), lr=1e-6).step,
        "CLARS": clars.step,
    }
    print("\nthe update alone")
    print(paired_timing(steps, arguments.repeats).table("SGD").round(5).to_string(index=False))


if __name__ == "__main__":
    main()
