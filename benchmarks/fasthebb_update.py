"""What a Hebbian update costs on the layers of the paper's networks: four forms, paired, and the memory they hold.

The forms that go through single patches or groups of neurons run on some of the patches, and their times are scaled up:
their cost is linear in the patches. The memory is counted at full size, on the meta device.

    python benchmarks/fasthebb_update.py [--network small] [--repeats 6] [--patches 64] [--threads 1]
"""

from __future__ import annotations

import argparse
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from leantrain.measure import median_interval, paired_timing
from leantrain.measure.peak import peak_bytes
from leantrain.techniques.fasthebb import IMAGENET, SMALL, LayerShape, grouped, layer_shapes, merged, patch_by_patch

NETWORKS = {"small": (SMALL, (3, 32, 32), 64), "imagenet": (IMAGENET, (3, 210, 210), 32)}
FORMS = {"patch": patch_by_patch, "grouped": grouped, "merged": merged}


def held(shape: LayerShape, principal: bool) -> dict[str, float]:
    """MiB that the forms hold at once, beyond patches, weights and gates."""
    meta: dict[str, Tensor] = {
        name: torch.empty(*size, device="meta")
        for name, size in {
            "x": (shape.patches, shape.inputs),
            "w": (shape.neurons, shape.inputs),
            "a": (shape.patches, shape.neurons),
        }.items()
    }
    r = meta["a"] if principal else None
    return {form: peak_bytes(lambda form=form: FORMS[form](**meta, r=r)) / 2**20 for form in ("grouped", "merged")}


def main() -> None:
    """Time the updates and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="small", help="whose layers")
    parser.add_argument("--repeats", type=int, default=6, help="timed repeats of every form, at least 3")
    parser.add_argument("--patches", type=int, default=64, help="patches that the slow forms run on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    stages, in_shape, batch = NETWORKS[arguments.network]
    rows = []
    for shape in layer_shapes(stages, in_shape, batch, hidden=0):
        x, w = torch.randn(shape.patches, shape.inputs), torch.randn(shape.neurons, shape.inputs) / shape.inputs**0.5
        y = torch.relu(x @ w.T)
        few = min(arguments.patches, shape.patches)
        for rule, r in (("swta", None), ("hpca", y)):
            calls = {
                form: partial(FORMS[form], x[:n], w, y[:n], None if r is None else r[:n])
                for form, n in (("patch", few), ("grouped", few), ("merged", shape.patches))
            }
            timing = paired_timing(calls, arguments.repeats, warmup=1)
            scale, memory = shape.patches / few, held(shape, r is not None)
            seconds = timing.seconds
            row = {"layer": f"{shape.name} {shape.patches} x {shape.inputs} to {shape.neurons}", "rule": rule}
            for form in ("patch", "grouped"):
                row[f"{form} (s)"] = f"{scale * timing.median(form):.2f}"
            row["merged (s)"] = f"{timing.median('merged'):.4f}"
            for form in ("patch", "grouped"):
                row[f"{form} / merged"] = str(median_interval(scale * seconds[form] / seconds["merged"]))
            row |= {f"{form} (MiB)": f"{mib:.0f}" for form, mib in memory.items()}
            rows.append(row)
    print(f"{arguments.network}, batch {batch}, {arguments.threads} threads, torch {torch.__version__}")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
