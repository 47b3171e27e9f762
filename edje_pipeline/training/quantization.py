"""The quantization-aware finish: the joint encoder sees what a reader of the index will see.

Forward: encode and decode with the codec itself (the numpy reference). Backward: the identity
(straight-through), so that adapter and joint encoder learn to live with the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edje_pipeline.errors import ShapeMismatchError
from edje_pipeline.storage.codecs import Codec


def straight_through(tokens: Tensor, codec: Codec) -> Tensor:
    """(B, M, E) -> the dequantized tokens (B, M, E), with the gradient of `tokens` unchanged.

    Raises:
        ShapeMismatchError: the codec was made for another token matrix.
    """
    if tuple(tokens.shape[1:]) != (codec.num_tokens, codec.dim):
        raise ShapeMismatchError(
            f"codec {codec.name} is for {codec.num_tokens} x {codec.dim} tokens, "
            f"the adapter gives {tuple(tokens.shape[1:])}"
        )
    with torch.no_grad():
        payload = codec.encode(tokens.detach().float().cpu().numpy())
        dequantized = torch.from_numpy(codec.decode(payload)).to(tokens)
    return tokens + (dequantized - tokens).detach()
