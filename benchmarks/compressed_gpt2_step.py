"""What a training step of the compressed GPT-2 costs on the real sizes, with and without a teacher, paired.

A step is a forward and a backward pass, without the optimiser's update. The six-layer student, alone and beside the
twelve-layer GPT-2 small, is timed in turns with GPT-2 small itself, so that a noisy machine wrongs all alike.

    python benchmarks/compressed_gpt2_step.py [--tokens 256] [--batch 2] [--repeats 9] [--threads 1] [--bf16]
"""

from __future__ import annotations

import argparse
from functools import partial

import pandas as pd
import torch

from leantrain.measure import paired_timing
from leantrain.techniques.compressed_gpt2 import DistilledLanguageModel, forward_macs, gpt2, select_blocks, truncate
from leantrain.training import LanguageModel

BASELINE = "6 blocks, distilled"


def main() -> None:
    """Time the steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a sequence, 2 to 1024")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of every step, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 where autocast uses it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-4)
    parent = gpt2().to(device)
    student = truncate(parent, select_blocks("alternate", 12, 6))
    modules = {
        "12 blocks, plain": LanguageModel(truncate(parent, range(12)), optimizer),
        "6 blocks, plain": LanguageModel(student, optimizer),
        BASELINE: DistilledLanguageModel(student, parent, optimizer, freeze_positions=False),
    }
    ids = torch.randint(50257, (arguments.batch, arguments.tokens), device=device)

    def step(module: LanguageModel) -> None:
        module.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=arguments.bf16):
            loss = module.loss(ids)
        loss.backward()

    timing = paired_timing({name: partial(step, module) for name, module in modules.items()}, arguments.repeats)
    full, half = (sum(forward_macs(depth=depth, context=arguments.tokens).values()) for depth in (12, 6))
    ideal = dict(zip(modules, (3 * full, 3 * half, 3 * half + full), strict=True))
    table = timing.table(BASELINE).set_index("arm")
    table["ratio of MACs"] = pd.Series(ideal) / ideal[BASELINE]
    kind = "bfloat16" if arguments.bf16 else "float32"
    print(f"GPT-2 small, {arguments.batch} x {arguments.tokens} tokens, {kind}, {device}, {arguments.threads} threads")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
