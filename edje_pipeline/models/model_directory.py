"""The model directory: open, check, load, save.

    MODEL/
      config.json                  format, the spec, sha256 and size of every other file
      backbone.safetensors  adapter.safetensors  joint_encoder.safetensors
      text_tower.safetensors       where the backbone has one
      tokenizer.json  MODEL_CARD.md

`open_model` reads JSON and file headers only: no torch, well under a second, and a model that does
not fit together is refused there. Weights are read by the `load_*` methods, checksums first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edje_pipeline.errors import ModelError, ModelNotFoundError, ShapeMismatchError
from edje_pipeline.models.compact_weights import plain_header, scale_problems
from edje_pipeline.models.layout import Shapes, adapter_shapes, joint_encoder_shapes
from edje_pipeline.models.model_files import (
    FileRecord,
    check_name,
    member,
    read_header,
    read_json,
    shape_problems,
    verify_sha256,
)
from edje_pipeline.models.spec import ModelSpec, fingerprint_of
from edje_pipeline.models.spec_json import spec_from_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edje_pipeline.models.adapter import TokenAdapter
    from edje_pipeline.models.backbone import Backbone
    from edje_pipeline.models.joint_encoder import JointEncoder
    from edje_pipeline.models.text_tower import TextTower
    from edje_pipeline.models.tokenizer import Tokenizer

FORMAT_NAME, FORMAT_VERSION = "edje-model", 1
CONFIG_FILE, CARD_FILE, TOKENIZER_FILE = "config.json", "MODEL_CARD.md", "tokenizer.json"
BACKBONE_FILE, ADAPTER_FILE = "backbone.safetensors", "adapter.safetensors"
JOINT_ENCODER_FILE, TEXT_TOWER_FILE = "joint_encoder.safetensors", "text_tower.safetensors"
HEADS_FILE = "training_heads.safetensors"  # of models trained here; only further training reads them
WEIGHT_FILES = {
    "backbone": BACKBONE_FILE,
    "adapter": ADAPTER_FILE,
    "joint_encoder": JOINT_ENCODER_FILE,
    "text_tower": TEXT_TOWER_FILE,
}


@dataclass(frozen=True)
class ModelDirectory:
    """A checked model directory; pickles by value, so that a worker can load from it."""

    path: Path
    spec: ModelSpec
    files: dict[str, FileRecord]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What a result depends on, by part: spec and sha256 of the weights."""
        parts = {
            "backbone": self.spec.backbone.fingerprint,
            "preprocess": self.spec.preprocess.fingerprint,
            "adapter": self.spec.adapter.fingerprint,
            "joint_encoder": fingerprint_of([self.spec.joint_encoder.fingerprint, self.spec.tokenizer_sha256]),
        }
        if self.spec.text_tower is not None:
            parts["text_tower"] = self.spec.text_tower.fingerprint
        return parts

    @property
    def size_bytes(self) -> int:
        """Of all files together, config.json not counted."""
        return sum(record.size_bytes for record in self.files.values())

    def file(self, name: str, *, verify: bool = True) -> Path:
        """The path of one of the model's files, its checksum verified (once per process).

        Raises:
            ModelNotFoundError: config.json does not list it, or it is gone. ModelError: damaged.
        """
        record = self.files.get(name)
        if record is None:
            raise ModelNotFoundError(f"the model {self.path} has no {name}; it holds {', '.join(sorted(self.files))}")
        path = member(self.path, name)
        if verify:
            verify_sha256(path, record, name=f"{self.path}/{name}")
        return path

    def load_backbone(self, *, verify: bool = True) -> Backbone:
        """The frozen vision model with its weights, in eval mode on the CPU."""
        from edje_pipeline.models.backbone import create_backbone

        return create_backbone(
            self.spec.backbone, self.file(BACKBONE_FILE, verify=verify), preprocess=self.spec.preprocess
        )

    def load_adapter(self, *, verify: bool = True) -> TokenAdapter:
        """The token adapter with its weights, float32, in eval mode on the CPU."""
        import torch

        from edje_pipeline.models.adapter import create_adapter

        with torch.device("meta"):
            adapter = create_adapter(self.spec.adapter)
        _assign(adapter, self.file(ADAPTER_FILE, verify=verify))
        return adapter

    def load_joint_encoder(self, *, verify: bool = True, dropout: float = 0.0) -> JointEncoder:
        """The joint encoder with its weights, float32, in eval mode on the CPU.

        Its position table is lengthened where text and image tokens need more rows than it has.
        """
        import torch

        from edje_pipeline.models.joint_encoder import JointEncoder

        with torch.device("meta"):
            encoder = JointEncoder(self.spec.joint_encoder, dropout=dropout)
        _assign(encoder, self.file(JOINT_ENCODER_FILE, verify=verify))
        encoder.extend_positions(self.spec.joint_encoder.max_text_tokens + self.spec.adapter.num_compressed_tokens)
        return encoder

    def load_tokenizer(self, *, verify: bool = True) -> Tokenizer:
        """The joint encoder's tokenizer.

        Raises:
            ShapeMismatchError: its vocabulary does not fit the word embeddings.
        """
        from edje_pipeline.models.tokenizer import Tokenizer

        path = self.file(TOKENIZER_FILE, verify=verify)
        tokenizer = Tokenizer.from_file(path, max_text_tokens=self.spec.joint_encoder.max_text_tokens)
        if tokenizer.vocab_size > self.spec.joint_encoder.vocab_size:
            raise ShapeMismatchError(
                f"{path} has {tokenizer.vocab_size} ids, the joint encoder knows {self.spec.joint_encoder.vocab_size}"
            )
        return tokenizer

    def load_text_tower(self, *, verify: bool = True) -> TextTower:
        """What maps a query to the backbone's embedding space.

        Raises:
            ModelError: the model has none.
        """
        from edje_pipeline.models.text_tower import create_text_tower

        if self.spec.text_tower is None:
            raise ModelError(
                f"model {self.spec.name!r} has no text tower, so it cannot search by text; give first-stage candidates "
                "of your own to score, or use a model with a text tower"
            )
        return create_text_tower(self.spec.text_tower, self.file(TEXT_TOWER_FILE, verify=verify))

    def load_tensors(self, name: str, *, verify: bool = True) -> dict[str, Tensor]:
        """The tensors of a further file of the model, such as `HEADS_FILE`."""
        from edje_pipeline.models.tensor_files import read_tensors

        return read_tensors(self.file(name, verify=verify))

    def verify(self) -> None:
        """Checks the sha256 of every file.

        Raises:
            ModelError: names every damaged or missing file.
        """
        problems = []
        for name in sorted(self.files):
            try:
                self.file(name)
            except ModelError as error:
                problems.append(str(error))
        if problems:
            raise ModelError("; ".join(problems))


def open_model(text: str | Path) -> ModelDirectory:
    """Opens what `--model` names: a directory, `hf:org/name[@revision]`, or a bundled name.

    Raises:
        ModelNotFoundError, ModelError, ShapeMismatchError: see `open_directory`.
    """
    from edje_pipeline.models.hub import resolve

    return open_directory(resolve(text))


def open_directory(directory: Path) -> ModelDirectory:
    """Reads and checks a model directory without reading weights.

    Raises:
        ModelNotFoundError: no such directory, or a file is missing.
        ShapeMismatchError: tensors differ from the spec, or two parts do not fit; lists everything.
        ModelError: damaged, incomplete, or of another format version.
    """
    if not directory.is_dir():
        raise ModelNotFoundError(f"no model directory at {directory}")
    if not (directory / CONFIG_FILE).exists():
        raise ModelNotFoundError(f"{directory} has no {CONFIG_FILE}; expected a model directory of this program")
    where = f"{directory}/{CONFIG_FILE}"
    config = read_json(member(directory, CONFIG_FILE))
    if not isinstance(config, dict) or config.get("format") != FORMAT_NAME:
        raise ModelError(
            f"{where} is not an {FORMAT_NAME} config; to use Hugging Face or the authors' weights, import them with "
            "`edje-pipeline import-checkpoint` first"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{where} has format version {version!r}, this program reads {FORMAT_VERSION}; upgrade edje-pipeline"
        )
    files = _read_records(config.get("files"), where)
    model = ModelDirectory(directory, spec_from_dict(config.get("spec"), where=where), files)
    _check_files(model)
    model.spec.validate()
    return model


def _read_records(value: Any, where: str) -> dict[str, FileRecord]:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where} has no list of files")
    records = {}
    for name, entry in value.items():
        check_name(str(name), where=where)
        sha256, size = (entry.get("sha256"), entry.get("size_bytes")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(sha256, str) or len(sha256) != 64 or not isinstance(size, int):
            raise ModelError(f"{where}: the entry of {name} needs a sha256 and size_bytes, has {entry!r}")
        records[str(name)] = FileRecord(sha256, size)
    return records


def _check_files(model: ModelDirectory) -> None:
    """Presence, size, header and shapes of every file; everything that is wrong in one error."""
    spec = model.spec
    required = {ADAPTER_FILE, JOINT_ENCODER_FILE, TOKENIZER_FILE, BACKBONE_FILE}
    required |= {TEXT_TOWER_FILE} if spec.text_tower is not None else set()
    broken = [f"config.json does not list {name}" for name in sorted(required - model.files.keys())]
    unfit: list[str] = []
    shapes: dict[str, Shapes] = {
        ADAPTER_FILE: adapter_shapes(spec.adapter),
        JOINT_ENCODER_FILE: joint_encoder_shapes(spec.joint_encoder),
    }
    for name, record in sorted(model.files.items()):
        try:
            path = member(model.path, name)
            size = path.stat().st_size
            if size != record.size_bytes:
                broken.append(f"{name} has {size:,} bytes, config.json says {record.size_bytes:,}; fetch it again")
            elif name.endswith(".safetensors"):
                header = read_header(path)
                broken += [f"{name}: {problem}" for problem in scale_problems(header)]
                unfit += shape_problems(name, plain_header(header), shapes[name]) if name in shapes else []
        except ModelError as error:
            broken.append(str(error))
    for part, name in WEIGHT_FILES.items():
        stated = getattr(getattr(spec, part), "weights_sha256", "")
        if name in model.files and stated and stated != model.files[name].sha256:
            broken.append(
                f"config.json gives {name} the sha256 {model.files[name].sha256[:12]}..., its spec {stated[:12]}..."
            )
    if broken:
        raise ModelError(f"the model {model.path} is damaged or incomplete: " + "; ".join(broken + unfit))
    if unfit:
        raise ShapeMismatchError(f"the model {model.path} does not fit its own spec: " + "; ".join(unfit))


def _assign(module: nn.Module, path: Path) -> None:
    """Gives a module built on the meta device its tensors without a second copy."""
    from edje_pipeline.models.tensor_files import key_problems, read_tensors

    tensors = read_tensors(path)
    problems = key_problems(tensors, module.state_dict(), ignore=frozenset())
    if problems:
        raise ShapeMismatchError(f"{path} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    module.eval()
