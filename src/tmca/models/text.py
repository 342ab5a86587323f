"""Text encoder: sentences → one vector a word and one a sentence.

Three kinds behind one contract: a BERT read from a folder or the hub (CXR-BERT in the paper, frozen), the text side of
a CLIP, and ``scratch``, a small BERT that is trained with the segmentation and whose WordPiece vocabulary is learned
from the training sentences. Word features are the mean of the last three layers (Sec. 3.1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import TextEncoderConfig
from tmca.errors import ConfigError, WeightsError
from tmca.models.tokenizer import SCRATCH, SentenceTokenizer
from tmca.models.weights import changed_fields, load_config, load_state_dict, locate, without_kernels
from tmca.types import TextFeatures, TextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP_TEXT = "clip_text_model"
BERTS = ("bert", "cxr-bert")
"""What the config of a BERT calls its kind."""
CACHE_SIZE = 5_000
"""Sentences whose features are remembered: 370 MB of a BERT of 768 and 24 tokens."""


class TextEncoder(nn.Module):
    """A BERT or CLIP text model behind the contract a guided decoder needs.

    Args:
        backbone: Model whose hidden states are averaged.
        tokenizer: The tokenizer that belongs to it.
        config: Layers to average, pooling, and whether the weights are frozen.

    Attributes:
        text_dim: Width of the word features.
        sentence_dim: Width of the sentence embedding.
        max_tokens: Tokens a row.
        precision: What remembered features are computed in, whatever the autocast of the caller.

    Raises:
        ConfigError: The configuration or the tokenizer does not fit the backbone.
    """

    def __init__(self, backbone: PreTrainedModel, tokenizer: SentenceTokenizer, config: TextEncoderConfig) -> None:
        super().__init__()
        depth = backbone.config.num_hidden_layers
        if config.word_layers > depth:
            raise ConfigError(
                f"text_encoder.word_layers is {config.word_layers}, but the encoder has {depth} layers",
                hint=f"set it to {depth} or less",
            )
        if tokenizer.vocabulary_size > backbone.config.vocab_size:
            raise ConfigError(
                f"The tokenizer has {tokenizer.vocabulary_size} entries, the encoder {backbone.config.vocab_size}",
                hint="use the tokenizer that belongs to the weights",
            )
        positions = backbone.config.max_position_embeddings
        if tokenizer.max_tokens > positions:
            raise ConfigError(
                f"text_encoder.max_tokens is {tokenizer.max_tokens}, but the encoder reads {positions} tokens",
                hint=f"set it to {positions} or less",
            )
        if config.sentence_pooling == "first" and backbone.config.model_type == CLIP_TEXT:
            raise ConfigError(
                "text_encoder.sentence_pooling is 'first', but the first token of a CLIP sees no word of the sentence",
                hint="set it to 'last'",
            )
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config
        self.text_dim: int = backbone.config.hidden_size
        self.sentence_dim: int = self.text_dim if self._projection is None else backbone.config.projection_dim
        self.max_tokens = tokenizer.max_tokens
        self.precision = torch.float32
        if config.freeze:
            self.requires_grad_(requires_grad=False)
            self.eval()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget_features)  # type: ignore[no-untyped-call]

    def architecture(self) -> dict[str, Any]:
        """Return what :func:`build_text_encoder` needs to build this encoder again without its weights."""
        return {"model_type": self.backbone.config.model_type, **changed_fields(self.backbone.config)}

    def train(self, mode: bool = True) -> TextEncoder:
        """Set training mode; a frozen encoder stays in evaluation mode, so that its dropout is off."""
        super().train(mode and not self.config.freeze)
        return self

    @property
    def _final_norm(self) -> nn.Module | None:
        """The LayerNorm that a CLIP applies to its last hidden state; a BERT has it inside its layers."""
        return getattr(getattr(self.backbone, "text_model", self.backbone), "final_layer_norm", None)

    @property
    def _projection(self) -> nn.Module | None:
        """CLIP's projection of the last token into the space it shares with images."""
        return getattr(self.backbone, "text_projection", None)

    def forward(self, tokens: TextTokens) -> TextFeatures:
        """Encode tokenized sentences.

        Differs from the paper in:
            1. The sentence embedding is the mean over real tokens; the paper leaves the pooling open.
            2. Features at padding are zeroed, unless ``mask_padding`` is off (as in Ariadne).

        Source:
            Li et al., TMCA, Sec. 3.1.
        """
        # Attention over a row of padding only is undefined; such a row reads its first token and is zeroed below.
        readable = tokens.attention_mask.clone()
        readable[:, 0] = True
        # Padding behind the longest sentence is not computed where nobody reads it.
        length = tokens.longest if self.config.mask_padding else tokens.limit
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
            output = self.backbone(
                input_ids=tokens.input_ids[:, :length],
                attention_mask=readable[:, :length].to(torch.int64),
                output_hidden_states=True,
            )
            words = torch.stack(output.hidden_states[-self.config.word_layers :]).mean(dim=0)
            words = words if self._final_norm is None else self._final_norm(words)
        words = nn.functional.pad(words, (0, 0, 0, tokens.limit - length))
        mask = tokens.attention_mask
        kept = mask if self.config.mask_padding else mask.any(dim=1, keepdim=True)
        return self._features(words * kept.unsqueeze(-1), mask)

    def encode(self, texts: Sequence[str | None]) -> TextFeatures:
        """Encode sentences; a frozen encoder computes each distinct sentence once and remembers its features."""
        device = next(self.backbone.parameters()).device
        tokens = self.tokenizer(texts).to(device)
        if self.training or not self.config.freeze:
            features: TextFeatures = self(tokens)
            return features
        self._remember([text for text in texts if text and text.strip()])
        nothing = torch.zeros(self.max_tokens, self.text_dim)
        words = torch.stack([self._cache[text] if text and text.strip() else nothing for text in texts])
        if device.type == "cuda":  # copied while it computes; from other memory it would be waited for
            words = words.pin_memory()
        return self._features(words.to(device, non_blocking=True), tokens.attention_mask)

    def forget(self) -> None:
        """Forget the features of the sentences seen so far."""
        self._cache.clear()

    def _remember(self, texts: Sequence[str]) -> None:
        missing = [text for text in dict.fromkeys(texts) if text not in self._cache]
        device = next(self.backbone.parameters()).device
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            # What is cached must not depend on the precision of the step that happened to ask first.
            half = self.precision != torch.float32
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                words = self(self.tokenizer(chunk).to(device)).word_features.float().cpu()
            self._cache.update(zip(chunk, words, strict=True))
        for text in texts:
            self._cache.move_to_end(text)
        while len(self._cache) > max(CACHE_SIZE, len(set(texts))):
            self._cache.popitem(last=False)

    def _features(
        self,
        words: Float[Tensor, "batch tokens text_dim"],
        attention_mask: Tensor,
    ) -> TextFeatures:
        if self.config.sentence_pooling == "first":
            sentence = words[:, 0]
        elif self.config.sentence_pooling == "last":
            last = (attention_mask.sum(dim=1) - 1).clamp(min=0)
            sentence = words[torch.arange(len(words), device=words.device), last]
            sentence = sentence * attention_mask.any(dim=1, keepdim=True)
            if self._projection is not None:
                # Autocast off, as for what is cached.
                with torch.autocast(words.device.type, enabled=False):
                    sentence = self._projection(sentence.float())
        else:
            real = words * attention_mask.unsqueeze(-1)
            sentence = real.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return TextFeatures(words, attention_mask, sentence)


def _forget_features(encoder: TextEncoder, _: object) -> None:
    encoder.forget()  # other weights, other features


def build_text_encoder(
    config: TextEncoderConfig, tokenizer: SentenceTokenizer, *, architecture: dict[str, Any] | None = None
) -> TextEncoder:
    """Build a text encoder, with its pretrained weights unless a checkpoint will fill it.

    Args:
        config: Which encoder.
        tokenizer: See :func:`build_tokenizer`.
        architecture: The encoder's architecture as a checkpoint stored it; given, no pretrained weights are looked for.

    Raises:
        WeightsError: The weights are neither on disk nor reachable, or do not fit.
        ConfigError: The encoder is neither a BERT nor a CLIP.
    """
    if architecture is not None:
        values, state = architecture, None
    elif config.weights == SCRATCH:
        values, state = scratch_bert_config(config, tokenizer), None
    else:
        folder = locate(config.weights)
        values, state = load_config(folder), load_state_dict(folder)
    values = without_kernels(values)
    kind = values.get("model_type", "bert")
    if kind not in (*BERTS, "clip", CLIP_TEXT):
        # The tensors of a RoBERTa, for one, have a BERT's names, but its positions count from two.
        raise ConfigError(
            f"The text encoder {config.weights!r} is of the kind {kind!r}, which is not supported",
            hint=f"supported are {', '.join((*BERTS, 'clip', CLIP_TEXT))}",
        )
    if kind in ("clip", CLIP_TEXT):
        backbone = _clip(values, projected=config.sentence_pooling == "last")
        state = None if state is None else clip_weights(state, backbone)
    else:
        backbone = _bert(values)
        state = None if state is None else bert_weights(state)
    if state is not None:
        wanted = backbone.state_dict()
        missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
        if missing:
            raise WeightsError(
                f"Weights {config.weights!r} do not fit the {type(backbone).__name__} of their config: {len(missing)} "
                f"tensors missing or of another shape, first {missing[0]!r}",
                hint="download the folder again, or correct its config.json",
            )
        backbone.load_state_dict({key: state[key] for key in wanted})
    return TextEncoder(backbone, tokenizer, config)


def _bert(values: dict[str, Any]) -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    accepted = BertConfig().to_dict()
    options = {key: value for key, value in values.items() if key in accepted and key != "model_type"}
    return BertModel(BertConfig(**options), add_pooling_layer=False)


def _clip(values: dict[str, Any], *, projected: bool) -> PreTrainedModel:
    """Build the text side of a CLIP from the config of the whole or of the text side; no projection: dimension none."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if values["model_type"] != CLIP_TEXT:
        whole = CLIPConfig.from_dict(values)
        values = whole.to_dict()["text_config"] | {"projection_dim": whole.projection_dim, "architectures": None}
    text_config = CLIPTextConfig.from_dict(values)
    text_config.dtype = torch.float32  # of training and use; a config stores the precision of its file
    if not projected or "CLIPTextModel" in (values.get("architectures") or ()):
        text_config.projection_dim = None
    projected = text_config.projection_dim is not None
    return CLIPTextModelWithProjection(text_config) if projected else CLIPTextModel(text_config)


def scratch_bert_config(config: TextEncoderConfig, tokenizer: SentenceTokenizer) -> dict[str, Any]:
    """Return the transformers configuration of the small BERT that is trained with the model."""
    return {
        "vocab_size": tokenizer.vocabulary_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention_heads,
        "intermediate_size": 2 * config.hidden_size,
        "max_position_embeddings": config.max_tokens,
        "type_vocab_size": 1,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def clip_weights(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a CLIP, or of its text side, under the names of ``backbone``.

    Without a projection, transformers 5 drops the prefix ``text_model.`` that files carry. The image side of a whole
    CLIP is left over.
    """
    if hasattr(backbone, "text_model"):
        return state
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def bert_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain BERT tensors of a checkpoint that may wrap them.

    CXR-BERT stores its encoder under ``bert.`` beside heads that segmentation does not use (``cls.*``,
    ``cls_projection_head.*``). Its own modelling code is remote code and does not run on transformers 5; the encoder
    itself is an ordinary BERT.
    """
    if any(key.startswith("bert.") for key in state):
        state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    # Checkpoints from before transformers 2 name the LayerNorm parameters gamma and beta.
    return {
        key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
        for key, value in state.items()
    }
