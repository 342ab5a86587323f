"""What the page says: predictions, sentences and images in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from tmca.data.contradictions import Contradiction
from tmca.errors import TMCAError
from tmca.prediction import NO_SENTENCE, Prediction, shortened

_CONFLICTS = {
    "presence": "The sentence says there is {said}, the mask shows {seen}.",
    "count": "The sentence counts {said}, the mask has {seen}.",
    "size": "The sentence says “{said}”, the mask is {seen}.",
    "side": "The sentence says “{said}”, the mask lies {seen}.",
    "height": "The sentence says “{said}”, the mask lies {seen}.",
}
_NOTHING = "nothing"


def headline(prediction: Prediction) -> str:
    """Return what was found and how large it is."""
    if not prediction.regions:
        return f"{prediction.answer[0].upper()}{prediction.answer[1:]}."
    count = len(prediction.regions)
    parts = [
        f"{count} region{'s' * (count > 1)} found",
        f"{percent(prediction.pixels / prediction.mask.size)} of the image",
    ]
    if (area := prediction.square_millimetres) is not None:
        parts.append(f"{area / 100:.1f} cm²" if area >= 100 else f"{area:.0f} mm²")
    return f"{', '.join(parts)}."


def summary(predictions: Sequence[Prediction]) -> str:
    """Return the answer to all sentences in one line, for a list."""
    if len(predictions) == 1:
        return headline(predictions[0])
    found = sum(bool(prediction.regions) for prediction in predictions)
    return f"{len(predictions)} sentences, regions found for {found} of them."


def effect(prediction: Prediction, measured_at: float) -> str:
    """Return what the sentence changed.

    Args:
        prediction: The answer, perhaps at another threshold than it was asked with.
        measured_at: The threshold it was asked with.
    """
    if not prediction.text:
        return "No sentence was given: the mask comes from the image alone."
    if prediction.setting == "no text":
        return "This model reads no sentence: the mask comes from the image alone."
    share = prediction.effects.get(NO_SENTENCE)
    if share is None:
        return (
            f"What the sentence changed was measured at threshold {measured_at:.2f}; segment again to measure it here."
        )
    if share == 0:
        return "The sentence changed nothing: without it the mask would be the same."
    return f"Without the sentence the mask would differ by {percent(share)}."


def conflict(found: Contradiction) -> str:
    """Return a contradiction between sentence and mask as a sentence."""
    return _CONFLICTS[found.kind].format(said=found.said or _NOTHING, seen=found.seen or _NOTHING)


def doubts(prediction: Prediction) -> list[str]:
    """Return what to check: words that the model does not know, an end that it has not read, what the mask denies."""
    lines = []
    if prediction.unknown_words:
        lines.append(f"Not in the model’s vocabulary: {shortened(prediction.unknown_words)}.")
    if prediction.truncated:
        lines.append("The model has not read the end of the sentence.")
    return lines + [conflict(found) for found in prediction.conflicts]


def reliability(prediction: Prediction) -> str:
    """Return how far the mask can be trusted, where the model is calibrated; else nothing."""
    if prediction.expected_dice is None:
        return ""
    return f"Estimated agreement with an expert’s mask (Dice): {prediction.expected_dice:.2f}."


def sentence(text: str | None) -> str:
    """Return a sentence in quotation marks, or that there is none."""
    return f"“{text}”" if text else "no sentence"


def token_count(counts: Sequence[tuple[int, bool, int]]) -> str:
    """Return how long sentences are for the model.

    Args:
        counts: Tokens, whether the end is not read, and the limit, of each sentence.
    """
    if not counts:
        return ""
    if counts[0][2] == 0:
        return "This model reads no sentence."
    lines = []
    for number, (tokens, truncated, limit) in enumerate(counts, start=1):
        start = f"Sentence {number}: " if len(counts) > 1 else ""
        lines.append(f"{start}{tokens} of {limit} tokens{'; the end will not be read' * truncated}.")
    return " ".join(lines)


def image_facts(kind: str, modality: str, size: tuple[int, int], frames: int) -> str:
    """Return what a file holds; nothing of whose it is."""
    what = f"DICOM {modality}".strip() if kind == "DICOM" else kind.capitalize() if kind == "picture" else kind
    several = f", {frames} slices" if frames > 1 else ""
    return f"{what}, {size[1]} × {size[0]} pixels{several}."


def problem(error: TMCAError) -> str:
    """Return what went wrong and what to do."""
    hint = f"{error.hint[0].upper()}{error.hint[1:]}." if error.hint else ""
    return f"{error.message.rstrip('.')}. {hint}".strip()


def percent(share: float) -> str:
    """Return a share in percent, with as many digits as it takes to not be 0."""
    value = 100 * share
    if 0 < value < 0.05:
        return "less than 0.1\N{NO-BREAK SPACE}%"
    return f"{value:.{0 if value >= 10 else 1}f}\N{NO-BREAK SPACE}%"
