from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.data.audit.case_facts import CaseFacts
from tmca.data.audit.fingerprint import Shift, effective_number, fingerprint
from tmca.data.manifest import Record


def _case(number: int, split: str, text: str | None = "one polyp", brightness: float = 100.0) -> tuple:
    record = Record(f"{split}-{number}", f"images/scan{number}.png", "m.png", text, split, patient_id=f"P{number}")
    facts = CaseFacts(
        image_size=(64, 96),
        brightness=brightness,
        contrast=20.0,
        darkest=int(brightness) - 50,
        brightest=int(brightness) + 50,
        foreground=0.25 * (number % 2),
    )
    return record, facts


def _fingerprint(cases: list[tuple], **values):
    return fingerprint([record for record, _ in cases], [facts for _, facts in cases], **values)


def test_facts_of_a_split():
    cases = [_case(number, "train", ("one polyp", "two polyps")[number % 2]) for number in range(4)]
    cases += [_case(0, "test", "one polyp"), _case(1, "test", "three large polyps"), _case(2, "test", None)]
    found = _fingerprint(cases, token_counts={"one polyp": 4, "two polyps": 5, "three large polyps": 6})
    assert (found.cases, found.distinct_sentences, list(found.splits)) == (7, 3, ["train", "test"])
    train, test = found.splits.values()
    assert (train.cases, train.patients, train.with_mask, train.with_text, train.empty_masks) == (4, 4, 4, 4, 2)
    assert (train.image_sizes, train.distinct_image_sizes) == ({"64 × 96": 4}, 1)
    assert (train.darkest, train.brightest) == (50, 150)
    assert train.foreground is not None
    assert (train.foreground.minimum, train.foreground.mean, train.foreground.maximum) == (0, 0.125, 0.25)
    assert (train.distinct_sentences, train.effective_sentences) == (2, 2.0)
    assert train.unseen_sentences is None
    assert (test.with_text, test.unseen_sentences) == (2, 0.5)
    assert test.words is not None
    assert (test.words.minimum, test.words.maximum) == (2, 3)
    assert test.tokens is not None
    assert test.tokens.mean == 5
    assert train.sources == {"scan": 4}


def test_what_is_not_there_is_none():
    record = Record("a", "a.png")
    found = fingerprint([record], [CaseFacts(image_error="missing")]).splits[""]
    assert (found.brightness, found.foreground, found.words, found.tokens, found.darkest) == (None,) * 5
    assert (found.cases, found.with_mask, found.with_text, found.image_sizes) == (1, 0, 0, {})
    assert fingerprint([], []).splits == {}


def test_shifts_are_measured_from_the_training_split():
    rng = np.random.default_rng(0)
    cases = [_case(number, "train", brightness=float(rng.normal(100, 10))) for number in range(200)]
    cases += [_case(number, "val", brightness=float(rng.normal(100, 10))) for number in range(200)]
    cases += [_case(number, "test", brightness=float(rng.normal(130, 10))) for number in range(200)]
    shifts = {(shift.split, shift.feature): shift for shift in _fingerprint(cases).shifts}
    assert shifts["val", "brightness"].distance < 0.2
    assert shifts["test", "brightness"].distance > 0.8
    assert shifts["test", "brightness"].effect == pytest.approx(3, abs=0.4)
    assert (shifts["test", "words"].distance, shifts["test", "words"].effect) == (0, None)
    assert ("test", "source") not in shifts


def test_small_splits_and_datasets_without_training_are_not_compared():
    cases = [_case(number, "train") for number in range(30)] + [_case(number, "test") for number in range(19)]
    assert _fingerprint(cases).shifts == ()
    assert _fingerprint([_case(number, split) for split in "ab" for number in range(30)]).shifts == ()


def test_rare_sources_are_put_together():
    cases = [_case(number, "train") for number in range(98)]
    for name in ("rare1", "odd2"):
        cases.append((dataclasses.replace(cases[0][0], id=name, image=f"{name}.png"), cases[0][1]))
    assert _fingerprint(cases).splits["train"].sources == {"scan": 98, "other": 2}


def _sources(names: list[tuple[str, str]]):
    records = [Record(str(number), f"images/{name}.png", split=split) for number, (name, split) in enumerate(names)]
    return fingerprint(records, [CaseFacts()] * len(records))


def _source_shifts(names: list[tuple[str, str]]) -> list[Shift]:
    return [shift for shift in _sources(names).shifts if shift.feature == "source"]


@pytest.mark.parametrize("pattern", ["{split}-{number}", "{split}{number}", "{split}_{number}_a", "{split}{number}b"])
@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("Train", "TEST"), ("tr", "ts"), ("train", "valid")])
def test_a_file_named_after_its_split_has_no_source_of_that_name(pattern: str, one: str, other: str):
    names = [(pattern.format(split=one, number=number), "train") for number in range(30)]
    names += [(pattern.format(split=other, number=number), "val") for number in range(30)]
    assert all(shift.distance == 0 for shift in _source_shifts(names))


def test_the_source_may_follow_the_split_in_the_name():
    names = [(f"train_{('covid', 'sub')[number % 2]}_{number}", "train") for number in range(60)]
    names += [(f"test_sub_{number}", "test") for number in range(30)]
    assert _sources(names).splits["train"].sources == {"covid": 30, "sub": 30}
    (shift,) = _source_shifts(names)
    assert shift.distance == 0.5
    assert shift.p_value < 0.001


def test_random_splits_of_many_sources_are_no_shift():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        names = [(f"{chr(97 + rng.integers(10)) * 3}_{n}", "train" if n < 200 else "val") for n in range(220)]
        alarms += any(shift.distance >= 0.3 and shift.p_value < 0.001 for shift in _source_shifts(names))
    assert alarms <= 1
    apart = [(f"{'ab'[number >= 200]}_{number}", "train" if number < 200 else "val") for number in range(220)]
    (shift,) = _source_shifts(apart)
    assert (shift.distance, shift.p_value < 0.001) == (1, True)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40))
def test_the_effective_number_lies_between_one_and_the_distinct(texts: list[str]):
    number = effective_number(texts)
    assert 1 - 1e-9 <= number <= len(set(texts)) + 1e-9
    assert effective_number(sorted(set(texts))) == pytest.approx(len(set(texts)))


def test_no_sentences_are_no_effective_sentence():
    assert effective_number([]) == 0
