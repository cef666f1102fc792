"""How fast is the FPRaker emulator? Simulated multiply-accumulates per CPU second.

    python benchmarks/fpraker_speed.py [--repeats 5] [--scalesim-python FOLDER/bin/python]

Four things are timed in one run, in processor time of one thread, repeats interleaved, the best of each shown:

* the tile emulator on random operands, against the same model in plain NumPy, all elements of all tiles side by side
  (cycles and values must be equal);
* the same at growing sizes, for cost that grows in proportion;
* ResNet-50 at full size, the three products of all layers, from the traced values to the table, with drawn tiles;
* if asked for, SCALE-Sim 3.0.0, the dense systolic simulator in Python; see `tensordash_speed.py` for what it needs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from tensordash_speed import SCALESIM_MACS, cpu_seconds, scalesim_seconds
from torch.nn import functional as F

from leantrain.hardware.fpraker import FPRaker, from_bits, random_streams, recode, run_tiles, simulate, summarise
from leantrain.hardware.trace import Trace, capture
from leantrain.hardware.workloads import build_torchvision

SIZES = (5, 10, 20, 40)
SETS = 200


def tiles_numpy(serial: np.ndarray, parallel: np.ndarray, config: FPRaker) -> tuple[np.ndarray, np.ndarray]:
    """The same element in NumPy, all elements at once: cycles of each set, (tiles, sets, columns, rows), and values."""
    shifts, signs = np.full((256, 9), np.inf), np.zeros((256, 9))
    for significand in range(128, 256):
        for number, (sign, power) in enumerate(recode(significand)):
            shifts[significand, number], signs[significand, number] = 7 - power, sign
    tiles, columns, sets, _ = serial.shape
    rows = parallel.shape[1]
    spent = np.zeros((tiles, sets, columns, rows), dtype=np.int16)
    register, unit, outer = (np.zeros((tiles, columns, rows)) for _ in range(3))
    for number in range(sets):
        a, b = serial[:, :, None, number], parallel[:, None, :, number]
        both = ((a & 0x7F80) != 0) & ((b & 0x7F80) != 0)
        exponent = np.where(both, ((a >> 7) & 255).astype(float) + ((b >> 7) & 255) - 254, -np.inf)
        held = register != 0
        own = np.where(held, unit + np.frexp(np.where(held, register, 1))[1] - 1 - config.fraction_bits, -np.inf)
        largest = np.maximum(exponent.max(axis=-1), own)
        safe = np.where(np.isfinite(largest), largest, 0)
        register = np.rint(register * np.exp2(np.where(held, unit - safe, 0)))
        unit = safe
        delta = np.where(both, safe[..., None] - exponent, np.inf)
        significand = np.broadcast_to((a & 127) | 128, both.shape)
        factor = from_bits(np.where(both, (b & 0x807F) | 0x3F80, 0).astype(np.uint16)) * np.where(a >> 15, -1.0, 1.0)
        place = np.zeros(both.shape, dtype=np.int64)
        while True:
            shift = shifts[significand, place] + delta
            shift[shift > config.threshold] = np.inf
            base = shift.min(axis=-1)
            working = np.isfinite(base)
            if not working.any():
                break
            fire = np.isfinite(shift) & (shift <= base[..., None] + config.window)
            weight = np.exp2(config.fraction_bits - np.where(fire, shift, 0.0))
            register = np.rint(register + (fire * signs[significand, place] * factor * weight).sum(axis=-1))
            place += fire
            spent[:, number] += working
        if (number + 1) * config.lanes % config.chunk == 0 or number + 1 == sets:
            outer = (outer + register * np.exp2(unit - config.fraction_bits)).astype(np.float32).astype(float)
            register[:] = 0
    return spent, outer


def resnet50_trace() -> Trace:
    """ResNet-50 as torchvision initialises it, one noise image in training, all three products with their values."""
    torch.manual_seed(0)
    model = build_torchvision("resnet50")
    with capture(model, values=True, precision="bfloat16", samples=1) as recorder:
        F.cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.tensor([0, 1])).backward()
    return recorder.trace()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12, help="tiles drawn for each layer and product of ResNet-50")
    parser.add_argument("--scalesim-python", type=Path, help="interpreter of an environment with scalesim 3.0.0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = FPRaker()
    zeros = (0.0, 0.5, 0.8)
    shape = {"groups": max(SIZES), "rows": 8, "steps": SETS}
    streams = {z: (random_streams(z, seed=0, **shape), random_streams(0.0, seed=1, **shape)) for z in zeros}
    small = {z: (a[:4, :, :30], b[:4, :, :30]) for z, (a, b) in streams.items()}
    trace = resnet50_trace()
    frame = simulate(trace, config, samples=options.samples, threads=1)  # also compiles
    for z, pair in small.items():
        runs, (spent, values) = run_tiles(*pair, config), tiles_numpy(*pair, config)
        if (runs.spent != spent).any() or (runs.values != values).any():
            raise SystemExit(f"the NumPy model disagrees at {z:.0%} zeros")
    best: dict[str, float] = {}
    for _ in range(options.repeats):
        for z in zeros:
            jobs = {
                f"compiled, {z:.0%} zeros": lambda z=z: run_tiles(*streams[z], config, threads=1),
                f"NumPy, {z:.0%} zeros": lambda z=z: tiles_numpy(*small[z], config),
            }
            for size in SIZES:
                jobs[f"{size} tiles, {z:.0%} zeros"] = lambda z=z, n=size: run_tiles(
                    streams[z][0][:n], streams[z][1][:n], config, threads=1
                )
            for name, job in jobs.items():
                best[name] = min(best.get(name, float("inf")), cpu_seconds(job))
        seconds = cpu_seconds(lambda: simulate(trace, config, samples=options.samples, threads=1))
        best["ResNet-50"] = min(best.get("ResNet-50", float("inf")), seconds)
    macs_of = {"compiled": max(SIZES) * SETS * 512, "NumPy": 4 * 30 * 512}
    print(f"{'':24s} {'CPU s':>8s} {'M MAC/s':>9s}")
    for z in zeros:
        rates = {kind: macs / best[f"{kind}, {z:.0%} zeros"] / 1e6 for kind, macs in macs_of.items()}
        for kind, rate in rates.items():
            print(f"{kind + f', {z:.0%} zeros':24s} {best[f'{kind}, {z:.0%} zeros']:8.3f} {rate:9.2f}")
        print(f"{'':24s} compiled is {rates['compiled'] / rates['NumPy']:.0f} times as fast")
    print("microseconds a set, by the number of tiles (constant: cost grows in proportion)")
    for z in zeros:
        each = [1e6 * best[f"{size} tiles, {z:.0%} zeros"] / (size * SETS) for size in SIZES]
        print(f"  {z:.0%} zeros: " + ", ".join(f"{size}: {t:.2f}" for size, t in zip(SIZES, each, strict=True)))
    total = summarise(frame).iloc[0]
    macs, drawn = frame["macs"].sum(), (frame["sets"] * frame["sampled"] / frame["tiles"]).sum() * 512
    print(f"ResNet-50, three products: {best['ResNet-50']:.2f} CPU s for {macs / 1e9:.1f} G MAC, of which about")
    print(f"  {drawn / 1e6:.0f} M in drawn tiles; speed-up {total['speedup']:.3f}, standard error {total['error']:.2%}")
    if options.scalesim_python:
        seconds = scalesim_seconds(options.scalesim_python)
        theirs, ours = SCALESIM_MACS / seconds, macs_of["compiled"] / best["compiled, 50% zeros"]
        print(f"SCALE-Sim 3.0.0: {SCALESIM_MACS / 1e6:.1f} M MAC in {seconds:.1f} CPU s, {theirs / 1e6:.1f} M MAC/s")
        print(f"  the emulator simulates {ours / theirs:.1f} times as many MAC per CPU second, bit by bit")


if __name__ == "__main__":
    main()
