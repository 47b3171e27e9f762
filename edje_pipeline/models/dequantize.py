"""`Codec.decode` on the device: payload bytes in, token matrices out, equal to the numpy path.

Only payload bytes cross to the device, 2 to 48 times fewer than the tokens they stand for.

Shape letters: n images, P payload bytes, M compressed tokens, E joint-encoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs import Codec, Float16Codec, Int4Codec, Int8Codec


class Dequantizer(nn.Module):
    """Common part of the modules below: shape checks and the output dtype."""

    def __init__(self, codec: Codec, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.num_tokens, self.dim = codec.name, codec.num_tokens, codec.dim
        self.payload_bytes, self.dtype = codec.payload_bytes, dtype

    def forward(self, payload_np: Tensor) -> Tensor:
        """(n, P) uint8 -> (n, M, E) of the module's dtype."""
        if payload_np.dtype != torch.uint8 or payload_np.ndim != 2 or payload_np.shape[1] != self.payload_bytes:
            raise CodecError(
                f"codec {self.name} decodes uint8 payloads of shape (n, {self.payload_bytes}); "
                f"got {payload_np.dtype} {tuple(payload_np.shape)}"
            )
        return self.decode(payload_np.contiguous())

    def decode(self, payload_np: Tensor) -> Tensor:
        """The codec's own part; `payload_np` is contiguous and has the right shape."""
        raise NotImplementedError


class Float16Dequantizer(Dequantizer):
    """Reads the bytes as halves."""

    def decode(self, payload_np: Tensor) -> Tensor:
        return payload_np.view(torch.float16).reshape(-1, self.num_tokens, self.dim).to(self.dtype)


class ScaledDequantizer(Dequantizer):
    """Codes times scales; the product is made in float32, as in numpy, and rounded last."""

    def __init__(self, codec: Int8Codec | Int4Codec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        self.code_bytes = codec.code_bytes

    def decode(self, payload_np: Tensor) -> Tensor:
        split = self.num_tokens * self.code_bytes
        packed_nmc = payload_np[:, :split].reshape(-1, self.num_tokens, self.code_bytes)
        scales_nm = payload_np[:, split:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        return (self.unpack(packed_nmc).float() * scales_nm[..., None]).to(self.dtype)

    def unpack(self, packed_nmc: Tensor) -> Tensor:
        """Bytes to signed codes (n, M, E)."""
        raise NotImplementedError


class Int8Dequantizer(ScaledDequantizer):
    """One code a byte."""

    def unpack(self, packed_nmc: Tensor) -> Tensor:
        return packed_nmc.view(torch.int8)


class Int4Dequantizer(ScaledDequantizer):
    """Two codes a byte, the low nibble first."""

    def unpack(self, packed_nmc: Tensor) -> Tensor:
        nibbles = torch.stack([packed_nmc & 0x0F, packed_nmc >> 4], dim=-1).flatten(-2)
        return nibbles[..., : self.dim].to(torch.int8) - 8


def dequantizer(codec: Codec, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32) -> Dequantizer:
    """The torch module that decodes payloads of `codec` on `device`.

    Raises:
        CodecError: a codec without a torch path.
    """
    if isinstance(codec, Float16Codec):
        return Float16Dequantizer(codec, dtype).to(device)
    if isinstance(codec, Int8Codec):
        return Int8Dequantizer(codec, dtype).to(device)
    if isinstance(codec, Int4Codec):
        return Int4Dequantizer(codec, dtype).to(device)
    raise CodecError(f"codec {codec.name} has no torch dequantizer")
