"""How fast is the Procrustes emulator? Multiply-accumulates simulated and scores selected per CPU second.

    python benchmarks/procrustes_speed.py [--repeats 5] [--scalesim-python FOLDER/bin/python]

Timed in one run, in processor time of one thread, repeats interleaved, the best of each shown:

* balancing of random working sets, against the same model in NumPy (the times must be equal);
* ResNet-18 and ResNet-50 at full size, the three products of all layers from the masks of 32 images to the table;
* the streamed threshold on ten million scores, against the same rule in plain Python and against a partial sort;
* ResNet-18's weight gradients at 8 to 64 images: the time must grow in proportion;
* if asked for, SCALE-Sim 3.0.0 on one ResNet convolution, as in `tensordash_speed.py`, which says how to install it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from tensordash_speed import SCALESIM_MACS, cpu_seconds, scalesim_seconds

from leantrain.hardware import procrustes as pc
from leantrain.hardware.trace import Packed, Trace
from leantrain.hardware.workloads import network
from leantrain.techniques.procrustes import stream_select


def balance_numpy(loads: np.ndarray) -> np.ndarray:
    """The same times in NumPy, vectorised over all working sets: unbalanced, paired, perfect."""
    rows = loads.shape[1] // 2
    order = np.sort(loads, axis=1)
    longest = (loads[:, :rows] + loads[:, rows:]).max(axis=1)
    paired = (order[:, :rows] + order[:, : rows - 1 : -1]).max(axis=1)
    return np.stack([longest, paired, -(-loads.sum(axis=1) // rows)])


def balance_python(loads: np.ndarray) -> np.ndarray:
    """The same times from the plain form, working set by working set."""
    logs = [pc.pair_halves(load) for load in loads]
    return np.array([[log.unbalanced.max(), log.paired.max(), -(-log.loads.sum() // len(log.pairs))] for log in logs]).T


def stream_python(scores: list[float], q: float, tau: float, beta: float) -> float:
    """The streamed threshold in plain Python."""
    up, down = 1 + beta * tau, 1 - beta * (1 - tau)
    for score in scores:
        q *= up if score > q else down
    return q


def full_size(name: str, batch: int) -> Trace:
    """Random masks at a network's shapes: a tenth of the weights, half of the activations."""
    layers, generator = network(name), np.random.default_rng(0)
    seen = [
        Packed.of(
            generator.random(
                (batch, layer.in_channels, *(layer.in_size if layer.kind == "conv" else ())), dtype=np.float32
            )
            < 0.5
        )
        for layer in layers
    ]
    return pc.random_trace(layers, seen, [pc.MaskStatistics(0.1, 0.0, 0.0, 0.5)] * len(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scalesim-python", type=Path, help="interpreter of an environment with scalesim 3.0.0")
    options = parser.parse_args()

    loads = pc.random_tiles(0.1, sets=100_000)
    few = loads[:2000]
    if (np.stack(pc.balance(loads)[:3]) != balance_numpy(loads)).any() or (
        balance_numpy(few) != balance_python(few)
    ).any():
        raise SystemExit("the three forms of the balancing disagree")
    scores = np.abs(np.random.default_rng(0).standard_normal(10_000_000)).astype(np.float32)
    short = scores[:300_000]
    fast, slow = stream_select(short, 0.1, 0.9, beta=1e-4)[1], stream_python(short.tolist(), 0.1, 0.9, 1e-4)
    if abs(fast / slow - 1) > 1e-9:
        raise SystemExit("the two forms of the stream disagree")
    traces = {name: full_size(name, 32) for name in ("resnet18", "resnet50")}
    sizes = {batch: full_size("resnet18", batch) for batch in (8, 16, 32, 64)}
    macs = {name: int(pc.simulate(trace, threads=1)["macs"].sum()) for name, trace in traces.items()}

    jobs = {
        "balance": lambda: pc.balance(loads, threads=1),
        "balance, NumPy": lambda: balance_numpy(loads),
        "balance, plain": lambda: balance_python(few),
        "stream": lambda: stream_select(scores, 0.1, 0.9, beta=1e-4),
        "stream, plain": lambda: stream_python(short.tolist(), 0.1, 0.9, 1e-4),
        "partial sort": lambda: np.partition(scores, int(0.9 * scores.size)),
    }
    jobs |= {name: lambda t=trace: pc.simulate(t, threads=1) for name, trace in traces.items()}
    jobs |= {
        f"wgrad, {batch} images": lambda t=trace: pc.simulate(t, products=["wgrad"], threads=1)
        for batch, trace in sizes.items()
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(options.repeats):
        for name, job in jobs.items():
            best[name] = min(best[name], cpu_seconds(job))

    counts = {"balance": len(loads), "balance, NumPy": len(loads), "balance, plain": len(few)}
    for name, count in counts.items():
        print(f"{name:18s} {count / best[name] / 1e6:9.3f} M working sets/s")
    for name, values in {"stream": scores, "stream, plain": short, "partial sort": scores}.items():
        print(f"{name:18s} {values.size / best[name] / 1e6:9.1f} M scores/s")
    for name, work in macs.items():
        print(f"{name}, three products, 32 images: {work / 1e9:.0f} G MAC in {best[name]:.2f} CPU s")
        print(f"  {work / best[name] / 1e9:.0f} G MAC/s")
    rates = [best[f"wgrad, {batch} images"] / batch * 1e3 for batch in sizes]
    print("wgrad, ms an image:", ", ".join(f"{rate:.2f} ({batch})" for batch, rate in zip(sizes, rates, strict=True)))
    if options.scalesim_python:
        seconds = scalesim_seconds(options.scalesim_python)
        theirs = SCALESIM_MACS / seconds
        print(f"SCALE-Sim 3.0.0: {SCALESIM_MACS / 1e6:.1f} M MAC in {seconds:.1f} CPU s, {theirs / 1e6:.1f} M MAC/s")
        print(
            f"  the emulator simulates {macs['resnet50'] / best['resnet50'] / theirs:.0f} times as many per CPU second"
        )


if __name__ == "__main__":
    main()
