"""Which int8 runtime for the joint encoder on a CPU: speed and agreement with float32, on the same layers.

    pip install onnx onnxruntime openvino
    python -m benchmarks.int8_runtimes --bert MINILM --captions captions.jsonl

Each side runs the layers of a joint encoder behind `JointEncoder.forward_dense`; embeddings and head
are shared. Speed: CPU seconds of one thread in alternating rounds. Agreement: all candidates of every
query. A runtime that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import table, write_report
from benchmarks.score_model import make_material
from benchmarks.score_speed import agreement
from edje_pipeline.models.cpu_encoder import CpuBertLayer, cpu_encoder
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.stages.score_pairs import TextTokens, length_batches


class Stack(nn.Module):
    """All layers at once: hidden (B, S, E) -> the last layer's [CLS] (B, 1, E)."""

    def __init__(self, call: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.call = call

    def forward_first(self, hidden: Tensor) -> Tensor:
        return torch.from_numpy(self.call(hidden.numpy()))


def quantized(weight_oi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights and their scales, one an output channel: (O, I), (O, 1)."""
    scale = np.abs(weight_oi).max(1, keepdims=True) / 127
    return np.round(weight_oi / scale).astype(np.int8), scale.astype(np.float32)


def onnxruntime_stack(encoder: JointEncoder, *, int8: bool) -> Stack:
    """Contrib operators throughout; int8: DynamicQuantizeMatMul, a scale a channel and a scale a tensor."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    contrib, width = "com.microsoft", encoder.spec.width
    initializers, nodes = [], []

    def const(value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), f"c{len(initializers)}"))
        return initializers[-1].name

    def node(op: str, inputs: list[str], num: int = 1, domain: str = contrib, **attributes: Any) -> list[str]:
        outputs = [f"n{len(nodes)}_{number}" for number in range(num)]
        nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs

    def linear(inputs: str, weight: Tensor, bias: Tensor) -> str:
        weight_oi, bias_o = weight.detach().numpy(), const(bias.detach().numpy())
        if not int8:
            return node("Add", [node("MatMul", [inputs, const(weight_oi.T)], domain="")[0], bias_o], domain="")[0]
        codes, scale = quantized(weight_oi)
        zeros = const(np.zeros(len(codes), np.int8))
        return node("DynamicQuantizeMatMul", [inputs, const(codes.T), const(scale[:, 0]), zeros, bias_o])[0]

    def norm(left: str, right: str, module: Any) -> str:
        weights = [const(module.weight.detach().numpy()), const(module.bias.detach().numpy())]
        return node("SkipLayerNormalization", [left, right, *weights], epsilon=module.eps)[0]

    hidden = "hidden"
    for number, layer in enumerate(encoder.layers):
        first = hidden
        weight, bias = layer.qkv.weight, layer.qkv.bias
        if number == len(encoder.layers) - 1:
            first = node("Slice", [hidden, *(const(np.array([n])) for n in (0, 1, 1))], domain="")[0]
            query = linear(first, weight[:width], bias[:width])
            pair = linear(hidden, weight[width:], bias[width:])
            key, value = node("Split", [pair], 2, "", axis=-1, num_outputs=2)
        else:
            query, key, value = node("Split", [linear(hidden, weight, bias)], 3, "", axis=-1, num_outputs=3)
        attended = node("MultiHeadAttention", [query, key, value], num_heads=encoder.spec.num_heads)[0]
        out = layer.attention_output
        middle = norm(linear(attended, out.weight, out.bias), first, layer.attention_norm)
        mlp = node("Gelu", [linear(middle, layer.mlp_in.weight, layer.mlp_in.bias)])[0]
        hidden = norm(linear(mlp, layer.mlp_out.weight, layer.mlp_out.bias), middle, layer.mlp_norm)
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", None, width]) for name in ("hidden", hidden)]
    graph = helper.make_graph(nodes, "layers", shapes[:1], shapes[1:], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(contrib, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Stack(lambda value: session.run(None, {"hidden": value})[0])


def openvino_stack(encoder: JointEncoder) -> Stack:
    """Compressed int8 weights; activations quantized at run time in groups of 128 channels of a token."""
    import openvino
    from openvino import opset13 as op

    heads, width = encoder.spec.num_heads, encoder.spec.width

    def linear(inputs: Any, weight: Tensor, bias: Tensor) -> Any:
        rows, columns = weight.shape
        codes, scale = quantized(weight.detach().numpy().reshape(-1, 128))
        parts = [part.reshape(rows, columns // 128, -1) for part in (codes, scale)]
        product = op.multiply(op.convert(op.constant(parts[0]), "f32"), op.constant(parts[1]))
        matrix = op.reshape(product, np.array([rows, columns]), False)
        return op.add(op.matmul(inputs, matrix, False, True), op.constant(bias.detach().numpy()))

    def norm(inputs: Any, module: Any) -> Any:
        value = op.mvn(inputs, np.array([-1]), True, module.eps, "inside_sqrt")
        scaled = op.multiply(value, op.constant(module.weight.detach().numpy()))
        return op.add(scaled, op.constant(module.bias.detach().numpy()))

    def split(value: Any) -> Any:
        return op.transpose(op.reshape(value, np.array([0, 0, heads, width // heads]), True), np.array([0, 2, 1, 3]))

    hidden = start = op.parameter([-1, -1, width], np.float32)
    for number, layer in enumerate(encoder.layers):
        first = hidden
        if number == len(encoder.layers) - 1:
            first = op.slice(hidden, *(np.array([n]) for n in (0, 1, 1, 1)))
        weights, biases = layer.qkv.weight.split(width), layer.qkv.bias.split(width)
        parts = (linear(i, w, b) for i, w, b in zip((first, hidden, hidden), weights, biases, strict=True))
        attended = op.scaled_dot_product_attention(*map(split, parts), causal=False)
        attended = op.reshape(op.transpose(attended, np.array([0, 2, 1, 3])), np.array([0, 0, width]), True)
        out = layer.attention_output
        middle = norm(op.add(linear(attended, out.weight, out.bias), first), layer.attention_norm)
        mlp = op.gelu(linear(middle, layer.mlp_in.weight, layer.mlp_in.bias), "erf")
        hidden = norm(op.add(linear(mlp, layer.mlp_out.weight, layer.mlp_out.bias), middle), layer.mlp_norm)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32",
              "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}  # fmt: skip
    request = (
        openvino.Core().compile_model(openvino.Model([hidden], [start], "m"), "CPU", config).create_infer_request()
    )
    return Stack(lambda value: request.infer({0: value})[0].copy())


def torch_ao_encoder(encoder: JointEncoder) -> JointEncoder:
    """torch.ao.quantization.quantize_dynamic: a scale a channel, a scale a tensor, oneDNN kernels."""
    from torch.ao import quantization

    def make(weight: Tensor, bias: Tensor, *, gelu: bool = False) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0]).eval()
        plain.weight.data, plain.bias.data = weight.detach().contiguous(), bias.detach().contiguous()
        spec = {nn.Linear: quantization.per_channel_dynamic_qconfig}
        return quantization.quantize_dynamic(nn.Sequential(plain, *([nn.GELU()] if gelu else [])), spec)

    torch.backends.quantized.engine = "onednn"
    last = len(encoder.layers) - 1
    return encoder.with_layers(CpuBertLayer(layer, make, is_last=n == last) for n, layer in enumerate(encoder.layers))  # type: ignore[arg-type]


def torchao_encoder(encoder: JointEncoder) -> JointEncoder:
    """torchao's Int8DynamicActivationInt8WeightConfig in eager mode: a scale a channel, a scale a token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def make(weight: Tensor, bias: Tensor, *, gelu: bool = False) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0]).eval()
        plain.weight.data, plain.bias.data = weight.detach().contiguous(), bias.detach().contiguous()
        return nn.Sequential(plain, *([nn.GELU()] if gelu else []))

    last = len(encoder.layers) - 1
    twin = encoder.with_layers(CpuBertLayer(layer, make, is_last=n == last) for n, layer in enumerate(encoder.layers))  # type: ignore[arg-type]
    quantize_(twin.layers, Int8DynamicActivationInt8WeightConfig())
    return twin


def sides_of(encoder: JointEncoder) -> tuple[dict[str, JointEncoder], list[str]]:
    """Every runtime that is here, and what is not."""
    makers: dict[str, Callable[[], JointEncoder]] = {
        "torch float32 (F.linear)": lambda: encoder,
        "torch float32 (oneDNN)": lambda: cpu_encoder(encoder, "float32"),
        "torch int8, 16-bit activations": lambda: cpu_encoder(encoder, "int8"),
        "torch.ao dynamic int8": lambda: torch_ao_encoder(encoder),
        "torchao int8 (eager)": lambda: torchao_encoder(encoder),
        "onnxruntime float32": lambda: encoder.with_layers([onnxruntime_stack(encoder, int8=False)]),
        "onnxruntime dynamic int8": lambda: encoder.with_layers([onnxruntime_stack(encoder, int8=True)]),
        "OpenVINO int8, groups of 128": lambda: encoder.with_layers([openvino_stack(encoder)]),
    }
    found, missing = {}, []
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, NotImplementedError, RuntimeError, AssertionError) as error:
            missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return found, missing


@torch.inference_mode()
def score_all(
    encoder: JointEncoder, lists: list[list[int]], tokens: np.ndarray, texts: np.ndarray, images: np.ndarray
) -> np.ndarray:
    """Logits of pairs in equal-length batches of 2,048 tokens."""
    flat, stored = TextTokens.from_lists(lists), torch.from_numpy(tokens).float()
    order = np.argsort(flat.lengths[texts], kind="stable")
    found = np.empty(len(texts), np.float32)
    for start, stop, length in length_batches(flat.lengths[texts][order], 2048, tokens.shape[1]):
        chosen = order[start:stop]
        ids = torch.from_numpy(flat.rows(texts[chosen], length))
        found[chosen] = encoder.forward_dense(ids, stored[images[chosen]]).numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--per-query", type=int, default=40)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bert", type=Path)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch.ao announces its end
    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder), num_images=120, num_queries=options.queries, num_layers=options.layers,
                                 bert=options.bert, captions=options.captions)  # fmt: skip
        encoder, lists = material.model.load_joint_encoder(), material.model.load_tokenizer().encode(material.queries)
    rng = np.random.default_rng(2)
    texts = np.repeat(np.arange(options.queries), options.per_query)
    images = np.concatenate([rng.choice(120, options.per_query, replace=False) for _ in range(options.queries)])
    sides, missing = sides_of(encoder)
    expected = score_all(encoder, lists, material.tokens, texts, images)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rows = []
    few = slice(0, 2 * options.per_query)
    for _ in range(options.rounds):
        for name, side in sides.items():
            started = time.process_time()
            score_all(side, lists, material.tokens, texts[few], images[few])
            seconds[name].append(time.process_time() - started)
    for name, side in sides.items():
        found = score_all(side, lists, material.tokens, texts, images)
        # The same pairs one at a time: does a score depend on its batch?
        ones = (slice(number, number + 1) for number in range(8))
        alone = np.concatenate([score_all(side, lists, material.tokens, texts[one], images[one]) for one in ones])
        pairs = zip(seconds["torch float32 (F.linear)"], seconds[name], strict=True)
        speed = statistics.median(base / own for base, own in pairs)
        difference, spearman, first = agreement(found, expected, texts)
        batch = float(np.abs(alone - found[:8]).max())
        rows.append([name, f"{speed:.2f}", f"{difference:.1e}", f"{spearman:.4f}", f"{first:.0%}", f"{batch:.1e}"])
        print(rows[-1], flush=True)
    header = [
        "runtime",
        "x F.linear",
        "max abs difference",
        "least Spearman of a query",
        "same first",
        "alone or batched",
    ]
    spread = float(np.std(expected))
    about = (
        f"{options.queries} queries x {options.per_query} candidates, {material.described}; the logits' standard "
        f"deviation is {spread:.2f}. Speed: median of {options.rounds} alternating rounds, CPU seconds, one thread."
    )
    lines = [
        about,
        "",
        *table(header, rows),
        *(["", "Not measured: " + "; ".join(missing)] if missing else []),
    ]
    packages = ("torch", "onnxruntime", "openvino", "torchao")
    write_report("int8_runtimes", "int8 runtimes", lines, out=options.out, module="int8_runtimes", packages=packages)


if __name__ == "__main__":
    main()
