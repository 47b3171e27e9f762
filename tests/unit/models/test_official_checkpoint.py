"""Import and export of the authors' checkpoint, against their forward pass rebuilt from transformers' parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edje_pipeline.errors import ModelError, ShapeMismatchError
from edje_pipeline.models.checkpoint import ModelDirectory, open_model
from edje_pipeline.models.official_checkpoint import ImportOptions, export_checkpoint, import_checkpoint
from tests.unit.models import official_reference as official

pytest.importorskip("transformers")

NUM_PAIRS, NUM_IMAGES = 200, 20


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write_vocab(tmp_path_factory.mktemp("official") / "vocab.txt")


@pytest.fixture(scope="module", params=["compressed", "local"])
def reference(request: pytest.FixtureRequest, vocab: Path) -> Any:
    torch.manual_seed(0)
    return official.Reference(official.reference_tokenizer(vocab), compressed=request.param == "compressed")


@pytest.fixture(scope="module")
def compressed(vocab: Path) -> Any:
    torch.manual_seed(0)
    return official.Reference(official.reference_tokenizer(vocab), compressed=True)


def options(vocab: Path, **more: Any) -> ImportOptions:
    return ImportOptions(tokenizer=vocab, joint_heads=4, vision_heads=4, interpolation="bicubic", **more)


def our_logits(model: ModelDirectory, images: torch.Tensor, texts: list[str], which: list[int]) -> torch.Tensor:
    backbone, adapter, encoder = model.load_backbone(), model.load_adapter(), model.load_joint_encoder()
    ids = model.load_tokenizer().encode(texts)
    scores = torch.empty(len(texts))
    with torch.inference_mode():
        tokens = adapter(backbone(images)[0])
        for row, (text_ids, image) in enumerate(zip(ids, which, strict=True)):
            scores[row] = encoder.forward_dense(torch.tensor([text_ids]), tokens[image : image + 1])[0]
    return scores


def pairs() -> tuple[torch.Tensor, list[str], list[int]]:
    generator = torch.Generator().manual_seed(9)
    side = official.PATCH * official.GRID
    images = torch.randint(0, 256, (NUM_IMAGES, side, side, 3), dtype=torch.uint8, generator=generator)
    return images, official.varied_texts(NUM_PAIRS), [row % NUM_IMAGES for row in range(NUM_PAIRS)]


def test_logits_of_200_pairs_equal_the_authors_forward(reference: Any, vocab: Path, tmp_path: Path) -> None:
    torch.save({"model": reference.state_dict(), "epoch": 3, "config": {"k": 10}}, tmp_path / "checkpoint_03.pth")
    model = import_checkpoint(tmp_path / "checkpoint_03.pth", tmp_path / "model", options(vocab))
    images, texts, which = pairs()
    normalised = model.load_backbone().normalise(images)
    expected = torch.cat(
        [
            reference.logits(normalised[which[start : start + 50]], texts[start : start + 50])
            for start in range(0, NUM_PAIRS, 50)
        ]
    )
    scores = our_logits(model, images, texts, which)
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_export_gives_every_tensor_back(reference: Any, vocab: Path, tmp_path: Path) -> None:
    source = dict(reference.state_dict())
    torch.save({"model": source}, tmp_path / "in.pth")
    import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(vocab))
    count = export_checkpoint(open_model(tmp_path / "model"), tmp_path / "out.pth")
    exported = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert count == len(source)
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(exported[name], tensor), name


def test_safetensors_with_a_prefix_in_bfloat16_round_trips(compressed: Any, vocab: Path, tmp_path: Path) -> None:
    source = {f"module.{name}": t.to(torch.bfloat16).clone() for name, t in compressed.state_dict().items()}
    del source["module.language_model.cls.predictions.decoder.weight"]
    save_file(source, tmp_path / "in.safetensors")
    model = import_checkpoint(tmp_path / "in.safetensors", tmp_path / "model", options(vocab))
    assert model.load_backbone().dtype == torch.float32
    export_checkpoint(model, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    assert {f"module.{name}" for name in exported} == source.keys()
    assert all(torch.equal(tensor, source[f"module.{name}"]) for name, tensor in exported.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in exported.values())


def test_names_as_transformers_4_wrote_them(compressed: Any, vocab: Path, tmp_path: Path) -> None:
    renamed = {
        name.replace("vision_encoder.", "vision_encoder.vision_model."): tensor.clone()
        for name, tensor in compressed.state_dict().items()
    }
    renamed["language_model.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"model": renamed}, tmp_path / "in.pth")
    model = import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(vocab))
    export_checkpoint(model, tmp_path / "out.pth")
    exported = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert exported.keys() == renamed.keys() - {"language_model.bert.embeddings.position_ids"}


def test_every_wrong_key_is_listed_at_once(compressed: Any, vocab: Path, tmp_path: Path) -> None:
    tensors = dict(compressed.state_dict())
    del tensors["vision_projection.layernorm.bias"]
    del tensors["vision_encoder.post_layernorm.weight"]
    tensors["classification_head.0.dense.weight"] = torch.zeros(3, 3)
    tensors["lora.weight"] = torch.zeros(1)
    torch.save({"model": tensors}, tmp_path / "in.pth")
    with pytest.raises(ShapeMismatchError) as caught:
        import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(vocab))
    message = str(caught.value)
    assert "2 missing: vision_encoder.post_layernorm.weight, vision_projection.layernorm.bias" in message
    assert "1 unknown: lora.weight" in message
    assert "classification_head.0.dense.weight is (3, 3), expected (48, 48)" in message
    assert not (tmp_path / "model").exists()


def test_without_a_vision_tower_one_must_be_named(compressed: Any, vocab: Path, tmp_path: Path) -> None:
    from edje_pipeline.models.assemble import BackboneSource

    tensors = {n: t for n, t in compressed.state_dict().items() if not n.startswith(("vision_encoder.", "clip."))}
    torch.save({"model": tensors}, tmp_path / "in.pth")
    with pytest.raises(ModelError, match="holds no vision tower"):
        import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(vocab))
    compressed.clip.save_pretrained(tmp_path / "siglip")
    source = BackboneSource(f"hf:{tmp_path / 'siglip'}", text_tower=False)
    model = import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(vocab, backbone=source))
    whole = tmp_path / "whole.pth"
    torch.save({"model": compressed.state_dict()}, whole)
    other = import_checkpoint(whole, tmp_path / "other", options(vocab))
    images, texts, which = pairs()
    ours, theirs = (our_logits(m, images[:2], texts[:4], [w % 2 for w in which[:4]]) for m in (model, other))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_the_text_tower_comes_along_with_its_tokenizer(compressed: Any, vocab: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "apple": 3}, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.save({"model": compressed.state_dict()}, tmp_path / "in.pth")
    wanted = options(vocab, text_tokenizer=tmp_path / "tokenizer.json")
    model = import_checkpoint(tmp_path / "in.pth", tmp_path / "model", wanted)
    ids = torch.tensor([[3, 1, 0, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(compressed.clip.text_model(input_ids=ids).pooler_output, dim=-1)
    ours = torch.from_numpy(model.load_text_tower().encode(["apple"]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    export_checkpoint(model, tmp_path / "out.pth")
    exported = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert all(torch.equal(exported[name], tensor) for name, tensor in compressed.state_dict().items())


def test_files_that_are_no_checkpoint(tmp_path: Path, vocab: Path) -> None:
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="not a checkpoint of the authors' training program"):
        import_checkpoint(tmp_path / "other.pth", tmp_path / "model", options(vocab))
    torch.save({"model": {"x": torch.zeros(1)}, "code": ImportOptions}, tmp_path / "code.pth")
    with pytest.raises(ModelError, match="could run code"):
        import_checkpoint(tmp_path / "code.pth", tmp_path / "model", options(vocab))


def test_the_wrong_tokenizer_is_refused(compressed: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    torch.save({"model": compressed.state_dict()}, tmp_path / "in.pth")
    with pytest.raises(ShapeMismatchError, match="has 7 ids with <image>"):
        import_checkpoint(tmp_path / "in.pth", tmp_path / "model", options(short))
