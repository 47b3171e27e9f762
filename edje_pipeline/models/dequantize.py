"""`Codec.decode` on the device: payload bytes in, token matrices out, equal to the numpy path.

Only payload bytes cross to the device, 2 to 48 times fewer than the tokens they stand for.

Shape letters: n images, P payload bytes, M compressed tokens, E joint-encoder width, s parts of a
token, f = 256 s centroids, d = E / s, c code bytes of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs import Codec, Float16Codec, Int4Codec, Int8Codec, ProductCodec


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
        if not len(payload_np):  # views of empty tensors need strides that these may not have
            return torch.empty((0, self.num_tokens, self.dim), dtype=self.dtype, device=payload_np.device)
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


class ProductDequantizer(Dequantizer):
    """Looks centroids up, turns them back, adds the mean.

    Equal to numpy bit for bit without a rotation; with one, up to the rounding of a matrix product.
    """

    centroids_fd: Tensor
    mean_me: Tensor
    offsets_s: Tensor
    rotation_ee: Tensor | None

    def __init__(self, codec: ProductCodec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        arrays = codec.codebook.arrays
        self.code_bytes = codec.code_bytes
        centroids = torch.from_numpy(arrays["centroids"].copy())
        # One table of s x 256 rows: code k of part j is row 256 j + k.
        self.register_buffer("centroids_fd", centroids.flatten(0, 1), persistent=False)
        self.register_buffer("offsets_s", 256 * torch.arange(codec.code_bytes, dtype=torch.int32), persistent=False)
        self.register_buffer("mean_me", torch.from_numpy(arrays["mean"].copy()), persistent=False)
        rotation = None if codec.rotation is None else torch.from_numpy(codec.rotation.copy())
        self.register_buffer("rotation_ee", rotation, persistent=False)

    def decode(self, payload_np: Tensor) -> Tensor:
        rows_ns = payload_np.view(-1, self.code_bytes).int() + self.offsets_s
        rotated_ne = functional.embedding(rows_ns, self.centroids_fd).flatten(1)
        centred_ne = rotated_ne if self.rotation_ee is None else rotated_ne @ self.rotation_ee
        return (centred_ne.view(-1, self.num_tokens, self.dim) + self.mean_me).to(self.dtype)


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
    if isinstance(codec, ProductCodec):
        return ProductDequantizer(codec, dtype).to(device)
    raise CodecError(f"codec {codec.name} has no torch dequantizer")
