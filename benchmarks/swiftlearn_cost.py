"""What a measurement of importance costs: a forward pass against a training step of an encoder, paired.

The step is forward, backward and AdamW's fused update of all weights; the forward pass keeps no gradients. Both take
the same batch, in turns, so that a noisy machine wrongs them alike. From their ratio follows the speed-up of SwiftLearn
for 5 epochs, 1 of them warm-up, and a tenth of the samples kept.

    python benchmarks/swiftlearn_cost.py [--encoder minilm] [--repeats 9] [--threads 1]
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from torch.nn import functional as F

from leantrain.measure import paired_timing
from leantrain.techniques.swiftlearn import sample_passes
from leantrain.training.encoders import ENCODERS, sentence_encoder


def main() -> None:
    """Time steps and passes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=ENCODERS, default="minilm")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of each, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    model = sentence_encoder(arguments.encoder, 2, untrained=True).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows = []
    for batch, length in ((8, 32), (32, 32), (8, 128)):
        ids = torch.randint(1000, 30000, (batch, length), device=device)
        mask, y = torch.ones_like(ids), torch.randint(2, (batch,), device=device)

        def train(ids: torch.Tensor = ids, mask: torch.Tensor = mask, y: torch.Tensor = y) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, y).backward()
            optimizer.step()

        def forward(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
            model.train()

        timing = paired_timing({"train": train, "forward": forward}, arguments.repeats)
        c = timing.ratio("forward", "train")
        rows.append(
            {
                "batch x length": f"{batch} x {length}",
                "training (samples/s)": f"{batch / timing.median('train'):.1f}",
                "forward (samples/s)": f"{batch / timing.median('forward'):.1f}",
                "c": f"{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]",
                "speed-up": f"{5 / sample_passes(5, 1, 0.1, 2, c.value):.2f}",
            }
        )
    print(f"{arguments.encoder}, {device}, {arguments.threads} threads, n = {arguments.repeats}")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
