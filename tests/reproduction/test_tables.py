from __future__ import annotations

import pytest

from tmca.errors import ConfigError
from tmca.presets import PRESETS, TABLE_2, TABLE_3, get_preset
from tmca.reproduction.tables import (
    DATASETS,
    NOTES,
    TABLES,
    Printed,
    Row,
    get_table,
    paper_dataset,
    register_row,
)

CELLS = {
    (table.name, row.label, dataset): printed
    for table in TABLES.values()
    for row in table.rows
    for dataset, printed in row.printed.items()
}


def test_every_row_is_a_preset_and_every_note_is_explained():
    for table in TABLES.values():
        assert {row.preset for row in table.rows} <= set(PRESETS)
        assert {note for row in table.rows for note in row.notes} <= set(NOTES)
        assert len({row.label for row in table.rows}) == len(table.rows)


def test_table_2_and_3_are_those_of_the_presets():
    assert tuple(row.preset for row in get_table("table2").rows) == TABLE_2
    assert tuple(row.preset for row in get_table("table3").rows) == TABLE_3


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_a_printed_pair_is_possible_under_its_definition(cell: tuple[str, str, str]):
    printed = CELLS[cell]
    pooled = 2 * printed.jaccard / (1 + printed.jaccard)
    assert 0.5 < printed.jaccard < printed.dice < 1
    if printed.protocol == "pooled":
        assert printed.dice == pytest.approx(pooled, abs=0.0012)
    else:  # the mean of a concave function lies below the function of the mean
        assert printed.dice < pooled - 0.01


def test_the_copied_cells_are_told_from_the_pooled_ones():
    copied = {(label, dataset) for (table, label, dataset), cell in CELLS.items() if cell.protocol == "per_case"}
    assert copied == {
        ("U-Net", "mosmed"),
        ("U-Net++", "mosmed"),
        ("nnU-Net", "qata"),
        ("nnU-Net", "mosmed"),
        ("Attention U-Net", "mosmed"),
        ("LViT", "mosmed"),
        ("CPAM", "qata"),
        *(("TGANet", name) for name in DATASETS),
        *(("TGANet, 100 %", name) for name in DATASETS),
        ("LGA", "qata"),
        ("LGA", "mosmed"),
        ("Attention U-Net, 100 %", "mosmed"),
    }


def test_the_goal_of_the_paper():
    rows = {row.label: row.printed for row in get_table("table1").rows}
    assert rows["TMCA"]["qata"] == Printed.percent(83.27, 90.87)
    assert rows["TMCA"]["qata"].dice == pytest.approx(0.9087)
    assert rows["TMCA"]["kvasir"].dice == pytest.approx(0.9220)
    assert rows["Ariadne"]["qata"].dice == pytest.approx(0.8978)


@pytest.mark.parametrize(
    ("name", "key"),
    [("kvasir_polyp", "kvasir"), ("QaTa-COV19-v2", "qata"), ("mosmed_plus", "mosmed"), ("phantoms", "")],
)
def test_a_dataset_is_known_by_its_name(name: str, key: str):
    assert paper_dataset(name) == key


def test_a_row_is_added_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TABLES, "table1", get_table("table1"))
    row = Row("Mine", "tiny")
    register_row("table1", row)
    register_row("table1", row)
    assert [known.label for known in get_table("table1").rows].count("Mine") == 1
    with pytest.raises(ConfigError, match="has a row 'Mine' already"):
        register_row("table1", Row("Mine", "demo"))
    with pytest.raises(ConfigError, match="Unknown table 'table9'"):
        register_row("table9", row)


def test_table_4_trains_on_nested_shares():
    shares = [row.fraction for row in get_table("table4").rows if row.preset == "tmca"]
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert get_preset("tmca").trainer.train_fraction == 1.0
