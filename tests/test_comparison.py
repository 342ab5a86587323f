from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tmca.comparison import RESAMPLES, Comparison, apart_by_weights, compare, holm, signed_rank_p
from tmca.comparison_report import in_words, write_comparison
from tmca.config import to_dict
from tmca.errors import ConfigError, DataError
from tmca.evaluation import Evaluation
from tmca.evaluation.reading import ScoredRun, read_runs, read_scores
from tmca.evaluation.writing import case_table
from tmca.files import write_json, write_text
from tmca.metrics import Counts, bootstrap_intervals, pooled_scores
from tmca.presets import get_preset

RESULTS = Path(__file__).resolve().parents[1] / "results"
PIXELS = 100


def _counts(cases: Sequence[tuple[int, int, int]]) -> Counts:
    """Return the counts of cases given as true positive, false positive, false negative."""
    table = np.array(cases, dtype=np.int64).reshape(-1, 3)
    return Counts(*table.T, true_negative=PIXELS - table.sum(axis=1))


def _random(seed: int, cases: int = 30) -> Counts:
    """Return counts of cases whose masks have the same 40 pixels, whatever the seed."""
    rng = np.random.default_rng(seed)
    found = rng.integers(10, 41, cases)
    return _counts(list(zip(found.tolist(), rng.integers(0, 30, cases).tolist(), (40 - found).tolist(), strict=True)))


def _write(
    folder: Path,
    counts: Counts,
    *,
    patients: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    preset: str | None = "tiny",
    seed: int = 1,
    **fields: Any,
) -> Path:
    """Write the two files of an evaluation that a comparison reads, as an evaluation writes them."""
    ids = tuple(ids or [f"case-{number:02}" for number in range(len(counts))])
    evaluation = Evaluation(
        split="test",
        ids=ids,
        patients=tuple(patients or ids),
        texts={"right": tuple(f"one polyp & {name}" for name in ids)},
        counts={"right": counts},
        cases={"right": np.arange(len(ids))},
        threshold=fields.pop("threshold", 0.5),
        space=fields.pop("space", "network"),
        image_size=fields.pop("image_size", 64),
        empty_policy=fields.pop("empty_policy", "one"),
        mirrored=fields.pop("mirrored", False),
        models=fields.pop("models", 1),
    )
    experiment = None if preset is None else to_dict(replace(get_preset(preset), seed=seed))
    write_text(folder / "metrics.csv", case_table(evaluation))
    values = {"protocol": evaluation.protocol(), "split": "test", "data_hash": "a" * 64, "experiment": experiment}
    write_json(folder / "summary.json", values | fields)
    return folder


def _runs(tmp_path: Path, *counts: Counts, **fields: Any) -> list[ScoredRun]:
    return read_runs([_write(tmp_path / f"run-{number}", part, **fields) for number, part in enumerate(counts)])


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return compare(_runs(tmp_path, _random(1), _random(2), _random(3)))


@pytest.fixture(scope="module")
def recorded() -> list[ScoredRun]:
    """Entries of the ledger as they were written before they had a hash of their experiment."""
    names = ("kvasir-mobile", "kvasir-mobile-ariadne", "kvasir-mobile-image-only", "kvasir-mobile-seed2")
    return read_runs([RESULTS / f"{name}.json" for name in names])


# Statistics ------------------------------------------------------------------------------------------------------


def test_the_difference_is_the_run_minus_the_reference(tmp_path: Path):
    before = _counts([(10, 0, 0), (5, 5, 5), (0, 4, 8), (10, 10, 0)])  # Dice 1, 1/2, 0, 2/3
    after = _counts([(10, 0, 0), (6, 0, 4), (0, 0, 8), (5, 0, 5)])  # Dice 1, 3/4, 0, 2/3
    (pair,) = compare(_runs(tmp_path, before, after)).pairs
    assert (pair.reference, pair.run) == ("run-0", "run-1")
    np.testing.assert_allclose(pair.differences, [0, 0.25, 0, 0], atol=1e-12)
    np.testing.assert_allclose(pair.jaccard_differences, [0, 6 / 10 - 5 / 15, 0, 0], atol=1e-12)
    assert pair.pooled_dice_difference == pytest.approx(42 / 59 - 50 / 82)
    assert (pair.wins, pair.ties, pair.losses, pair.n) == (1, 3, 0, 4)
    assert pair.row()["mean_dice_difference"] == pytest.approx(0.0625)
    assert pair.row()["median_dice_difference"] == pytest.approx(0)
    assert pair.most_different(3) == [1]


def test_a_hair_is_a_tie(tmp_path: Path):
    before, after = _counts([(1000, 0, 0), (1000, 0, 0)]), _counts([(999, 0, 1), (990, 0, 10)])
    (pair,) = compare(_runs(tmp_path, before, after)).pairs
    assert pair.differences[0] == pytest.approx(-0.0005, abs=1e-5)
    assert (pair.wins, pair.ties, pair.losses) == (0, 1, 1)


def test_the_same_patients_are_drawn_for_both(tmp_path: Path):
    patients = [f"patient {number // 3}" for number in range(30)]
    first, second = _random(1), _random(2)
    (pair,) = compare(_runs(tmp_path, first, second, patients=patients), seed=4).pairs
    drawn = np.random.default_rng(4).integers(0, 10, size=(RESAMPLES, 10))
    # Sorted by name, patient 0 to 9 own the cases 0-2, 3-5, …
    cases = (3 * drawn[:, :, None] + np.arange(3)).reshape(RESAMPLES, 30)
    pooled = [pooled_scores(second.select(c))["dice"] - pooled_scores(first.select(c))["dice"] for c in cases]
    assert pair.pooled_dice_interval == pytest.approx(tuple(np.percentile(pooled, [2.5, 97.5])))
    means = pair.differences[cases].mean(axis=1)
    assert pair.mean_dice_interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_an_interval_of_paired_draws_is_narrower_than_the_scores_own(recorded: list[ScoredRun]):
    own = {run.name: np.ptp(bootstrap_intervals(run.counts)["pooled_dice"]) for run in recorded}
    for pair in compare(recorded).pairs:
        low, high = pair.pooled_dice_interval or (np.nan, np.nan)
        assert low < pair.pooled_dice_difference < high
        assert high - low < 0.9 * min(own[pair.run], own[pair.reference])


def test_p_equals_scipy_where_every_case_is_a_patient(recorded: list[ScoredRun]):
    for pair in compare(recorded).pairs:
        assert pair.p == pytest.approx(stats.wilcoxon(pair.differences).pvalue)


def test_cases_of_one_patient_are_one_observation(tmp_path: Path):
    first, second = _random(1), _random(2)
    (single,) = compare(_runs(tmp_path / "single", first, second)).pairs
    five = [Counts.concatenate([part] * 5) for part in (first, second)]
    patients = [f"case-{number:02}" for number in range(30)] * 5
    (repeated,) = compare(_runs(tmp_path / "repeated", *five, patients=patients)).pairs
    assert repeated.n == 5 * single.n
    assert repeated.p == pytest.approx(single.p)
    assert repeated.pooled_dice_interval == pytest.approx(single.pooled_dice_interval)
    (pretended,) = compare(_runs(tmp_path / "pretended", *five)).pairs
    assert pretended.p < single.p


@pytest.mark.parametrize("size", [1, 4, 30])
def test_equal_runs_do_not_differ(tmp_path: Path, size: int):
    (pair,) = compare(_runs(tmp_path, _random(1, size), _random(1, size))).pairs
    assert (pair.p, pair.p_holm) == (1, 1)
    assert (pair.wins, pair.ties, pair.losses) == (0, size, 0)
    assert pair.pooled_dice_interval == ((0, 0) if size > 1 else None)
    assert pair.most_different(5) == []


def test_a_difference_in_the_last_digit_is_none():
    assert signed_rank_p(np.array([1e-16, -2e-16, 0.0])) == 1
    assert signed_rank_p(np.array([0.1, 0.2, 0.3])) == pytest.approx(0.25)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_corrects_no_more_than_bonferroni(p_values: list[float]):
    corrected = holm(p_values)
    for raw, value in zip(p_values, corrected, strict=True):
        assert raw <= value <= min(1, len(p_values) * raw)
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)
    assert min(corrected) == min(1, len(p_values) * min(p_values))


def test_every_pair_is_compared_and_corrected_together(comparison: Comparison):
    named = [(pair.reference, pair.run) for pair in comparison.pairs]
    assert named == [("run-0", "run-1"), ("run-0", "run-2"), ("run-1", "run-2")]
    assert [pair.p_holm for pair in comparison.pairs] == holm([pair.p for pair in comparison.pairs])


def test_exchanging_two_runs_changes_the_sign_only(tmp_path: Path):
    runs = _runs(tmp_path, _random(1), _random(2))
    (there,), (back,) = compare(runs).pairs, compare(runs[::-1]).pairs
    np.testing.assert_allclose(there.differences, -back.differences)
    assert there.p == pytest.approx(back.p)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    low, high = there.pooled_dice_interval or (0, 0)
    assert back.pooled_dice_interval == pytest.approx((-high, -low))


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path):
    order = np.random.default_rng(0).permutation(30)
    plain = _write(tmp_path / "plain", _random(1))
    other = _write(tmp_path / "other", _random(2))
    turned = _write(tmp_path / "turned", _random(2).select(order), ids=[f"case-{number:02}" for number in order])
    (expected,), (got,) = compare(read_runs([plain, other])).pairs, compare(read_runs([plain, turned])).pairs
    np.testing.assert_array_equal(got.differences, expected.differences)


def test_the_most_different_cases_come_first(comparison: Comparison):
    dice = np.array([column.cases("dice") for column in comparison.columns])
    spread = dice.max(axis=0) - dice.min(axis=0)
    chosen = comparison.most_different(4)
    assert len(chosen) == 4
    assert spread[chosen].tolist() == sorted(spread, reverse=True)[:4]
    sizes = np.abs(comparison.pairs[0].differences)
    assert sizes[comparison.pairs[0].most_different(2)].tolist() == sorted(sizes, reverse=True)[:2]
    assert comparison.most_different(0) == comparison.most_different(-1) == []


def test_a_case_that_one_run_leaves_out_has_no_difference(tmp_path: Path):
    empty = _counts([(0, 0, 0), (5, 5, 5), (0, 0, 0), (9, 1, 0), (3, 3, 6)])
    wrong = _counts([(0, 7, 0), (6, 0, 4), (0, 0, 0), (8, 0, 1), (9, 0, 0)])
    (pair,) = compare(_runs(tmp_path / "skip", empty, wrong, empty_policy="skip")).pairs
    assert pair.n == 3
    np.testing.assert_array_equal(np.isnan(pair.differences), [True, False, True, False, False])
    (pair,) = compare(_runs(tmp_path / "one", empty, wrong, empty_policy="one")).pairs
    assert (pair.n, pair.differences[0]) == (5, -1)


def test_without_any_score_there_is_nothing_to_compare(tmp_path: Path):
    nothing = _counts([(0, 0, 0), (0, 0, 0)])
    with pytest.raises(DataError, match="No case has a score"):
        compare(_runs(tmp_path, nothing, nothing, empty_policy="skip"))


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message", "hint"),
    [
        ("split", "val", "split is test in the first, val in the second", "--split"),
        ("data_hash", "b" * 64, "data_hash is aaaaaaaaaaaa in the first, bbbbbbbbbbbb in the", "one manifest"),
        ("image_size", 32, "space is 64 in the first, 32 in the second", "--space original"),
        ("space", "original", "space is 64 in the first, original in the second", "--space original"),
        ("threshold", 0.3, "threshold is 0.5 in the first, 0.3 in the second", "--threshold"),
        ("empty_policy", "zero", "empty_policy is one in the first, zero in the second", "--empty-policy"),
    ],
)
def test_runs_that_were_scored_differently_are_refused(tmp_path: Path, field: str, value: Any, message: str, hint: str):
    first = _write(tmp_path / "first", _random(1))
    second = _write(tmp_path / "second", _random(2), **{field: value})
    with pytest.raises(DataError, match=f"first and second cannot be compared: {message}") as caught:
        compare(read_runs([first, second]))
    assert hint in caught.value.hint


def test_other_cases_are_refused(tmp_path: Path):
    first = _write(tmp_path / "first", _random(1))
    fewer = _write(tmp_path / "fewer", _random(2, cases=28))
    with pytest.raises(DataError, match=r"2 cases are in one of them only, e\.g\. case-28"):
        compare(read_runs([first, fewer]))
    counts = _random(2)
    masks = replace(counts, false_negative=counts.false_negative + 1, true_negative=counts.true_negative - 1)
    with pytest.raises(DataError, match=r"the pixels of the mask of 30 cases differ, e\.g\. case-00"):
        compare(read_runs([first, _write(tmp_path / "masks", masks)]))
    larger = replace(counts, true_negative=counts.true_negative + 1)
    with pytest.raises(DataError, match="the pixels of 30 cases differ"):
        compare(read_runs([first, _write(tmp_path / "larger", larger)]))
    patients = [f"case-{number:02}" for number in range(29)] + ["case-00"]
    with pytest.raises(DataError, match=r"the patient of 1 cases differ, e\.g\. case-29"):
        compare(read_runs([first, _write(tmp_path / "patients", _random(2), patients=patients)]))


@pytest.mark.parametrize("name", ["experiment.json", "config.json"])
def test_a_model_without_scores_is_told_how_to_get_them(tmp_path: Path, name: str):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("{}")
    (run / "metrics.csv").write_text("epoch,seconds\n1,2.0\n")  # a run's own table of epochs
    with pytest.raises(DataError, match="no scores of the split 'test'") as caught:
        read_scores(run)
    assert caught.value.hint == f"tmca evaluate -m {run} --data DATA --split test"
    _write(run / "evaluation-val", _random(1))
    with pytest.raises(DataError, match="'test'; it has evaluation-val"):
        read_scores(run)
    assert read_scores(run, "val").name == "run"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent is no run folder"),
        ("absent.json", r"There is no .*absent\.json"),
        ("folder", "folder is no run folder"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, message: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"protocol": {"pooled": {"dice": 1}}}'),
        ("metrics.csv", "id,patient_id,dice\na,a,1\n"),
        ("metrics.csv", "id,patient_id,text,true_positive,false_positive,false_negative,true_negative\n"),
        ("metrics.csv", "id,patient_id,text,true_positive,false_positive,false_negative,true_negative\na,a,,1,x,0,1\n"),
        ("metrics.csv", "id,patient_id,text,true_positive,false_positive,false_negative,true_negative\na,a,,1,2\n"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str):
    folder = _write(tmp_path / "run", _random(1))
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=name) as caught:
        read_scores(folder)
    assert "tmca evaluate" in caught.value.hint


def test_a_missing_table_is_named(tmp_path: Path):
    folder = _write(tmp_path / "run", _random(1))
    (folder / "metrics.csv").unlink()
    with pytest.raises(DataError, match=r"metrics\.csv holds no cases"):
        read_scores(folder)


def test_files_of_two_evaluations_are_refused(tmp_path: Path):
    first, second = _write(tmp_path / "first", _random(1)), _write(tmp_path / "second", _random(2))
    (first / "metrics.csv").write_text((second / "metrics.csv").read_text("utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match="not of one evaluation"):
        read_scores(first)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="version 99") as caught:
        read_scores(_write(tmp_path / "run", _random(1), schema_version=99))
    assert "update" in caught.value.hint


def test_two_runs_are_needed(tmp_path: Path):
    run = _write(tmp_path / "run", _random(1))
    for sources in ([], [run]):
        with pytest.raises(ConfigError, match="expected two or more"):
            read_runs(sources)
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([run, tmp_path / "run" / ".." / "run"])


# Names and seeds -------------------------------------------------------------------------------------------------


def test_runs_are_called_by_their_folder_or_entry(tmp_path: Path):
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "experiment.json").write_text("{}")
    _write(trained / "evaluation-test", _random(1))
    for place in (trained, trained / "evaluation-test", trained / "evaluation-test" / "summary.json"):
        assert read_scores(place).name == "trained"
    assert read_scores(_write(tmp_path / "scores", _random(1))).name == "scores"
    assert read_scores(RESULTS / "kvasir-mobile.json").name == "kvasir-mobile"


def test_equal_names_are_told_apart(tmp_path: Path):
    first, second = _write(tmp_path / "a" / "run", _random(1)), _write(tmp_path / "b" / "run", _random(2))
    assert [run.name for run in read_runs([first, second])] == [str(first), str(second)]


def test_seeds_of_one_experiment_are_averaged(tmp_path: Path):
    folders = [_write(tmp_path / f"seed-{seed}", _random(seed), seed=seed) for seed in (1, 2)]
    folders.append(_write(tmp_path / "other", _random(3), preset="image-only"))
    runs = read_runs(folders)
    comparison = compare(runs, group_seeds=True)
    both, other = comparison.columns
    assert (both.name, other.name) == ("tiny (2 seeds)", "other")
    assert (both.seeds, other.seeds) == ([1, 2], [1])
    dice = np.array([run.case_scores["dice"] for run in runs])
    (pair,) = comparison.pairs
    np.testing.assert_allclose(pair.differences, dice[2] - dice[:2].mean(axis=0))
    pooled = [pooled_scores(run.counts)["dice"] for run in runs]
    assert pair.pooled_dice_difference == pytest.approx(pooled[2] - (pooled[0] + pooled[1]) / 2)
    low, high = pair.pooled_dice_interval or (0, 0)
    assert low < pair.pooled_dice_difference < high
    assert both.pooled("dice") == pytest.approx(np.mean(pooled[:2]))
    assert both.pooled_by_seed("dice") == pytest.approx(pooled[:2])
    assert len(compare(runs).columns) == 3


def test_the_average_is_called_as_its_runs_are(tmp_path: Path):
    names = ("large-seed1", "large-seed2", "small", "small-seed2")
    presets = ("tiny", "tiny", "image-only", "image-only")
    folders = [
        _write(tmp_path / name, _random(number), seed=number % 2, preset=preset)
        for number, (name, preset) in enumerate(zip(names, presets, strict=True))
    ]
    comparison = compare(read_runs(folders), group_seeds=True)
    assert [column.name for column in comparison.columns] == ["large (2 seeds)", "small (2 seeds)"]


def test_runs_apart_by_the_name_of_their_weights_are_told(tmp_path: Path):
    folders = [_write(tmp_path / f"seed-{seed}", _random(seed), seed=seed) for seed in (1, 2, 3)]
    path = folders[2] / "summary.json"
    values = json.loads(path.read_text("utf-8"))
    values["experiment"]["model"]["image_encoder"]["weights"] = "my/folder"
    write_json(path, values)
    assert apart_by_weights(compare(read_runs(folders), group_seeds=True).columns) == []  # the others start at random
    for folder in folders[:2]:
        values = json.loads((folder / "summary.json").read_text("utf-8"))
        values["experiment"]["model"]["image_encoder"]["weights"] = "the/hub"
        write_json(folder / "summary.json", values)
    comparison = compare(read_runs(folders), group_seeds=True)
    (note,) = apart_by_weights(comparison.columns)
    assert note.startswith("tiny (2 seeds) and seed-3 are the same but for the name of their pretrained weights")
    assert str(path) in note
    assert apart_by_weights(comparison.columns[:1]) == []


def test_a_seed_that_leaves_a_case_out_does_not_hide_the_others(tmp_path: Path):
    right, wrong, nothing = (10, 0, 0), (0, 10, 0), (0, 0, 0)
    folders = [
        _write(tmp_path / "seed-1", _counts([right, wrong, nothing, nothing]), seed=1, empty_policy="skip"),
        _write(tmp_path / "seed-2", _counts([right, nothing, wrong, nothing]), seed=2, empty_policy="skip"),
        _write(tmp_path / "other", _counts([right, wrong, wrong, wrong]), preset="image-only", empty_policy="skip"),
    ]
    comparison = compare(read_runs(folders), group_seeds=True)
    np.testing.assert_array_equal(comparison.columns[0].cases("dice"), [1, 0, 0, np.nan])
    assert comparison.pairs[0].n == 3


def test_averaged_runs_are_no_seeds_of_single_ones(tmp_path: Path):
    folders = [_write(tmp_path / f"seed-{seed}", _random(seed), seed=seed) for seed in (1, 2)]
    folders.append(_write(tmp_path / "flipped", _random(3), seed=3, mirrored=True))
    folders.append(_write(tmp_path / "several", _random(4), seed=1, mirrored=True, models=2))
    comparison = compare(read_runs(folders), group_seeds=True)
    names = [column.name for column in comparison.columns]
    assert names == ["tiny (2 seeds)", "flipped (mirrored)", "several (2 models, mirrored)"]


def test_runs_on_other_training_data_and_averages_of_models_are_no_seeds(tmp_path: Path):
    whole, half = "a" * 64, "b" * 64
    folders = [
        _write(tmp_path / "first", _random(1), seed=1, train_data_hash=whole),
        _write(tmp_path / "second", _random(2), seed=2),  # an older file, which does not tell: trained as it was scored
        _write(tmp_path / "half", _random(3), seed=3, train_data_hash=half),
        _write(tmp_path / "half-again", _random(4), seed=1, train_data_hash=half),
        _write(tmp_path / "pair", _random(5), seed=1, models=2),
        _write(tmp_path / "other-pair", _random(6), seed=2, models=2),
    ]
    comparison = compare(read_runs(folders), group_seeds=True)
    assert [[str(run.sources[0].parent.name) for run in column.runs] for column in comparison.columns] == [
        ["first", "second"],
        ["half", "half-again"],
        ["pair"],
        ["other-pair"],
    ]
    assert len({column.name for column in comparison.columns}) == 4


def test_a_run_may_be_called_as_a_column_is(tmp_path: Path):
    comparison = compare(read_runs([_write(tmp_path / "text", _random(1)), _write(tmp_path / "other", _random(2))]))
    write_comparison(comparison, tmp_path / "written")
    with (tmp_path / "written" / "cases.csv").open(encoding="utf-8", newline="") as stream:
        first = next(csv.DictReader(stream))
    assert first["text"] == "one polyp & case-00"
    assert float(first["dice_text"]) == pytest.approx(comparison.columns[0].cases("dice")[0], abs=1e-5)


def test_entries_of_the_ledger_without_a_hash_are_grouped(recorded: list[ScoredRun]):
    comparison = compare(recorded, group_seeds=True)
    assert [column.name for column in comparison.columns] == [
        "kvasir-mobile (2 seeds)",
        "kvasir-mobile-ariadne",
        "kvasir-mobile-image-only",
    ]


def test_seeds_that_cannot_be_grouped_are_refused(tmp_path: Path):
    first = _write(tmp_path / "first", _random(1))
    same = _write(tmp_path / "same", _random(2))
    with pytest.raises(DataError, match="first and same hold a seed of one experiment twice"):
        compare(read_runs([first, same]), group_seeds=True)
    old = _write(tmp_path / "old", _random(2), preset=None)
    with pytest.raises(DataError, match="does not tell with what the run was trained"):
        compare(read_runs([first, old]), group_seeds=True)
    assert compare(read_runs([first, old])).columns[1].seeds == [None]
    strange = _write(tmp_path / "strange", _random(2), experiment={"colour": "red"})
    with pytest.raises(DataError, match="colour"):
        compare(read_runs([first, strange]), group_seeds=True)
    second = _write(tmp_path / "second", _random(2), seed=2)
    with pytest.raises(DataError, match="nothing is left to compare"):
        compare(read_runs([first, second]), group_seeds=True)


# Folds -----------------------------------------------------------------------------------------------------------


def _fold(folder: Path, number: int, counts: Counts, **fields: Any) -> Path:
    ids = [f"fold{number}-case-{case}" for case in range(len(counts))]
    return _write(
        folder / f"{fields.get('preset', 'tiny')}-{number}-{fields.get('seed', 1)}",
        counts,
        ids=ids,
        data_hash=str(number) * 64,
        **fields,
    )


def test_folds_are_joined_and_compared_over_all_cases(tmp_path: Path):
    ours, theirs = ([_random(seed + method, 10) for seed in (1, 2, 3)] for method in (0, 10))
    folders = [_fold(tmp_path, number, counts) for number, counts in enumerate(ours)]
    others = [_fold(tmp_path, number, counts, preset="image-only") for number, counts in enumerate(theirs)]
    comparison = compare(read_runs([*folders, *reversed(others)]), join_folds=True)
    assert [column.name for column in comparison.columns] == ["tiny (3 folds)", "image-only (3 folds)"]
    assert comparison.n_patients == 30
    assert [len(column.sources) for column in comparison.columns] == [3, 3]
    pooled = [pooled_scores(Counts.concatenate(counts))["dice"] for counts in (ours, theirs)]
    (pair,) = comparison.pairs
    assert [column.pooled("dice") for column in comparison.columns] == pytest.approx(pooled)
    assert pair.pooled_dice_difference == pytest.approx(pooled[1] - pooled[0])
    assert pair.n == 30
    assert "30 cases of 3 folds" in in_words(comparison)


def test_seeds_of_joined_folds_are_averaged_or_named(tmp_path: Path):
    folders = [_fold(tmp_path, number, _random(number + seed, 10), seed=seed) for seed in (1, 2) for number in (1, 2)]
    others = [_fold(tmp_path, number, _random(number, 10), preset="image-only") for number in (1, 2)]
    runs = read_runs([*folders, *others])
    names = [column.name for column in compare(runs, join_folds=True).columns]
    assert names == ["tiny (2 folds, seed 1)", "tiny (2 folds, seed 2)", "image-only (2 folds)"]
    first, _ = compare(runs, join_folds=True, group_seeds=True).columns
    assert (first.name, first.seeds) == ("tiny (2 seeds, 2 folds)", [1, 2])
    assert len(first.sources) == 4


def test_runs_that_are_no_folds_of_one_dataset_are_refused(tmp_path: Path):
    first, second = (_fold(tmp_path, number, _random(number, 10)) for number in (1, 2))
    other = _fold(tmp_path, 1, _random(3, 10), preset="image-only")
    with pytest.raises(DataError, match="Of image-only-1-1 no run is on the data of tiny-2-1"):
        compare(read_runs([first, second, other]), join_folds=True)
    with pytest.raises(DataError, match="All runs are folds or seeds of tiny"):
        compare(read_runs([first, second]), join_folds=True)
    again = _write(tmp_path / "again", _random(1, 10), ids=["fold1-case-3", *"abcdefghi"], data_hash="3" * 64)
    with pytest.raises(DataError, match=r"1 cases were scored more than once, e\.g\. fold1-case-3") as caught:
        compare(read_runs([first, again]), join_folds=True)
    assert "tmca data split --folds" in (caught.value.hint or "")
    strict = _fold(tmp_path, 4, _random(4, 10), threshold=0.7)
    with pytest.raises(DataError, match=r"no folds of one dataset: threshold 0\.5, 0\.7"):
        compare(read_runs([first, strict]), join_folds=True)
    leaking = _fold(tmp_path, 6, _random(4, 10), train_data_hash="1" * 64)
    with pytest.raises(DataError, match="trained on other data than it was scored on"):
        compare(read_runs([first, leaking]), join_folds=True)
    old = _fold(tmp_path, 5, _random(4, 10), preset=None)
    with pytest.raises(DataError, match="does not tell with what the run was trained"):
        compare(read_runs([first, old]), join_folds=True)
