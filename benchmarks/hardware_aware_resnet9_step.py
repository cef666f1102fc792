"""What a training step of ResNet-9 costs: by arithmetic and memory layout, and by technique, paired.

All ways pass the same batch through networks of the same width, in turns, so that a noisy machine wrongs them alike.

    python benchmarks/hardware_aware_resnet9_step.py [--width 16] [--batch 64] [--repeats 7] [--threads 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantrain.measure import paired_timing
from leantrain.techniques.hardware_aware_resnet9 import Recipe, centralise_gradients, meta_gradient, sam_gradient


def gradient_of(net: nn.Module, x: Tensor, y: Tensor, half: bool = False) -> Callable[[], Tensor]:
    """A function that clears and fills the gradients of a network and returns the loss."""

    def gradient() -> Tensor:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    return gradient


def main() -> None:
    """Time the passes and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16, help="width of the network")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch, an even number")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of every way, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x, y = torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,))
    improved = Recipe(whitening=True, celu=0.3)

    ways = {}
    for place, layout in (("first", torch.contiguous_format), ("last", torch.channels_last)):
        net = improved.network(arguments.width).to(memory_format=layout)
        for bits, half in (("32 bits", False), ("bfloat16", True)):
            ways[f"{bits}, channels {place}"] = gradient_of(net, x.contiguous(memory_format=layout), y, half)
    table = paired_timing(ways, arguments.repeats).table("32 bits, channels first")
    table["images_per_s"] = arguments.batch / table["median_s"]
    print(f"forward and backward, width {arguments.width}, {arguments.batch} images, {arguments.threads} threads")
    print(table.round(3).to_string(index=False))

    net = improved.network(arguments.width).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    params, whole, half_size = list(net.parameters()), gradient_of(net, x, y), arguments.batch // 2
    first, second = gradient_of(net, x[:half_size], y[:half_size]), gradient_of(net, x[half_size:], y[half_size:])

    def centralised() -> None:
        whole()
        centralise_gradients(params)

    techniques = {
        "plain": whole,
        "centralised": centralised,
        "SAM": partial(sam_gradient, whole, params, 0.05),
        "meta-learning": partial(meta_gradient, first, second, params, 0.1),
    }
    print("\nthe gradient of one step, 32 bits, channels last")
    print(paired_timing(techniques, arguments.repeats).table("plain").round(3).to_string(index=False))


if __name__ == "__main__":
    main()
