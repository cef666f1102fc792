"""What a skipped block saves: the step of a BERT-base against the number of blocks that run.

    python benchmarks/progressive_layer_dropping_step.py [--batch 4] [--tokens 128] [--repeats 9] [--bf16]

Times forward and backward of a masked-language model of BERT-base's size, in turn with 12 down to 6 blocks, and with
three blocks computed and multiplied by zero, as stochastic depth is usually implemented. Prints every time with its
ratio to the full model, the line through them, and the saving at the mean depth of a run.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantrain.measure import median_interval, paired_timing
from leantrain.techniques.progressive_layer_dropping import KeepSchedule, ProgressiveStack, pre_ln_bert
from leantrain.training import mask_tokens

VOCABULARY, BLOCKS, STEPS = 30_522, 12, 10_000
COUNTS = (12, 11, 10, 9, 8, 7, 6)


class Zeroed(nn.Module):
    """A block that is computed and then counts for nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, branch_scale: float = 1.0) -> Tensor:
        """The input, after all the work."""
        return self.inner(x, branch_scale=0.0)


def step(model: nn.Module, stack: ProgressiveStack, ids: Tensor, kept: int, dtype: torch.dtype) -> None:
    hidden, chosen = mask_tokens(ids, vocab_size=VOCABULARY, mask_id=4, generator=torch.Generator().manual_seed(0))
    model.encoder = stack
    stack.begin_step(0, [1.0] * kept + [0.0] * (BLOCKS - kept))
    model.zero_grad()
    with torch.autocast(ids.device.type, dtype, enabled=dtype is not torch.float32):
        loss = F.cross_entropy(model(hidden, chosen).float(), ids[chosen])
    loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = pre_ln_bert(VOCABULARY, max_length=options.tokens).to(device)
    skipping = model.encoder
    zeroing = ProgressiveStack(*(Zeroed(b) if i % 4 == 3 else b for i, b in enumerate(skipping)))
    ids = torch.randint(5, VOCABULARY, (options.batch, options.tokens), device=device)
    arms = {f"{kept} blocks": partial(step, model, skipping, ids, kept, dtype) for kept in COUNTS}
    arms["3 of 12 multiplied by zero"] = partial(step, model, zeroing, ids, BLOCKS, dtype)
    timing = paired_timing(arms, repeats=options.repeats, warmup=1)
    table = timing.table("12 blocks")
    table["median_s"] *= 1e3
    print(f"batch {options.batch}, {options.tokens} tokens, {dtype}, {device}, {torch.get_num_threads()} threads")
    print(table.rename(columns={"median_s": "median_ms"}).round(3).to_string(index=False))
    times = timing.seconds[[f"{kept} blocks" for kept in COUNTS]].to_numpy()
    slope, intercept = np.polyfit(COUNTS, times.T, deg=1)
    print(f"a block {1e3 * np.median(slope):.1f} ms, the rest {1e3 * np.median(intercept):.1f} ms")
    for label, first_kept in (("first block kept", True), ("first dropped too", False)):
        kept = KeepSchedule(0.5, 100 / STEPS, first_kept=first_kept).mean_depth_of_run(STEPS, BLOCKS)
        saved = median_interval(100 * slope * (BLOCKS - kept) / (slope * BLOCKS + intercept))
        print(f"limit 0.5, {label}: {kept:.2f} blocks on average, time saved {saved} %")


if __name__ == "__main__":
    main()
