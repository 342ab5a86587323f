"""Facts and sentences to draw at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tmca.data.grammar import COLOURS, PARAPHRASES, PLACES, SHAPES, SIDES, SIZES, THIRDS

# The strategies make the fields and the tests the facts: executed annotations draw random numbers, which hypothesis
# does not allow in strategies.
Fields = dict[str, Any]


def _in_order(words: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    """Some of the words, each once, in their order."""
    return st.sets(st.sampled_from(words), min_size=least).map(
        lambda chosen: tuple(word for word in words if word in chosen)
    )


targets = st.fixed_dictionaries(
    {
        "grammar": st.sampled_from(["polyp", "phantom"]),
        "present": st.just(True),
        "sizes": _in_order(SIZES),
        "colour": st.none() | st.sampled_from(COLOURS),
        "shape": st.none() | st.sampled_from(SHAPES),
        "places": st.lists(st.sampled_from(PLACES), min_size=1, max_size=12).map(
            lambda places: tuple(sorted(places, key=PLACES.index))
        ),
    }
).map(lambda fields: {**fields, "count": len(fields["places"])})
lungs = st.fixed_dictionaries(
    {
        "grammar": st.just("lung"),
        "present": st.just(True),
        "count": st.integers(1, 15),
        "sides": _in_order(SIDES, least=1),
        "left": _in_order(THIRDS, least=1),
        "right": _in_order(THIRDS, least=1),
    }
).map(
    lambda fields: {
        **fields,
        "bilateral": len(fields["sides"]) == 2,
        **{side: () for side in SIDES if side not in fields["sides"]},
    }
)
absences = st.fixed_dictionaries(
    {"grammar": st.sampled_from(["polyp", "phantom", "lung"]), "present": st.just(False), "count": st.just(0)}
)
anything = targets | lungs | absences
wordings = st.integers(0, PARAPHRASES - 1)

polyp_texts = st.builds(
    lambda count, size, colour, shape, places: (
        f"{count} {size} {colour} {shape} polyp, located in {', '.join(places)} of the image"
    ),
    st.sampled_from(["one", "two", "three", "four"]),
    st.sampled_from(["small", "medium", "large"]),
    st.sampled_from(["white", "bright", "dark"]),
    st.sampled_from(["round", "oval"]),
    st.lists(st.sampled_from(PLACES), min_size=1, max_size=4),
)
regions = st.builds(
    lambda heights, side: f"{heights} {side} lung",
    st.sampled_from(["all", "upper", "middle", "lower", "upper lower", "middle lower", "upper middle lower"]),
    st.sampled_from(["left", "right"]),
)
lung_texts = st.builds(
    lambda side, count, areas: f"{side} pulmonary infection, {count}, {' and '.join(areas)}.",
    st.sampled_from(["Bilateral", "Unilateral"]),
    st.sampled_from(["one infected area", "two infected areas", "five infected areas"]),
    st.lists(regions, min_size=1, max_size=2),
)
sentences = polyp_texts | lung_texts
