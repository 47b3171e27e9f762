"""Scoring speed, end to end from a committed index, against the paths it replaces. Same weights, same pairs.

    python -m benchmarks.score_speed --rounds 5

(ours)          run_score: index on disk -> ranked results on disk, 49 kB float16 tokens and int8 tokens
(authors)       one query at a time: text + M placeholders tokenized and padded, attention mask, full last
                layer, MLM head computed over the sequence, as the released code does
(transformers)  transformers.BertModel on padded batches of 32 pairs, sorted by nothing, from memory
(dense)         the joint encoder alone on equal-length batches from memory: what ours could reach

All rivals read their tokens from memory, ours reads them from disk and writes its results. Rounds
alternate; the table gives medians.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.pipeline.score import ScoreConfig, run_score
from edje_pipeline.stages.score_pairs import PairScorer, TextTokens
from edje_pipeline.storage.index import Index
from tests.index_util import write_index

WORDS = ("a", "red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "two", "people")
NUM_TOKENS = 64


def make_model(folder: Path) -> ModelDirectory:
    """MiniLM-L12 sizes, random weights, 64 image tokens of width 384."""
    small = write_random_model(folder / "small", size="demo", num_compressed_tokens=NUM_TOKENS, image_size=32)
    spec = replace(small.spec.joint_encoder, num_layers=12, vocab_size=30_523, max_positions=512, weights_sha256="")
    torch.manual_seed(0)
    encoder = JointEncoder(spec)
    for name, value in encoder.named_parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.04)
        elif "norm" not in name:
            nn.init.zeros_(value)
    return save_model(
        folder / "model",
        replace(small.spec, joint_encoder=spec),
        backbone=small.file("backbone.safetensors"),
        adapter=small.file("adapter.safetensors"),
        joint_encoder=encoder,
        tokenizer=small.file("tokenizer.json"),
        text_tower=small.file("text_tower.safetensors") if small.spec.text_tower else None,
    )


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
    source, target = encoder.state_dict(), {}
    target["embeddings.word_embeddings.weight"] = source["word_embeddings.weight"]
    target["embeddings.position_embeddings.weight"] = source["position_embeddings.weight"]
    target["embeddings.token_type_embeddings.weight"] = source["type_embeddings.weight"]
    pairs = {"embedding_norm": "embeddings.LayerNorm", "pooler.dense": "pooler.dense"}
    for number in range(spec.num_layers):
        ours, theirs = f"layers.{number}", f"encoder.layer.{number}"
        pairs |= {
            f"{ours}.attention_output": f"{theirs}.attention.output.dense",
            f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.mlp_in": f"{theirs}.intermediate.dense",
            f"{ours}.mlp_out": f"{theirs}.output.dense",
            f"{ours}.mlp_norm": f"{theirs}.output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            parts = source[f"{ours}.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                target[f"{theirs}.attention.self.{name}.{kind}"] = part
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            target[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"]
    missing = bert.load_state_dict(target, strict=False)
    assert not missing.unexpected_keys, missing
    assert not [key for key in missing.missing_keys if "position_ids" not in key], missing
    return bert


class PaddedPath:
    """Text (padded) and image tokens through transformers' BERT, with a mask."""

    def __init__(self, encoder: JointEncoder, *, mlm: bool) -> None:
        self.bert = as_transformers(encoder)
        self.classifier = encoder.classifier
        width = encoder.spec.width
        self.mlm = None
        if mlm:  # transform + decoder, as BertForMaskedLM has them; its output is thrown away
            self.mlm = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, encoder.spec.vocab_size)
            )
        self.sep = 3

    @torch.inference_mode()
    def score(self, lists: list[list[int]], image_tokens: Tensor, pad_to: int | None = None) -> np.ndarray:
        """Token ids of each pair and (B, M, E) -> logits."""
        num_pairs, num_image = image_tokens.shape[:2]
        length = max(map(len, lists)) + num_image + 1 if pad_to is None else pad_to
        ids = torch.zeros(num_pairs, length, dtype=torch.int64)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        place = torch.zeros(num_pairs, dtype=torch.int64)
        for row, tokens in enumerate(lists):
            end = len(tokens) + num_image
            ids[row, : len(tokens)] = torch.tensor(tokens)
            ids[row, end] = tokens[-1]
            mask[row, : end + 1] = 1
            types[row, len(tokens) : end + 1] = 1
            place[row] = len(tokens)
        embedded = self.bert.embeddings.word_embeddings(ids)
        columns = place[:, None] + torch.arange(num_image)
        embedded[torch.arange(num_pairs)[:, None], columns] = image_tokens
        out = self.bert(inputs_embeds=embedded, attention_mask=mask, token_type_ids=types)
        if self.mlm is not None:
            self.mlm(out.last_hidden_state)
        return self.classifier(out.pooler_output)[:, 0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--per-query", type=int, default=12)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="edje-speed-"))
    try:
        text = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def measure(folder: Path, options: argparse.Namespace) -> str:
    model = make_model(folder)
    index = write_index(folder / "index", model, num_images=options.images, shard_rows=128, row_group_rows=128)
    small = write_index(
        folder / "int8", model, num_images=options.images, shard_rows=128, codec="int8", row_group_rows=256
    )
    rng, ids = np.random.default_rng(0), index.ids()
    queries = [(f"q{n}", " ".join(rng.choice(WORDS, rng.integers(6, 16)))) for n in range(options.queries)]
    pairs = [(q, ids[n]) for q, _ in queries for n in rng.choice(len(ids), options.per_query, replace=False)]
    pq.write_table(
        pa.table({"query_id": [q for q, _ in queries], "text": [t for _, t in queries]}), folder / "q.parquet"
    )
    pq.write_table(
        pa.table({"query_id": [q for q, _ in pairs], "image_id": [i for _, i in pairs]}), folder / "c.parquet"
    )
    encoder, lists = model.load_joint_encoder(), model.load_tokenizer().encode([t for _, t in queries])
    number = {name: n for n, name in enumerate(ids)}
    images = np.array([number[i] for _, i in pairs])
    texts = np.repeat(np.arange(len(queries)), options.per_query)
    stored = torch.from_numpy(index.tokens(ids))
    payloads = index.payloads(ids)
    authors, plain = PaddedPath(encoder, mlm=True), PaddedPath(encoder, mlm=False)
    scorer = PairScorer(encoder, index.codec, device="cpu", precision="float32")
    found: dict[str, np.ndarray] = {}
    startup: list[float] = []

    def ours(where: Index, name: str) -> None:
        out = folder / name
        result = run_score(
            ScoreConfig(
                index=str(where.location),
                queries=str(folder / "q.parquet"),
                candidates=str(folder / "c.parquet"),
                out=str(out),
                device="cpu",
                num_workers=0,
                num_threads=options.threads,
                overwrite=True,
                quiet=True,
            )
        )
        # Loading the model takes as long for ten pairs as for ten million.
        timings, stats = result.manifest["timings"], result.manifest["stats"]
        inside = stats["wait_s"] + stats["score_s"] + stats["write_s"]
        startup.append(timings["score_s"] - inside)
        table = pq.read_table(out / "results")
        keys = zip(table["query_id"].to_pylist(), table["image_id"].to_pylist(), strict=True)
        scores = dict(zip(keys, table["score"].to_pylist(), strict=True))
        found[name] = np.array([scores[pair] for pair in pairs], np.float32)

    def by_query() -> None:
        parts = []
        for query in range(len(queries)):
            chosen = np.flatnonzero(texts == query)
            parts.append(authors.score([lists[query]] * len(chosen), stored[images[chosen]], pad_to=64 + NUM_TOKENS))
        found["authors"] = np.concatenate(parts)

    def padded() -> None:
        starts = range(0, len(pairs), 32)
        chunks = [slice(start, start + 32) for start in starts]
        found["transformers"] = np.concatenate(
            [plain.score([lists[t] for t in texts[c]], stored[images[c]]) for c in chunks]
        )

    def dense() -> None:
        found["dense"] = scorer.score(payloads, images, TextTokens.from_lists(lists), texts)

    sides: dict[str, Callable[[], None]] = {
        "ours 49kB": lambda: ours(index, "ours 49kB"),
        "ours int8 tokens": lambda: ours(small, "ours int8 tokens"),
        "authors": by_query,
        "transformers": padded,
        "dense": dense,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number_of_round in range(options.rounds + 1):  # the first one warms up
        for name, side in sides.items():
            startup.clear()
            started = time.perf_counter()
            side()
            if number_of_round:
                seconds[name].append(time.perf_counter() - started - sum(startup))
    command = f"python -m benchmarks.score_speed {' '.join(sys.argv[1:])}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    lengths = f"{min(map(len, lists))} to {max(map(len, lists))}"
    text = f"""# Scoring speed on the CPU

`{command}`; {versions}, {options.threads} threads.
Medians of {options.rounds} alternating rounds, loading of the model left out.

{len(queries)} queries x {options.per_query} candidates, texts of {lengths} tokens, {NUM_TOKENS} image tokens,
MiniLM-L12 sizes with random weights.
"""
    lines = [
        text,
        "| path | pairs/s | (min, max) | against authors | max abs difference |",
        "|---|---|---|---|---|",
    ]
    base = statistics.median(seconds["authors"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        spread = f"{len(pairs) / max(taken):.1f}, {len(pairs) / min(taken):.1f}"
        difference = float(np.abs(found[name] - found["authors"]).max())
        lines.append(f"| {name} | {len(pairs) / median:.1f} | {spread} | {base / median:.2f} | {difference:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
