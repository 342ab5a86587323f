"""A model cut into graphs of named tensors, the form in which other runtimes take it.

``image_encoder``: images → what the decoder reads of them. ``text_encoder``: token ids → what the decoder reads of the
sentence. ``decoder``: both → logits. ``model``: the three in one. An image is encoded once and then takes many
sentences at the decoder's cost, as in :class:`~tmca.inference.Predictor`.

Images have any height and width that are multiples of :data:`MULTIPLE`; batch and number of tokens are free as well. A
row without a real token stands for "no sentence".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tmca.models import TMCA, SegmentationModel
from tmca.models.preparation import prepare_for_prediction
from tmca.types import ImageFeatures, TextFeatures, TextTokens

MULTIPLE = 32
"""Sides of the images are multiples of this: the deepest stride of the encoders."""
MAP, SKIP, EMBEDDING = "feature_map_", "encoded_skip_", "image_embedding"
WORDS, WORD_MASK, SENTENCE = "word_features", "word_mask", "sentence_embedding"
LOGITS = "mask_logits"
WHOLE = "model"
"""Name of the graph that is one piece."""
Dimensions = dict[str, dict[int, Any]]
_ROWS, _COLS = 2, 3
"""Height and width of the images that are traced, in multiples of :data:`MULTIPLE`."""


@dataclass(frozen=True)
class Graph:
    """A module whose inputs and outputs are tensors in a fixed order.

    Attributes:
        name: ``image_encoder``, ``text_encoder``, ``decoder`` or ``model``.
        module: Takes the inputs, returns a tuple of the outputs.
        inputs: Name → example.
        outputs: Names.
        dynamic: Input → its dimensions of free size, and how they depend on each other.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Dimensions


class ImageEncoderGraph(nn.Module):
    """Images → those features of them that the decoder reads."""

    def __init__(self, network: SegmentationModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode the images."""
        (images,) = inputs
        named = name_features(self.network.encode_image(images))
        return tuple(named[name] for name in self.outputs)


class TextEncoderGraph(nn.Module):
    """Token ids → features of the words and of the sentence, as many words as the decoder knows."""

    def __init__(self, network: SegmentationModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode the sentences."""
        named = name_words(encode_tokens(self.network, *inputs))
        return tuple(named[name] for name in self.outputs)


class DecoderGraph(nn.Module):
    """Features of images and sentences → logits."""

    def __init__(self, network: SegmentationModel, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Segment the images."""
        named = dict(zip(self.inputs, inputs, strict=True))
        text = features_of_text(self.network, named)
        return (self.network.segment(features_of_images(named), text).mask_logits,)


class WholeGraph(nn.Module):
    """Images and token ids → logits."""

    def __init__(self, network: SegmentationModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Segment the images."""
        images, *tokens = inputs
        text = encode_tokens(self.network, *tokens) if tokens else None
        return (self.network.segment(self.network.encode_image(images), text).mask_logits,)


def encode_tokens(network: SegmentationModel, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
    """Return the features of tokenized sentences, padded to the tokens that the network knows."""
    encoder = network.text_encoder
    if encoder is None:
        raise TypeError("the network reads no text")
    limit = encoder.max_tokens
    if encoder.config.mask_padding:
        features: TextFeatures = encoder(TextTokens(input_ids, attention_mask, (input_ids.shape[1],)))
        words = nn.functional.pad(features.word_features, (0, 0, 0, limit))[:, :limit]
        return TextFeatures(words, _padded(attention_mask, limit), features.sentence_embedding)
    # What the encoder gives at padding is read as words are.
    padded: TextFeatures = encoder(TextTokens(_padded(input_ids, limit), _padded(attention_mask, limit), (limit,)))
    return padded


def _padded(tokens: Tensor, limit: int) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], limit)], dim=1)[:, :limit]


def name_features(features: ImageFeatures) -> dict[str, Tensor]:
    """Return the features of images by name."""
    named = {f"{MAP}{stride}": tensor for stride, tensor in features.feature_maps.items()}
    named |= {f"{SKIP}{stride}": tensor for stride, tensor in features.encoded_skips.items()}
    return named if features.image_embedding is None else {**named, EMBEDDING: features.image_embedding}


def name_words(features: TextFeatures) -> dict[str, Tensor]:
    """Return the features of sentences by name."""
    named = (features.word_features, features.attention_mask, features.sentence_embedding)
    return dict(zip((WORDS, WORD_MASK, SENTENCE), named, strict=True))


def features_of_images(named: Mapping[str, Tensor]) -> ImageFeatures:
    """Return the features of images from their names; the images are as large as their finest map says."""
    maps = {int(name.removeprefix(MAP)): named[name] for name in named if name.startswith(MAP)}
    skips = {int(name.removeprefix(SKIP)): named[name] for name in named if name.startswith(SKIP)}
    finest = min([*maps, *skips])
    like = maps.get(finest, skips.get(finest))
    rows, cols = like.shape[2:]  # type: ignore[union-attr]
    return ImageFeatures(maps, named.get(EMBEDDING), (rows * finest, cols * finest), skips)


def features_of_text(network: SegmentationModel, named: Mapping[str, Tensor]) -> TextFeatures | None:
    """Return the features of sentences from their names; what the network does not read is left empty."""
    if network.text_encoder is None:
        return None
    mask = named[WORD_MASK]
    nothing = torch.zeros(1, 1, 1).expand(mask.shape[0], mask.shape[1], network.text_encoder.text_dim)
    sentence = named.get(SENTENCE)
    if sentence is None:
        sentence = nothing[:, 0, :1].expand(-1, network.text_encoder.sentence_dim)
    return TextFeatures(named.get(WORDS, nothing), mask, sentence)


def cut_graphs(model: SegmentationModel) -> list[Graph]:
    """Return the graphs of a model, in float32; the model itself stays as it is.

    Args:
        model: On the CPU.
    """
    network = prepare_for_prediction(model, torch.device("cpu"), half=False)
    if isinstance(network, TMCA) and network.alignment is not None:
        network.alignment.aligned = ()  # of use in training only, as are the heads that serve no enhancement
        for level in set(network.alignment.heads) - set(network.enhancement):
            del network.alignment.heads[level]
    _write_padding_out(network)
    images = torch.rand(2, 3, _ROWS * MULTIPLE, _COLS * MULTIPLE)
    tokens = _example_tokens(network)
    image_features, text_features = _read_features(network, images, tokens)

    batch, rows, cols = (torch.export.Dim(name) for name in ("batch", "rows", "cols"))
    length = torch.export.Dim("tokens", max=1 if network.text_encoder is None else network.text_encoder.max_tokens)
    of_images: Dimensions = {"images": {0: batch, 2: MULTIPLE * rows, 3: MULTIPLE * cols}}
    of_tokens: Dimensions = {name: {0: batch, 1: length} for name in tokens}
    of_features: Dimensions = {name: {0: batch} for name in image_features | text_features}
    for name, tensor in image_features.items():
        if tensor.ndim == 4:
            of_features[name] |= {2: tensor.shape[2] // _ROWS * rows, 3: tensor.shape[3] // _COLS * cols}

    encoded, told, read = tuple(image_features), tuple(text_features), image_features | text_features
    graphs = [Graph("image_encoder", ImageEncoderGraph(network, encoded), {"images": images}, encoded, of_images)]
    if tokens:
        graphs.append(Graph("text_encoder", TextEncoderGraph(network, told), tokens, told, of_tokens))
    graphs.append(Graph("decoder", DecoderGraph(network, tuple(read)), read, (LOGITS,), of_features))
    everything = {"images": images, **tokens}
    graphs.append(Graph(WHOLE, WholeGraph(network), everything, (LOGITS,), of_images | of_tokens))
    for graph in graphs:
        graph.module.eval()
    return graphs


def _write_padding_out(network: SegmentationModel) -> None:
    """Pad by constants where transformers computes TensorFlow's padding from the size of the map.

    With sides that are multiples of :data:`MULTIPLE` it is the same at every size, and only so can the size stay free.
    """
    padding = [layer for layer in network.modules() if getattr(getattr(layer, "config", None), "tf_padding", False)]
    for layer in padding:
        convolution = getattr(layer, "convolution", None)
        if isinstance(convolution, nn.Conv2d):
            sides = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
            amounts = [(max(kernel - stride, 0), dilation) for kernel, stride, dilation in sides]
            (top, bottom), (left, right) = [
                (total // 2 * dilation, (total - total // 2) * dilation) for total, dilation in amounts
            ]
            layer.convolution = nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), convolution)
    for layer in padding:
        layer.config.tf_padding = False  # type: ignore[union-attr]


def _example_tokens(network: SegmentationModel) -> dict[str, Tensor]:
    if network.text_encoder is None:
        return {}
    length = network.text_encoder.max_tokens - 1
    mask = torch.tensor([[True] * length, [True] * (length - 1) + [False]])
    return {"input_ids": mask.to(torch.int64), "attention_mask": mask}


@torch.enable_grad()
def _read_features(
    network: SegmentationModel, images: Tensor, tokens: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return those features of images and of sentences that the decoder reads: on which what it returns depends."""
    with torch.no_grad():
        of_images = name_features(network.encode_image(images))
        of_text = name_words(encode_tokens(network, *tokens.values())) if tokens else {}
    named = {name: value.detach().clone() for name, value in (of_images | of_text).items()}
    differentiable = {name: value.requires_grad_() for name, value in named.items() if value.is_floating_point()}
    output = network.segment(features_of_images(named), features_of_text(network, named))
    returned = [output.mask_logits, *output.side_logits, *output.class_logits.values()]
    total = torch.stack([logits.sum() for logits in returned]).sum()
    gradients = torch.autograd.grad(total, list(differentiable.values()), allow_unused=True)
    read = {name for name, gradient in zip(differentiable, gradients, strict=True) if gradient is not None}
    read.add(WORD_MASK)
    chosen = [{name: value for name, value in part.items() if name in read} for part in (of_images, of_text)]
    return chosen[0], chosen[1]
