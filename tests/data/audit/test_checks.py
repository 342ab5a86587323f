from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmca.data.audit import CHECKS, SCHEMA_VERSION, SEVERITIES, Audit, Finding, audit
from tmca.data.audit.case_facts import CaseFacts
from tmca.data.audit.fingerprint import fingerprint
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest, Record
from tmca.data.phantom import write_phantoms
from tmca.errors import ConfigError
from tmca.imaging.raster import read_image, read_mask, write_image, write_mask

SIZE = 96
DOCS = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "audit.md"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("audit") / "phantoms"
    return write_phantoms(folder, {"train": 24, "test": 6}, size=SIZE, seed=3, no_lesion_share=0.0, absent_share=0.0)


@pytest.fixture
def data(clean: Manifest, tmp_path: Path) -> Manifest:
    """A copy of the clean phantoms to spoil."""
    shutil.copytree(clean.root, tmp_path / "phantoms")
    return replace(clean, root=tmp_path / "phantoms")


def _count_tokens(sentences: list[str]) -> list[int]:
    return [len(sentence.split()) for sentence in sentences]


def _of(found: Audit, check: str) -> list[Finding]:
    """The findings of one check, after a look at what every finding must hold."""
    for finding in found.findings:
        assert finding.severity == CHECKS[finding.check].severity
        assert finding.message
        json.dumps(finding.details)
    return found.by_check.get(check, [])


def _changed(data: Manifest, number: int, **values: Any) -> Manifest:
    records = list(data.records)
    records[number] = replace(records[number], **values)
    return data.with_records(records)


def _one(found: Audit, check: str, cases: Sequence[Record]) -> Finding:
    """The only finding of a check, and of the audit."""
    assert list(found.by_check) == [check]
    (finding,) = _of(found, check)
    assert sorted(finding.cases) == sorted(record.id for record in cases)
    for record in cases:
        assert record.id in finding.message or check in ("text_too_long", "missing_mask", "missing_text")
    return finding


def test_clean_phantoms_are_silent(clean: Manifest):
    found = audit(clean, count_tokens=_count_tokens, token_limit=40)
    assert found.findings == ()
    assert (found.cases, found.token_limit, found.dataset) == (30, 40, clean.name)
    assert found.errors == found.warnings == found.notes == ()


@pytest.mark.parametrize("broken", ["missing", "cut off"])
def test_a_broken_image_does_not_end_the_audit(data: Manifest, broken: str):
    path = data.image_path(data.records[4])
    content = path.read_bytes()
    path.unlink()
    if broken == "cut off":
        path.write_bytes(content[: len(content) // 2])
    finding = _one(audit(data), "unreadable", data.records[4:5])
    assert finding.files == (data.records[4].image,)
    assert str(path) in finding.message


def test_a_broken_mask(data: Manifest):
    (data.root / str(data.records[4].mask)).write_bytes(b"no image")
    assert _one(audit(data), "unreadable", data.records[4:5]).files == (data.records[4].mask,)


def test_sizes_that_differ(data: Manifest):
    record = data.records[2]
    mask = read_mask(data.root / str(record.mask))
    write_mask(data.root / str(record.mask), mask[:-2])
    finding = _one(audit(data), "size_mismatch", [record])
    assert finding.details == {"image_size": [SIZE, SIZE], "mask_size": [SIZE - 2, SIZE]}


def test_a_transposed_pair(data: Manifest):
    record = data.records[2]
    write_image(data.image_path(record), read_image(data.image_path(record))[:-10])
    mask = read_mask(data.root / str(record.mask))
    write_mask(data.root / str(record.mask), mask[:-10].T)
    finding = _one(audit(data), "transposed", [record])
    assert finding.details == {"image_size": [SIZE - 10, SIZE], "mask_size": [SIZE, SIZE - 10]}


def test_a_mask_of_three_classes(data: Manifest):
    record = data.records[2]
    values = read_mask(data.root / str(record.mask)).astype(np.uint8) * 2
    values[:3, :3] = 1
    write_image(data.root / str(record.mask), values)
    assert "3 classes" in _one(audit(data), "mask_not_binary", [record]).message


def _copied(data: Manifest, source: int, target: int, alter: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Give one case the files of another, with an altered image."""
    one, other = data.records[source], data.records[target]
    image, mask = read_image(data.image_path(one)), read_mask(data.root / str(one.mask))
    if alter is not None:
        image = alter(image)
        mask = np.asarray(Image.fromarray(mask).resize((image.shape[1], image.shape[0])))
    write_image(data.image_path(other), image)
    write_mask(data.root / str(other.mask), mask)


def _shrunk(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((80, 80), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("target", "alter", "check"),
    [
        (26, None, "same_image_across_splits"),
        (7, None, "same_image_within_split"),
        (26, _shrunk, "copy_across_splits"),
        (7, _shrunk, "copy_within_split"),
    ],
)
def test_copies(data: Manifest, target: int, alter: Callable[[np.ndarray], np.ndarray] | None, check: str):
    _copied(data, 1, target, alter)
    text = data.records[1].text
    spoiled = _changed(data, target, text=text)
    finding = _one(audit(spoiled), check, [data.records[1], data.records[target]])
    assert finding.details["splits"] == (["train", "test"] if target == 26 else ["train"])
    assert finding.details["same_text"]
    assert set(finding.files) == {
        name for number in (1, target) for name in (data.records[number].image, data.records[number].mask)
    }
    other = audit(_changed(data, target, text=f"{text}"[:-1] + "e."))
    assert "sentences differ" in other.by_check[check][0].message


def test_a_mirrored_copy_is_named_so(data: Manifest):
    _copied(data, 1, 26, lambda image: np.ascontiguousarray(image[:, ::-1]))
    (finding,) = _of(audit(data), "copy_across_splits")
    assert finding.details["orientation"] == "left-right"
    assert "mirrored left-right" in finding.message


def test_one_image_with_several_masks_is_no_duplicate(data: Manifest):
    second = replace(data.records[0], id="second", mask=data.records[0].mask)
    assert audit(data.with_records([*data.records, second])).findings == ()
    elsewhere = replace(second, split="test")
    assert list(audit(data.with_records([*data.records, elsewhere])).by_check) == ["same_image_across_splits"]


def test_a_volume_in_two_splits(data: Manifest):
    records = [Record(f"s{n}", f"scan.nii.gz#{n}", split="train" if n < 3 else "test") for n in range(4)]
    findings = audit(replace(data, records=(*data.records, *records))).findings
    (finding,) = [finding for finding in findings if finding.check == "patient_across_splits"]
    assert finding.message.startswith("Volume scan.nii.gz has images in several splits: 3 in train, 1 in test")


def test_a_patient_in_two_splits(data: Manifest):
    spoiled = _changed(_changed(data, 0, patient_id="P7"), 25, patient_id="P7")
    (finding,) = audit(spoiled).findings
    assert finding.check == "patient_across_splits"
    assert finding.cases == (data.records[0].id, data.records[25].id)
    assert finding.details == {"patient": "P7", "splits": {"train": 1, "test": 1}}
    assert audit(_changed(_changed(data, 0, patient_id="P7"), 1, patient_id="P7")).findings == ()


def test_cases_in_no_split_leak_nothing(data: Manifest):
    _copied(data, 1, 26, None)
    _copied(data, 2, 27, _shrunk)
    spoiled = _changed(_changed(data, 0, patient_id="P7"), 25, patient_id="P7")
    slices = [Record(f"s{n}", f"scan.nii.gz#{n}", split="train" if n < 3 else "test") for n in range(4)]
    leaks = {"same_image_across_splits", "copy_across_splits", "patient_across_splits"}
    assert leaks <= audit(spoiled.with_records([*spoiled.records, *slices])).by_check.keys()
    apart = spoiled.with_records(
        replace(record, split=record.split.removeprefix("test")) for record in [*spoiled.records, *slices]
    )
    found = audit(apart).by_check.keys()
    assert not {name for name in found if "split" in name}
    none = apart.with_records(replace(record, split="") for record in apart.records)
    assert {"same_image_within_split", "copy_within_split"} <= audit(none).by_check.keys()


def test_images_of_a_patient_in_two_splits_and_in_none(data: Manifest):
    spoiled = data
    for number, split in ((0, "train"), (1, ""), (25, "test")):
        spoiled = _changed(spoiled, number, patient_id="P7", split=split)
    (finding,) = audit(spoiled).findings
    assert finding.details == {"patient": "P7", "splits": {"train": 1, "test": 1}}
    assert finding.cases == (data.records[0].id, data.records[25].id)


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("no lesion in the image", "contradicted_presence"),
        ("one lesion, located in left of the image", "contradicted_side"),
        ("one lesion, located in bottom of the image", "contradicted_height"),
        ("three lesions", "contradicted_count"),
        ("one small lesion", "contradicted_size"),
    ],
)
def test_contradictions(data: Manifest, text: str, check: str):
    record = data.records[0]
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[5:40, 50:90] = True  # one large lesion, top right
    write_mask(data.root / str(record.mask), mask)
    found = audit(_changed(data, 0, text=text))
    (finding,) = _of(found, check)
    assert finding.details["text"] == text
    assert finding.details["said"] in finding.message
    assert finding.details["seen"] in finding.message


def test_a_lesion_that_is_not_there(data: Manifest):
    write_mask(data.root / str(data.records[0].mask), np.zeros((SIZE, SIZE), dtype=bool))
    found = audit(data)
    assert list(found.by_check) == ["contradicted_presence", "mask_empty"]
    right = audit(_changed(data, 0, text="no lesion in the image"))
    assert list(right.by_check) == ["mask_empty"]
    assert right.errors == ()


def test_a_full_mask(data: Manifest):
    write_mask(data.root / str(data.records[0].mask), np.ones((SIZE, SIZE), dtype=bool))
    assert "mask_full" in audit(data).by_check


def test_one_mask_beside_several_images(data: Manifest):
    first, second, third = data.records[:3]
    for record in (second, third):
        shutil.copy(data.root / str(first.mask), data.root / str(record.mask))
    finding = _of(audit(data), "same_mask")[0]
    assert sorted(finding.cases) == sorted(record.id for record in (first, second, third))
    assert set(finding.files) == {name for record in (first, second, third) for name in (record.image, record.mask)}
    patient = _changed(_changed(data, 0, patient_id="p"), 1, patient_id="p")
    assert "same_mask" not in audit(patient.with_records(patient.records[:2])).by_check
    assert len(_of(audit(patient), "same_mask")) == 1


def test_copies_of_an_image_and_empty_masks_share_theirs(data: Manifest):
    first, second, third, fourth = data.records[:4]
    shutil.copy(data.root / str(first.mask), data.root / str(second.mask))
    picture = read_image(data.root / first.image)
    write_image(data.root / second.image, np.clip(picture.astype(float) + 8, 0, 255).astype(np.uint8))
    for record in (third, fourth):
        write_mask(data.root / str(record.mask), np.zeros((SIZE, SIZE), dtype=bool))
    found = audit(data)
    assert "copy_within_split" in found.by_check
    assert "same_mask" not in found.by_check


def test_specks(data: Manifest):
    record = data.records[0]
    mask = read_mask(data.root / str(record.mask))
    row, column = max(
        ((row, column) for row in (0, SIZE - 1) for column in (0, SIZE - 1)),
        key=lambda corner: np.hypot(*(np.argwhere(mask) - corner).T).min(),
    )
    mask[row, column] = True
    write_mask(data.root / str(record.mask), mask)
    (finding,) = _of(audit(_changed(data, 0, text=None)), "stray_specks")
    assert finding.details["specks"] == [1]


def test_missing_masks_and_sentences(data: Manifest):
    found = audit(_changed(_changed(data, 0, mask=None), 1, text=None))
    assert [finding.cases for finding in _of(found, "missing_mask")] == [(data.records[0].id,)]
    assert [finding.cases for finding in _of(found, "missing_text")] == [(data.records[1].id,)]
    bare = data.with_records(replace(record, mask=None, text=None) for record in data.records)
    assert {finding.check for finding in audit(bare).findings} <= {"orphan_file"}


def test_long_sentences(data: Manifest):
    text = f"{data.records[3].text} or so"
    limit = max(_count_tokens(list(data.sentences))) + 1
    long = text + " very" * limit
    found = audit(_changed(data, 3, text=long), count_tokens=_count_tokens, token_limit=limit)
    (finding,) = _of(found, "text_too_long")
    assert (finding.cases, finding.details["text"]) == ((data.records[3].id,), long)
    assert finding.details["tokens"] == len(long.split())
    assert "text_too_long" not in audit(_changed(data, 3, text=long), count_tokens=_count_tokens).by_check


def test_a_limit_needs_a_tokenizer(data: Manifest):
    with pytest.raises(ConfigError, match="tokenizer"):
        audit(data, token_limit=24)
    with pytest.raises(ConfigError, match="workers"):
        audit(data, workers=0)


def test_sentences_that_are_one_class(data: Manifest):
    same = [replace(record, text="one lesion") for record in data.records]
    (finding,) = _of(audit(data.with_records(same)), "text_one_class")
    assert finding.details == {"text": "one lesion", "share": 1.0, "effective": pytest.approx(1.0)}
    assert len(finding.cases) == 30


def test_misspelt_words(data: Manifest):
    text = "one lesion, located in rught of the image"
    (finding,) = _of(audit(_changed(_changed(data, 3, text=text), 4, text=text)), "unknown_words")
    assert finding.details["word"] == "rught"
    assert finding.cases == (data.records[3].id, data.records[4].id)


def test_another_language_is_one_finding(data: Manifest):
    foreign = [replace(record, text=f"ein Befund Nummer {number}") for number, record in enumerate(data.records)]
    (finding,) = _of(audit(data.with_records(foreign)), "unknown_words")
    assert "no known grammar" in finding.message


def test_a_blank_image(data: Manifest):
    for number in (3, 4, 26):
        write_image(data.image_path(data.records[number]), np.full((SIZE, SIZE, 3), 9, dtype=np.uint8))
    found = audit(data)
    assert list(found.by_check) == ["blank_image"]  # and blank images are no copies of each other
    assert len(found.findings) == 3


def test_files_of_no_case(data: Manifest):
    write_image(data.root / "images" / "left over.png", np.zeros((8, 8, 3), dtype=np.uint8))
    (data.root / "images" / "notes.txt").write_text("no image", "utf-8")
    (finding,) = audit(data).findings
    assert (finding.check, finding.files) == ("orphan_file", ("images/left over.png",))


def test_files_that_changed_since_the_import(data: Manifest):
    hashed = data.with_hashes()
    assert audit(hashed).findings == ()
    record = hashed.records[5]
    image = read_image(data.image_path(record))
    image[0, 0] ^= 1
    write_image(data.image_path(record), image)
    assert _one(audit(hashed), "changed_file", [record]).files == (record.image,)


def test_a_split_unlike_the_training_split(tmp_path: Path):
    counts = {"train": 20, "val": 20}
    drawn = write_phantoms(tmp_path / "phantoms", counts, size=64, no_lesion_share=0.0, absent_share=0.0)
    for record in drawn.split("val").records:
        write_image(drawn.image_path(record), read_image(drawn.image_path(record)) // 2)
    shifted = {finding.details["feature"] for finding in _of(audit(drawn), "split_shift")}
    assert {"brightness", "contrast"} <= shifted
    assert "foreground" not in shifted


def test_phantoms_of_several_splits_are_silent(tmp_path: Path):
    counts = {"train": 60, "val": 30}
    drawn = write_phantoms(tmp_path / "phantoms", counts, size=32, no_lesion_share=0.0, absent_share=0.0)
    assert _of(audit(drawn), "split_shift") == []


def test_a_split_of_another_name_is_told(data: Manifest):
    renamed = [replace(r, split={"train": "training"}.get(r.split, r.split)) for r in data.records]
    (found,) = _of(audit(data.with_records(renamed)), "unknown_split")
    assert found.severity == "warning"
    assert "in a split called 'training'" in found.message
    assert len(found.cases) == sum(record.split == "train" for record in data.records)


def test_splits_need_no_names(data: Manifest):
    assert audit(data.with_records(replace(record, split="") for record in data.records)).findings == ()


def test_findings_do_not_depend_on_the_number_of_workers(data: Manifest):
    _copied(data, 1, 26, _shrunk)
    first, second = (audit(data, workers=workers) for workers in (1, 3))
    assert first.findings == second.findings
    assert first.fingerprint == second.fingerprint


def test_the_dictionary_is_json_of_a_fixed_form(data: Manifest):
    _copied(data, 1, 26, None)
    found = audit(data, count_tokens=_count_tokens, token_limit=40)
    values = found.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert list(values) == [
        *("schema_version", "dataset", "cases", "seconds", "token_limit", "counts", "checks", "findings"),
        "fingerprint",
    ]
    assert values["schema_version"] == SCHEMA_VERSION == 1
    assert list(values["counts"]) == list(SEVERITIES)
    assert sum(values["counts"].values()) == len(values["findings"]) > 0
    assert [check["name"] for check in values["checks"]] == list(CHECKS)
    assert all(list(check) == ["name", "severity", "finds", "why", "advice", "findings"] for check in values["checks"])
    assert list(values["findings"][0]) == ["check", "severity", "cases", "files", "message", "details"]
    assert list(values["fingerprint"]) == ["cases", "distinct_sentences", "splits", "shifts"]
    assert list(values["fingerprint"]["splits"]["train"]) == [
        *("cases", "patients", "with_mask", "with_text", "image_sizes", "distinct_image_sizes", "darkest"),
        *("brightest", "brightness", "contrast", "foreground", "empty_masks", "words", "tokens"),
        *("distinct_sentences", "effective_sentences", "unseen_sentences", "sources"),
    ]
    assert list(values["fingerprint"]["splits"]["test"]["words"]) == ["minimum", "median", "mean", "maximum"]


def test_an_empty_manifest_has_no_findings(tmp_path: Path):
    assert audit(Manifest(tmp_path, (), "nothing")).findings == ()


def test_the_documentation_lists_every_check():
    rows = re.findall(
        r"^\| `(\w+)` \| (error|warning|note) \| (.+?) \| (.+?) \|$", DOCS.read_text("utf-8"), re.MULTILINE
    )
    assert rows == [(check.name, check.severity, check.finds, check.why) for check in CHECKS.values()]


def test_the_sources_of_qata_are_found(shared: Path):
    """All of its covid_… images are in the training split."""
    data = open_dataset(shared / "data" / "qata_cov19")
    shifts = fingerprint(data.records, [CaseFacts()] * len(data.records)).shifts
    found = {shift.split: shift for shift in shifts if shift.feature == "source"}
    assert set(found) == {"val", "test"}
    assert all(shift.distance > 0.3 and shift.p_value < 0.001 for shift in found.values())


def test_the_published_polyps(shared: Path):
    """Faults of Kvasir-SEG that were looked at: an image in train and test, and a pixel in the corner of masks."""
    data = open_dataset(shared / "data" / "kvasir_polyp")
    named = ["cju30bmab08bi0835mvlr6e0r", "cju6wi3akvn8r0801px8eligc"]
    part = data.with_records([*data.select(named).records, *data.split("test").records])
    found = audit(part)
    pairs = [set(finding.cases) for finding in _of(found, "copy_across_splits")]
    assert pairs == [{"cju77k828z46w0871r0avuoo9", "cju30bmab08bi0835mvlr6e0r"}]
    specks = {finding.cases[0]: finding.details["specks"] for finding in _of(found, "stray_specks")}
    assert specks["cju6wi3akvn8r0801px8eligc"] == [1]
    assert "unreadable" not in found.by_check
