from __future__ import annotations

import copy
import csv
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    RobertaConfig,
    RobertaModel,
)

from tmca.config import TextEncoderConfig
from tmca.errors import ConfigError, WeightsError
from tmca.models.preparation import prepare_for_prediction
from tmca.models.text import TextEncoder, bert_weights, build_text_encoder, scratch_bert_config
from tmca.models.tokenizer import SentenceTokenizer, build_tokenizer

WORDS = (
    "one two three small large lesion lesions infected area areas left right upper lower lung of the image located in"
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *WORDS.split(), "##s"]
TEXTS = (
    "one small lesion, located in upper left of the image",
    "Two large lesions.",
    "three infected areas, upper left lung and lower right lung",
)
COUNTS = (13, 6, 13)
"""Tokens of the sentences above, [CLS] and [SEP] included."""
MAX_TOKENS = 20
TOKENIZER = SentenceTokenizer.learn(TEXTS, vocabulary_size=90, max_tokens=MAX_TOKENS)


@pytest.fixture
def bert() -> BertModel:
    options = {"num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 24}
    config = BertConfig(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, **options)
    model = BertModel(config, add_pooling_layer=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def folder(bert: BertModel, tmp_path: Path) -> Path:
    """Return a BERT in the layout of the hub."""
    target = tmp_path / "bert"
    bert.save_pretrained(target)
    _write_vocabulary(target)
    return target


def _write_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def _build(folder: Path, **fields: Any) -> TextEncoder:
    config = TextEncoderConfig(weights=str(folder), max_tokens=MAX_TOKENS, **fields)
    return build_text_encoder(config, build_tokenizer(config)).eval()


def _scratch(sentences: Sequence[str] = TEXTS, **fields: Any) -> TextEncoder:
    fields = {"hidden_size": 16, "layers": 3, "attention_heads": 2} | fields
    config = TextEncoderConfig(weights="scratch", freeze=False, max_tokens=MAX_TOKENS, **fields)
    return build_text_encoder(config, build_tokenizer(config, sentences))


def _vocabulary(tokenizer: SentenceTokenizer) -> dict[str, int]:
    return tokenizer.tokenizer.get_vocab()


# --- features -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("word_layers", [1, 3, 4])
def test_word_features_are_the_mean_of_the_last_layers(bert: BertModel, folder: Path, word_layers: int):
    encoder = _build(folder, word_layers=word_layers)
    tokens = encoder.tokenizer(TEXTS)
    features = encoder(tokens)
    assert torch.equal(features.attention_mask, tokens.attention_mask)
    assert tokens.attention_mask.sum(dim=1).tolist() == list(COUNTS)
    for row, count in enumerate(tokens.token_counts):
        # Alone and without padding, so that padding can have no part in what is expected.
        output = bert(input_ids=tokens.input_ids[row : row + 1, :count], output_hidden_states=True)
        expected = torch.stack(output.hidden_states[-word_layers:]).mean(dim=0)[0]
        torch.testing.assert_close(features.word_features[row, :count], expected, rtol=1e-5, atol=1e-5)
        assert not features.word_features[row, count:].any()
    output = bert(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.long(), output_hidden_states=True)
    expected = torch.stack(output.hidden_states[-word_layers:]).mean(dim=0) * tokens.attention_mask[:, :, None]
    torch.testing.assert_close(features.word_features, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_sentence_embedding_is_the_mean_of_real_tokens(folder: Path):
    features = _build(folder).encode([*TEXTS, None])
    for row, count in enumerate(COUNTS):
        expected = features.word_features[row, :count].mean(dim=0)
        torch.testing.assert_close(features.sentence_embedding[row], expected)
    assert not features.sentence_embedding[3].any()
    assert features.present.tolist() == [True, True, True, False]


@torch.no_grad()
def test_the_sentence_embedding_can_be_the_first_token(folder: Path):
    features = _build(folder, sentence_pooling="first").encode(TEXTS)
    assert torch.equal(features.sentence_embedding, features.word_features[:, 0])


@torch.no_grad()
def test_padding_can_keep_what_the_encoder_gives_there(bert: BertModel, folder: Path):
    encoder = _build(folder, word_layers=1, mask_padding=False)
    tokens = encoder.tokenizer([*TEXTS, None])
    features = encoder(tokens)
    expected = bert(input_ids=tokens.input_ids[:3], attention_mask=tokens.attention_mask[:3].long()).last_hidden_state
    torch.testing.assert_close(features.word_features[:3], expected, rtol=1e-5, atol=1e-5)
    assert not features.word_features[3].any()
    assert features.present.tolist() == [True, True, True, False]
    torch.testing.assert_close(
        features.sentence_embedding, _build(folder, word_layers=1)(tokens).sentence_embedding, rtol=1e-5, atol=1e-5
    )
    remembered = encoder.encode([*TEXTS, None])
    torch.testing.assert_close(remembered.word_features, features.word_features)
    torch.testing.assert_close(remembered.sentence_embedding, features.sentence_embedding)


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_behind_the_longest_sentence_is_computed_only_where_it_is_read(folder: Path, mask_padding: bool):
    encoder = _build(folder, mask_padding=mask_padding)
    widths: list[int] = []
    encoder.backbone.register_forward_pre_hook(
        lambda *call: widths.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    features = encoder.encode(TEXTS[1:2])
    assert features.word_features.shape == (1, MAX_TOKENS, encoder.text_dim)
    assert widths == [COUNTS[1] if mask_padding else MAX_TOKENS]
    encoder.train()
    assert encoder(encoder.tokenizer([None])).word_features.count_nonzero() == 0


def test_a_sentence_does_not_see_its_neighbours(folder: Path):
    encoder = _build(folder)
    together = encoder(encoder.tokenizer([TEXTS[0], None, TEXTS[1]])).word_features
    for row, text in enumerate((TEXTS[0], None, TEXTS[1])):
        torch.testing.assert_close(encoder(encoder.tokenizer([text])).word_features[0], together[row])


# --- weights ------------------------------------------------------------------------------------------------------


def _as_cxr_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    wrapped = {f"bert.{name}": value.clone() for name, value in state.items()}
    return wrapped | {
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "cls.predictions.bias": torch.randn(len(VOCABULARY)),
        "cls.predictions.transform.LayerNorm.weight": torch.randn(16),
        "cls_projection_head.dense_to_hidden.weight": torch.randn(8, 16),
        "cls_projection_head.LayerNorm.bias": torch.randn(8),
    }


def _write_cxr_bert(bert: BertModel, folder: Path, state: dict[str, Tensor], *, safetensors: bool) -> Path:
    folder.mkdir()
    _write_vocabulary(folder)
    remote = {"AutoModel": "modeling_cxrbert.CXRBertModel"}
    values = bert.config.to_dict() | {"model_type": "cxr-bert", "projection_size": 8, "auto_map": remote}
    (folder / "config.json").write_text(json.dumps(values))
    if safetensors:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("safetensors", [False, True])
def test_the_layout_of_cxr_bert_loads(bert: BertModel, folder: Path, tmp_path: Path, safetensors: bool):
    wrapped = _write_cxr_bert(bert, tmp_path / "cxr", _as_cxr_bert(bert.state_dict()), safetensors=safetensors)
    plain, cxr = _build(folder).encode(TEXTS), _build(wrapped).encode(TEXTS)
    assert plain.word_features.any()
    assert torch.equal(plain.word_features, cxr.word_features)


def test_the_old_names_of_layer_norm_load(bert: BertModel, folder: Path, tmp_path: Path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in _as_cxr_bert(bert.state_dict()).items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old
    assert bert_weights(old).keys() == bert.state_dict().keys() | {"embeddings.position_ids"}
    written = _write_cxr_bert(bert, tmp_path / "old", old, safetensors=False)
    assert torch.equal(_build(folder).encode(TEXTS).word_features, _build(written).encode(TEXTS).word_features)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_their_config(bert: BertModel, tmp_path: Path, change: str):
    state = _as_cxr_bert(bert.state_dict())
    if change == "missing":
        del state["bert.embeddings.LayerNorm.bias"]
    else:
        state["bert.embeddings.LayerNorm.bias"] = torch.zeros(3)
    written = _write_cxr_bert(bert, tmp_path / "cut", state, safetensors=True)
    with pytest.raises(WeightsError, match=r"1 tensors missing.* first 'embeddings\.LayerNorm\.bias'"):
        _build(written)


def test_a_checkpoint_fills_an_encoder_without_its_folder(folder: Path):
    config = TextEncoderConfig(weights="somebody/not-on-this-machine", max_tokens=MAX_TOKENS)
    tokenizer = SentenceTokenizer.read(folder, MAX_TOKENS)
    original = _build(folder)
    encoder = build_text_encoder(config, tokenizer, architecture=original.backbone.config.to_dict())
    encoder.load_state_dict(original.state_dict())
    assert torch.equal(encoder.encode(TEXTS).word_features, original.encode(TEXTS).word_features)


def test_word_layers_beyond_the_depth_are_refused(folder: Path):
    with pytest.raises(ConfigError, match="word_layers is 5, but the encoder has 4 layers") as caught:
        _build(folder, word_layers=5)
    assert caught.value.hint == "set it to 4 or less"


def test_a_tokenizer_with_too_many_entries_is_refused(folder: Path):
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "pneumonia"]) + "\n")
    with pytest.raises(ConfigError, match=f"{len(VOCABULARY) + 1} entries, the encoder {len(VOCABULARY)}"):
        _build(folder)


# --- freezing and caching -----------------------------------------------------------------------------------------


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[TextEncoder], list[int]]:
    """Return a function that lists how many sentences each run of an encoder reads from now on."""

    def listen(encoder: TextEncoder) -> list[int]:
        rows: list[int] = []
        run = encoder.backbone.forward

        def counted(*, input_ids: Tensor, **others: Any) -> Any:
            rows.append(len(input_ids))
            return run(input_ids=input_ids, **others)

        monkeypatch.setattr(encoder.backbone, "forward", counted)
        return rows

    return listen


def test_a_frozen_encoder_stays_in_evaluation_mode_without_gradients(folder: Path):
    encoder = _build(folder)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder(encoder.tokenizer(TEXTS))
    assert not features.word_features.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(encoder(encoder.tokenizer(TEXTS)).word_features, features.word_features)


def test_an_encoder_that_is_not_frozen_trains(folder: Path):
    encoder = _build(folder, freeze=False)
    encoder.train()
    assert all(module.training for module in encoder.modules())
    encoder.encode(TEXTS).word_features.sum().backward()
    assert encoder.backbone.embeddings.word_embeddings.weight.grad.any()
    dropped = [encoder.encode(TEXTS).word_features for _ in range(2)]
    assert not torch.equal(*dropped)


def test_each_distinct_sentence_is_computed_once(folder: Path, rows_read: Callable[[TextEncoder], list[int]]):
    encoder = _build(folder)
    rows = rows_read(encoder)
    first, second, third = TEXTS
    once = encoder.encode([first, second, first, None, "  "])
    assert rows == [2]
    again = encoder.encode([second, first])
    assert rows == [2]
    assert torch.equal(again.word_features, once.word_features[[1, 0]])
    encoder.encode([third, first])
    assert rows == [2, 1]
    assert encoder.encode([None]).word_features.shape == (1, MAX_TOKENS, 16)
    assert rows == [2, 1]


def test_an_encoder_that_is_not_frozen_is_not_cached(folder: Path, rows_read: Callable[[TextEncoder], list[int]]):
    encoder = _build(folder, freeze=False)
    rows = rows_read(encoder)
    before = encoder.encode(TEXTS).word_features
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.mul_(2)
    assert not torch.allclose(encoder.encode(TEXTS).word_features, before)
    assert rows == [3, 3]


@torch.no_grad()
def test_cached_features_equal_live_ones(folder: Path):
    encoder = _build(folder)
    texts = [TEXTS[1], None, *TEXTS, " "]
    live = encoder(encoder.tokenizer(texts))
    for _ in range(2):
        cached = encoder.encode(texts)
        torch.testing.assert_close(cached.word_features, live.word_features, rtol=0, atol=1e-6)
        torch.testing.assert_close(cached.sentence_embedding, live.sentence_embedding, rtol=0, atol=1e-6)
        assert torch.equal(cached.attention_mask, live.attention_mask)


def test_cached_features_do_not_depend_on_the_precision_of_the_caller(folder: Path):
    expected = _build(folder).encode(TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = _build(folder).encode(TEXTS)
    assert features.word_features.dtype == torch.float32
    assert torch.equal(features.word_features, expected.word_features)


def test_many_sentences_are_computed_in_parts(folder: Path, rows_read: Callable[[TextEncoder], list[int]]):
    encoder = _build(folder)
    rows = rows_read(encoder)
    words = VOCABULARY[7:20]
    texts = [" ".join(pair) for pair in itertools.product(words, words)]
    features = encoder.encode(texts)
    assert rows == [64, 64, 41]
    torch.testing.assert_close(encoder(encoder.tokenizer(texts)).word_features, features.word_features)


def test_the_cache_forgets_what_was_asked_longest_ago(
    folder: Path, rows_read: Callable[[TextEncoder], list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tmca.models.text.CACHE_SIZE", 2)
    encoder = _build(folder)
    rows = rows_read(encoder)
    first, second, third = TEXTS
    for text in (first, second, first, third, first):
        encoder.encode([text])
    assert rows == [1, 1, 1]
    encoder.encode([second])
    assert rows == [1, 1, 1, 1]


# --- tokenizer ----------------------------------------------------------------------------------------------------

ODD_TEXTS = (
    "Ünïcödé FAÇADE œdème",
    "肺部 感染 lung",
    "a\u200bb c\u00a0d",
    "\ttab\nand line\r\n",
    "emoji 😀 lung",
    "x" * 150,
    "…—“quotes”",
    "e\u0301tude",
    "İstanbul ß ﬁ Ⅳ",
    "3.5cm×2mm ½ °C",
    "\u2028separator",
    "a\x00b\ufffdc",
    "α β-blocker",
    "ก็ ไทย",
    "1,2,3--4",
)


@pytest.fixture
def published(shared: Path) -> Path:
    return shared / "data" / "cxr-bert-tokenizer"


def test_ids_equal_those_of_transformers(published: Path, shared: Path):
    with (shared / "data" / "qata_cov19" / "prompt" / "train.csv").open(newline="") as stream:
        sentences = sorted({row["Description"] for row in csv.DictReader(stream)})
    chosen = random.Random(0).sample(sentences, 50)
    reference = BertTokenizerFast.from_pretrained(str(published))
    tokenizer = SentenceTokenizer.read(published, 24)
    for text in (*chosen, *ODD_TEXTS):
        ids = reference(text)["input_ids"]
        assert tokenizer.tokenizer.encode(text).ids == ids
        tokens = tokenizer([text])
        assert tokens.token_counts == (len(ids),)
        assert (
            tokens.input_ids[0].tolist()
            == reference(text, padding="max_length", truncation=True, max_length=24)["input_ids"]
        )
    assert tokenizer.vocabulary_size == 30522


def test_a_long_sentence_is_cut_before_its_last_token(folder: Path):
    tokenizer = SentenceTokenizer.read(folder, 6)
    tokens = tokenizer([TEXTS[0], TEXTS[1], "one lesion"])
    assert tokens.token_counts == (13, 6, 4)
    assert tokens.truncated == (True, False, False)
    assert tokens.limit == 6
    words = [[VOCABULARY[token] for token in row] for row in tokens.input_ids.tolist()]
    assert words == [
        ["[CLS]", "one", "small", "lesion", ",", "[SEP]"],
        ["[CLS]", "two", "large", "lesions", ".", "[SEP]"],
        ["[CLS]", "one", "lesion", "[SEP]", "[PAD]", "[PAD]"],
    ]
    assert tokens.attention_mask.tolist() == [[True] * 6, [True] * 6, [True] * 4 + [False] * 2]


def test_blank_sentences_have_no_token(folder: Path):
    tokens = SentenceTokenizer.read(folder, 6)([None, "", "  \n", "one"])
    assert tokens.token_counts == (0, 0, 0, 3)
    assert tokens.attention_mask.any(dim=1).tolist() == [False, False, False, True]
    assert not tokens.input_ids[:3].any()
    assert SentenceTokenizer.read(folder, 6)([]).input_ids.shape == (0, 6)


@pytest.mark.parametrize(("lowercase", "known"), [(True, True), (False, False), (None, True)])
def test_the_case_setting_of_the_folder_is_followed(folder: Path, lowercase: bool | None, known: bool):
    if lowercase is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    ids = SentenceTokenizer.read(folder, 6)(["LESION"]).input_ids[0, :3].tolist()
    assert ids == [2, VOCABULARY.index("lesion") if known else VOCABULARY.index("[UNK]"), 3]


def test_a_saved_tokenizer_reads_the_same(tmp_path: Path):
    tokenizer = SentenceTokenizer.learn(TEXTS, vocabulary_size=200, max_tokens=MAX_TOKENS)
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = SentenceTokenizer.read(tmp_path, MAX_TOKENS)
    texts = [*TEXTS, "Zebra ünd 42?", *ODD_TEXTS, None]
    assert torch.equal(again(texts).input_ids, tokenizer(texts).input_ids)
    assert again(texts).token_counts == tokenizer(texts).token_counts


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_text("nothing of use")
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        SentenceTokenizer.read(tmp_path, 6)
    assert str(tmp_path) in caught.value.message


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"neither tokenizer\.json nor vocab\.txt"):
        SentenceTokenizer.read(tmp_path, 6)


def test_a_given_tokenizer_is_used_instead_of_a_learned_one(folder: Path):
    config = TextEncoderConfig(weights="scratch", freeze=False, tokenizer=str(folder))
    assert _vocabulary(build_tokenizer(config)) == {word: index for index, word in enumerate(VOCABULARY)}


# --- scratch ------------------------------------------------------------------------------------------------------


def test_a_scratch_encoder_needs_sentences():
    with pytest.raises(ConfigError, match="needs training sentences or a tokenizer folder"):
        _scratch([])


def test_a_scratch_encoder_has_the_size_of_its_config():
    encoder = _scratch(dropout=0.3)
    assert encoder.text_dim == encoder.backbone.config.hidden_size == 16
    assert encoder.backbone.config.num_hidden_layers == 3
    assert encoder.backbone.config.hidden_dropout_prob == 0.3
    assert encoder.backbone.config.vocab_size == encoder.tokenizer.vocabulary_size
    values = scratch_bert_config(replace(encoder.config, max_tokens=12), encoder.tokenizer)
    assert values["max_position_embeddings"] == 12
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_learned_vocabulary_holds_the_training_words():
    tokenizer = SentenceTokenizer.learn(TEXTS, vocabulary_size=1000, max_tokens=MAX_TOKENS)
    assert tokenizer(TEXTS).token_counts == COUNTS
    vocabulary = _vocabulary(tokenizer)
    assert [word for word, index in sorted(vocabulary.items(), key=lambda entry: entry[1])[:4]] == VOCABULARY[:4]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert not (set("abcdefghijklmnopqrstuvwxyz0123456789,.-") - vocabulary.keys())


def test_a_learned_vocabulary_keeps_its_limit():
    assert SentenceTokenizer.learn(TEXTS, vocabulary_size=90, max_tokens=MAX_TOKENS).vocabulary_size <= 90


@pytest.mark.parametrize("vocabulary_size", [90, 1000])
def test_a_learned_vocabulary_is_a_function_of_the_sentences(vocabulary_size: int):
    words = ("one", "two", "small", "large", "bright", "dark", "round", "oval", "lesion", "polyp")
    sentences = [" ".join(triple) for triple in itertools.permutations(words, 3)][::7]
    learned = []
    for _ in range(5):
        random.shuffle(sentences)
        config = TextEncoderConfig(weights="scratch", freeze=False, vocabulary_size=vocabulary_size)
        learned.append(_vocabulary(build_tokenizer(config, [*sentences, *sentences[:10]])))
    assert all(vocabulary == learned[0] for vocabulary in learned)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=24))
def test_an_unseen_word_is_spelled_not_lost(word: str):
    encoding = TOKENIZER.tokenizer.encode(word)
    assert "[UNK]" not in encoding.tokens
    assert "".join(piece.removeprefix("##") for piece in encoding.tokens[1:-1]) == word


def test_new_weights_forget_the_cached_features(folder: Path):
    encoder, other = _build(folder), _build(folder)
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight.mul_(2)
    encoder.encode(TEXTS)
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder.encode(TEXTS).word_features, other.encode(TEXTS).word_features)


def test_more_sentences_than_the_cache_holds(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tmca.models.text.CACHE_SIZE", 2)
    encoder = _build(folder)
    encoder.encode(TEXTS[:1])
    assert encoder.encode(TEXTS).present.all()


# --- CLIP ---------------------------------------------------------------------------------------------------------

CLIP_OPTIONS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP_SIZE = 12
"""Width of the space that the tiny CLIP shares with images."""
CLIP_LIMIT = 32
CLIP_TEXTS = ("one lesion", "Two  large lesions, left", "three infected areas")


def _write_pairs(folder: Path) -> int:
    """Write ``vocab.json`` and ``merges.txt`` of a tiny CLIP; return the size of its vocabulary."""
    letters = sorted(ByteLevel.alphabet())
    merges = ("o n", "on e</w>", "l e", "le s")
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return len(vocabulary)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole CLIP in the layout of the hub: images, text and the projections of both."""
    folder = tmp_path_factory.mktemp("clip")
    size = _write_pairs(folder)
    sizes = {"vocab_size": size, "max_position_embeddings": CLIP_LIMIT, "projection_dim": CLIP_SIZE}
    text = CLIP_OPTIONS | sizes | {"eos_token_id": size - 1}
    vision = CLIP_OPTIONS | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_SIZE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def _build_clip(folder: Path, **fields: Any) -> TextEncoder:
    fields = {"word_layers": 1, "sentence_pooling": "last", "max_tokens": CLIP_LIMIT} | fields
    config = TextEncoderConfig(weights=str(folder), **fields)
    return build_text_encoder(config, build_tokenizer(config)).eval()


def _clip_reference(folder: Path, texts: Sequence[str]) -> Any:
    """Return what transformers makes of sentences, each alone, with its own tokenizer."""
    model, tokenizer = CLIPTextModelWithProjection.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    return [model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True) for text in texts]


@torch.no_grad()
def test_the_features_of_a_clip_equal_those_of_transformers(clip_folder: Path):
    encoder = _build_clip(clip_folder)
    features = encoder.encode([*CLIP_TEXTS, None])
    assert (encoder.text_dim, encoder.sentence_dim) == (16, CLIP_SIZE)
    for row, expected in enumerate(_clip_reference(clip_folder, CLIP_TEXTS)):
        count = expected.last_hidden_state.shape[1]
        assert features.attention_mask[row].sum() == count < CLIP_LIMIT
        torch.testing.assert_close(features.word_features[row, :count], expected.last_hidden_state[0])
        assert not features.word_features[row, count:].any()
        torch.testing.assert_close(features.sentence_embedding[row], expected.text_embeds[0])
    assert not features.sentence_embedding[3].any()
    assert features.present.tolist() == [True, True, True, False]


@torch.no_grad()
def test_layers_of_a_clip_are_averaged_before_its_last_norm(clip_folder: Path):
    encoder = _build_clip(clip_folder, word_layers=2, sentence_pooling="mean")
    features = encoder.encode(CLIP_TEXTS[:1])
    (reference,) = _clip_reference(clip_folder, CLIP_TEXTS[:1])
    expected = encoder.backbone.final_layer_norm(torch.stack(reference.hidden_states[-2:]).mean(dim=0))[0]
    torch.testing.assert_close(features.word_features[0, : len(expected)], expected)
    torch.testing.assert_close(features.sentence_embedding[0], expected.mean(dim=0))
    assert encoder.sentence_dim == encoder.text_dim == 16


@torch.no_grad()
def test_a_clip_folder_may_hold_the_text_side_only(clip_folder: Path, tmp_path: Path):
    expected = _build_clip(clip_folder).encode(CLIP_TEXTS)
    for name, model in (("projected", CLIPTextModelWithProjection), ("plain", CLIPTextModel)):
        model.from_pretrained(clip_folder).save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "clip_text_model"
        shutil.copy(clip_folder / "tokenizer.json", tmp_path / name)
    projected = _build_clip(tmp_path / "projected").encode(CLIP_TEXTS)
    assert torch.equal(projected.word_features, expected.word_features)
    assert torch.equal(projected.sentence_embedding, expected.sentence_embedding)
    plain = _build_clip(tmp_path / "plain").encode(CLIP_TEXTS)
    assert torch.equal(plain.word_features, expected.word_features)
    last = plain.attention_mask.sum(dim=1) - 1
    assert torch.equal(plain.sentence_embedding, plain.word_features[torch.arange(3), last])


@torch.no_grad()
def test_a_projected_clip_predicts_in_bfloat16(clip_folder: Path, tiny_model: Callable[..., Any]):
    clip = TextEncoderConfig(
        weights=str(clip_folder), word_layers=1, sentence_pooling="last", max_tokens=CLIP_LIMIT, freeze=True
    )
    model = tiny_model(text_encoder=clip).eval()
    network = prepare_for_prediction(model, torch.device("cpu"), half=True)
    images = torch.randn(2, 3, 64, 64)
    expected = model.segment(model.encode_image(images), model.encode_text(CLIP_TEXTS[:2])).mask_logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.segment(network.encode_image(images), network.encode_text(CLIP_TEXTS[:2])).mask_logits
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_what_is_neither_bert_nor_clip_is_refused(tmp_path: Path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=40)).save_pretrained(tmp_path)
    _write_vocabulary(tmp_path)
    with pytest.raises(ConfigError, match="'roberta', which is not supported") as caught:
        _build(tmp_path)
    assert "bert, cxr-bert, clip" in caught.value.hint


def test_bytes_that_are_no_text_are_read_as_unknown_characters():
    tokens = TOKENIZER(["one \udce9 polyp", "one ? polyp"])
    assert torch.equal(tokens.input_ids[0], tokens.input_ids[1])


def test_a_clip_in_half_precision_runs_in_float32(clip_folder: Path, tmp_path: Path):
    shutil.copytree(clip_folder, tmp_path / "half")
    CLIPModel.from_pretrained(clip_folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in _build_clip(tmp_path / "half").parameters()} == {torch.float32}


def test_clip_weights_that_do_not_fit_their_config(clip_folder: Path, tmp_path: Path):
    shutil.copytree(clip_folder, tmp_path / "cut")
    state = load_file(clip_folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"CLIPTextModelWithProjection.*1 tensors missing.*'text_projection\.weight'"
    ):
        _build_clip(tmp_path / "cut")
    assert _build_clip(tmp_path / "cut", sentence_pooling="mean").sentence_dim == 16


@pytest.mark.parametrize("sentence_pooling", ["last", "mean"])
def test_a_checkpoint_fills_a_clip_without_its_folder(clip_folder: Path, sentence_pooling: str):
    original = _build_clip(clip_folder, sentence_pooling=sentence_pooling)
    architecture = json.loads(json.dumps(original.architecture()))
    encoder = build_text_encoder(original.config, original.tokenizer, architecture=architecture).eval()
    encoder.load_state_dict(original.state_dict())
    expected, features = original.encode(CLIP_TEXTS), encoder.encode(CLIP_TEXTS)
    assert torch.equal(features.word_features, expected.word_features)
    assert torch.equal(features.sentence_embedding, expected.sentence_embedding)


def test_a_clip_that_is_not_frozen_trains(clip_folder: Path):
    encoder = _build_clip(clip_folder, freeze=False).train()
    encoder.encode(CLIP_TEXTS).sentence_embedding.square().sum().backward()
    unreached = [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    # A softmax ignores what is added to all of its inputs.
    assert [name for name in unreached if "k_proj.bias" not in name] == []


def test_a_frozen_clip_is_cached(clip_folder: Path, rows_read: Callable[[TextEncoder], list[int]]):
    encoder = _build_clip(clip_folder)
    rows = rows_read(encoder)
    live = encoder(encoder.tokenizer(CLIP_TEXTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = [encoder.encode(CLIP_TEXTS) for _ in range(2)][1]
    assert rows == [3, 3]
    assert not live.sentence_embedding.requires_grad
    assert cached.sentence_embedding.dtype == torch.float32
    torch.testing.assert_close(cached.sentence_embedding, live.sentence_embedding)


def test_the_last_token_of_a_bert_is_its_sep(folder: Path):
    features = _build(folder, sentence_pooling="last").encode([*TEXTS, None])
    for row, count in enumerate(COUNTS):
        assert torch.equal(features.sentence_embedding[row], features.word_features[row, count - 1])
    assert not features.sentence_embedding[3].any()


def test_the_first_token_of_a_clip_is_refused(clip_folder: Path):
    with pytest.raises(ConfigError, match="the first token of a CLIP sees no word") as caught:
        _build_clip(clip_folder, sentence_pooling="first")
    assert caught.value.hint == "set it to 'last'"


def test_more_tokens_than_the_encoder_has_positions_are_refused(clip_folder: Path):
    with pytest.raises(ConfigError, match=f"max_tokens is {CLIP_LIMIT + 1}, but the encoder reads {CLIP_LIMIT}"):
        _build_clip(clip_folder, max_tokens=CLIP_LIMIT + 1)


def test_the_tokens_of_a_clip_equal_those_of_transformers(clip_folder: Path, tmp_path: Path):
    reference = CLIPTokenizer.from_pretrained(clip_folder)
    size = _write_pairs(tmp_path)
    for folder in (clip_folder, tmp_path):
        tokenizer = SentenceTokenizer.read(folder, 8)
        assert tokenizer.vocabulary_size == size
        for text in (*CLIP_TEXTS, *ODD_TEXTS):
            ids = reference(text)["input_ids"]
            assert tokenizer.tokenizer.encode(text).ids == ids
            tokens = tokenizer([text])
            assert tokens.token_counts == (len(ids),)
            kept = reference(text, truncation=True, max_length=8)["input_ids"]
            assert tokens.input_ids[0, : len(kept)].tolist() == kept
            assert tokens.attention_mask[0].tolist() == [True] * len(kept) + [False] * (8 - len(kept))
    assert [size - 2, size - 1] == tokenizer.tokenizer.encode("").ids
    copied = copy.deepcopy(tokenizer)
    assert torch.equal(copied(CLIP_TEXTS).input_ids, tokenizer(CLIP_TEXTS).input_ids)


def test_pairs_without_merges_are_named(tmp_path: Path):
    _write_pairs(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        SentenceTokenizer.read(tmp_path, 6)
