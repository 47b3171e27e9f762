"""The joint encoder: a BERT that reads a text and an image's tokens and gives one logit.

Sequence: `[CLS] text [SEP]` with token type 0, then M image tokens and `[SEP]` with token type 1.
Image tokens stand where word embeddings would: position and type embeddings and the embedding
LayerNorm apply to them. The score is a linear map of BERT's pooled [CLS]. (Paper section 3.3; the
authors' `pretrain_model.py` for the order of the pieces, the pooler and the single logit.)

Shape letters: B pairs, U distinct images, L text tokens with [CLS] and [SEP], M image tokens,
S = L + M + 1 whole sequence, E width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, ShapeMismatchError
from edje_pipeline.models.bert_layers import BertLayer, BertPooler
from edje_pipeline.models.spec import JointEncoderSpec

TEXT_TYPE, IMAGE_TYPE = 0, 1


class JointEncoder(nn.Module):
    """See the module docstring. Two ways to score, equal by test.

    `forward_dense` is the fast one: texts of one length, no mask, the last layer at [CLS] only.
    `forward_padded` is the plain one: any lengths, a mask, every layer in full; training uses it.
    """

    def __init__(self, spec: JointEncoderSpec, *, dropout: float = 0.0) -> None:
        """Args: spec: sizes. dropout: probability used in training mode, at BERT's own places."""
        super().__init__()
        if spec.width % spec.num_heads:
            raise ConfigError(f"joint encoder width {spec.width} is not a multiple of its {spec.num_heads} heads")
        self.spec = spec
        self.dropout = dropout
        self.word_embeddings = nn.Embedding(spec.vocab_size, spec.width)
        self.position_embeddings = nn.Embedding(spec.max_positions, spec.width)
        self.type_embeddings = nn.Embedding(2, spec.width)
        self.embedding_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.layers = nn.ModuleList(
            BertLayer(spec.width, spec.num_heads, spec.mlp_dim, spec.norm_eps, dropout) for _ in range(spec.num_layers)
        )
        self.pooler = BertPooler(spec.width)
        self.classifier = nn.Linear(spec.width, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: what it computes in."""
        return self.classifier.weight.dtype

    def forward_dense(self, input_ids: Tensor, image_tokens: Tensor, image_index: Tensor | None = None) -> Tensor:
        """Scores pairs whose texts have one length.

        Args:
            input_ids: (B, L) int64, `[CLS] text [SEP]`, no padding.
            image_tokens: (B, M, E), or (U, M, E) with `image_index`.
            image_index: (B,) int64, which image each pair is about; one image serves many pairs.

        Returns:
            (B,) float32 logits.
        """
        self._check(input_ids, image_tokens, None if image_index is not None else input_ids.shape[0])
        num_text, num_image = input_ids.shape[1], image_tokens.shape[1]
        positions = self.position_embeddings.weight[: num_text + num_image + 1]
        types = self.type_embeddings.weight
        text = self.word_embeddings(input_ids) + (positions[:num_text] + types[TEXT_TYPE])
        # Position and norm of image tokens depend on the text's length only: once per image, not per pair.
        image = image_tokens.to(self.dtype) + (positions[num_text:-1] + types[IMAGE_TYPE])
        image = self.embedding_norm(image)
        if image_index is not None:
            image = image.index_select(0, image_index)
        end = self.word_embeddings(input_ids[:, -1:]) + (positions[-1:] + types[IMAGE_TYPE])
        hidden = torch.cat([self.embedding_norm(text), image, self.embedding_norm(end)], dim=1)
        hidden = F.dropout(hidden, self.dropout, self.training)
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
        first: Tensor = self.layers[-1].forward_first(hidden)  # type: ignore[operator]
        return self.score(first[:, 0])

    def forward_padded(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Scores pairs whose texts have any lengths.

        Args:
            input_ids: (B, L) int64, `[CLS] text [SEP]`, padded on the right.
            attention_mask: (B, L), nonzero where `input_ids` is not padding.
            image_tokens: (B, M, E).

        Returns:
            (B,) float32 logits.
        """
        return self.score(self.encode_pair(input_ids, attention_mask, image_tokens)[:, 0])

    forward = forward_padded

    def encode_pair(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Hidden states (B, L + M + 1, E) of the last layer: text (with its padding), image tokens, `[SEP]`.

        Padding stands between text and image here, behind both in the authors' code; it is masked
        and the position numbers leave it out, so the results are the same.
        """
        self._check(input_ids, image_tokens, input_ids.shape[0])
        mask = attention_mask.bool()
        lengths = mask.sum(dim=1, keepdim=True)
        num_image = image_tokens.shape[1]
        text = self.word_embeddings(input_ids) + self._positions_types(self._text_positions(input_ids), TEXT_TYPE)
        end = self.word_embeddings(input_ids.gather(1, lengths - 1))
        image_positions = lengths + torch.arange(num_image + 1, device=input_ids.device)
        image = torch.cat([image_tokens.to(self.dtype), end], dim=1) + self._positions_types(
            image_positions, IMAGE_TYPE
        )
        hidden = self.embedding_norm(torch.cat([text, image], dim=1))
        return self._run(hidden, torch.cat([mask, mask.new_ones(len(mask), num_image + 1)], dim=1))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, E) of the last layer on text alone, for the text-embedding recovery loss."""
        positions = self._text_positions(input_ids)
        hidden = self.word_embeddings(input_ids) + self._positions_types(positions, TEXT_TYPE)
        return self._run(self.embedding_norm(hidden), None if attention_mask is None else attention_mask.bool())

    def encode_images(self, image_tokens: Tensor, cls_id: int) -> Tensor:
        """Hidden states (B, 1 + M, E) of `[CLS]` and image tokens read as if they were a sentence (type 0).

        For the contrastive warm-up of training, which has no text in the sequence.
        """
        first = self.word_embeddings.weight[cls_id].expand(len(image_tokens), 1, -1)
        hidden = torch.cat([first, image_tokens.to(self.dtype)], dim=1)
        positions = self._text_positions(hidden[..., 0])
        return self._run(self.embedding_norm(hidden + self._positions_types(positions, TEXT_TYPE)), None)

    def score(self, first_be: Tensor) -> Tensor:
        """Hidden state of [CLS] (B, E) -> float32 logits (B,)."""
        logits: Tensor = self.classifier(self.pooler(first_be))
        return logits[:, 0].float()

    def extend_positions(self, max_positions: int) -> None:
        """Lengthens the position table to at least `max_positions` rows by repeating the last one."""
        from edje_pipeline.models.bert_weights import extend_rows

        if max_positions <= self.position_embeddings.num_embeddings:
            return
        table = extend_rows(self.position_embeddings.weight.detach(), max_positions)
        self.position_embeddings = nn.Embedding(len(table), self.spec.width, _weight=table)

    def with_layers(self, layers: Iterable[nn.Module]) -> JointEncoder:
        """A twin whose layers are others; everything else is shared with this one.

        Args:
            layers: modules that take what `BertLayer` takes, `forward_first` of the last one included.
        """
        twin = copy.copy(self)
        twin._modules = {**self._modules, "layers": nn.ModuleList(layers)}  # noqa: SLF001
        return twin

    def _run(self, hidden: Tensor, mask_bs: Tensor | None) -> Tensor:
        hidden = F.dropout(hidden, self.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, mask_bs)
        return hidden

    def _text_positions(self, like_bl: Tensor) -> Tensor:
        length = like_bl.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ShapeMismatchError(
                f"a sequence of {length} tokens does not fit the joint encoder's "
                f"{self.position_embeddings.num_embeddings} positions; call extend_positions first"
            )
        return torch.arange(length, device=like_bl.device)

    def _positions_types(self, positions: Tensor, token_type: int) -> Tensor:
        summed: Tensor = self.position_embeddings(positions) + self.type_embeddings.weight[token_type]
        return summed

    def _check(self, input_ids: Tensor, image_tokens: Tensor, num_images: int | None) -> None:
        """Raises ShapeMismatchError when the inputs do not fit the weights or each other."""
        expected = ("U" if num_images is None else num_images, "M", self.spec.width)
        fits = image_tokens.ndim == 3 and image_tokens.shape[2] == self.spec.width
        if not fits or input_ids.ndim != 2 or (num_images is not None and image_tokens.shape[0] != num_images):
            raise ShapeMismatchError(
                f"joint encoder takes input_ids (B, L) and image tokens {expected}, "
                f"got {tuple(input_ids.shape)} and {tuple(image_tokens.shape)}"
            )
        needed = input_ids.shape[1] + image_tokens.shape[1] + 1
        if needed > self.position_embeddings.num_embeddings:
            raise ShapeMismatchError(
                f"{input_ids.shape[1]} text tokens and {image_tokens.shape[1]} image tokens need {needed} positions, "
                f"the joint encoder has {self.position_embeddings.num_embeddings}; call extend_positions first"
            )
