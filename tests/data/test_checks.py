"""The validators name the file and the row; equal content is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantrain.data.checks import check_images, check_labels, duplicates, overlap
from leantrain.data.errors import CorruptData

GOOD = np.zeros((4, 3, 8, 8), np.uint8)
LABELS = np.array([0, 1, 2, 9])


def check(images=GOOD, labels=LABELS):
    check_images("batch_3", images, labels, num_classes=10, shape=(3, 8, 8))


def test_good_images_pass():
    check()
    check(GOOD.astype(np.float32))


def test_not_a_number_is_found():
    images = GOOD.astype(np.float32)
    images[2, 1, 0, 0] = np.nan
    images[3, 1, 0, 0] = np.inf
    with pytest.raises(CorruptData, match=r"batch_3: row 2 has pixels that are not finite"):
        check(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10, 10], "batch_3: row 2 has the label 10, expected 0 to 9"),
        ([0, -1, 2, 3], "batch_3: row 1 has the label -1"),
        ([0, 1, 2], "4 images, but 3 labels"),
        ([0.0, 1.0, 2.0, 3.0], "must be integers"),
        ([], "expected a row of labels"),
        ([[0, 1, 2, 3]], "expected a row of labels"),
    ],
)
def test_wrong_labels_are_found(labels, message):
    with pytest.raises(CorruptData, match=message):
        check(labels=np.array(labels))


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 8, 9), (4, 8, 8, 3), (4, 192)])
def test_wrong_shapes_are_found(shape):
    with pytest.raises(CorruptData, match="batch_3: images have the shape"):
        check(np.zeros(shape, np.uint8))


def test_wrong_types_are_found():
    with pytest.raises(CorruptData, match="int64"):
        check(GOOD.astype(np.int64))


def test_labels_of_one_class_pass():
    check_labels("x", np.zeros(3, np.uint8), 1)


def test_equal_content_is_found():
    items = np.array([[1, 2], [3, 4], [1, 2], [1, 2]], np.uint8)
    assert duplicates(items) == [(0, 2), (0, 3)]
    assert overlap(items, np.array([[9, 9], [3, 4], [1, 2]], np.uint8)) == [(1, 1), (0, 2)]
    assert duplicates(["a", "b", "a"]) == [(0, 2)]


def test_shape_and_type_belong_to_the_content():
    assert overlap([np.zeros((2, 3), np.uint8)], [np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.int8)]) == []


@given(st.lists(st.binary(max_size=2)), st.lists(st.binary(max_size=2)))
def test_overlap_and_duplicates_against_lists(train, test):
    assert overlap(train, test) == [(train.index(item), k) for k, item in enumerate(test) if item in train]
    assert duplicates(train) == [(train.index(item), k) for k, item in enumerate(train) if train.index(item) < k]
