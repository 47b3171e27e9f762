"""Text towers: a query text to the embedding space of the backbone, for first-stage retrieval only.

Three kinds. `open_clip`: an architecture of open_clip with its own tokenizer. `hf`: the text tower of
SiglipModel or CLIPModel, on the same open_clip module. `sentence_map`: a BERT sentence encoder (mean of its
tokens), for backbones without a text tower; the backbone's `embedding_map` then leads into its space.

The tokenizer's JSON travels inside the weights file, so that one file is the whole tower.

Shape letters: B batch, L text tokens, W tower width, De embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, ModelError
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.spec import JointEncoderSpec, TextTowerSpec
from edje_pipeline.models.tensor_files import load_exactly, read_tensors

TOKENIZER_KEY = "tokenizer_json"
BATCH_TEXTS = 64
TOKENIZER_FILE, TOKENIZER_CLIP = "file", "clip_bpe"


class TextTower(nn.Module):
    """Common part: batching, normalisation, the tokenizer inside the weights."""

    tokenizer_json: Tensor

    def __init__(self, spec: TextTowerSpec, tokenizer_bytes: bytes) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer(TOKENIZER_KEY, torch.tensor(list(tokenizer_bytes), dtype=torch.uint8))

    @property
    def tokenizer_text(self) -> str:
        """The tokenizer.json that the tower was saved with; empty for a built-in one."""
        return bytes(self.tokenizer_json.cpu().numpy()).decode()

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B, L) int64 and mask (B, L), 1 where a token is text."""
        raise NotImplementedError

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> (B, De), not normalised."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (n, De) float32, L2-normalised, in the order given."""
        if isinstance(texts, str):
            raise TypeError("encode takes a sequence of texts, got one string; wrap it in a list")
        device = self.tokenizer_json.device
        rows = np.empty((len(texts), self.spec.embedding_dim), dtype=np.float32)
        for start in range(0, len(texts), BATCH_TEXTS):
            ids, mask = self.tokenize(list(texts[start : start + BATCH_TEXTS]))
            embedding = F.normalize(self.embed(ids.to(device), mask.to(device)).float(), dim=-1)
            rows[start : start + len(embedding)] = embedding.cpu().numpy()
        return rows


class ContrastiveTextTower(TextTower):
    """open_clip's TextTransformer, also with the weights of SiglipModel and CLIPModel."""

    def __init__(self, spec: TextTowerSpec, tokenizer_bytes: bytes) -> None:
        super().__init__(spec, tokenizer_bytes)
        from open_clip.model import _build_text_tower

        options = spec.options
        self.context_length = int(options["text_cfg"]["context_length"])
        self.model = _build_text_tower(
            spec.embedding_dim, copy.deepcopy(options["text_cfg"]), bool(options.get("quick_gelu", False))
        )
        self._tokenize = clip_tokenizer(self.context_length)
        if options.get("tokenizer", TOKENIZER_FILE) == TOKENIZER_FILE:
            self._tokenize = file_tokenizer(
                self.tokenizer_text, self.context_length, int(options.get("pad_id", 0)), options.get("clean", "")
            )

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = self._tokenize(texts)
        return ids, torch.ones_like(ids)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        del mask  # These towers were trained to see their padding, or are causal and pool before it.
        embedding: Tensor = self.model(ids)
        return embedding


class SentenceTextTower(TextTower):
    """A BERT whose token states are averaged (all-MiniLM and its like), and an optional learned linear map."""

    def __init__(self, spec: TextTowerSpec, tokenizer_bytes: bytes) -> None:
        super().__init__(spec, tokenizer_bytes)
        from tokenizers import Tokenizer as WordPieceTokenizer

        from edje_pipeline.models.tokenizer import Tokenizer

        bert = JointEncoderSpec(**spec.options["bert"])
        self.model = JointEncoder(bert)
        # The scoring head has no part in a sentence's embedding and no place in its weights.
        self.model.pooler = cast("Any", nn.Identity())
        self.model.classifier = cast("Any", nn.Identity())
        has_map = bool(spec.options.get("map", False))
        if not has_map and bert.width != spec.embedding_dim:
            raise ConfigError(f"a sentence tower of width {bert.width} without map cannot give {spec.embedding_dim}")
        self.map = nn.Linear(bert.width, spec.embedding_dim) if has_map else None
        max_tokens = int(spec.options.get("max_tokens", 256))
        self._tokenizer = Tokenizer(WordPieceTokenizer.from_str(self.tokenizer_text), max_text_tokens=max_tokens + 1)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer.encode(texts)
        length = max(len(ids) for ids in encoded)
        ids = torch.full((len(encoded), length), self._tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(encoded), length), dtype=torch.int64)
        for row, values in enumerate(encoded):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        return ids, mask

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model.encode_text(ids, mask)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        if self.map is None:
            return pooled
        mapped: Tensor = self.map(F.normalize(pooled, dim=-1))
        return mapped


KINDS: dict[str, type[TextTower]] = {
    "open_clip": ContrastiveTextTower,
    "hf": ContrastiveTextTower,
    "sentence_map": SentenceTextTower,
}


def clip_tokenizer(context_length: int) -> Any:
    """open_clip's own byte-pair tokenizer: its vocabulary is part of the package."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=context_length)

    def encode(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(texts)
        return ids

    return encode


def file_tokenizer(text: str, context_length: int, pad_id: int, clean: str) -> Any:
    """A tokenizer.json: special tokens as it says, cut and padded to the tower's context length."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ModelError(f"the text tower's tokenizer.json cannot be read: {error}") from error
    tokenizer.enable_truncation(max_length=context_length)
    tokenizer.enable_padding(length=context_length, pad_id=pad_id)
    cleaner = None
    if clean:
        from open_clip.tokenizer import get_clean_fn

        cleaner = get_clean_fn(clean)

    def encode(texts: list[str]) -> Tensor:
        cleaned = [cleaner(text) for text in texts] if cleaner is not None else texts
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(cleaned)], dtype=torch.int64)

    return encode


def create_text_tower(
    spec: TextTowerSpec, weights: str | Path | None = None, *, tokenizer_json: str | bytes = b""
) -> TextTower:
    """Builds the tower a spec describes.

    Args:
        spec: From a model directory or from assemble.py.
        weights: A text_tower.safetensors; None leaves random weights.
        tokenizer_json: Content of a tokenizer.json, when `weights` is None.

    Raises:
        ModelError: the file or its tokenizer cannot be read. ShapeMismatchError: it does not fit.
    """
    if spec.kind not in KINDS:
        raise ConfigError(f"text tower kind {spec.kind!r} is not known; expected one of {', '.join(KINDS)}")
    tokenizer_bytes = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
    tensors: dict[str, Tensor] | None = None
    if weights is not None:
        tensors = read_tensors(Path(weights))
        if TOKENIZER_KEY in tensors:
            tokenizer_bytes = bytes(tensors[TOKENIZER_KEY].numpy())
    tower = KINDS[spec.kind](spec, tokenizer_bytes)
    if tensors is not None:
        load_exactly(tower, tensors, where=str(weights))
    tower.requires_grad_(False)
    return tower.eval()
