"""Model directories: saved, opened, and refused with a message that names the file and the difference."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from edje_pipeline.errors import ModelError, ModelNotFoundError, ShapeMismatchError
from edje_pipeline.models.checkpoint import open_directory, open_model, save_model
from edje_pipeline.models.model_files import sha256_of
from edje_pipeline.models.random_model import write_random_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(pristine, tmp_path):
    """A copy to damage."""
    shutil.copytree(pristine.path, tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory, name, change):
    """Rewrites a weights file and its record, so that only the tensors are wrong."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name)
    digest, size = sha256_of(directory / name), (directory / name).stat().st_size

    def record(config):
        config["files"][name] = {"sha256": digest, "size_bytes": size}
        config["spec"][name.removesuffix(".safetensors")]["weights_sha256"] = digest

    edit_config(directory, record)


def test_parts_load_and_work_together(pristine):
    model = open_model(str(pristine.path))
    assert model == pristine
    backbone, adapter, encoder = model.load_backbone(), model.load_adapter(), model.load_joint_encoder()
    tokenizer, tower = model.load_tokenizer(), model.load_text_tower()
    assert not adapter.training
    assert not encoder.training
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vision_tokens, embedding = backbone(pixels)
        tokens = adapter(vision_tokens)
        ids = torch.tensor(tokenizer.encode(["a red apple"]) * 3)
        logits = encoder.forward_dense(ids, tokens)
    assert tokens.shape == (3, 4, 32)
    assert logits.std() > 0.01
    assert tower.encode(["a red apple"]).shape == (1, embedding.shape[1])
    model.verify()


def test_open_needs_no_torch_and_little_time(pristine):
    code = (
        "import sys, time; from edje_pipeline.models.checkpoint import open_model; t = time.perf_counter(); "
        f"open_model({str(pristine.path)!r}); print(time.perf_counter() - t, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(output[0]) < 1.0
    assert output[1] == "False"


def test_fingerprints_depend_on_weights_and_spec_of_their_part_only(pristine, tmp_path):
    same = write_random_model(tmp_path / "same")
    other_weights = write_random_model(tmp_path / "weights", seed=1)
    other_adapter = write_random_model(tmp_path / "adapter", num_compressed_tokens=6)
    assert same.fingerprints == pristine.fingerprints
    differing = {
        part for part in pristine.fingerprints if pristine.fingerprints[part] != other_weights.fingerprints[part]
    }
    assert differing == {"backbone", "adapter", "joint_encoder", "text_tower"}
    assert other_adapter.fingerprints["backbone"] == pristine.fingerprints["backbone"]
    assert other_adapter.fingerprints["adapter"] != pristine.fingerprints["adapter"]


def test_a_model_directory_pickles(pristine):
    again = pickle.loads(pickle.dumps(pristine))
    assert again == pristine
    assert again.fingerprints == pristine.fingerprints


def test_position_table_grows_at_load_for_more_image_tokens(tmp_path):
    model = write_random_model(tmp_path / "m", num_compressed_tokens=4)
    wide = replace(model, spec=replace(model.spec, adapter=replace(model.spec.adapter, num_compressed_tokens=100)))
    assert wide.load_joint_encoder().position_embeddings.num_embeddings == 164


def test_half_precision_files_load_as_float32(model):
    edit_tensors(model, "adapter.safetensors", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    adapter = open_directory(model).load_adapter()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["backbone.safetensors", "adapter.safetensors", "tokenizer.json", "MODEL_CARD.md"])
def test_a_missing_file_is_named(model, name):
    (model / name).unlink()
    with pytest.raises(ModelError, match=f"no file {re.escape(name)}; it is incomplete"):
        open_directory(model)


def test_a_truncated_file_is_named_at_open(model):
    path = model / "joint_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"joint_encoder.safetensors has [\d,]+ bytes, config.json says"):
        open_directory(model)
    edit_config(model, lambda c: c["files"][path.name].update(size_bytes=path.stat().st_size))
    with pytest.raises(ModelError, match=r"joint_encoder.safetensors has [\d,]+ bytes, its header promises"):
        open_directory(model)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x08\0\0\0\0\0\0\0notjson!", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_named(model, content):
    (model / "adapter.safetensors").write_bytes(content)
    edit_config(model, lambda c: c["files"]["adapter.safetensors"].update(size_bytes=len(content)))
    with pytest.raises(ModelError, match=r"adapter\.safetensors is"):
        open_directory(model)


def test_a_flipped_byte_is_found_at_load(model):
    path = model / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    opened = open_directory(model)
    with pytest.raises(ModelError, match=r"adapter.safetensors is damaged: its sha256 is"):
        opened.load_adapter()
    with pytest.raises(ModelError, match=r"adapter.safetensors is damaged"):
        opened.verify()
    opened.load_adapter(verify=False)


def test_every_difference_of_tensors_is_listed_at_once(model):
    def damage(tensors):
        del tensors["key.bias"]
        tensors["surprise"] = torch.zeros(1)
        tensors["projection.weight"] = torch.zeros(31, 48)

    edit_tensors(model, "adapter.safetensors", damage)
    edit_tensors(model, "joint_encoder.safetensors", lambda t: t.pop("pooler.dense.bias"))
    started = time.perf_counter()
    with pytest.raises(ShapeMismatchError) as caught:
        open_directory(model)
    assert time.perf_counter() - started < 1.0
    for part in (
        "adapter.safetensors lacks key.bias",
        "adapter.safetensors holds the unexpected surprise",
        "adapter.safetensors: projection.weight is (31, 48), the spec says (32, 48)",
        "joint_encoder.safetensors lacks pooler.dense.bias",
    ):
        assert part in str(caught.value)


def test_parts_that_do_not_fit_each_other_are_refused(model):
    edit_config(model, lambda c: c["spec"]["backbone"].update(width=49))
    with pytest.raises(ShapeMismatchError, match="gives tokens of width 49, the adapter expects 48"):
        open_directory(model)


def test_a_foreign_checksum_in_the_spec_is_refused(model):
    edit_config(model, lambda c: c["spec"]["adapter"].update(weights_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"gives adapter.safetensors the sha256 .*, its spec 000000000000"):
        open_directory(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.bin", "can run code"), ("evil.PKL", "can run code"), ("m.pt", "can run code"),
        ("modeling.py", "can run"),
        ("../adapter.safetensors", "inside the directory"), ("/etc/passwd.json", "inside the directory"),
        ("sub/a.safetensors", "inside the directory"), (".hidden.json", "inside the directory"), ("a.exe", "ending in"),
    ],
)  # fmt: skip
def test_names_that_are_refused(model, name, message):
    edit_config(model, lambda c: c["files"].update({name: {"sha256": "0" * 64, "size_bytes": 1}}))
    with pytest.raises(ModelError, match=message):
        open_directory(model)


def test_links_that_leave_the_directory_are_refused(model, tmp_path):
    outside = tmp_path / "elsewhere.safetensors"
    (model / "adapter.safetensors").rename(outside)
    (model / "adapter.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="outside the model directory; refused"):
        open_directory(model)


def test_a_pickle_under_a_safe_name_is_never_unpickled(model):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code of the model directory was run",))

    for name in ("adapter.safetensors", "tokenizer.json", "config.json"):
        shutil.copyfile(model / name, model / "kept")
        (model / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ModelError):
            open_directory(model).load_tokenizer()
        (model / "kept").rename(model / name)


def test_config_files_that_are_not_ours(model, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no model directory at"):
        open_directory(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        open_directory(tmp_path)
    (model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="import-checkpoint"):
        open_directory(model)
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not JSON"):
        open_directory(model)
    with (model / "config.json").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ModelError, match="more than the"):
        open_directory(model)


def test_a_newer_format_is_refused(model):
    edit_config(model, lambda c: c.update(format_version=2))
    with pytest.raises(ModelError, match="format version 2, this program reads 1; upgrade"):
        open_directory(model)


def test_spec_problems_are_listed_at_once(model):
    def damage(config):
        spec = config["spec"]
        spec["adapter"].pop("input_dim")
        spec["adapter"]["kind"] = "pooled"
        spec["joint_encoder"]["width"] = "wide"
        spec["joint_encoder"]["num_layers"] = 0
        spec["preprocess"]["image_size"] = [32]
        spec["colour"] = "red"

    edit_config(model, damage)
    with pytest.raises(ModelError) as caught:
        open_directory(model)
    for part in (
        "adapter.input_dim is missing", "adapter.kind is 'pooled', expected one of compressed, local",
        "joint_encoder.width is 'wide', expected int", "joint_encoder.num_layers is 0", "preprocess.image_size is [32]",
        "unknown keys colour",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_save_refuses_an_existing_target_and_leaves_nothing_behind(pristine, tmp_path):
    parts = {"backbone": pristine.file("backbone.safetensors"), "joint_encoder": pristine.load_joint_encoder(),
             "tokenizer": pristine.load_tokenizer(), "text_tower": pristine.file("text_tower.safetensors")}  # fmt: skip
    adapter = pristine.load_adapter()
    saved = save_model(tmp_path / "new", pristine.spec, adapter=adapter, **parts, extra={"notes.txt": b"hello"})
    assert saved.fingerprints == pristine.fingerprints
    assert saved.file("notes.txt").read_bytes() == b"hello"
    with pytest.raises(ModelError, match="exists already"):
        save_model(tmp_path / "new", pristine.spec, adapter=adapter, **parts)
    with pytest.raises(ShapeMismatchError, match=r"adapter\.safetensors lacks"):
        save_model(tmp_path / "bad", pristine.spec, adapter={"query": torch.zeros(1)}, **parts)
    with pytest.raises(ModelError, match="can run code"):
        save_model(tmp_path / "bad", pristine.spec, adapter=adapter, **parts, extra={"model.pkl": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    save_model(tmp_path / "new", replace(pristine.spec, name="renamed"), adapter=adapter, **parts, overwrite=True)
    assert open_directory(tmp_path / "new").spec.name == "renamed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_a_model_without_a_text_tower_says_so(tmp_path):
    model = write_random_model(tmp_path / "m", text_tower=False)
    with pytest.raises(ModelError, match="has no text tower, so it cannot search by text"):
        model.load_text_tower()


def test_a_tokenizer_with_too_many_words_is_refused(pristine):
    encoder = replace(pristine.spec.joint_encoder, vocab_size=100)
    narrow = replace(pristine, spec=replace(pristine.spec, joint_encoder=encoder))
    with pytest.raises(ShapeMismatchError, match=r"has \d+ ids, the joint encoder knows 100"):
        narrow.load_tokenizer()
