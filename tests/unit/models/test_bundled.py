"""The trained model in the package: whole, small enough, with its terms. Skips until there is one."""

from __future__ import annotations

import pytest

from edje_pipeline.models import hub
from edje_pipeline.models.checkpoint import open_model

MAX_BYTES = 64_000_000


@pytest.fixture
def bundled():
    if hub.EMOJI_MODEL not in hub.bundled_names():
        pytest.skip("no trained model is bundled")
    return open_model(hub.EMOJI_MODEL)


def test_every_file_is_whole_and_all_together_are_small(bundled):
    bundled.verify()
    assert sum(path.stat().st_size for path in bundled.path.rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_card_names_every_artist_and_licence(bundled):
    card = bundled.file("MODEL_CARD.md").read_text()
    for words in ("OpenMoji", "Noto", "Twemoji", "Fluent", "EmojiOne", "CC BY-SA 4.0", "Apache", "CC BY 4.0", "MIT",
                  "all-MiniLM-L6-v2", "DINOv2"):  # fmt: skip
        assert words in card


def test_it_prefers_the_text_that_names_the_drawing(bundled):
    tower = bundled.load_text_tower()
    embeddings = tower.encode(["red apple", "green apple", "rocket"])
    assert embeddings[0] @ embeddings[1] > embeddings[0] @ embeddings[2]
