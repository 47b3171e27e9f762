"""The card: every credit, every measured figure, none invented."""

from __future__ import annotations

import pytest

from edje_pipeline.errors import SourceError
from edje_pipeline.models.random_model import write_random_model
from recipes import emoji_corpus
from recipes.bundled_model_card import COMMAND, CREDITS, card_text
from recipes.emoji_packages import PACKAGES, fetch


def interval(mean):
    return {"mean": mean, "low": mean - 1.5, "high": mean + 1.5}


def evaluation_rows():
    metrics = {"R@1": interval(20.25), "R@5": interval(44.0), "R@10": interval(60.0), "MRR": interval(31.5)}
    first = {"artist": "fluent", "texts": 1234, "direction": "t2i", "stage": "first stage", "pool": 0,
             "fusion_weight": 0.0, "metrics": metrics, "gain": None}  # fmt: skip
    return [first, {**first, "stage": "reranked", "pool": 10, "fusion_weight": 5.0, "gain": interval(4.75)}]


STUDENT = {
    "plan": {"steps": 1000, "batch_size": 256, "augmentation": {"scale": 0.5}},
    "token_cosine": 0.81234,
    "pooled_cosine": 0.9,
}


def test_the_card_names_everybody_and_cites_what_was_measured(tmp_path):
    model = write_random_model(tmp_path / "m")
    demo = {"num_images": 1658, "recall_at_1": {"num_names": 1658, "first_stage": 0.251, "reranked": 0.402},
            "not_trained_on": {"num_names": 331, "first_stage": 0.2, "reranked": 0.25}}  # fmt: skip
    card = card_text(evaluation_rows(), STUDENT, spec=model.spec, storages={"joint_encoder": "int8"}, demo=demo)
    for credit in CREDITS:
        assert credit.line in card
    for words in (
        "CC BY-SA 4.0",
        "Apache",
        "CC BY 4.0",
        "MIT",
        "all-MiniLM-L6-v2",
        "DINOv2",
        "EfficientNet-Lite0",
        COMMAND,
    ):
        assert words in card
    assert "| Fluent Emoji Flat | 1,234 | first stage | 20.2 [18.8, 21.8] | 44.0 | 31.5 |  |" in card
    assert "| reranked, pool 10, w = 5 |" in card
    assert "+4.8 [+3.2, +6.2]" in card
    assert "| of these, concepts not trained on | 331 | 20.0% | 25.0% |" in card
    assert "token cosine 0.81234" in card
    assert "steps 1000" in card
    assert "| joint_encoder | BERT, 2 layers of 32 | int8 |\n| text_tower |" in card
    assert "augmentation scale 0.5" in card
    assert "{" not in card


def test_two_arguments_are_enough_and_no_figures_are_an_error():
    assert card_text(evaluation_rows(), STUDENT).startswith("# emoji-small\n")
    with pytest.raises(ValueError, match="has no rows"):
        card_text([], STUDENT)


def test_the_credits_agree_with_the_packages_own_metadata(tmp_path):
    try:
        tarballs = {package: fetch(package, tmp_path) for package in PACKAGES}
    except SourceError as error:
        pytest.skip(f"no package registry: {error}")
    artists, concepts = {}, []
    for package, tarball in tarballs.items():
        if package.style == "openmoji":
            _, _, artists[package.style] = emoji_corpus.read_openmoji(package, tarball)
        else:
            _, artists[package.style] = emoji_corpus.read_icons(package, tarball, concepts)
    for credit in CREDITS:
        artist = artists[credit.style]
        assert (credit.spdx, credit.license_url, credit.homepage, credit.package) == (
            artist.license, artist.license_url, artist.homepage, artist.package,
        )  # fmt: skip
        assert artist.author.split()[0] in credit.author
