"""How fast is the emulator of gradient output sparsity, and does leaving out gradients pay on this processor?

    python benchmarks/gradient_sparsity_speed.py [--repeats 5] [--plot FILE.png] [--scalesim-python FOLDER/bin/python]

Timed in one run, in processor time of one thread, repeats interleaved, the best of each shown:

* the redistribution of work, compiled, against the same model in plain Python (the results must be equal);
* the loads of all outputs of a layer from its masks, against the same count in plain Python loops (equal as well);
* VGG-16 and ResNet-50 at full size, the three products of all convolutions, from traced masks to the table;
* the time against the simulated work, for one to eight images of a layer: it should grow in proportion;
* the input gradients of one layer on this processor, by the compiled kernel with and without skipping;
* if asked for, SCALE-Sim 3.0.0, the dense systolic simulator in Python, on one ResNet convolution of 115.6 million
  multiply-accumulates (see benchmarks/tensordash_speed.py for its environment).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from tensordash_speed import SCALESIM_MACS, scalesim_seconds
from torch import nn
from torch.nn import functional as F

from leantrain.hardware import gradient_sparsity as gs
from leantrain.hardware.trace import Trace
from leantrain.hardware.workloads import Layer, build_torchvision

LAYER = Layer("conv", "conv", 128, 128, (3, 3), (1, 1), (1, 1), in_size=(28, 28), out_size=(28, 28))
SMALL = Layer("small", "conv", 32, 32, (3, 3), (1, 1), (1, 1), in_size=(10, 10), out_size=(10, 10))


def loads_in_python(entry, lanes: int) -> list[int]:
    """Cycles of every output of dgrad with both kinds of skipping, by loops over outputs, taps and channels."""
    layer = entry.layer
    g, needed = entry.masks["grad_output"].mask()[0].tolist(), entry.extra["needed"].mask()[0].tolist()
    loads = []
    for plane in needed:
        for h, row in enumerate(plane):
            for w, on in enumerate(row):
                lists = [0] * lanes
                for r in range(layer.kernel[0]) if on else ():
                    for s in range(layer.kernel[1]):
                        at = h + layer.padding[0] - r, w + layer.padding[1] - s
                        if 0 <= at[0] < layer.out_size[0] and 0 <= at[1] < layer.out_size[1]:
                            for k in range(layer.out_channels):
                                lists[k % lanes] += g[k][at[0]][at[1]]
                loads.append(max(lists))
    return loads


def trace_of(name: str) -> Trace:
    """The convolutions of a network in its first training step, one image of noise."""
    if name in gs.FULL_SIZE:
        return gs.trace_full_size(name, batch=1)
    torch.manual_seed(0)
    model = build_torchvision(name)
    layers = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return gs.trace_step(model, torch.randn(1, 3, 224, 224), torch.tensor([1]), layers=layers)


def cpu_seconds(function: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def input_gradient_job(zeros: float, skip: bool) -> Callable[[], int]:
    """The backward pass of one convolution of 64 channels on 32 x 32 positions behind a ReLU."""
    torch.manual_seed(0)
    conv = gs.MaskedConv2d(nn.Conv2d(64, 64, 3, padding=1), skip=skip)
    conv.conv.requires_grad_(False)
    hidden = torch.randn(2, 64, 32, 32) + torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - zeros))
    hidden.requires_grad_()
    out = conv(F.relu(hidden))
    gradient = torch.randn_like(out) * (torch.rand_like(out) >= zeros)

    def job() -> int:
        torch.autograd.grad(out, hidden, gradient, retain_graph=True)
        return conv.made

    return job


def plot(path: Path, work: list[float], seconds: list[float]) -> None:
    """Processor time against simulated work, with the line of proportion."""
    import matplotlib.pyplot as plt

    from leantrain.plotting import figure, use_style

    use_style()
    fig, ax = figure()
    ax.plot(work, seconds, "o", label="measured")
    ax.plot([0, work[-1]], [0, seconds[-1]], "--", label="in proportion")
    ax.set(xlabel="simulated multiply-accumulates (G)", ylabel="processor time (s)", xlim=(0, None), ylim=(0, None))
    ax.legend()
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="write the time against the simulated work to this picture")
    parser.add_argument("--scalesim-python", type=Path, help="interpreter of an environment with scalesim 3.0.0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = gs.PEArray(redistribution="stealing")
    networks = {name: trace_of(name) for name in ("vgg16", "resnet50")}
    entries = {n: gs.random_trace(LAYER, input_zeros=0.5, gradient_zeros=0.6, batch=n) for n in (1, 2, 4, 8)}
    small = gs.random_trace(SMALL, input_zeros=0.5, gradient_zeros=0.6)

    cycles = gs.output_loads(entries[1], "dgrad", config)
    prefix = np.concatenate([[0], np.cumsum(cycles)])
    bounds = np.arange(config.units + 1) * cycles.size // config.units
    arguments = (prefix, bounds, config.transfer_start, config.transfer_rate, np.zeros((0, 6), np.int64))
    if gs._steal(*arguments) != gs._steal.py_func(*arguments):
        raise SystemExit("the redistribution in plain Python disagrees")
    if gs.output_loads(small, "dgrad", config).tolist() != loads_in_python(small, config.lanes):
        raise SystemExit("the loads in plain Python disagree")

    jobs: dict[str, Callable[[], object]] = {
        "redistribution, compiled": lambda: gs._steal(*arguments),
        "redistribution, Python": lambda: gs._steal.py_func(*arguments),
        "loads, array operations": lambda: gs.output_loads(small, "dgrad", config),
        "loads, Python": lambda: loads_in_python(small, config.lanes),
    }
    jobs |= {f"{name}, three products": lambda t=trace: gs.simulate(t, config) for name, trace in networks.items()}
    jobs |= {f"{name}, counts": lambda t=trace: gs.mac_counts(t) for name, trace in networks.items()}
    jobs |= {f"one layer, {n} images": lambda e=entry: gs.simulate(e, config) for n, entry in entries.items()}
    for zeros in (0.5, 0.75, 0.9):
        for skip in (False, True):
            name = f"input gradient, {zeros:.0%} zeros, {'skipping' if skip else 'all'}"
            jobs[name] = input_gradient_job(zeros, skip)
    best: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            best[name] = min(best.get(name, float("inf")), cpu_seconds(job))
    print(f"{'best of ' + str(options.repeats):42s} {'CPU s':>9s}")
    for name, seconds in best.items():
        print(f"{name:42s} {seconds:9.4f}")
    for fast, slow in (
        ("redistribution, compiled", "redistribution, Python"),
        ("loads, array operations", "loads, Python"),
    ):
        print(f"{fast}: {best[slow] / best[fast]:.0f} times as fast as plain Python")
    rate = 0.0
    for name, trace in networks.items():
        macs = gs.mac_counts(trace)["dense"].sum()
        rate = macs / best[f"{name}, three products"]
        print(
            f"{name}: {macs / 1e9:.1f} G MAC in {best[f'{name}, three products']:.2f} CPU s, {rate / 1e9:.1f} G MAC/s"
        )
    work = [gs.mac_counts(entry)["dense"].sum() / 1e9 for entry in entries.values()]
    seconds = [best[f"one layer, {n} images"] for n in entries]
    print(
        "CPU s per G MAC with 1, 2, 4, 8 images:", ", ".join(f"{s / w:.4f}" for s, w in zip(seconds, work, strict=True))
    )
    for zeros in (0.5, 0.75, 0.9):
        ratio = best[f"input gradient, {zeros:.0%} zeros, all"] / best[f"input gradient, {zeros:.0%} zeros, skipping"]
        print(
            f"skipping on this processor, {zeros:.0%} zeros on both sides: {ratio:.2f} times as fast as the same kernel"
        )
    if options.plot:
        plot(options.plot, work, seconds)
    if options.scalesim_python:
        spent = scalesim_seconds(options.scalesim_python)
        theirs = SCALESIM_MACS / spent
        print(f"SCALE-Sim 3.0.0: {SCALESIM_MACS / 1e6:.1f} M MAC in {spent:.1f} CPU s, {theirs / 1e6:.1f} M MAC/s")
        print(f"  the emulator simulates {rate / theirs:.0f} times as many MAC per CPU second")


if __name__ == "__main__":
    main()
