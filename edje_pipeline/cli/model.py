"""`edje-pipeline import-checkpoint`, `export-checkpoint`, `make-model`, `compact-model` and `model-info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edje_pipeline.cli.app import app
from edje_pipeline.cli.common import DebugOption, FormatOption, OutputFormat, emit, handled
from edje_pipeline.errors import ConfigError

OutOption = Annotated[Path, typer.Option("--out", help="The model directory to write; it must not exist.")]
BackboneSourceHelp = (
    "timm:NAME, open_clip:ARCH/TAG, hf:DIRECTORY or hf:ORG/NAME, dinov2-onnx:FILE; ?key=value options may follow."
)
WeightsOption = Annotated[
    str, typer.Option("--weights", help="Of the backbone: `pretrained` (fetched), a file, or random:SEED.")
]
StorageOption = Annotated[
    str | None, typer.Option(help="float32, float16 or int8.", show_default="as it is", metavar="STORAGE")
]
TextTokenizerOption = Annotated[
    Path | None, typer.Option("--text-tokenizer", help="tokenizer.json of the backbone's text tower.")
]


@app.command("import-checkpoint")
@handled
def import_checkpoint_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The authors' .pth, or .safetensors.")],
    out: OutOption,
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", help="The language model's tokenizer.json, vocab.txt or BERT directory.")
    ],
    name: Annotated[str, typer.Option("--name", help="The model's name.")] = "edje",
    backbone: Annotated[
        str | None, typer.Option("--backbone", help=f"When the checkpoint holds no vision tower: {BackboneSourceHelp}")
    ] = None,
    weights: WeightsOption = "pretrained",
    text_tokenizer: TextTokenizerOption = None,
    joint_heads: Annotated[
        int | None, typer.Option("--joint-heads", min=1, help="Attention heads of the BERT.", show_default="by width")
    ] = None,
    vision_heads: Annotated[
        int | None, typer.Option("--vision-heads", min=1, help="Attention heads of SigLIP.", show_default="by width")
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option("--interpolation", help="Of the image processor: bilinear or bicubic.", show_default="by model"),
    ] = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Make a model directory from the authors' training checkpoint.

    Reads tensors only, never code. The vision tower is taken from the
    checkpoint where it is in it; SigLIP's text tower too, when its
    tokenizer.json is given. Unknown, missing and misshapen keys are all listed.

    Examples:

        edje-pipeline import-checkpoint checkpoint_16.pth --out MODEL
            --tokenizer MiniLM-L12-H384-uncased/ --text-tokenizer siglip2/tokenizer.json

        edje-pipeline import-checkpoint light.safetensors --out MODEL
            --tokenizer vocab.txt --backbone hf:google/siglip2-large-patch16-384
    """
    from edje_pipeline.models.assemble import BackboneSource
    from edje_pipeline.models.official_checkpoint import ImportOptions, import_checkpoint
    from edje_pipeline.models.preprocess import interpolation as checked
    from edje_pipeline.models.summary import ModelSummary

    source = BackboneSource(backbone, weights, text_tokenizer=text_tokenizer) if backbone is not None else None
    options = ImportOptions(
        tokenizer, name, source, text_tokenizer, joint_heads, vision_heads,
        checked(interpolation) if interpolation is not None else None,
    )  # fmt: skip
    emit(ModelSummary(import_checkpoint(checkpoint, out, options), f"imported {checkpoint.name}"), format)


@app.command("export-checkpoint")
@handled
def export_checkpoint_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hf:ORG/NAME or bundled name.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .safetensors, else a torch.save file.")],
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Write a model under the names of the authors' training program.

    What was imported comes back tensor for tensor, bit for bit.

    Example:

        edje-pipeline export-checkpoint MODEL --out checkpoint.pth
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.models.official_checkpoint import export_checkpoint
    from edje_pipeline.models.summary import ExportSummary

    if out.exists():
        raise ConfigError(f"{out} exists already; choose another file")
    num_tensors = export_checkpoint(open_model(model), out)
    emit(ExportSummary(out, num_tensors, out.stat().st_size), format)


@app.command("make-model")
@handled
def make_model_command(
    out: OutOption,
    backbone: Annotated[str, typer.Option("--backbone", help=BackboneSourceHelp)],
    joint_encoder: Annotated[
        Path, typer.Option("--joint-encoder", help="Hugging Face BERT directory the joint encoder starts from.")
    ],
    weights: WeightsOption = "pretrained",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="M, compressed tokens an image.")] = 64,
    local: Annotated[bool, typer.Option("--local", help="The local adapter instead: all vision tokens.")] = False,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="adapter.safetensors to use.", show_default="random weights")
    ] = None,
    mlp_dim: Annotated[int, typer.Option("--mlp-dim", min=1, help="Hidden size of the adapter's MLP.")] = 8192,
    sentence_encoder: Annotated[
        Path | None,
        typer.Option("--sentence-encoder", help="BERT directory as text tower, for a backbone that has none."),
    ] = None,
    text_tokenizer: TextTokenizerOption = None,
    text_tower: Annotated[
        bool, typer.Option("--text-tower/--no-text-tower", help="Take the backbone's own text tower along.")
    ] = True,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=8, help="Pixels, both sides.", show_default="the backbone's own")
    ] = None,
    joint_layers: Annotated[
        int | None, typer.Option("--joint-layers", min=1, help="Only the first layers of it.", show_default="all")
    ] = None,
    key_positions: Annotated[
        bool,
        typer.Option("--key-positions", help="Learned positions in the adapter's keys, for adapter-start of a recipe."),
    ] = False,
    squash: Annotated[
        bool, typer.Option("--squash", help="See the whole image, squeezed, instead of the backbone's own crop.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="The model's name.", show_default="--out's")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what starts random.")] = 0,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Assemble a model directory to train, from a backbone and a BERT.

    The adapter (unless given) and the scoring head start with random weights.

    Examples:

        edje-pipeline make-model --out MODEL --backbone hf:google/siglip2-large-patch16-384
            --joint-encoder MiniLM-L12-H384-uncased/

        edje-pipeline make-model --out MODEL --backbone dinov2-onnx:vit_s_focus.onnx
            --image-size 112 --squash --tokens 16 --sentence-encoder all-MiniLM-L6-v2/
            --joint-encoder all-MiniLM-L6-v2/ --joint-layers 3
    """
    from edje_pipeline.models.assemble import BackboneSource, ModelParts, make_model
    from edje_pipeline.models.backbone import parse_source
    from edje_pipeline.models.summary import ModelSummary

    kind, _, _ = parse_source(backbone)
    options: dict[str, Any] = {}
    if image_size is not None:
        options["img_size" if kind in ("timm", "open_clip") else "image_size"] = image_size
    source = BackboneSource(backbone, weights, options, text_tower, text_tokenizer)
    parts = ModelParts(
        joint_encoder, None if local else tokens, adapter, mlp_dim, sentence_encoder,
        joint_layers=joint_layers, squash=squash, seed=seed, key_positions=key_positions,
    )  # fmt: skip
    emit(ModelSummary(make_model(out, name or out.name, source, parts), f"assembled {out.name}"), format)


@app.command("make-student")
@handled
def make_student_command(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Trained model directory with a local adapter.")],
    out: OutOption,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="M, compressed tokens an image.")] = 64,
    mlp_dim: Annotated[
        int | None, typer.Option("--mlp-dim", min=1, help="Hidden size of the adapter.", show_default="the teacher's")
    ] = None,
    key_positions: Annotated[
        bool, typer.Option("--key-positions/--no-key-positions", help="Learned positions in the adapter's keys.")
    ] = True,
    name: Annotated[str | None, typer.Option("--name", help="The model's name.", show_default="--out's")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the adapter's random weights.")] = 0,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Put a fresh compressed adapter before the other parts of a trained local model.

    Train it by distillation: docs/training.md, "A compressed adapter from a local teacher".

    Examples:

        edje-pipeline make-student LOCAL --tokens 32 --out START

        edje-pipeline train --model START --teacher LOCAL --recipe recipes/compress.toml
            --captions captions.jsonl --images photos/ --out RUN
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.models.student import make_student
    from edje_pipeline.models.summary import ModelSummary

    student = make_student(
        out, name or out.name, open_model(teacher), num_compressed_tokens=tokens, mlp_dim=mlp_dim,
        key_positions=key_positions, seed=seed,
    )  # fmt: skip
    emit(ModelSummary(student, f"student {out.name}"), format)


@app.command("compact-model")
@handled
def compact_model_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hf:ORG/NAME or bundled name.")],
    out: OutOption,
    joint_encoder: StorageOption = None,
    text_tower: StorageOption = None,
    adapter: StorageOption = None,
    backbone: StorageOption = None,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Write a smaller copy of a model: float16, or int8 with a scale a row.

    int8 applies to matrices; norms, biases and positions are float16 then.
    Computing is not affected: weights are read back as float32. Scores change
    a little, so an index made with the original model needs a rebuild.

    Example:

        edje-pipeline compact-model MODEL --out SMALL --joint-encoder int8
            --text-tower int8 --adapter float16 --backbone float16
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.models.compact_model import compact_model

    asked = {"backbone": backbone, "adapter": adapter, "joint_encoder": joint_encoder, "text_tower": text_tower}
    storages = {part: storage for part, storage in asked.items() if storage is not None}
    if not storages:
        raise ConfigError(
            "nothing to compact: give at least one of --joint-encoder, --text-tower, --adapter, --backbone"
        )
    emit(compact_model(open_model(model), out, storages), format)


@app.command("model-info")
@handled
def model_info_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hf:ORG/NAME or bundled name.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Print the model card instead.")] = False,
    format: FormatOption = OutputFormat.text,
    debug: DebugOption = False,
) -> None:
    """Show the parts of a model, their sizes and fingerprints.

    Examples:

        edje-pipeline model-info MODEL --verify

        edje-pipeline model-info emoji-small --card

        edje-pipeline model-info random-tiny --format json
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.models.model_directory import CARD_FILE
    from edje_pipeline.models.summary import ModelSummary

    opened = open_model(model)
    if verify:
        opened.verify()
    if card:
        typer.echo(opened.file(CARD_FILE).read_text(encoding="utf-8"))
        return
    emit(ModelSummary(opened, "every checksum is right" if verify else ""), format)
