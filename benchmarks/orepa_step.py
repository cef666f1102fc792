"""What a training step of a ResNet costs with plain convolutions, diverse branches, RepVGG's blocks and OREPA, paired.

Also counted: parameters, and what autograd keeps for the backward pass.

    python benchmarks/orepa_step.py [--network resnet18] [--batch 12] [--repeats 6] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

from leantrain.measure import count_parameters, paired_timing, saved_activation_bytes
from leantrain.techniques.orepa import Kind, convert

KINDS: tuple[Kind, ...] = ("plain", "dbb", "orepa", "orepa-fused", "repvgg", "repvgg-orepa")


def step_of(model: nn.Module, batch: int, device: str) -> Callable[[], None]:
    """One step of SGD with momentum on random images."""
    x, y = torch.randn(batch, 3, 224, 224, device=device), torch.randint(0, 1000, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time the steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", help="a ResNet of torchvision")
    parser.add_argument("--batch", type=int, default=12, help="images in a step")
    parser.add_argument("--repeats", type=int, default=6, help="timed repeats of every kind, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    steps, rows = {}, []
    for kind in KINDS:
        torch.manual_seed(0)
        model = convert(get_model(arguments.network), kind).to(device)
        with torch.device("meta"):
            like, x = convert(get_model(arguments.network), kind), torch.empty(arguments.batch, 3, 224, 224)
            kept = saved_activation_bytes(lambda like=like, x=x: like(x).sum())
        rows.append({"kind": kind, "parameters (M)": count_parameters(model) / 1e6, "kept (MiB)": kept / 2**20})
        steps[kind] = step_of(model, arguments.batch, device)
    timing = paired_timing(steps, arguments.repeats, warmup=1)
    table = pd.DataFrame(rows).round(2)
    table["step (s)"] = [f"{timing.median(kind):.3f}" for kind in KINDS]
    table["over plain"] = [str(timing.ratio(kind, "plain")) for kind in KINDS]
    table["dbb over it"] = [str(timing.ratio("dbb", kind)) for kind in KINDS]
    print(f"{arguments.network}, batch {arguments.batch}, {device}, {arguments.threads} threads, {torch.__version__}")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
