"""What scoring is compared with: the authors' way, transformers in padded and in equal-length batches, text alone.

All read their tokens from memory and run the joint encoder's own weights in transformers' BertModel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edje_pipeline.models.bert_weights import to_hf_names
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.stages.score_pairs import length_batches


def as_transformers(encoder: JointEncoder) -> Any:
    """transformers' BertModel with the weights of a joint encoder."""
    from transformers import BertConfig, BertModel

    spec = encoder.spec
    config = BertConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.mlp_dim,
        max_position_embeddings=encoder.position_embeddings.num_embeddings,
        layer_norm_eps=spec.norm_eps,
    )
    bert = BertModel(config, add_pooling_layer=True).eval()
    target = to_hf_names(encoder.state_dict())
    target |= {f"pooler.dense.{kind}": getattr(encoder.pooler.dense, kind) for kind in ("weight", "bias")}
    found = bert.load_state_dict(target, strict=False)
    assert not found.unexpected_keys, found
    assert not [key for key in found.missing_keys if "position_ids" not in key], found
    return bert


class Rivals:
    """Every other way to score the same pairs with the same weights."""

    def __init__(self, encoder: JointEncoder, lists: list[list[int]], tokens: np.ndarray) -> None:
        """Args: lists: token ids of the queries. tokens: (images, M, E)."""
        self.bert, self.classifier = as_transformers(encoder), encoder.classifier
        self.lists, self.images = lists, torch.from_numpy(tokens).float()
        width = encoder.spec.width
        # Transform and decoder, as BertForMaskedLM has them; the output is thrown away.
        self.mlm = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, encoder.spec.vocab_size)
        ).eval()

    @torch.inference_mode()
    def authors(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        """One query at a time against its candidates: mask, every position of the last layer, the MLM head."""
        parts = []
        for query in np.unique(texts):
            chosen = np.flatnonzero(texts == query)
            parts.append(self._padded([self.lists[query]] * len(chosen), self.images[images[chosen]], mlm=True))
        return np.concatenate(parts)

    @torch.inference_mode()
    def padded(self, texts: np.ndarray, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """Batches in the order of the pairs, padded to the longest text of each."""
        chunks = [slice(start, start + batch) for start in range(0, len(texts), batch)]
        return np.concatenate([self._padded([self.lists[t] for t in texts[c]], self.images[images[c]]) for c in chunks])

    @torch.inference_mode()
    def dense(self, texts: np.ndarray, images: np.ndarray, max_tokens: int) -> np.ndarray:
        """Batches of one text length, no mask: the bare forward pass."""
        lengths = np.array([len(self.lists[t]) for t in texts])
        order = np.argsort(lengths, kind="stable")
        found = np.empty(len(texts), np.float32)
        for start, stop, length in length_batches(lengths[order], max_tokens, self.images.shape[1]):
            chosen = order[start:stop]
            ids = torch.tensor([self.lists[t] for t in texts[chosen]])
            words = self.bert.embeddings.word_embeddings
            embedded = torch.cat([words(ids), self.images[images[chosen]], words(ids[:, -1:])], 1)
            types = torch.zeros(embedded.shape[:2], dtype=torch.int64)
            types[:, length:] = 1
            out = self.bert(inputs_embeds=embedded, token_type_ids=types)
            found[chosen] = self.classifier(out.pooler_output)[:, 0].numpy()
        return found

    @torch.inference_mode()
    def text_only(self, texts: np.ndarray, batch: int = 32) -> np.ndarray:
        """A text cross-encoder on as many tokens: word ids only, padded batches sorted by length.

        What CrossEncoder.predict of sentence-transformers does after tokenizing; `CrossEncoderRival` is the real one.
        """
        num_image = self.images.shape[1]
        lengths = np.array([len(self.lists[t]) + num_image + 1 for t in texts])
        order = np.argsort(-lengths, kind="stable")
        found = np.empty(len(texts), np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = int(lengths[chosen].max())
            ids = torch.randint(1000, self.bert.config.vocab_size - 1, (len(chosen), longest))
            mask = (torch.arange(longest) < torch.from_numpy(lengths[chosen])[:, None]).long()
            out = self.bert(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
            found[chosen] = self.classifier(out.pooler_output)[:, 0].numpy()
        return found

    def _padded(self, lists: list[list[int]], image_tokens: Tensor, *, mlm: bool = False) -> np.ndarray:
        num_pairs, num_image = image_tokens.shape[:2]
        length = max(map(len, lists)) + num_image + 1
        ids = torch.zeros(num_pairs, length, dtype=torch.int64)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        place = torch.tensor([len(tokens) for tokens in lists])
        for row, tokens in enumerate(lists):
            end = len(tokens) + num_image
            ids[row, : len(tokens)] = torch.tensor(tokens)
            ids[row, end] = tokens[-1]
            mask[row, : end + 1] = 1
            types[row, len(tokens) : end + 1] = 1
        embedded = self.bert.embeddings.word_embeddings(ids)
        embedded[torch.arange(num_pairs)[:, None], place[:, None] + torch.arange(num_image)] = image_tokens
        out = self.bert(inputs_embeds=embedded, attention_mask=mask, token_type_ids=types)
        if mlm:
            self.mlm(out.last_hidden_state)
        return self.classifier(out.pooler_output)[:, 0].numpy()


class CrossEncoderRival:
    """sentence-transformers' CrossEncoder with the same weights, on pairs of texts of the same total length.

    The passage is as many word tokens as an image has tokens. It runs the real `predict`: tokenizer,
    sorting by length, padding, its own default batch of 32.

    Raises:
        ImportError: sentence-transformers is not installed.
    """

    def __init__(self, rivals: Rivals, tokenizer_json: str, queries: list[str], folder: Path) -> None:
        from sentence_transformers import CrossEncoder
        from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

        config = rivals.bert.config
        config.num_labels = 1
        model = BertForSequenceClassification(config).eval()
        model.bert.load_state_dict(rivals.bert.state_dict())
        model.classifier.load_state_dict(rivals.classifier.state_dict())
        model.save_pretrained(folder)
        (folder / "words.json").write_text(tokenizer_json)
        special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "words.json"), **special)
        tokenizer.save_pretrained(folder)
        self.encoder = CrossEncoder(str(folder), device="cpu", max_length=config.max_position_embeddings)
        self.queries, num_image = queries, rivals.images.shape[1]
        # A word that is one token of the vocabulary, as often as an image has tokens.
        known = tokenizer.get_vocab()
        word = next(word for word in ("red", "a", *known) if word in known and word.isalpha())
        self.passage = " ".join([word] * num_image)
        pair = tokenizer(queries[0], self.passage)["input_ids"]
        expected = len(tokenizer(queries[0])["input_ids"]) + num_image + 1
        assert len(pair) == expected, f"{len(pair)} tokens a pair, {expected} expected"

    def predict(self, texts: np.ndarray) -> np.ndarray:
        """One score a pair; they mean nothing, for the passage says nothing."""
        pairs = [(self.queries[text], self.passage) for text in texts]
        found: np.ndarray = self.encoder.predict(pairs, show_progress_bar=False)
        return found
