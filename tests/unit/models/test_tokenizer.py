"""The tokenizer's own promises; equality of ids with transformers is in tests/numerics."""

from __future__ import annotations

import json

import pytest

from edje_pipeline.errors import ModelError, ModelNotFoundError
from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.models.words import word_pieces


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_vocab(word_pieces())


def test_ids_of_a_text(tokenizer):
    vocabulary = word_pieces()
    want = [vocabulary.index(piece) for piece in ("[CLS]", "a", "red", "apple", "##s", "[SEP]")]
    assert tokenizer.encode(["A  red\tAPPLES"]) == [want]
    assert tokenizer.encode([""]) == [[tokenizer.cls_id, tokenizer.sep_id]]
    assert tokenizer.encode([]) == []


def test_image_token_is_the_next_id(tokenizer):
    assert tokenizer.image_id == len(word_pieces())
    assert tokenizer.vocab_size == len(word_pieces()) + 1
    assert tokenizer.encode(["<image>"]) == [[tokenizer.cls_id, tokenizer.image_id, tokenizer.sep_id]]


@pytest.mark.parametrize(("num_words", "num_ids"), [(60, 62), (61, 63), (62, 63), (3000, 63)])
def test_text_keeps_61_word_pieces(tokenizer, num_words, num_ids):
    (ids,) = tokenizer.encode(["apple " * num_words])
    assert len(ids) == num_ids
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id


def test_a_batch_gives_what_single_texts_give(tokenizer):
    texts = [f"{word} number {number}" for number, word in enumerate(["apple", "dogs", "", "sky blue"] * 1500)]
    together = tokenizer.encode(texts)
    assert together[:40] == [tokenizer.encode([text])[0] for text in texts[:40]]
    assert together[-40:] == [tokenizer.encode([text])[0] for text in texts[-40:]]
    assert len(together) == len(texts)


def test_lone_surrogates_do_not_stop_a_batch(tokenizer):
    assert tokenizer.encode(["red \ud800 apple", "\udfff"]) == [
        tokenizer.encode(["red apple"])[0],
        [tokenizer.cls_id, tokenizer.sep_id],
    ]


def test_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="sequence of texts, got one string"):
        tokenizer.encode("red apple")
    with pytest.raises(TypeError, match="must be a string, got NoneType"):
        tokenizer.encode(["red apple", None])


def test_json_round_trip_forgets_foreign_padding_and_truncation(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    content["post_processor"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    texts = ["a red apple on the table under the tree", ""]
    again = Tokenizer.from_file(path)
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.to_json() == tokenizer.to_json()


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no tokenizer file at"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    for number, content in enumerate([b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "Magic"}}']):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"{number}.json is not"):
            Tokenizer.from_file(path)
    with pytest.raises(ModelError, match=r"has no \[CLS\], \[SEP\] in its vocabulary"):
        Tokenizer.from_vocab(["[PAD]", "[UNK]", "[MASK]", "a"])
    with pytest.raises(ModelError, match="lists a word piece twice"):
        Tokenizer.from_vocab([*word_pieces(), "apple"])
