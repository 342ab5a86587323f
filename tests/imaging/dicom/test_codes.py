from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from tmca.errors import ConfigError
from tmca.imaging.dicom.codes import Code, read_codes

TABLE = resources.files("tmca.imaging.dicom").joinpath("codes.toml").read_text("utf-8")


def test_the_codes_say_what_the_dictionaries_of_pydicom_say():
    concepts = pytest.importorskip("pydicom.sr._concepts_dict", reason="the dictionaries are pydicom's").concepts
    table = read_codes()
    targets = table.targets.values()
    codes = {code for target in targets for code in (target.category, target.type, target.region) if code}
    codes |= set(table.procedures.values())
    assert len(codes) == 11
    for code in codes:
        meanings = [
            meaning
            for entries in concepts[code.scheme].values()
            for value, (meaning, _) in entries.items()
            if value == code.value
        ]
        assert code.meaning in meanings, code


def test_targets_by_name():
    table = read_codes()
    polyp = table.target("  Colon  POLYP ")
    assert (polyp.label, polyp.type, polyp.region) == (
        "Polyp",
        Code("SCT", "68496003", "Polyp of colon"),
        Code("SCT", "71854001", "Colon"),
    )
    assert table.target("lesion").region is None
    assert table.target("lung infection").type.value == "112001"
    with pytest.raises(ConfigError, match="Unknown target 'polp'") as caught:
        table.target("polp")
    assert "did you mean 'polyp'?" in caught.value.hint
    assert "codes.toml" in caught.value.hint


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("one small pink polyp, located in right of the image", "polyp"),
        ("Bilateral pulmonary infection, two infected areas, upper left lung.", "pulmonary infection"),
        ("ground-glass opacity of the left lung", "ground-glass opacity"),
        ("diffuse ground glass opacities", "ground glass opacities"),
        ("polypoid mass", None),
        ("John Smith, 12.3.1950", None),
        ("", None),
    ],
)
def test_the_target_of_a_sentence(sentence: str, name: str | None):
    assert read_codes().named_in(sentence) == name


def test_procedures_by_modality():
    table = read_codes()
    assert table.procedure("CT").value == "77477000"
    assert table.procedure("ES") == table.procedure("") == Code("SCT", "363679005", "Imaging procedure")


def test_a_site_has_its_own_table(tmp_path: Path):
    path = tmp_path / "codes.toml"
    path.write_text(TABLE.replace('"Polyp"', '"Polyp of the colon"').replace('"polyp", ', '"polyp", "knob", '), "utf-8")
    assert read_codes(path).target("knob").label == "Polyp of the colon"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[[targets]]", "[[target]]", "lacks"),
        ("other =", "others =", "lacks"),
        ("[[targets]]", "[[targets", "is not TOML"),
        ('label = "Polyp"\n', "", "target 1 lacks a field or has an unknown one"),
        ('label = "Polyp"', 'label = "Polyp"\ncolour = 1', "target 1 lacks a field or has an unknown one"),
        ('label = "Polyp"', f'label = "{"x" * 65}"', "target 1 has the label"),
        ('label = "Polyp"', 'label = ""', "target 1 has the label ''"),
        ('label = "Polyp"', "label = 3", "target 1 has the label 3"),
        ('["lesion", "lesions"]', "[]", "target 6 has the names"),
        ('["lesion", "lesions"]', "[1]", "target 6 has the names"),
        ('["lesion", "lesions"]', '["Polyp"]', "target 6 has the name 'polyp' of another one"),
        ('["SCT", "68496003", "Polyp of colon"]', '["SCT", "68496003"]', "target 1, type is"),
        ('["SCT", "68496003", "Polyp of colon"]', '["SCT", "68496003", ""]', "target 1, type is"),
        ('"DCM", "112121"', '"my codes", "112121"', "target 5, type is"),
        ('"DCM", "112121"', '"DCM", "11212111111111111"', "target 5, type is"),
        ('CT = ["SCT", "77477000", "Computed tomography"]', "CT = 1", "procedure CT is 1"),
    ],
)
def test_a_table_that_is_wrong_is_explained(tmp_path: Path, old: str, new: str, reason: str):
    path = tmp_path / "codes.toml"
    assert old in TABLE
    path.write_text(TABLE.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=reason) as caught:
        read_codes(path)
    assert caught.value.hint


def test_a_table_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="Cannot read the codes of"):
        read_codes(tmp_path / "missing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_codes(tmp_path / "bytes.toml")
