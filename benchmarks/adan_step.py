"""What one optimiser step costs on ViT-S/16: Adan against AdamW and timm's Adan, paired.

All optimisers update the same 22,050,664 weights with the same gradients, in turns, so that a noisy machine wrongs them
alike. A ratio compares like with like: the loop over tensors with AdamW's loop, the foreach path with AdamW's foreach
path. PyTorch's fused AdamW kernel has no counterpart for Adan; its row says what a fused Adan could hope for.

    python benchmarks/adan_step.py [--repeats 15] [--threads 1]
"""

from __future__ import annotations

import argparse

import pandas as pd
import timm.optim
import torch
from torch.optim import AdamW

from leantrain.measure import optimizer_state_bytes, paired_timing
from leantrain.techniques.adan import Adan
from leantrain.training.vit import small_vit

BASELINES = {"loop": "AdamW, loop", "foreach": "AdamW, foreach", "fused": "AdamW, foreach"}


def main() -> None:
    """Time the steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats of every optimiser, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    model = small_vit(image_size=224, patch_size=16, num_classes=1000, dim=384, depth=12, heads=6).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weights = list(model.parameters())
    optimizers = {
        "AdamW, loop": AdamW(weights, lr=1e-6, foreach=False),
        "Adan, loop": Adan(weights, lr=1e-6, foreach=False),
        "Adan of timm, loop": timm.optim.Adan(weights, lr=1e-6, foreach=False),
        "AdamW, foreach": AdamW(weights, lr=1e-6, foreach=True),
        "Adan, foreach": Adan(weights, lr=1e-6, foreach=True),
        "Adan of timm, foreach": timm.optim.Adan(weights, lr=1e-6, foreach=True),
        "AdamW, fused": AdamW(weights, lr=1e-6, fused=True),
    }
    timing = paired_timing({name: opt.step for name, opt in optimizers.items()}, arguments.repeats)
    rows = []
    for name, optimizer in optimizers.items():
        baseline = BASELINES[name.rpartition(", ")[2]]
        ratio = timing.ratio(name, baseline)
        rows.append(
            {
                "optimiser": name,
                "median (ms)": f"{1e3 * timing.median(name):.1f}",
                "against": baseline,
                "ratio": f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                "state (MB)": f"{optimizer_state_bytes(optimizer) / 1e6:.1f}",
            }
        )
    print(f"ViT-S/16, {device}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats}")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
