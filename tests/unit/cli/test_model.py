"""The model commands, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import edje_pipeline.cli.model  # noqa: F401 (registers the commands)
from edje_pipeline.cli.app import app
from edje_pipeline.models.bert_weights import to_hf_names
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.models.tensor_files import read_tensors, write_tensors

RUNNER = CliRunner()
TINY = "timm:vit_tiny_patch16_224?embed_dim=32&depth=1&num_heads=2"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face BERT directory out of a random model's joint encoder."""
    root = tmp_path_factory.mktemp("bert")
    model = write_random_model(root / "random")
    spec = model.spec.joint_encoder
    directory = root / "bert"
    directory.mkdir()
    write_tensors(directory / "model.safetensors", to_hf_names(read_tensors(model.file("joint_encoder.safetensors"))))
    (directory / "tokenizer.json").write_text(model.file("tokenizer.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert", "hidden_act": "gelu", "hidden_size": spec.width, "type_vocab_size": 2,
                "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads,
                "intermediate_size": spec.mlp_dim, "vocab_size": spec.vocab_size, "max_position_embeddings": 70,
                "layer_norm_eps": 1e-12,
            }
        )
    )  # fmt: skip
    return directory


def test_make_model_then_info(tmp_path: Path, bert: Path) -> None:
    out = tmp_path / "model"
    made = RUNNER.invoke(app, [
        "make-model", "--out", str(out), "--backbone", TINY, "--weights", "random:3", "--image-size", "32",
        "--tokens", "3", "--mlp-dim", "16", "--joint-encoder", str(bert), "--sentence-encoder", str(bert),
    ])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert all(len(line) <= 80 or str(tmp_path) in line for line in made.stdout.splitlines())
    card = RUNNER.invoke(app, ["model-info", str(out), "--card"])
    assert card.stdout.strip() == (out / "MODEL_CARD.md").read_text().strip()
    shown = RUNNER.invoke(app, ["model-info", str(out), "--verify", "--format", "json"])
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout)
    assert summary["spec"]["adapter"]["num_compressed_tokens"] == 3
    assert summary["spec"]["backbone"]["num_vision_tokens"] == 4
    assert summary["spec"]["text_tower"]["kind"] == "sentence_map"
    # Both spaces are 32 wide here, and a map still stands between them.
    assert summary["spec"]["text_tower"]["embedding_dim"] == summary["spec"]["backbone"]["options"]["pooled_dim"] == 32
    assert summary["spec"]["backbone"]["options"]["embedding_map"] == 32

    model = open_model(out)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    backbone = model.load_backbone()
    tokens, embedding = backbone(images)
    assert tokens.shape == (2, 4, 32)
    assert embedding is not None
    texts = ["a red apple", "", "a dog in the snow " * 90]
    encoded = model.load_text_tower().encode(texts)
    assert encoded.shape == (3, embedding.shape[1])
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, atol=1e-6)
    # One at a time without padding, or together with it: the same.
    alone = np.concatenate([model.load_text_tower().encode([text]) for text in texts])
    np.testing.assert_allclose(encoded, alone, atol=1e-6)


def test_random_weights_follow_the_seed(tmp_path: Path, bert: Path) -> None:
    hashes = []
    for number, seed in enumerate(["random:1", "random:1", "random:2"]):
        out = tmp_path / str(number)
        made = RUNNER.invoke(app, [
            "make-model", "--out", str(out), "--backbone", TINY + "&img_size=32", "--weights", seed, "--tokens", "2",
            "--mlp-dim", "8", "--joint-encoder", str(bert), "--format", "json",
        ])  # fmt: skip
        assert made.exit_code == 0, made.output
        hashes.append(json.loads(made.stdout)["spec"]["backbone"]["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--backbone", "resnet"], 2, "is not KIND:NAME"),
        (["--backbone", "timm:no_such_model"], 2, "timm has no model 'no_such_model'"),
        (["--backbone", "keras:vit"], 2, "backbone kind 'keras' is not known"),
        (["--backbone", "open_clip:ViT-B-99/x"], 2, "open_clip has no architecture 'ViT-B-99'"),
        (["--backbone", "open_clip:ViT-B-16/nobody"], 2, "open_clip has no weights 'nobody' for ViT-B-16"),
        (["--backbone", "open_clip:ViT-B-16"], 2, "names no weights"),
        (["--backbone", TINY, "--weights", "absent.pth"], 1, "no weights file at absent.pth"),
        (["--backbone", TINY, "--weights", "random:x"], 2, "is not random:SEED"),
        (["--backbone", "dinov2-onnx:absent.onnx"], 1, "no ONNX file at absent.onnx"),
    ],
)
def test_wrong_input_gets_one_clear_line(
    arguments: list[str], code: int, expected: str, tmp_path: Path, bert: Path
) -> None:
    result = RUNNER.invoke(app, ["make-model", "--out", str(tmp_path / "m"), "--joint-encoder", str(bert), *arguments])
    assert result.exit_code == code, result.output
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_export_of_a_model_without_siglip_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model")
    result = RUNNER.invoke(app, ["export-checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "x.pth")])
    assert result.exit_code == 1
    assert "the authors' names exist for SigLIP only" in result.stderr


def test_import_names_what_is_wrong(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "x.pth")
    result = RUNNER.invoke(
        app, ["import-checkpoint", str(tmp_path / "x.pth"), "--out", str(tmp_path / "m"), "--tokenizer", "v.txt"]
    )
    assert result.exit_code == 1
    assert "not a checkpoint of the authors' training program" in result.stderr
