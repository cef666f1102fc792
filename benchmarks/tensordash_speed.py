"""How fast is the TensorDash emulator? Scheduled values and simulated multiply-accumulates per CPU second.

    python benchmarks/tensordash_speed.py [--repeats 5] [--scalesim-python FOLDER/bin/python]

Three things are timed in one run, in processor time of one thread, repeats interleaved, the best of each shown:

* the blocked scheduler on random streams, against the same model in plain NumPy (the cycles must be equal);
* VGG-16 at full size, the three products of all layers from the traced masks to the table;
* if asked for, SCALE-Sim 3.0.0, the dense systolic simulator in Python, on one ResNet convolution of 115.6 million
  multiply-accumulates. It needs NumPy below 2, hence an environment of its own:

    python -m venv scalesim-env && scalesim-env/bin/pip install scalesim==3.0.0 "numpy<2"
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch.nn import functional as F

from leantrain.hardware.tensordash import TensorDash, random_streams, schedule, simulate
from leantrain.hardware.trace import Trace, capture
from leantrain.hardware.workloads import build_torchvision

SCALESIM_MACS = 56 * 56 * 64 * 64 * 3 * 3
SCALESIM = """
import resource, sys
from scalesim.scale_sim import scalesim
scalesim(save_disk_space=True, verbose=False, config="c.cfg", topology="t.csv", layout="l.csv").run_scale("out")
used = resource.getrusage(resource.RUSAGE_SELF)
print("CPU seconds", used.ru_utime + used.ru_stime)
"""
SCALESIM_CONFIG = """
[general]
run_name = layer
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
[architecture_presets]
ArrayHeight = 32
ArrayWidth = 32
ifmapsramszkB = 512
filtersramszkB = 512
ofmapsramszkB = 512
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = ws
Bandwidth = 10
ReadRequestBuffer = 32
WriteRequestBuffer = 32
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
"""


def schedule_numpy(words: np.ndarray, config: TensorDash) -> np.ndarray:
    """The same scheduler in NumPy, vectorised over all streams: cycles of each tile group."""
    groups, rows, steps = words.shape
    left = np.zeros((groups, rows, steps + config.depth, 16), dtype=bool)
    left[:, :, :steps] = (words[..., None] >> np.arange(16, dtype=np.uint16)) & 1
    head, cycles = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)
    every, row = np.arange(groups)[:, None], np.arange(rows)[None, :]
    while (head < steps).any():
        running = head < steps
        at = np.minimum(head, steps)[:, None]
        for lane in (lane for level in config.lane_levels for lane in level):
            free = np.ones((groups, rows), dtype=bool)
            for step, offset in config.lane_options:
                place = (every, row, np.minimum(at + step, steps + config.depth - 1), (lane + offset) % 16)
                taken = left[place] & free
                left[place] &= ~taken
                free &= ~taken
        advance, empty = np.ones((groups, rows), dtype=np.int64), np.ones((groups, rows), dtype=bool)
        for step in range(1, config.depth):
            empty &= ~left[every, row, np.minimum(at + step, steps + config.depth - 1)].any(axis=-1)
            advance += empty
        head += np.where(running, advance.min(axis=1), 0)
        cycles += running
    return cycles


def vgg16_trace() -> Trace:
    """VGG-16 as torchvision initialises it, one noise image, all three products."""
    torch.manual_seed(0)
    model = build_torchvision("vgg16")
    with capture(model) as recorder:
        F.cross_entropy(model(torch.randn(1, 3, 224, 224)), torch.tensor([0])).backward()
    return recorder.trace()


def cpu_seconds(function) -> float:
    """Processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def scalesim_seconds(python: Path) -> float:
    """Processor time of one SCALE-Sim run of one layer, in its own interpreter, start and imports included."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "c.cfg").write_text(SCALESIM_CONFIG)
        Path(folder, "t.csv").write_text("Layer,IH,IW,FH,FW,C,K,Stride,\nconv,58,58,3,3,64,64,1,\n")
        Path(folder, "l.csv").write_text("Layer\nconv," + "1," * 15 + "\n")
        command = [str(python.absolute()), "-c", SCALESIM]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode or "CPU seconds" not in done.stdout:
        raise SystemExit(f"SCALE-Sim failed: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return float(done.stdout.rsplit("CPU seconds", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scalesim-python", type=Path, help="interpreter of an environment with scalesim 3.0.0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = TensorDash()
    words = {zeros: random_streams(zeros, groups=1024, rows=4, steps=1000) for zeros in (0.5, 0.9)}
    small = {zeros: w[:64, :, :150] for zeros, w in words.items()}
    trace = vgg16_trace()
    frame = simulate(trace, config, threads=1)  # also compiles
    for zeros, w in small.items():
        if (schedule(w, config).cycles != schedule_numpy(w, config)).any():
            raise SystemExit(f"the NumPy model disagrees at {zeros:.0%} zeros")
    best: dict[str, float] = {}
    for _ in range(options.repeats):
        for zeros in words:
            jobs = {
                f"blocked, {zeros:.0%} zeros": lambda z=zeros: schedule(words[z], config, threads=1),
                f"NumPy, {zeros:.0%} zeros": lambda z=zeros: schedule_numpy(small[z], config),
            }
            for name, job in jobs.items():
                best[name] = min(best.get(name, float("inf")), cpu_seconds(job))
        seconds = cpu_seconds(lambda: simulate(trace, config, threads=1))
        best["VGG-16"] = min(best.get("VGG-16", float("inf")), seconds)
    print(f"{'':24s} {'CPU s':>8s} {'G values/s':>11s}")
    for zeros in words:
        fast, slow = f"blocked, {zeros:.0%} zeros", f"NumPy, {zeros:.0%} zeros"
        rates = {n: 16 * w[zeros].size / best[n] / 1e9 for n, w in ((fast, words), (slow, small))}
        for name, rate in rates.items():
            print(f"{name:24s} {best[name]:8.3f} {rate:11.4f}")
        print(f"{'':24s} blocked is {rates[fast] / rates[slow]:.0f} times as fast")
    macs = int(frame["macs"].sum())
    rate = macs / best["VGG-16"]
    print(f"VGG-16, three products: {macs / 1e9:.1f} G MAC in {best['VGG-16']:.2f} CPU s, {rate / 1e9:.1f} G MAC/s")
    print(f"  {rate / 2.5e6:.0f} times the 2.5 M MAC per CPU second of SCALE-Sim's default layers")
    if options.scalesim_python:
        seconds = scalesim_seconds(options.scalesim_python)
        theirs = SCALESIM_MACS / seconds
        print(f"SCALE-Sim 3.0.0: {SCALESIM_MACS / 1e6:.1f} M MAC in {seconds:.1f} CPU s, {theirs / 1e6:.1f} M MAC/s")
        print(f"  the emulator simulates {rate / theirs:.0f} times as many MAC per CPU second")


if __name__ == "__main__":
    main()
