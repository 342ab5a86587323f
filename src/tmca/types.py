"""Tensor aliases and the frozen dataclasses that flow through the package.

A layout becomes a manifest, its records become a ``Batch`` (or, one alone, a ``Sample``); a model turns a batch into
``ImageFeatures``, ``TextFeatures`` and a ``ModelOutput``. Names and shapes are those of ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

GLOBAL_LEVEL = "global"
"""Name of the alignment level behind the image encoder's pooling (the paper's TSDM-G)."""


@dataclass(frozen=True)
class Sample:
    """One preprocessed image with its mask and sentence.

    Attributes:
        id: Case name, unique in its manifest.
        image: Normalised image, float32 ``(3, height, width)``.
        mask: Ground-truth foreground, bool ``(1, height, width)``.
        text: The sentence, or ``None`` where the case has none.
    """

    id: str
    image: Float[Tensor, "3 height width"]
    mask: Bool[Tensor, "1 height width"]
    text: str | None


@dataclass(frozen=True)
class Batch:
    """Samples of one size stacked along the first dimension.

    Attributes:
        ids: Case names, one an image.
        images: Normalised images, float32.
        masks: Ground-truth foreground, bool.
        texts: One sentence an image; ``None`` where a case has none or where it was dropped in training.
    """

    ids: tuple[str, ...]
    images: Float[Tensor, "batch 3 height width"]
    masks: Bool[Tensor, "batch 1 height width"]
    texts: tuple[str | None, ...]

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``."""
        return type(self)(
            self.ids,
            self.images.to(device, non_blocking=non_blocking),
            self.masks.to(device, non_blocking=non_blocking),
            self.texts,
        )

    def pin_memory(self) -> Self:
        """Return the batch in memory that a GPU can read while it computes; PyTorch's loader asks for this."""
        return type(self)(self.ids, self.images.pin_memory(), self.masks.pin_memory(), self.texts)

    def __repr__(self) -> str:
        return f"Batch({self.batch_size} images of {tuple(self.images.shape[2:])}, {self.ids[0]} …)"


@dataclass(frozen=True)
class TextTokens:
    """Token ids of a batch of sentences, padded to one length.

    A row whose ``attention_mask`` is false everywhere stands for "no sentence".

    Attributes:
        input_ids: Token ids, int64.
        attention_mask: True at real tokens.
        token_counts: Tokens of each sentence *before* the cut to the limit, special tokens included.
    """

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    token_counts: tuple[int, ...]

    @property
    def limit(self) -> int:
        """Number of tokens a row can hold."""
        return self.input_ids.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, at least 1: what lies behind them is padding."""
        return min(self.limit, max((1, *self.token_counts)))

    @property
    def truncated(self) -> tuple[bool, ...]:
        """Whether each sentence was longer than the limit."""
        return tuple(count > self.limit for count in self.token_counts)

    def to(self, device: torch.device | str) -> Self:
        """Return the tokens on ``device``; a GPU copies them when it comes to it, and nobody waits."""
        to_card = torch.device(device).type == "cuda"
        ids, mask = (
            (value.pin_memory() if to_card and not value.is_cuda else value).to(device, non_blocking=to_card)
            for value in (self.input_ids, self.attention_mask)
        )
        return type(self)(ids, mask, self.token_counts)


@dataclass(frozen=True)
class TextFeatures:
    """What a text encoder says of a batch of sentences.

    Attributes:
        word_features: One vector a token; zeros at padding, so that padding changes nothing downstream, unless
            ``text_encoder.mask_padding`` is off.
        attention_mask: True at real tokens; a row of false stands for "no sentence".
        sentence_embedding: Mean of the real tokens' vectors (or the first or last token's, by config).
        present: Which images have a sentence.
    """

    word_features: Float[Tensor, "batch tokens text_dim"]
    attention_mask: Bool[Tensor, "batch tokens"]
    sentence_embedding: Float[Tensor, "batch sentence_dim"]
    present: Bool[Tensor, " batch"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "present", self.attention_mask.any(dim=1))


@dataclass(frozen=True)
class ImageFeatures:
    """What an image encoder says of a batch of images; it has not seen any sentence.

    Attributes:
        feature_maps: Stride → ``(batch, channels, rows, cols)``; which strides there are is the method's business.
        image_embedding: Pooled global feature ``(batch, dim)``, of methods that have one.
        size: Height and width of the images before padding, in pixels.
        encoded_skips: Stride → what the skip connection adds to the decoder's map there, of methods that compute it
            before they know a sentence.
    """

    feature_maps: dict[int, Float[Tensor, "batch _ _ _"]]
    image_embedding: Float[Tensor, "batch dim"] | None
    size: tuple[int, int]
    encoded_skips: dict[int, Float[Tensor, "batch _ _ _"]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return next(iter(self.feature_maps.values())).shape[0]

    def repeat(self, times: int) -> Self:
        """Return the features with every image repeated for so many sentences; of one image without a copy."""

        def repeated(rows: Tensor) -> Tensor:
            return rows.expand(times, *rows.shape[1:]) if len(rows) == 1 else rows.repeat_interleave(times, dim=0)

        return self._changed(repeated)

    def split(self, images: int) -> list[Self]:
        """Return the features of each image; of a mirrored batch, an image's rows are one batch apart."""
        if images == 1:
            return [self]
        return [self._changed(partial(_row_of, number, images)) for number in range(images)]

    @classmethod
    def join(cls, features: Sequence[Self]) -> Self:
        """Return the features of several images as one batch: the inverse of :meth:`split`."""
        first = features[0]

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part[row : row + 1] for row in range(len(parts[0])) for part in parts])

        embeddings = [one.image_embedding for one in features if one.image_embedding is not None]
        return cls(
            {stride: joined([one.feature_maps[stride] for one in features]) for stride in first.feature_maps},
            joined(embeddings) if embeddings else None,
            first.size,
            {stride: joined([one.encoded_skips[stride] for one in features]) for stride in first.encoded_skips},
        )

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        tensors = [*self.feature_maps.values(), *self.encoded_skips.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            {stride: change(maps) for stride, maps in self.feature_maps.items()},
            None if self.image_embedding is None else change(self.image_embedding),
            self.size,
            {stride: change(maps) for stride, maps in self.encoded_skips.items()},
        )


def _row_of(number: int, images: int, rows: Tensor) -> Tensor:
    """Return the rows of one image; copied, so that it does not keep the others in memory."""
    return rows[number::images].clone()


@dataclass(frozen=True)
class LevelEmbeddings:
    """The image and text vectors of one aligned level, in one space but not yet normalised.

    Attributes:
        image_embedding: One vector an image.
        text_embedding: One vector a sentence.
        feature_map: Given where the loss shall take the image vector from the masked part of the map instead.
    """

    image_embedding: Float[Tensor, "batch dim"]
    text_embedding: Float[Tensor, "batch dim"]
    feature_map: Float[Tensor, "batch dim rows cols"] | None = None


@dataclass(frozen=True)
class ModelOutput:
    """What every method of the registry returns.

    Attributes:
        mask_logits: Before the sigmoid, at the size of the input images.
        alignments: Level name (``"8"``, ``"16"``, ``"32"``, ``"global"``) → embeddings; those of an image without a
            sentence mean nothing. Empty for methods that do not align or that were given no text.
        present: Which images of the batch have a sentence, in the order of the batch.
        side_logits: Further logits of the same size that training supervises like ``mask_logits`` (deep supervision).
        class_logits: Name of an attribute of the target (see :func:`tmca.losses.target_classes`) → logits
            ``(batch, classes)``, of methods that are also trained to tell it.
    """

    mask_logits: Float[Tensor, "batch 1 height width"]
    alignments: dict[str, LevelEmbeddings]
    present: Bool[Tensor, " batch"]
    side_logits: tuple[Float[Tensor, "batch 1 height width"], ...] = ()
    class_logits: dict[str, Float[Tensor, "batch _"]] = field(default_factory=dict)
