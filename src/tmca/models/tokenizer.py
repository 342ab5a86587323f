"""Sentences → token ids: the tokenizer of a pretrained text encoder, or a WordPiece learned from training sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from tmca.config import TextEncoderConfig
from tmca.errors import ConfigError, WeightsError
from tmca.models.weights import locate
from tmca.types import TextTokens

SCRATCH = "scratch"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


class SentenceTokenizer:
    """Tokenizer that pads every sentence to one length and counts what it cuts.

    Args:
        tokenizer: A ``tokenizers`` tokenizer that adds its own special tokens.
        max_tokens: Length of every row.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._last_id = tokenizer.encode("").ids[-1]

    @property
    def vocabulary_size(self) -> int:
        """Number of entries of the vocabulary."""
        return int(self.tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str | None]) -> TextTokens:
        """Tokenize sentences.

        A sentence over the limit keeps its first tokens and the closing ``[SEP]`` (CLIP: ``<|endoftext|>``); its full
        length stands in ``token_counts``. ``None`` and blank sentences become rows without a real token.
        """
        input_ids = torch.zeros(len(texts), self.max_tokens, dtype=torch.int64)
        attention_mask = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        counts = []
        for row, text in enumerate(texts):
            # Of bytes that are no UTF-8 the command line makes lone surrogates, which `tokenizers` refuses.
            ids = self.tokenizer.encode(text.encode(errors="replace").decode()).ids if text and text.strip() else []
            counts.append(len(ids))
            if len(ids) > self.max_tokens:
                ids = [*ids[: self.max_tokens - 1], self._last_id]
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            attention_mask[row, : len(ids)] = True
        return TextTokens(input_ids, attention_mask, tuple(counts))

    def broken_words(self, text: str) -> tuple[str, ...]:
        """Return the words that the vocabulary does not hold whole, in lower case and order, each once."""
        text = text.encode(errors="replace").decode()
        encoding = self.tokenizer.encode(text)
        spans: dict[int, tuple[int, int]] = {}
        broken = set()
        for number, piece, (start, end) in zip(encoding.word_ids, encoding.tokens, encoding.offsets, strict=True):
            if number is None:  # [CLS], [SEP]
                continue
            if number in spans or piece == "[UNK]":
                broken.add(number)
            spans[number] = (spans.get(number, (start, end))[0], end)
        words = (text[slice(*span)].lower() for number, span in spans.items() if number in broken)
        return tuple(dict.fromkeys(word for word in words if any(map(str.isalnum, word))))

    @classmethod
    def read(cls, folder: Path, max_tokens: int) -> SentenceTokenizer:
        """Read ``tokenizer.json``, a BERT ``vocab.txt`` or a CLIP ``vocab.json`` and ``merges.txt`` from a folder.

        Raises:
            WeightsError: None of the files is there, or it cannot be read.
        """
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), max_tokens)
            if (folder / "vocab.txt").is_file():
                words = (folder / "vocab.txt").read_text("utf-8").splitlines()
                settings_path = folder / "tokenizer_config.json"
                settings = json.loads(settings_path.read_text("utf-8")) if settings_path.is_file() else {}
                vocabulary = {word: index for index, word in enumerate(words)}
                return cls(_wordpiece(vocabulary, lowercase=settings.get("do_lower_case", True)), max_tokens)
            if (folder / "vocab.json").is_file():
                return cls(_clip_pairs(folder), max_tokens)
        except Exception as error:  # tokenizers raises bare Exception
            raise WeightsError(f"The tokenizer in {folder} cannot be read: {error}", hint="copy it again") from error
        raise WeightsError(
            f"{folder} has neither tokenizer.json nor vocab.txt nor vocab.json",
            hint="add one, or set text_encoder.tokenizer",
        )

    @classmethod
    def learn(cls, sentences: Iterable[str], *, vocabulary_size: int, max_tokens: int) -> SentenceTokenizer:
        """Learn a lower-case WordPiece vocabulary from sentences.

        Single letters and digits are always in it, so that an unseen word is spelled, not lost.
        """
        tokenizer = _wordpiece({token: index for index, token in enumerate(SPECIAL_TOKENS)}, lowercase=True)
        counts: Counter[str] = Counter()
        for sentence in sentences:
            text = tokenizer.normalizer.normalize_str(sentence)
            counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        letters = sorted(set(ALPHABET).union(*counts))
        pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
        # Whole words, the most frequent first. The trainers of `tokenizers` break ties by a randomised hash, so that
        # two runs on the same sentences learn different vocabularies.
        frequent = sorted(counts.keys() - set(pieces), key=lambda word: (-counts[word], word))
        pieces += frequent[: max(0, vocabulary_size - len(pieces))]
        return cls(_wordpiece({piece: index for index, piece in enumerate(pieces)}, lowercase=True), max_tokens)


def _wordpiece(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def _clip_pairs(folder: Path) -> Tokenizer:
    """Read the byte pairs of a CLIP from ``vocab.json`` and ``merges.txt``."""
    from transformers import CLIPTokenizer

    pairs = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return Tokenizer.from_str(pairs.backend_tokenizer.to_str())


def build_tokenizer(config: TextEncoderConfig, sentences: Iterable[str] = ()) -> SentenceTokenizer:
    """Return the tokenizer of a text encoder: its own, a given one, or one learned from ``sentences``.

    Raises:
        WeightsError: The tokenizer folder cannot be found or read.
        ConfigError: There is nothing to learn a vocabulary from.
    """
    if not config.learns_vocabulary:
        return SentenceTokenizer.read(locate(config.tokenizer or config.weights), config.max_tokens)
    distinct = sorted(set(sentences))
    if not distinct:
        raise ConfigError(
            "A scratch text encoder needs training sentences or a tokenizer folder",
            hint="set text_encoder.tokenizer, or train on a manifest with sentences",
        )
    return SentenceTokenizer.learn(distinct, vocabulary_size=config.vocabulary_size, max_tokens=config.max_tokens)
