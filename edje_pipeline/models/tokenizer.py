"""Text to WordPiece ids, cut exactly as the authors' tokenizer call cuts them.

They tokenize the pair (text, M times `<image>`) with truncation of the first part only to a whole of
64 + M tokens; [CLS] and two [SEP] take three of the 64, so the text keeps 61 word pieces. What stands
after the text is the same in every pair, so this gives `[CLS] text [SEP]`: at most 63 ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as WordPieceTokenizer

from edje_pipeline.errors import ModelError, ModelNotFoundError

IMAGE_TOKEN = "<image>"  # noqa: S105 - a word of the vocabulary, no secret
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_FILE_BYTES = 64 << 20
"""Of a tokenizer.json or vocab.txt; BERT's have under one megabyte, multilingual ones ten."""

BATCH_TEXTS = 4096
"""Texts encoded at once: bounds the memory of the library's intermediate results."""


class Tokenizer:
    """A frozen WordPiece tokenizer with `<image>` in its vocabulary; threads may share it."""

    def __init__(self, tokenizer: WordPieceTokenizer, *, max_text_tokens: int = 64, where: str = "tokenizer") -> None:
        """Args: tokenizer: the library's. max_text_tokens: closing `[SEP]` counted. where: for messages."""
        missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise ModelError(f"{where} has no {', '.join(missing)} in its vocabulary; expected a BERT tokenizer")
        tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            _id_of(tokenizer, token) for token in SPECIAL_TOKENS
        )
        self.image_id = _id_of(tokenizer, IMAGE_TOKEN)
        self.max_text_tokens = max_text_tokens
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._json: str = tokenizer.to_str()
        tokenizer.enable_truncation(max_length=max_text_tokens - 1)
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | Path, *, max_text_tokens: int = 64) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            ModelNotFoundError: it is not there. ModelError: it is no BERT tokenizer.
        """
        text = _read_text(Path(path))
        try:
            json.loads(text)
            tokenizer = WordPieceTokenizer.from_str(text)
        except Exception as error:
            raise ModelError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
        return cls(tokenizer, max_text_tokens=max_text_tokens, where=str(path))

    @classmethod
    def from_vocab(
        cls, vocab: str | Path | Sequence[str], *, lowercase: bool = True, max_text_tokens: int = 64
    ) -> Tokenizer:
        """BERT's tokenizer over a vocabulary: a `vocab.txt` with a word piece per line, or the list itself."""
        where = "the vocabulary"
        if isinstance(vocab, str | Path):
            where = str(vocab)
            vocab = _read_text(Path(vocab)).rstrip("\n").split("\n")
        ids = {piece: number for number, piece in enumerate(vocab)}
        if len(ids) != len(vocab):
            raise ModelError(f"{where} lists a word piece twice; expected {len(vocab)} different ones, got {len(ids)}")
        tokenizer = WordPieceTokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        known = [token for token in SPECIAL_TOKENS if token in ids]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
        return cls(tokenizer, max_text_tokens=max_text_tokens, where=where)

    @property
    def vocab_size(self) -> int:
        """Number of ids, `<image>` included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """`[CLS] text [SEP]` ids of each text, at most `max_text_tokens - 1`, never padded.

        Raises:
            TypeError: something in `texts` is not a string, or `texts` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a sequence of texts, got one string; wrap it in a list")
        ids: list[list[int]] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            chunk = [_clean(text) for text in texts[start : start + BATCH_TEXTS]]
            ids.extend(encoding.ids for encoding in self._tokenizer.encode_batch_fast(chunk))
        return ids

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, `<image>` included, without truncation or padding."""
        return self._json


def _id_of(tokenizer: WordPieceTokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None
    return int(number)


def _clean(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, got {type(text).__name__}: {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # A lone surrogate is no character; BERT's normaliser drops the replacement character.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ModelNotFoundError(f"no tokenizer file at {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_FILE_BYTES:,} a tokenizer may have"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error}") from error
