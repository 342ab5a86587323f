from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmca.calibration import Calibration
from tmca.config import Experiment, config_hash, from_dict
from tmca.data.manifest import Manifest, Record
from tmca.data.opposites import contradict
from tmca.errors import CheckpointError, ConfigError, DataError, StorageError
from tmca.evaluation import Evaluation, evaluate, pixel_size, score_masks, sentence_variants, shuffled
from tmca.evaluation.writing import case_table, write_evaluation, write_ledger
from tmca.files import sha256_of
from tmca.imaging.raster import read_mask, write_image, write_mask
from tmca.inference import Predictor
from tmca.metrics import OVERLAPS, SCORES
from tmca.models import TMCA
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, change
from tmca.runs import score_run
from tmca.training import fit, note_end
from tmca.types import ModelOutput

SIZE = 64
HALF = SIZE * SIZE // 2


def _half(side: str) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    {"left": mask[:, :32], "right": mask[:, 32:], "top": mask[:32], "nothing": mask[:0]}[side][:] = True
    return mask


def _manifest(folder: Path, cases: Sequence[tuple[str, np.ndarray, str]]) -> Manifest:
    """Write cases of (sentence, mask, patient); the images do not matter to the stub."""
    records = []
    for number, (text, mask, patient) in enumerate(cases):
        name = f"case-{number}"
        write_image(folder / f"{name}.png", np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), np.uint8))
        write_mask(folder / f"{name}-mask.png", mask)
        record = Record(name, f"{name}.png", f"{name}-mask.png", text or None, "test", patient_id=patient)
        records.append(record)
    manifest = Manifest(folder, tuple(records), "halves")
    manifest.write(folder / "manifest.csv")
    return manifest


@pytest.fixture
def halves(tmp_path: Path) -> Manifest:
    """Right, right, nothing to find, and half right."""
    cases = [
        ("lesion, left", _half("left"), "p1"),
        ("lesion, right", _half("right"), "p2"),
        ("lesion", _half("nothing"), "p3"),
        ("lesion, left", _half("top"), "p3"),
    ]
    return _manifest(tmp_path / "halves", cases)


@pytest.fixture
def stub(tiny_model: Callable[..., TMCA]) -> TMCA:
    """A model that marks the half that the sentence names, with a probability of 0.6, and else nothing."""
    model = tiny_model()

    def segment(images: torch.Tensor, texts: Sequence[str | None] | None) -> ModelOutput:
        logits = torch.full((len(images), 1, SIZE, SIZE), -5.0)
        for row, text in enumerate(texts or ()):
            for side in ("left", "right"):
                if text and side in text:
                    logits[row, 0][torch.from_numpy(_half(side))] = float(np.log(0.6 / 0.4))
        return ModelOutput(logits, {}, torch.ones(len(images), dtype=torch.bool))

    vars(model).update(encode_image=lambda images: images, encode_text=list, segment=segment)
    return model


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    tiny_model().save_pretrained(folder)
    return folder


# Counts ----------------------------------------------------------------------------------------------------------


def test_counts_by_hand(stub: TMCA, halves: Manifest):
    evaluation = evaluate(stub, halves)
    quarter = HALF // 2
    counts = evaluation.counts["right"]
    np.testing.assert_array_equal(counts.true_positive, [HALF, HALF, 0, quarter])
    np.testing.assert_array_equal(counts.false_positive, [0, 0, 0, quarter])
    np.testing.assert_array_equal(counts.false_negative, [0, 0, 0, quarter])
    np.testing.assert_array_equal(counts.true_negative, [HALF, HALF, 2 * HALF, quarter])
    assert evaluation.ids == ("case-0", "case-1", "case-2", "case-3")
    assert evaluation.patients == ("p1", "p2", "p3", "p3")
    pooled = {"dice": 5 / 6, "jaccard": 5 / 7, "precision": 5 / 6, "recall": 5 / 6, "accuracy": 7 / 8}
    assert evaluation.pooled() == pytest.approx(pooled)
    each = dict.fromkeys(("dice", "precision", "recall"), 3.5 / 4)
    assert evaluation.per_case() == pytest.approx(each | {"jaccard": (3 + 1 / 3) / 4, "accuracy": 7 / 8})
    assert evaluation.by_dice() == [3, 0, 1, 2]


@pytest.mark.parametrize(("policy", "mean"), [("one", 3.5 / 4), ("zero", 2.5 / 4), ("skip", 2.5 / 3)])
def test_the_policy_decides_what_an_empty_case_is_worth(stub: TMCA, halves: Manifest, policy: Any, mean: float):
    evaluation = evaluate(stub, halves, empty_policy=policy)
    assert evaluation.per_case()["dice"] == pytest.approx(mean)
    assert evaluation.pooled()["dice"] == pytest.approx(5 / 6)
    protocol = evaluation.protocol()["per_case_mean"]
    assert (protocol["empty_policy"], protocol["n_empty"]) == (policy, 1)


def test_a_threshold_above_the_probability_finds_nothing(stub: TMCA, halves: Manifest):
    assert evaluate(stub, halves, threshold=0.59).pooled()["dice"] == pytest.approx(5 / 6)
    assert evaluate(stub, halves, threshold=0.61).pooled()["dice"] == 0


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 7.0, float("nan")])
def test_an_impossible_threshold_is_refused(stub: TMCA, halves: Manifest, threshold: float):
    with pytest.raises(ConfigError, match="threshold"):
        evaluate(stub, halves, threshold=threshold)


def test_wrong_sentences_are_scored_on_the_same_cases(stub: TMCA, halves: Manifest):
    evaluation = evaluate(stub, halves)
    assert list(evaluation.counts) == ["right", "shuffled", "contradictory", "none"]
    ablation = evaluation.text_ablation()
    assert list(ablation) == ["shuffled", "contradictory", "none"]
    # Each marks the other half: nothing is right in the first two, and again a half in the last.
    assert evaluation.cases["contradictory"].tolist() == [0, 1, 3]
    assert ablation["contradictory"]["n"] == 3
    assert ablation["contradictory"]["per_case_mean"]["dice"] == pytest.approx(0.5 / 3)
    assert ablation["none"]["n"] == 4
    assert ablation["none"]["pooled"]["dice"] == 0
    assert ablation["none"]["per_case_mean"]["dice"] == pytest.approx(1 / 4)


def test_an_image_only_model_has_one_variant(tiny_model: Callable[..., TMCA], phantoms: Manifest):
    model = tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    silent = phantoms.with_records(replace(record, text=None) for record in phantoms.records)
    evaluation = evaluate(model, silent)
    assert list(evaluation.counts) == ["right"]
    assert evaluation.text_ablation() == {}
    assert len(evaluation.counts["right"]) == 8


# Sentences -------------------------------------------------------------------------------------------------------


def test_every_image_gets_another_sentence():
    texts = ["a", "a", "b", "c", "a", "b"]
    for seed in range(50):
        given = shuffled(texts, seed)
        assert all(new != own and new in texts for new, own in zip(given, texts, strict=True))
        assert given == shuffled(texts, seed)
    assert len({shuffled(texts, seed) for seed in range(50)}) > 10


@given(texts=st.lists(st.none() | st.sampled_from("abcd"), max_size=30), seed=st.integers(0, 5))
def test_other_sentences_are_drawn_as_from_the_list_of_all_others(texts: list[str | None], seed: int):
    """As recorded scores were drawn."""
    rng = np.random.default_rng(seed)
    expected: list[str | None] = []
    for text in texts:
        others = [other for other in texts if other and other != text]
        expected.append(others[int(rng.integers(len(others)))] if text and others else None)
    assert shuffled(texts, seed) == tuple(expected)


def test_other_sentences_are_found_in_linear_time():
    texts = [f"lesion {number % 1000}" for number in range(100_000)]
    started = time.monotonic()
    given = shuffled(texts, 0)
    assert all(other != text for other, text in zip(given, texts, strict=True))
    assert time.monotonic() - started < 30  # comparing each with each takes minutes


def test_there_may_be_no_other_sentence():
    assert shuffled(["a", "a"], 0) == (None, None)
    assert shuffled(["a", None, "b"], 0) == ("b", None, "a")
    assert shuffled([], 0) == ()


def test_the_variants_of_a_sentence():
    texts = ["one polyp, located in left of the image", "two polyp, located in top of the image", "polyp", None]
    variants = sentence_variants(texts, 0)
    assert variants["right"] == tuple(texts)
    assert variants["none"] == (None,) * 4
    assert variants["contradictory"] == (contradict(texts[0] or ""), contradict(texts[1] or ""), None, None)
    assert variants["shuffled"][3] is None


def test_the_seed_decides_the_sentences(stub: TMCA, phantoms: Manifest):
    first, same, other = (evaluate(stub, phantoms, seed=seed).texts["shuffled"] for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_cut_sentences_are_listed(tiny_model: Callable[..., TMCA], phantoms: Manifest):
    long = "lesion " * 40
    first, *others = phantoms.split("test").records
    manifest = phantoms.with_records([replace(first, text=long), *others])
    model = tiny_model(sentences=phantoms.sentences)
    assert evaluate(model, manifest).over_limit == (long,)
    assert evaluate(model, phantoms).over_limit == ()


# A real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(phantoms: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Phantoms of other sizes and aspect ratios than the network's."""
    root = tmp_path_factory.mktemp("odd")
    records = []
    for record, size in zip(phantoms.split("test").records, [(90, 41), (64, 64), (33, 200)], strict=False):
        for name in (record.image, str(record.mask)):
            (root / name).parent.mkdir(exist_ok=True)
            Image.open(phantoms.root / name).resize(size, Image.Resampling.NEAREST).save(root / name)
        records.append(record)
    return Manifest(root, tuple(records), "odd")


def _middle(predictor: Predictor, manifest: Manifest) -> float:
    """A threshold that an untrained model's probabilities lie on both sides of."""
    predictor.set_image(manifest.image_path(manifest.records[0]))
    return float(np.median(predictor.probability(manifest.records[0].text)))


def test_at_the_original_size_the_counts_are_those_of_the_predictor(tiny_model: Callable[..., TMCA], odd: Manifest):
    predictor = Predictor(tiny_model(), "cpu", precision="32")
    threshold = _middle(predictor, odd)
    evaluation = evaluate(predictor.model, odd, threshold=threshold, space="original", batch_size=1)
    assert evaluation.protocol()["space"] == "original"
    for variant in ("right", "shuffled", "none"):
        for case, record in enumerate(odd.records):
            predictor.set_image(odd.image_path(record))
            predicted = predictor.predict(evaluation.texts[variant][case], threshold=threshold)
            truth = read_mask(odd.root / str(record.mask))
            counts = evaluation.counts[variant]
            assert counts.true_positive[case] == (predicted & truth).sum()
            assert counts.false_positive[case] == (predicted & ~truth).sum()
            assert counts.false_negative[case] == (~predicted & truth).sum()
            assert counts.true_negative[case] == (~predicted & ~truth).sum()
    assert evaluation.counts["right"].true_positive.sum() > 0


def test_at_the_network_size_every_image_has_as_many_pixels(tiny_model: Callable[..., TMCA], odd: Manifest):
    evaluation = evaluate(tiny_model(), odd)
    assert evaluation.protocol()["space"] == "64"
    counts = evaluation.counts["right"]
    total = counts.true_positive + counts.false_positive + counts.false_negative + counts.true_negative
    np.testing.assert_array_equal(total, [64 * 64] * 3)


@pytest.mark.parametrize("space", ["network", "original"])
def test_the_batch_size_does_not_change_the_scores(tiny_model: Callable[..., TMCA], phantoms: Manifest, space: Any):
    model = tiny_model()
    threshold = _middle(Predictor(model, "cpu"), phantoms)
    one, three, many = (
        evaluate(model, phantoms, threshold=threshold, space=space, batch_size=size) for size in (1, 3, 100)
    )
    for other in (three, many):
        assert other.texts == one.texts
        for variant, counts in one.counts.items():
            for name in ("true_positive", "false_positive", "false_negative", "true_negative"):
                # A probability within rounding of the threshold may fall on either side.
                difference = getattr(other.counts[variant], name) - getattr(counts, name)
                assert np.abs(difference).max() <= 2, (variant, name)


def test_a_model_can_be_trained_on_after_it_was_scored(tiny_model: Callable[..., TMCA], phantoms: Manifest):
    model = tiny_model()
    first = evaluate(model, phantoms)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), tiny_model().parameters(), strict=True))
    output = model.segment(model.encode_image(torch.randn(2, 3, 64, 64)), model.encode_text(["a", "b"]))
    output.mask_logits.sum().backward()
    second = evaluate(model, phantoms)
    np.testing.assert_array_equal(first.counts["right"].true_positive, second.counts["right"].true_positive)


def test_an_empty_split_lists_the_splits(stub: TMCA, phantoms: Manifest):
    with pytest.raises(DataError, match=r"no split 'holdout'; it has train \(16\), val \(6\), test \(8\)"):
        evaluate(stub, phantoms, "holdout")


def test_missing_sentences_are_refused_when_they_guide(stub: TMCA, phantoms: Manifest):
    first, *others = phantoms.split("test").records
    with pytest.raises(DataError, match=f"no sentence: {first.id}"):
        evaluate(stub, phantoms.with_records([replace(first, text=None), *others]))


def test_a_model_without_its_experiment_is_refused(stub: TMCA, phantoms: Manifest):
    stub.experiment = None
    with pytest.raises(ConfigError, match="from_pretrained"):
        evaluate(stub, phantoms)


# Outlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path) -> Manifest:
    """The left half, a quarter less of it, nothing to find, and something that the stub does not find."""
    less = _half("left")
    less[:, 26:32] = False
    cases = [
        ("lesion, left", _half("left"), ""),
        ("lesion, left", less, ""),
        ("lesion", _half("nothing"), ""),
        ("lesion", less, ""),
    ]
    return _manifest(tmp_path / "moved", cases)


def test_distances_are_measured_on_demand(stub: TMCA, moved: Manifest):
    assert evaluate(stub, moved).surface is None
    evaluation = evaluate(stub, moved, surface_tolerance=2.0, batch_size=3)
    assert evaluation.surface is not None
    np.testing.assert_array_equal(evaluation.surface.hd95, [0, 6, np.nan, np.nan])
    surface_dice = evaluation.surface.surface_dice
    np.testing.assert_array_equal(surface_dice[[0, 2, 3]], [1, np.nan, 0])
    assert 0.5 < surface_dice[1] < 0.8
    summary = evaluation.protocol()["surface"]
    assert (summary["hd95"], summary["n_hd95"], summary["unit"], summary["tolerance"]) == (3, 2, "pixels", 2)
    assert (summary["surface_dice"], summary["n_surface_dice"]) == (pytest.approx((2 + surface_dice[1]) / 4), 4)
    within = evaluate(stub, moved, surface_tolerance=6.0).surface
    assert within is not None
    assert within.surface_dice[1] == 1


def test_distances_are_in_millimetres_where_every_pixel_is_measured(stub: TMCA, moved: Manifest):
    measured = moved.with_records(replace(record, spacing="3,0.5") for record in moved.records)
    original = evaluate(stub, measured, space="original", surface_tolerance=3.0)
    assert original.surface is not None
    np.testing.assert_array_equal(original.surface.hd95[:2], [0, 3])
    assert (original.surface.unit, original.surface.surface_dice[1]) == ("mm", 1)
    first, *others = measured.records
    in_part = moved.with_records([replace(first, spacing=""), *others])
    for evaluation in (
        evaluate(stub, measured, surface_tolerance=2.0),
        evaluate(stub, in_part, space="original", surface_tolerance=2.0),
    ):
        assert evaluation.surface is not None
        assert (evaluation.surface.unit, evaluation.surface.hd95[1]) == ("pixels", 6)


@pytest.mark.parametrize("spacing", ["0.7", "a,b", "0,1", "1,-1", "nan,1", "inf,1", "1,1,1"])
def test_an_impossible_spacing_is_refused(spacing: str):
    assert pixel_size(Record("a", "a.png")) is None
    assert pixel_size(Record("a", "a.png", spacing="0.7, 1.5")) == (0.7, 1.5)
    with pytest.raises(DataError, match="Case 'a' has the spacing"):
        pixel_size(Record("a", "a.png", spacing=spacing))


def test_an_impossible_tolerance_is_refused_before_any_work(stub: TMCA, moved: Manifest):
    with pytest.raises(ConfigError, match="tolerance"):
        evaluate(stub, moved, surface_tolerance=-1.0)


def test_the_files_tell_how_distances_were_measured(stub: TMCA, moved: Manifest, model_folder: Path, tmp_path: Path):
    evaluation = evaluate(stub, moved, surface_tolerance=2.0, empty_policy="skip")
    write_evaluation(evaluation, model_folder, moved, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    surface = summary["protocol"]["surface"]
    assert set(surface) == {"hd95", "n_hd95", "surface_dice", "n_surface_dice", "tolerance", "unit"}
    assert (surface["n_hd95"], surface["n_surface_dice"]) == (2, 3)
    with (tmp_path / "out" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["hd95"] for row in rows] == ["0.000000", "6.000000", "", ""]
    assert [row["surface_dice"] for row in rows][2:] == ["", "0.000000"]
    assert {(row["tolerance"], row["unit"]) for row in rows} == {("2.0", "pixels")}


# Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(stub: TMCA, halves: Manifest, model_folder: Path, tmp_path: Path) -> Path:
    write_evaluation(evaluate(stub, halves), model_folder, halves, tmp_path / "out")
    return tmp_path / "out"


def test_the_table_has_a_row_a_case(written: Path):
    with (written / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("id", "patient_id", "dice", "jaccard", "precision", "recall", "accuracy"),
        *("true_positive", "false_positive", "false_negative", "true_negative"),
        *("dice_shuffled", "dice_contradictory", "dice_none"),
        *("threshold", "space", "empty_policy", "text"),
    ]
    assert {(row["threshold"], row["space"], row["empty_policy"]) for row in rows} == {("0.5", "64", "one")}
    assert [row["id"] for row in rows] == ["case-0", "case-1", "case-2", "case-3"]
    assert [float(row["dice"]) for row in rows] == [1, 1, 1, 0.5]
    assert [row["dice_contradictory"] for row in rows] == ["0.000000", "0.000000", "", "0.500000"]
    assert [row["text"] for row in rows] == ["lesion, left", "lesion, right", "lesion", "lesion, left"]
    assert [int(row["true_positive"]) for row in rows] == [HALF, HALF, 0, HALF // 2]


def test_the_summary_has_the_keys_of_nnunet_and_the_protocol(written: Path, halves: Manifest, model_folder: Path):
    summary = json.loads((written / "summary.json").read_text("utf-8"))
    assert {"metric_per_case", "mean", "foreground_mean", "protocol"} <= set(summary)
    names = {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"}
    assert set(summary["foreground_mean"]) == set(summary["mean"]["1"]) == names
    assert len(summary["metric_per_case"]) == 4
    last = summary["metric_per_case"][3]
    assert {"reference_file", "prediction_file", "metrics"} <= set(last)
    assert last["reference_file"] == "case-3-mask.png"
    quarter = HALF // 2
    expected = {"Dice": 0.5, "IoU": 1 / 3, "TP": quarter, "FP": quarter, "FN": quarter, "TN": quarter}
    assert last["metrics"]["1"] == pytest.approx(expected | {"n_pred": HALF, "n_ref": HALF})
    assert summary["foreground_mean"]["Dice"] == pytest.approx(3.5 / 4)

    protocol = summary["protocol"]
    meaning = {"threshold", "space", "mirrored", "models", "temperatures"}
    assert set(protocol) == {"pooled", "per_case_mean", "ci95", "surface"} | meaning
    assert set(protocol["pooled"]) == set(SCORES)
    assert set(protocol["per_case_mean"]) == {*SCORES, "empty_policy", "n_empty"}
    assert set(protocol["ci95"]) == {f"{kind}_{name}" for kind in ("pooled", "per_case") for name in OVERLAPS}
    assert protocol["surface"] is None
    low, high = protocol["ci95"]["pooled_dice"]
    assert low <= protocol["pooled"]["dice"] <= high
    assert (protocol["threshold"], protocol["space"]) == (0.5, "64")
    assert (summary["split"], summary["n"]) == ("test", 4)
    assert (summary["preset"], summary["seed"]) == ("tiny", 1)
    assert summary["config_hash"] == config_hash(from_dict(Experiment, summary["experiment"]))
    assert summary["data_hash"] == halves.content_hash()
    assert summary["model_sha256"] == sha256_of(model_folder / "model.safetensors")


def test_the_summary_is_json_when_empty_cases_are_left_out(
    stub: TMCA, halves: Manifest, model_folder: Path, tmp_path: Path
):
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    write_evaluation(evaluate(stub, halves, empty_policy="skip"), model_folder, halves, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"), parse_constant=refuse)
    assert summary["foreground_mean"]["Dice"] == pytest.approx(2.5 / 3)
    assert summary["metric_per_case"][2]["metrics"]["1"]["Dice"] is None
    with (tmp_path / "out" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        blank = list(csv.DictReader(stream))[2]
    assert [blank[name] for name in OVERLAPS] == [""] * 4


def test_a_split_of_empty_cases_can_be_written(stub: TMCA, model_folder: Path, tmp_path: Path):
    empty = _manifest(tmp_path / "empty", [("lesion", _half("nothing"), ""), ("lesion two", _half("nothing"), "")])
    for policy in ("one", "skip"):
        evaluation = evaluate(stub, empty, empty_policy=policy)
        assert evaluation.pooled()["dice"] == 1
        write_evaluation(evaluation, model_folder, empty, tmp_path / policy)
        assert (tmp_path / policy / "summary.json").is_file()


@pytest.fixture(scope="module")
def run(phantoms: Manifest, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger") / "run"
    fit(change(tiny_experiment, "tiny", trainer={"max_epochs": 1}), phantoms, folder)
    return folder


def test_the_ledger_keeps_no_sentence(run: Path, phantoms: Manifest, tmp_path: Path):
    evaluation = evaluate(TMCA.from_pretrained(run), phantoms)
    write_ledger(evaluation, run, phantoms, "phantoms", tmp_path / "entry.json")
    text = (tmp_path / "entry.csv").read_text("utf-8")
    sentence = phantoms.split("test").records[0].text
    assert sentence
    assert sentence in case_table(evaluation)
    assert sentence not in text
    assert len(text.splitlines()) == 1 + 8


def test_the_ledger_has_the_agreed_fields(run: Path, phantoms: Manifest, tmp_path: Path):
    evaluation: Evaluation = evaluate(TMCA.from_pretrained(run), phantoms, threshold=0.3)
    write_ledger(evaluation, run, phantoms, "phantoms", tmp_path / "results" / "tiny-phantoms.json")
    entry = json.loads((tmp_path / "results" / "tiny-phantoms.json").read_text("utf-8"))
    agreed = "schema_version name preset experiment dataset split n data_hash commit hardware seed seconds epochs"
    assert {*agreed.split(), "metrics", "text_ablation"} <= set(entry)
    assert (entry["name"], entry["preset"], entry["dataset"], entry["split"]) == (
        *("tiny-phantoms", "tiny"),
        *("phantoms", "test"),
    )
    assert (entry["n"], entry["seed"], entry["epochs"]) == (8, 1, 1)
    assert entry["data_hash"] == phantoms.content_hash()
    assert entry["experiment"] == json.loads((run / "experiment.json").read_text("utf-8"))
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    assert (entry["commit"], entry["hardware"]) == (environment["commit"], environment["hardware"])
    assert entry["config_hash"] == config_hash(from_dict(Experiment, entry["experiment"]))
    assert {"pooled", "per_case_mean", "ci95", "surface"} <= set(entry["metrics"])
    assert set(entry["text_ablation"]) == {"shuffled", "contradictory", "none"}
    scores = [entry["metrics"], *entry["text_ablation"].values()]
    for score in scores:
        assert set(score["pooled"]) == set(SCORES)
        assert set(SCORES) <= set(score["per_case_mean"])
        assert all(0 <= value <= 1 for value in score["pooled"].values())
    with (tmp_path / "results" / "tiny-phantoms.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 8


def test_the_ledger_does_not_tell_where_weights_lay(run: Path, phantoms: Manifest, tmp_path: Path):
    weights = tmp_path / "home" / "some-encoder"
    weights.mkdir(parents=True)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    experiment = json.loads((copy / "experiment.json").read_text("utf-8"))
    experiment["model"]["image_encoder"]["weights"] = str(weights)
    (copy / "experiment.json").write_text(json.dumps(experiment), encoding="utf-8")
    write_ledger(evaluate(TMCA.from_pretrained(run), phantoms), copy, phantoms, "phantoms", tmp_path / "entry.json")
    text = (tmp_path / "entry.json").read_text("utf-8")
    entry = json.loads(text)
    assert entry["experiment"]["model"]["image_encoder"]["weights"] == "some-encoder"
    assert entry["config_hash"] == config_hash(from_dict(Experiment, entry["experiment"]))
    assert str(tmp_path) not in text


def test_the_ledger_tells_on_which_data_a_run_was_trained_and_whether_it_ended(
    run: Path, phantoms: Manifest, tmp_path: Path
):
    others = replace(phantoms, records=phantoms.records[1:])
    write_ledger(evaluate(TMCA.from_pretrained(run), others), run, others, "phantoms", tmp_path / "entry.json")
    entry = json.loads((tmp_path / "entry.json").read_text("utf-8"))
    assert (entry["train_data_hash"], entry["data_hash"]) == (phantoms.content_hash(), others.content_hash())
    assert entry["stopped"] == "all epochs done"
    interrupted = Path(shutil.copytree(run, tmp_path / "interrupted"))
    note_end(interrupted, None)
    write_ledger(evaluate(TMCA.from_pretrained(run), others), interrupted, others, "x", tmp_path / "half.json")
    assert json.loads((tmp_path / "half.json").read_text("utf-8"))["stopped"] is None


def test_scores_never_replace_the_files_of_a_run(run: Path, phantoms: Manifest, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = (copy / "metrics.csv").read_bytes()
    for folder in (copy, copy / "checkpoints" / "best"):
        with pytest.raises(StorageError, match="holds a model") as caught:
            score_run(copy, phantoms, "test", folder)
        assert str(folder / "evaluation-test") in caught.value.hint
    assert (copy / "metrics.csv").read_bytes() == before


def test_a_calibrated_model_is_scored_as_it_predicts(run: Path, phantoms: Manifest, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    Calibration(temperature=3.0).write(copy / "checkpoints" / "best")
    record = phantoms.split("test").records[0]
    predictor = Predictor.from_pretrained(copy, "cpu", "32")
    predictor.set_image(phantoms.image_path(record))
    threshold = float(np.median(predictor.probability(record.text)))
    found = {}
    for name, model in (("calibrated", copy), ("raw", run)):
        evaluation = score_run(model, phantoms, "test", tmp_path / name, threshold=threshold, space="original")
        found[name] = int(evaluation.counts["right"].true_positive[0] + evaluation.counts["right"].false_positive[0])
        assert evaluation.protocol()["temperatures"] == [3.0 if name == "calibrated" else 1.0]
    assert found["calibrated"] == predictor.predict(record.text, threshold=threshold).sum()
    assert found["calibrated"] != found["raw"]


def test_the_ledger_needs_a_run(stub: TMCA, halves: Manifest, model_folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no run folder") as caught:
        write_ledger(evaluate(stub, halves), model_folder, halves, "halves", tmp_path / "x.json")
    assert "tmca train" in caught.value.hint
    assert not (tmp_path / "x.json").exists()


# Masks of another program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE, SIZE // 2])
@pytest.mark.parametrize("space", ["network", "original"])
def test_masks_of_another_program_are_scored_as_those_of_a_model(stub: TMCA, halves: Manifest, size: int, space: Any):
    expected = evaluate(stub, halves, space=space, empty_policy="zero", surface_tolerance=2.0)
    nothing = np.zeros((size, size), dtype=bool)
    left, right = nothing.copy(), nothing.copy()
    left[:, : size // 2] = right[:, size // 2 :] = True
    masks = {"case-3": left, "case-2": nothing, "case-1": right, "case-0": left, "of another split": left}
    experiment = stub.experiment
    assert experiment is not None
    scored = score_masks(masks, halves, experiment=experiment, space=space, empty_policy="zero", surface_tolerance=2.0)
    assert scored.protocol() == expected.protocol()
    assert case_table(replace(expected, counts={"right": expected.counts["right"]})) == case_table(scored)
    assert scored.text_ablation() == {}
    assert scored.experiment == experiment


def test_every_case_needs_a_mask(halves: Manifest, tiny_experiment: Experiment):
    masks = {f"case-{number}": np.zeros((8, 8), dtype=bool) for number in (0, 2, 3)}
    with pytest.raises(DataError, match="1 of 4 cases of test have no predicted mask, first 'case-1'"):
        score_masks(masks, halves, experiment=tiny_experiment)


def test_the_hash_of_foreign_weights_is_taken_as_given(stub: TMCA, halves: Manifest, tmp_path: Path):
    write_evaluation(evaluate(stub, halves), "runs/foreign", halves, tmp_path, model_sha256="abc")
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert (summary["model"], summary["model_sha256"]) == ("runs/foreign", "abc")


# Several models --------------------------------------------------------------------------------------------------


def test_models_are_averaged(tiny_model: Callable[..., TMCA], phantoms: Manifest):
    models = [tiny_model(), tiny_model()]
    with torch.no_grad():
        models[1].head.classify.weight *= 20
    together = evaluate(models, phantoms, threshold=0.45, device="cpu")
    assert (together.models, together.protocol()["models"]) == (2, 2)
    twice = evaluate([models[0], models[0]], phantoms, threshold=0.45, device="cpu")
    alone = evaluate(models[0], phantoms, threshold=0.45, device="cpu")
    assert alone.models == 1
    assert twice.pooled() == alone.pooled()
    predictor = Predictor(models, "cpu", "32")
    record = phantoms.split("test").records[0]
    predictor.set_image(phantoms.image_path(record))
    counts = together.counts["right"]
    assert predictor.predict(record.text, threshold=0.45).sum() == counts.true_positive[0] + counts.false_positive[0]


def test_models_that_see_images_differently_are_not_averaged(tiny_model: Callable[..., TMCA], phantoms: Manifest):
    models = [tiny_model(), tiny_model()]
    experiment = models[1].experiment
    assert experiment is not None
    models[1].experiment = replace(experiment, preprocessing=replace(experiment.preprocessing, image_size=96))
    with pytest.raises(ConfigError, match="different sizes"):
        evaluate(models, phantoms)
    with pytest.raises(ConfigError):
        evaluate([], phantoms)
