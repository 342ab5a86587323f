from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tmca.data.manifest import Manifest, Record
from tmca.data.splits import SHARES, cross_validation_folds, nested_fractions, split_manifest
from tmca.errors import ConfigError, DataError


def _manifest(sizes: list[int], singles: int = 0, split: str = "") -> Manifest:
    """Patients with so many cases each, and cases whose patient is not known."""
    records = [
        Record(f"p{patient}-{number}", f"p{patient}-{number}.png", split=split, patient_id=f"p{patient}")
        for patient, size in enumerate(sizes)
        for number in range(size)
    ]
    return Manifest(Path(), (*records, *(Record(f"s{n}", f"s{n}.png", split=split) for n in range(singles))), "toy")


def _splits_of_patients(manifest: Manifest) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for record in manifest.records:
        found[record.patient_id or record.id].add(record.split)
    return found


# Splits -----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    singles=st.integers(0, 20),
    seed=st.integers(0, 99),
    shift=st.integers(0, 50),
)
def test_patients_stay_together_whatever_the_order_of_the_rows(sizes: list[int], singles: int, seed: int, shift: int):
    manifest = _manifest(sizes, singles)
    split = split_manifest(manifest, seed=seed)
    assert [record.id for record in split.records] == [record.id for record in manifest.records]
    assert all(len(splits) == 1 for splits in _splits_of_patients(split).values())
    assert set(split.splits) == set(SHARES)
    shift %= len(manifest.records)
    rotated = manifest.with_records(manifest.records[shift:] + manifest.records[:shift])
    again = {record.id: record.split for record in split_manifest(rotated, seed=seed).records}
    assert again == {record.id: record.split for record in split.records}


@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=7), seed=st.integers(0, 9))
def test_no_single_move_or_exchange_comes_nearer_to_the_shares(sizes: list[int], seed: int):
    split = split_manifest(_manifest(sizes), seed=seed)
    names, total = list(SHARES), sum(sizes)
    of_patient = {patient: next(iter(splits)) for patient, splits in _splits_of_patients(split).items()}
    dealt = [of_patient[f"p{number}"] for number in range(len(sizes))]

    def distance(dealt: list[str]) -> float:
        counts = {name: sum(s for s, d in zip(sizes, dealt, strict=True) if d == name) for name in names}
        return sum((counts[name] - SHARES[name] * total) ** 2 for name in names)

    changed = [[*dealt[:i], name, *dealt[i + 1 :]] for i in range(len(sizes)) for name in names]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        swapped = list(dealt)
        swapped[i], swapped[j] = dealt[j], dealt[i]
        changed.append(swapped)
    assert all(distance(other) >= distance(dealt) - 1e-6 for other in changed if set(other) == set(names))


def test_single_cases_meet_the_shares_exactly():
    split = split_manifest(_manifest([], 200), {"train": 0.7, "val": 0.1, "test": 0.2})
    assert split.splits == {"train": 140, "val": 20, "test": 40}


def test_volumes_of_uneven_size_come_near_the_shares():
    sizes = [161, 191, 143, 137, 113, 116, 70, 93, 216, 111, 162, 103, 44, 11, 34, 72, 26, 41, *[16] * 50]
    for seed in range(5):
        split = split_manifest(_manifest(sizes), seed=seed)
        total = sum(sizes)
        assert all(abs(split.splits[name] - share * total) <= 8 for name, share in SHARES.items())


def test_large_and_small_patients_reach_every_split():
    sizes = [30] * 10 + [1] * 100
    in_test = [
        record.patient_id
        for seed in range(20)
        for record in split_manifest(_manifest(sizes), seed=seed).split("test").records
    ]
    large = sum(int(patient[1:]) < 10 for patient in in_test) / len(in_test)
    assert 0.5 < large < 0.95  # 0.75 of all cases are of large patients


def test_slices_of_a_volume_and_sentences_on_an_image_stay_together():
    slices = [Record(f"v{volume}-{n}", f"v{volume}.nii.gz#{n}") for volume in range(6) for n in range(5)]
    twice = [Record(f"i{image}-{n}", f"i{image}.png") for image in range(6) for n in range(2)]
    split = split_manifest(Manifest(Path(), (*slices, *twice), "toy"))
    found: dict[str, set[str]] = defaultdict(set)
    for record in split.records:
        found[record.image.partition("#")[0]].add(record.split)
    assert all(len(splits) == 1 for splits in found.values())
    assert set().union(*found.values()) == {"train", "val", "test"}


def test_the_seed_decides():
    manifest = _manifest([], 60)
    assert split_manifest(manifest, seed=1) == split_manifest(manifest, seed=1) != split_manifest(manifest, seed=2)


def test_other_names_and_numbers_of_splits():
    manifest = _manifest([], 10)
    folds = split_manifest(manifest, {f"fold{n}": 0.2 for n in range(5)})
    assert set(folds.splits.values()) == {2}
    assert split_manifest(manifest, {"all": 1.0}).splits == {"all": 10}
    assert set(split_manifest(manifest, {"train": 0.8, "val": 0.0, "test": 0.2}).splits) == {"train", "test"}


def test_one_split_can_be_divided_further():
    manifest = _manifest([2] * 20, split="train")
    manifest = manifest.with_records([*manifest.records, Record("t", "x", split="test", patient_id="t")])
    divided = split_manifest(manifest, {"train": 0.9, "val": 0.1}, within="train")
    assert divided.splits == {"train": 36, "val": 4, "test": 1}
    with pytest.raises(ConfigError, match="split 'test' of toy is there already") as taken:
        split_manifest(manifest, {"train": 0.9, "test": 0.1}, within="train")
    assert "--test 0" in taken.value.hint
    other = manifest.with_records(replace(r, split=r.split.replace("test", "extra")) for r in manifest.records)
    with pytest.raises(ConfigError, match="split 'extra' of toy is there already") as taken:
        split_manifest(other, {"train": 0.9, "extra": 0.1}, within="train")
    assert taken.value.hint == "choose another name"
    with pytest.raises(DataError, match="has no split 'tset'") as caught:
        manifest.split("tset")
    assert caught.value.hint == "did you mean 'test'?"
    with pytest.raises(DataError) as caught:
        manifest.with_records(replace(r, split=f"{r.split}ing") for r in manifest.records).split("train")
    assert caught.value.hint.startswith("name the cases 'train' in the column split")
    with pytest.raises(DataError, match="has no split 'val'"):
        split_manifest(manifest, {"val": 1.0}, within="val")


def test_existing_splits_are_not_lost_by_accident():
    manifest = split_manifest(_manifest([], 10))
    with pytest.raises(DataError, match=r"toy is split already: .*train \(7\)") as caught:
        split_manifest(manifest, seed=5)
    assert "--resplit" in caught.value.hint
    assert split_manifest(manifest, seed=5, overwrite=True) == split_manifest(_manifest([], 10), seed=5)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"train": 0.7, "val": 0.2}, r"0\.7 \+ 0\.2, expected a sum of 1"),
        ({}, "are nothing, expected"),
        ({"train": 1.5, "val": -0.5}, "split 'train' is 1.5"),
        ({"train": float("nan")}, "expected 0 to 1"),
        ({" ": 1.0}, "split ' '"),
    ],
)
def test_nonsense_shares_are_refused(shares: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        split_manifest(_manifest([], 10), shares)


def test_fewer_patients_than_splits_are_refused():
    with pytest.raises(DataError, match="2 patients for 3 splits") as caught:
        split_manifest(_manifest([50, 50]))
    assert "patient_id" in caught.value.hint
    assert set(split_manifest(_manifest([98, 1, 1])).splits) == set(SHARES)


# Fractions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def split_cases() -> Manifest:
    return split_manifest(_manifest([3] * 20, 40), seed=1)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=12),
    singles=st.integers(0, 20),
    count=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_every_case_is_tested_in_one_fold_and_patients_stay_together(
    sizes: list[int], singles: int, count: int, seed: int
):
    manifest = _manifest(sizes, singles)
    assume(sum(sizes) + singles > 4 * max(sizes))  # or one patient may be all that a fold leaves
    folds = cross_validation_folds(manifest, count, seed)
    assert len(folds) == count
    tested = [record.id for fold in folds for record in fold.split("test").records]
    assert sorted(tested) == sorted(record.id for record in manifest.records)
    for fold in folds:
        assert [record.id for record in fold.records] == [record.id for record in manifest.records]
        assert set(fold.splits) == set(SHARES)
        assert all(len(splits) == 1 for splits in _splits_of_patients(fold).values())
    assert cross_validation_folds(manifest, count, seed) == folds


def test_folds_are_of_one_size_and_validate_on_the_share_that_was_asked_for():
    folds = cross_validation_folds(_manifest([], singles=100), 5)
    assert [dict(fold.splits) for fold in folds] == [{"train": 70, "val": 10, "test": 20}] * 5
    (first, _) = cross_validation_folds(_manifest([], singles=100), 2, val=0.0)
    assert dict(first.splits) == {"train": 50, "test": 50}


def test_folds_that_cannot_be_are_refused(split_cases: Manifest):
    unsplit = _manifest([], singles=20)
    with pytest.raises(ConfigError, match="1 folds were asked for, expected 2 or more"):
        cross_validation_folds(unsplit, 1)
    with pytest.raises(ConfigError, match=r"0\.5 for validation leaves nothing to train on: of 2 folds 0\.5"):
        cross_validation_folds(unsplit, 2, val=0.5)
    with pytest.raises(DataError, match="20 patients for 21 splits"):
        cross_validation_folds(unsplit, 21)
    uneven = _manifest([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], singles=0)
    with pytest.raises(
        DataError, match=r"Without fold \d of toy 1 patient is left to train and to validate on"
    ) as caught:
        cross_validation_folds(uneven, 2)
    assert "--val 0" in caught.value.hint
    assert len(cross_validation_folds(uneven, 2, val=0.0)) == 2
    with pytest.raises(DataError, match="split already"):
        cross_validation_folds(split_cases)
    assert len(cross_validation_folds(split_cases, 3, overwrite=True)) == 3


def test_fractions_thin_out_one_split_and_are_nested(split_cases: Manifest):
    parts = nested_fractions(split_cases, (0.75, 0.25, 0.5), seed=4)
    assert list(parts) == [0.25, 0.5, 0.75]
    ids = [{record.id for record in part.split("train").records} for part in parts.values()]
    assert ids[0] < ids[1] < ids[2]
    for fraction, part in parts.items():
        assert part.splits["train"] == round(fraction * split_cases.splits["train"])
        assert part.split("test") == split_cases.split("test")
        assert part.split("train") == split_cases.split("train").fraction(fraction, 4)  # as training takes it
    assert nested_fractions(split_cases, [1.0])[1.0] == split_cases


def test_nonsense_fractions_are_refused(split_cases: Manifest):
    with pytest.raises(ConfigError, match="No fraction"):
        nested_fractions(split_cases, ())
    with pytest.raises(ConfigError, match="share in"):
        nested_fractions(split_cases, (25.0,))
    with pytest.raises(DataError, match="no split 'training'"):
        nested_fractions(split_cases, split="training")
