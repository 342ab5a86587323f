"""Reports put together at random from clauses whose facts are known: findings among denials, histories and distractors.

They read worse than a person's, but there can be thousands of them, and they join in one sentence what no writer of
tests would think of. What they state is in the facts; everything else must not be in a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from tmca.data.grammar import SIDES, THIRDS, Grammar

ZONES = {
    "upper": ("upper zone", "apex", "upper lung zone"),
    "middle": ("mid zone", "mid lung", "middle third"),
    "lower": ("lower zone", "base", "lower lung field", "lung base"),
}
OPACITIES = ("consolidation", "patchy opacity", "airspace opacity", "ground-glass opacity", "infiltrate", "pneumonia")
LUNG_FINDINGS = (
    *("there is {what} in the {side} {zone}", "{what} is seen in the {side} {zone}", "{side} {zone} {what}"),
    *("the {side} {zone} shows {what}", "{what} at the {side} {zone}", "in the {side} {zone} there is {what}"),
    *(
        "persistent {what} in the {side} {zone}",
        "{what} in the {zone} of the {side} lung",
        "unchanged {side} {zone} {what}",
    ),
    *("new {side} {zone} {what} has developed", "{what} is again noted in the {side} {zone}"),
)
LUNG_OTHERS = (
    *(
        "no {what} in the {side} {zone}",
        "there is no {what} at the {side} {zone}",
        "the {side} {zone} is free of {what}",
    ),
    *("{what} is not seen in the {side} {zone}", "the {side} {zone} shows no {what}"),
    *("the previously seen {what} in the {side} {zone} has resolved", "prior {side} {zone} {what} has cleared"),
    *("{what} in the {side} {zone} is no longer present", "history of {side} {zone} {what}"),
    *("{side} {zone} {what} was seen in 2019", "possible {what} in the {side} {zone}"),
    *("{what} in the {side} {zone} cannot be excluded", "there may be {what} in the {side} {zone}"),
    *("small {side} pleural effusion", "{side} PICC line in place", "the {side} hemidiaphragm is elevated"),
    *("no {side} pneumothorax", "old {side} rib fracture", "a {side} {zone} nodule is stable", "the heart is enlarged"),
    *("{side} basal atelectasis", "calcified granuloma in the {side} {zone}", "scarring at the {side} apex"),
    *("a {side} chest tube is in place", "no pleural effusion on the {side}"),
)

SEGMENTS = ("sigmoid colon", "cecum", "left colon", "right colon", "rectum", "upper rectum", "splenic flexure")
SIZE_WORDS = ("tiny", "small", "medium", "large")
COLOUR_WORDS = ("white", "red", "tan", "yellow", "pink", "brown")
SHAPE_WORDS = ("round", "oval", "flat", "irregular")
HOURS = {
    12: "top",
    2: "top right",
    3: "right",
    4: "bottom right",
    6: "bottom",
    8: "bottom left",
    9: "left",
    10: "top left",
}
NUMBERS = {1: ("a", "one", "a single"), 2: ("two",), 3: ("three", "3"), 4: ("four",)}
POLYP_FINDINGS = (
    "{number} {adjectives} {noun} {was} found in the {segment}{clock}",
    "in the {segment} there {is_} {number} {adjectives} {noun}{clock}",
    "{number} {adjectives} {noun}{clock} {was} removed with a large snare",
    "the endoscope showed {number} {adjectives} {length} mm {noun} in the {segment}{clock}",
)
POLYP_OTHERS = (
    *("no other polyps were seen", "no further polyp in the {segment}", "there were no polyps in the {segment}"),
    *("the {segment} was free of polyps", "no polyps larger than 20 mm", "a history of {size} polyps"),
    *("two {colour} polyps were removed from the {segment} in 2019", "three {size} polyps were resected last year"),
    *("the previously removed {colour} polyp in the {segment}", "the scar of a polypectomy at 6 o'clock"),
    *("the mucosa was {colour}", "{colour} stool in the {segment}", "white-light images were taken"),
    *("a {size} amount of fluid was removed", "internal haemorrhoids at 3 o'clock", "five biopsies were taken"),
    *("a {size} diverticulum in the {segment}", "red blood in the {segment}", "small bowel was not seen"),
    *("the examination began at 9 o'clock in the morning", "a {colour} ulcer at 5 o'clock"),
)

JOINTS = (". ", ". ", ". ", "; ", ", and ", ", but ", ", while ")


def compose(count: int, seed: int, grammar: Grammar) -> Iterator[dict[str, Any]]:
    """Yield reports in the form of the written ones, without tags."""
    rng = Random(seed)
    for number in range(count):
        clauses, facts = _lung_clauses(rng) if grammar == "lung" else _polyp_clauses(rng)
        rng.shuffle(clauses)
        text = _joined(clauses, rng)
        yield {"id": f"composed-{grammar}-{seed}-{number}", "grammar": grammar, "text": text, "facts": facts}


def _joined(clauses: Sequence[str], rng: Random) -> str:
    text = "The examination was complete. "
    joint = ". "
    for number, clause in enumerate(clauses):
        text += joint if number else ""
        text += clause[0].upper() + clause[1:] if joint == ". " else clause
        joint = rng.choice(JOINTS)
    return f"{text}."


def _lung_clauses(rng: Random) -> tuple[list[str], dict[str, Any]]:
    cells = [(side, third) for side in SIDES for third in THIRDS]
    rng.shuffle(cells)
    infected = [cells.pop() for _ in range(rng.choice((0, 1, 1, 2)))]

    def clause(templates: Sequence[str], cell: tuple[str, str]) -> str:
        zone = rng.choice(ZONES[cell[1]])
        return rng.choice(templates).format(what=rng.choice(OPACITIES), side=cell[0], zone=zone)

    clauses = [clause(LUNG_FINDINGS, cell) for cell in infected]
    clauses += [clause(LUNG_OTHERS, rng.choice(cells)) for _ in range(rng.randint(1, 4))]
    thirds = {side: [third for third in THIRDS if (side, third) in infected] for side in SIDES}
    sides = [side for side in SIDES if thirds[side]]
    facts = {"present": True, "sides": sides, **thirds} if infected else {}
    facts |= {"bilateral": True} if len(sides) == 2 else {}
    return clauses, facts


def _polyp_clauses(rng: Random) -> tuple[list[str], dict[str, Any]]:
    facts: dict[str, Any] = {}
    clauses: list[str] = []
    if rng.random() < 0.8:
        number = rng.choice((1, 1, 2, 3, 4))
        words = {
            name: rng.choice(known)
            for name, known in (("sizes", SIZE_WORDS), ("colour", COLOUR_WORDS), ("shape", SHAPE_WORDS))
            if rng.random() < 0.5
        }
        hour = rng.choice(list(HOURS)) if number == 1 and rng.random() < 0.5 else None
        clause = rng.choice(POLYP_FINDINGS).format(
            number=rng.choice(NUMBERS[number]),
            adjectives=rng.choice((" ", ", ")).join(words.values()),
            noun="polyp" if number == 1 else "polyps",
            was="was" if number == 1 else "were",
            is_="is" if number == 1 else "are",
            length=rng.randint(2, 20),
            segment=rng.choice(SEGMENTS),
            clock="" if hour is None else f" at {hour} o'clock",
        )
        clauses.append(" ".join(clause.split()))
        facts = {"present": True, "count": number, **words}
        facts |= {"sizes": [words["sizes"]]} if "sizes" in words else {}
        facts |= {"places": [HOURS[hour]]} if hour is not None else {}
    clauses += [
        rng.choice(POLYP_OTHERS).format(
            segment=rng.choice(SEGMENTS), size=rng.choice(SIZE_WORDS), colour=rng.choice(COLOUR_WORDS)
        )
        for _ in range(rng.randint(1, 4))
    ]
    return clauses, facts
