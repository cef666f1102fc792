"""Ranks against the paper's lists, brute force, and bad input."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantrain.low_rank.ranks import energy_rank, pair_size, svd_rank, triple_size, tucker_ranks

# Hajimolahoseini and others (2024), the ranks before optimisation, compression 2.
LISTED_PAIRS = {(64, 64): 16, (64, 256): 25, (2048, 512): 204, (512, 2048): 204, (2048, 1000): 335}
LISTED_TRIPLES = {(64, 64): 38, (512, 512): 309}
# Layers of ResNet-50 at compressions 2 and 4.
PAIRS = {
    (256, 128): (42, 21),
    (128, 512): (51, 25),
    (512, 256): (85, 42),
    (256, 1024): (102, 51),
    (1024, 512): (170, 85),
}
TRIPLES = {128: (77, 51), 256: (154, 102), 512: (309, 205), 64: (38, 25)}
SIZE = st.integers(1, 600)


@pytest.mark.parametrize(("shape", "rank"), LISTED_PAIRS.items())
def test_listed_ranks_of_matrices(shape, rank):
    assert svd_rank(*shape, 2) == rank
    assert svd_rank(*shape[::-1], 2) == rank


@pytest.mark.parametrize(("shape", "rank"), LISTED_TRIPLES.items())
def test_listed_ranks_of_convolutions(shape, rank):
    assert tucker_ranks(*shape, 9, 2) == (rank, rank)


def test_ranks_of_resnet50():
    for shape, ranks in PAIRS.items():
        assert tuple(svd_rank(*shape, a) for a in (2, 4)) == ranks
    for channels, ranks in TRIPLES.items():
        assert tuple(tucker_ranks(channels, channels, 9, a)[0] for a in (2, 4)) == ranks


@given(SIZE, SIZE, st.sampled_from([1.25, 1.5, 2.0, 3.0, 4.0, 7.5]))
def test_the_rank_is_the_largest_that_saves_enough(inputs, outputs, compression):
    rank, dense = svd_rank(inputs, outputs, compression), inputs * outputs
    assert compression * pair_size(inputs, outputs, rank) <= dense
    assert compression * pair_size(inputs, outputs, rank + 1) > dense or rank == min(inputs, outputs)


@given(SIZE, SIZE, st.sampled_from([1, 3, 9, 25]), st.sampled_from([1.5, 2.0, 4.0]))
def test_the_ranks_are_the_largest_equal_ones_that_save_enough(inputs, outputs, positions, compression):
    first, second = tucker_ranks(inputs, outputs, positions, compression)
    dense = inputs * outputs * positions
    least = min(inputs, outputs)
    by_trial = [r for r in range(least + 1) if compression * triple_size(inputs, outputs, positions, (r, r)) <= dense]
    assert min(first, second) == by_trial[-1]


def test_a_ratio_of_the_two_ranks():
    first, second = tucker_ranks(256, 512, 9, 2, ratio=2.0)
    assert second == 2 * first
    assert 2 * triple_size(256, 512, 9, (first, second)) <= 9 * 256 * 512
    assert 2 * triple_size(256, 512, 9, (first + 1, second + 2)) > 9 * 256 * 512


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_the_energy_rank_is_the_smallest_that_keeps_enough(values, energy):
    values = sorted(values, reverse=True)
    rank = energy_rank(values, energy)
    total = math.fsum(v * v for v in values)
    assert math.fsum(v * v for v in values[:rank]) >= energy * total * (1 - 1e-12)
    assert rank == 1 or math.fsum(v * v for v in values[: rank - 1]) < energy * total * (1 + 1e-12)


def test_energy_of_known_values():
    assert energy_rank([3.0, 2.0, 1.0], 9 / 14) == 1
    assert energy_rank([3.0, 2.0, 1.0], 9.01 / 14) == 2
    assert energy_rank([3.0, 2.0, 1.0], 1.0) == 3
    assert energy_rank([3.0, 0.0, 0.0], 1.0) == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: svd_rank(0, 4, 2), "inputs=0"),
        (lambda: svd_rank(4, 4, 0), "compression=0"),
        (lambda: svd_rank(4, 4, math.nan), "compression=nan"),
        (lambda: tucker_ranks(4, 4, 0, 2), "positions=0"),
        (lambda: tucker_ranks(4, 4, 9, 2, ratio=0), "ratio=0"),
        (lambda: energy_rank([], 0.9), "singular_values"),
        (lambda: energy_rank([1.0, 2.0], 0.9), "singular_values"),
        (lambda: energy_rank([2.0, 1.0], 1.1), "energy=1.1"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
