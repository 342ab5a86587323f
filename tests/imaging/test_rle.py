from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tmca.errors import DataError
from tmca.imaging.rle import decode_mask, encode_mask, write_mask

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


def test_runs_by_hand():
    # Columns from the left: 0 1 1 | 1 0 0 | 0 0 1 give the runs 1, 3, 4, 1.
    mask = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 1]], dtype=bool)
    # 1, 3, 4, then 1 - 3 = -2, whose five bits are 11110: 30 + 48 is N.
    assert encode_mask(mask) == {"size": [3, 3], "counts": "134N", "bbox": [0, 0, 3, 3], "area": 4}


@pytest.mark.parametrize(
    ("mask", "counts", "box"),
    [
        (np.zeros((2, 3), bool), "6", [0, 0, 0, 0]),
        (np.ones((2, 3), bool), "06", [0, 0, 3, 2]),
        (np.arange(16).reshape(16, 1) == 15, "?1", [0, 15, 1, 1]),
        # 16 would be read as -16, so it takes a second group: 16 + 32 + 48 is `, 0 + 48 is 0.
        (np.arange(17).reshape(17, 1) == 16, "`01", [0, 16, 1, 1]),
        # 1000 = 31 · 32 + 8: groups 8, 31 and, as 31 has the sign's bit, 0.
        (np.arange(1001).reshape(1, 1001) == 1000, "Xo01", [1000, 0, 1, 1]),
    ],
)
def test_counts_by_hand(mask: np.ndarray, counts: str, box: list[int]):
    encoded = encode_mask(mask)
    assert (encoded["counts"], encoded["bbox"], encoded["area"]) == (counts, box, mask.sum())
    np.testing.assert_array_equal(decode_mask(encoded), mask)


@given(mask=MASKS)
def test_a_mask_comes_back(mask: np.ndarray):
    encoded = json.loads(json.dumps(encode_mask(mask)))
    np.testing.assert_array_equal(decode_mask(encoded), mask)
    left, top, width, height = encoded["bbox"]
    assert mask[top : top + height, left : left + width].sum() == mask.sum() == encoded["area"]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@given(mask=MASKS)
def test_pycocotools_writes_and_reads_the_same(mask: np.ndarray):
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    encoded = encode_mask(mask)
    theirs = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert theirs["counts"].decode() == encoded["counts"]
    np.testing.assert_array_equal(reference.decode(encoded).astype(bool), mask)
    assert reference.toBbox(encoded).tolist() == encoded["bbox"]
    assert reference.area(encoded) == encoded["area"]


def test_lists_of_numbers_are_read_too():
    mask = np.array([[0, 1], [1, 1]], dtype=bool)
    np.testing.assert_array_equal(decode_mask({"size": [2, 2], "counts": [1, 3]}), mask)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        ({"counts": "4"}, "size None"),
        ({"size": [2, 0], "counts": ""}, r"size \[2, 0\]"),
        ({"size": [2, "2"], "counts": "4"}, "size"),
        ({"size": [10**6, 10**6], "counts": "4"}, "size"),
        ({"size": [2, 2]}, "no counts"),
        ({"size": [2, 2], "counts": [1, "3"]}, "no counts"),
        ({"size": [2, 2], "counts": "5"}, "count 5 pixels, expected 2 × 2 = 4"),
        ({"size": [2, 2], "counts": [5, -1]}, "count 4 pixels"),
        ({"size": [2, 2], "counts": ""}, "count 0 pixels"),
        ({"size": [2, 2], "counts": "4\n"}, "hold '.n' where none can be"),
        ({"size": [2, 2], "counts": "o" * 8}, "hold 'o' where none can be"),
        ({"size": [2, 2], "counts": "4o"}, "end within a number"),
    ],
)
def test_what_is_no_mask_is_explained(encoded: dict, reason: str):
    with pytest.raises(DataError, match=reason) as caught:
        decode_mask(encoded)
    assert caught.value.hint


@given(text=st.text(max_size=12))
def test_any_text_is_read_or_explained(text: str):
    try:
        mask = decode_mask({"size": [4, 4], "counts": text})
    except DataError:
        return
    assert mask.shape == (4, 4)


def test_the_file_is_json(tmp_path: Path):
    mask = np.eye(3, dtype=bool)
    write_mask(tmp_path / "mask.json", mask)
    np.testing.assert_array_equal(decode_mask(json.loads((tmp_path / "mask.json").read_text("utf-8"))), mask)
