"""A `paper` profile on several devices: Lightning's DDP must train as one process would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leantrain import paths


@pytest.mark.slow
def test_two_processes_average_to_the_gradients_of_one(tmp_path):
    """SkipViT's ViT-small at full size, in 64 bits: two images on two processes, or both on one."""
    output = tmp_path / "gradients.pt"
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "lib"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ddp_gradients.py")), str(output)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(output, weights_only=True)
    assert found["processes"] == 2
    averaged, joint, alone = found["averaged"], found["joint"], found["alone"]
    assert sum(g.numel() for g in joint.values()) > 21_000_000, "the network of the paper, not a small one"
    assert averaged.keys() == joint.keys()
    for name, gradient in joint.items():
        torch.testing.assert_close(averaged[name], gradient, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(alone, joint["model.head.weight"], rtol=1e-2), "half of the batch has other gradients"
