"""The own kernels: on a CPU through Triton's interpreter, on a GPU as they are."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from edje_pipeline.errors import DeviceError
from edje_pipeline.models.gpu_encoder import GpuBertLayer, gpu_encoder, has_triton
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.spec import JointEncoderSpec
from edje_pipeline.stages.score_pairs import KERNELS, prepare_encoder
from tests.score_util import tiny_model

INTERPRETED = """
import torch
from torch.nn import functional as F
from edje_pipeline.models.gpu_kernels import add_norm
torch.manual_seed(0)
for shape in ((3, 7, 48), (9, 384)):
    x, y, weight, bias = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    want = F.layer_norm(x + y, shape[-1:], weight, bias, 1e-5)
    torch.testing.assert_close(add_norm(x, y, weight, bias, 1e-5), want, atol=1e-4, rtol=1e-4)
from edje_pipeline.models.bert_layers import BertLayer
from edje_pipeline.models.gpu_encoder import GpuBertLayer
plain = BertLayer(64, 4, 128, 1e-12).eval()
own, hidden = GpuBertLayer(plain), torch.randn(2, 9, 64)
with torch.inference_mode():
    for name in ("forward", "forward_first"):
        found, want = getattr(own, name)(hidden), getattr(plain, name)(hidden)
        torch.testing.assert_close(found, want, atol=2e-3, rtol=0)  # the tanh form of GELU
        assert not torch.equal(found, want)
print("equal")
"""


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_give_what_two_passes_give() -> None:
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "equal\n", done.stderr


def test_refused_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="the encoder is on cpu; use --kernels torch"):
        gpu_encoder(tiny_model().load_joint_encoder())


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("length", [3, 20])
def test_layers_of_both_kinds_are_near_float32(length: int, kernels: str) -> None:
    torch.manual_seed(0)
    spec = JointEncoderSpec(width=128, num_layers=3, num_heads=4, mlp_dim=256, vocab_size=100, max_positions=64)
    encoder = JointEncoder(spec).eval()
    for value in encoder.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.1)
    ids, images = torch.randint(0, 100, (37, length)), torch.randn(37, 16, 128)
    with torch.inference_mode():
        want = encoder.forward_dense(ids, images)
        on_cpu = copy.deepcopy(encoder).bfloat16().forward_dense(ids, images)
        prepared = prepare_encoder(encoder, torch.device("cuda"), "bfloat16", kernels=kernels)
        found = prepared.forward_dense(ids.cuda(), images.cuda()).cpu()
    assert (found - want).abs().max() < 1.5 * (on_cpu - want).abs().max() + 1e-3
    assert isinstance(prepared.layers[0], GpuBertLayer) == (kernels == "own")
    assert not isinstance(encoder.layers[0], GpuBertLayer)
