from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmca.data.grammar import parse
from tmca.data.manifest import Manifest
from tmca.errors import DataError
from tmca.inference import Predictor
from tmca.models import TMCA
from tmca.wordings import abbreviated, compare_wordings, negated, rewritings, typos

POLYP = "one small white round polyp, located in top left of the image"
LUNG = "Bilateral pulmonary infection, two infected areas, upper left lung and middle right lung."


@pytest.fixture(scope="module")
def predictor(tiny_model: Callable[..., TMCA]) -> Predictor:
    return Predictor(tiny_model(), "cpu")


@pytest.mark.parametrize("text", [POLYP, LUNG])
def test_every_wording_differs_from_the_sentence(text: str):
    found = {name: rewrite(text) for name, (_, rewrite) in rewritings().items()}
    assert all(changed != text for changed in found.values())
    assert {"p0", "p6"} - {name for name, changed in found.items() if changed} == {"p0", "p6"}
    for name in ("typos", "abbreviated", "upper case", "wrong side", "contradictory", "negated", "paraphrase 1"):
        assert found[name], name


def test_paraphrases_say_the_same():
    for name, (expected, rewrite) in rewritings().items():
        if name.startswith("paraphrase"):
            changed = rewrite(POLYP)
            assert expected == "same"
            assert changed is not None
            assert parse(changed) == parse(POLYP)


def test_typos_exchange_letters():
    changed = typos(POLYP)
    assert changed is not None
    assert changed != POLYP
    assert sorted(changed) == sorted(POLYP)
    assert typos("a an") is None


def test_words_are_shortened():
    assert abbreviated("one small polyp, located in top left") == "one sm. polyp, loc. in top L"
    assert abbreviated("polyp") is None


def test_a_denial_is_not_denied():
    assert negated(POLYP) == f"no {POLYP}"
    assert negated("no polyp") is None


def test_wordings_are_compared(predictor: Predictor, phantoms: Manifest, tmp_path: Path):
    report = compare_wordings(predictor, phantoms, "test", pictures=tmp_path)
    by_name = {wording.name: wording for wording in report.wordings}
    texts = [record.text for record in phantoms.split("test").records if record.text]
    own = by_name["own"]
    assert (own.cases, own.change, own.example) == (len(texts), 0.0, texts[0])
    assert (by_name["none"].cases, by_name["none"].example) == (len(texts), None)
    assert by_name["another image's"].example in texts
    assert all(0 <= wording.pooled_dice <= 1 and 0 <= wording.change <= 1 for wording in report.wordings)
    pictures = sorted(tmp_path.glob("*.png"))
    assert 1 <= len(pictures) <= 4
    assert np.asarray(Image.open(pictures[0])).std() > 0
    report.write(tmp_path / "prompts.json")
    assert len(json.loads((tmp_path / "prompts.json").read_text("utf-8"))["wordings"]) == len(report.wordings)
    assert report.table().row_count == len(report.wordings)


def test_published_levels_stand_for_written_ones(predictor: Predictor, phantoms: Manifest):
    records = tuple(replace(record, text="published words" if record.text else None) for record in phantoms.records)
    ladder = {"p3": replace(phantoms, records=records), "p8": replace(phantoms, records=records)}
    by_name = {wording.name: wording for wording in compare_wordings(predictor, phantoms, ladder=ladder).wordings}
    assert by_name["p3"].example == by_name["p8"].example == "published words"
    assert by_name["p2"].example != "published words"


def test_data_without_sentences_is_refused(predictor: Predictor, phantoms: Manifest):
    silent = replace(phantoms, records=tuple(replace(record, text=None) for record in phantoms.records))
    with pytest.raises(DataError, match="No case of test has a sentence"):
        compare_wordings(predictor, silent)
