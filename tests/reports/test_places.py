"""Places are read as part of a mention: whose they are depends on the sentence's other nouns."""

from __future__ import annotations

import pytest

from tmca.data.grammar import Grammar
from tmca.reports.findings import Mention, find_mentions
from tmca.reports.sections import split_report


def _mentions(text: str, grammar: Grammar = "lung") -> list[Mention]:
    return find_mentions(split_report(text), grammar)


def _where(text: str) -> list[tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """Sides, thirds and whether a lobe is named, of each place of the one finding."""
    (mention,) = [item for item in _mentions(text) if not item.is_normal]
    return [(place.sides, place.thirds, place.lobe) for place in mention.located]


BOTH = ("left", "right")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("Right basal opacity", [(("right",), ("lower",), False)]),
        ("Opacity at the base of the right lung", [(("right",), ("lower",), False)]),
        ("Opacity in the right mid and lower zones", [(("right",), ("middle", "lower"), False)]),
        ("Opacity in the right mid-to-lower lung", [(("right",), ("middle", "lower"), False)]),
        ("Opacity of the left and right bases", [(BOTH, ("lower",), False)]),
        (
            "Opacity in the right upper zone, right lower zone and left base",
            [(("right",), ("upper",), False), (("right",), ("lower",), False), (("left",), ("lower",), False)],
        ),
        (
            "Opacity in the upper zone on the left and the lower zone on the right",
            [(("left",), ("upper",), False), (("right",), ("lower",), False)],
        ),
        ("Opacity in the left lung and right base", [(("left",), (), False), (("right",), ("lower",), False)]),
        ("Opacities at both lung bases", [(BOTH, ("lower",), False)]),
        ("Opacities at the bases", [(BOTH, ("lower",), False)]),
        ("Bibasilar opacities", [(BOTH, ("lower",), False)]),
        ("Biapical opacities", [(BOTH, ("upper",), False)]),
        ("Bilateral opacities", [(BOTH, (), False)]),
        ("Opacity throughout the left lung", [(("left",), ("upper", "middle", "lower"), False)]),
        ("RUL opacity", [(("right",), (), True)]),
        ("Right middle lobe opacity", [(("right",), (), True)]),
        ("Middle lobe opacity", [(("right",), (), True)]),
        ("Lingular opacity", [(("left",), (), True)]),
        ("Opacity in the apical segment of the right lower lobe", [(("right",), (), True)]),
        ("R lower zone opacity", [(("right",), ("lower",), False)]),
        ("Right LZ opacity", [(("right",), (), False)]),
        ("LMZ opacity", [(("left",), ("middle",), False)]),
        ("The right lung shows patchy opacity", [(("right",), (), False)]),
        ("In the right lower zone there is an opacity", [(("right",), ("lower",), False)]),
        ("Right lung: opacity", [(("right",), (), False)]),
        ("Lung bases: opacity", []),
        ("Opacity with a small left pleural effusion", []),
        ("Left pleural effusion and opacity", []),
        ("Opacity and atelectasis on the right", [(("right",), (), False)]),
        ("Opacity, and atelectasis on the right", []),
        ("Opacity silhouetting the right heart border", []),
        ("Opacity above the left hemidiaphragm", []),
        ("Opacity in the left lung, not the right", [(("left",), (), False)]),
        ("Opacity of the left lung with sparing of the right apex", [(("left",), (), False)]),
        ("Opacity in the left base rather than the right", [(("left",), ("lower",), False)]),
        ("The right lung, except its apex, is consolidated", [(("right",), (), False)]),
        ("Opacity at the left base, the right base is spared", [(("left",), ("lower",), False)]),
    ],
)
def test_places_of_a_lung_finding(text: str, places: list[tuple[tuple[str, ...], tuple[str, ...], bool]]):
    assert _where(text) == places


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("A polyp in the upper left of the image", ["top left"]),
        ("A polyp in the left upper quadrant of the image", ["top left"]),
        ("A polyp occupies the centre of the picture", ["center"]),
        ("A polyp at 3 o'clock", ["right"]),
        ("A polyp at the 6 o’clock position", ["bottom"]),
        ("A polyp at 1 o'clock", ["top right"]),
        ("A polyp at 6 o'clock to 9 o'clock", []),
        ("A polyp was removed at 9 o'clock in the morning", []),
        ("A polyp in the left colon", []),
        ("A polyp on the left wall", []),
        ("A polyp in the upper rectum", []),
        ("A polyp in the left lower quadrant", []),
        ("A polyp at the top of a fold", []),
        ("A polyp, and haemorrhoids at 3 o'clock", []),
    ],
)
def test_places_of_a_polyp(text: str, places: list[str]):
    (mention,) = _mentions(text, "polyp")
    assert [place.place for place in mention.located] == places
