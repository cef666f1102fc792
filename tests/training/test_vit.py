"""The small vision transformer: size by formula, and sizes that cannot be."""

import pytest
import torch

from leantrain.training.vit import small_vit

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "dim": 48,
    "depth": 3,
    "heads": 6,
}


def test_parameters_follow_the_formula():
    model = small_vit(**SIZES, mlp_ratio=2.0)
    dim, hidden, tokens = 48, 96, 16 + 1
    embedding = (2 * 2 * 1) * dim + dim + dim + tokens * dim  # patches, their bias, class token, positions
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    mlp = dim * hidden + hidden + hidden * dim + dim
    expected = embedding + 3 * (attention + mlp + 4 * dim) + 2 * dim + dim * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_seed_decides_the_initial_weights():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(torch.nn.utils.parameters_to_vector(small_vit(**SIZES).parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"heads": 5}, "dim 48 is not a multiple of heads 5"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must be positive"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_vit(**(SIZES | change))
