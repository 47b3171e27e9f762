"""`Codec.encode` on the device: token matrices in, payload bytes out, equal to the numpy path.

The encode stage calls this right after the adapter, so that only payload bytes leave the device.
Instead of raising, it says which images the codec can store: one bad image must not fail its batch.

Shape letters: n images, M compressed tokens, E joint-encoder width, P payload bytes, t = n M tokens,
s parts of a token, d = E / s, f centroids of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs import Codec, Float16Codec, Int4Codec, Int8Codec, ProductCodec
from edje_pipeline.storage.codecs.float16 import MAX_MAGNITUDE
from edje_pipeline.storage.codecs.integer import MAX_HALF

_CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}
"""Tokens scored against all centroids at once: caches on a CPU, full occupancy on a GPU."""


class Quantizer(nn.Module):
    """Common part: the checks of `storage.codecs.checks`, as a mask."""

    def __init__(self, codec: Codec, limit: float) -> None:
        super().__init__()
        self.name, self.num_tokens, self.dim = codec.name, codec.num_tokens, codec.dim
        self.payload_bytes, self.limit = codec.payload_bytes, limit

    @torch.no_grad()
    def forward(self, tokens_nme: Tensor) -> tuple[Tensor, Tensor]:
        """(n, M, E) of any float dtype -> payload (n, P) uint8, storable (n,) bool.

        The payload of an image that is not storable (NaN, infinity, overflow) is that of zero tokens.
        """
        if tokens_nme.ndim != 3 or tuple(tokens_nme.shape[1:]) != (self.num_tokens, self.dim):
            raise CodecError(
                f"codec {self.name} encodes tokens of shape (n, {self.num_tokens}, {self.dim}); "
                f"got {tuple(tokens_nme.shape)}"
            )
        if not len(tokens_nme):  # views of empty tensors need strides that these may not have
            empty_np = torch.empty((0, self.payload_bytes), dtype=torch.uint8, device=tokens_nme.device)
            return empty_np, torch.ones(0, dtype=torch.bool, device=tokens_nme.device)
        values_nme = tokens_nme.float().contiguous()
        storable_n = (values_nme.abs() <= self.limit).flatten(1).all(dim=1)
        values_nme = torch.where(storable_n[:, None, None], values_nme, values_nme.new_zeros(()))
        return self.encode(values_nme).reshape(-1, self.payload_bytes), storable_n

    def encode(self, values_nme: Tensor) -> Tensor:
        """The codec's own part, on finite float32 values."""
        raise NotImplementedError


class Float16Quantizer(Quantizer):
    """Writes halves."""

    def encode(self, values_nme: Tensor) -> Tensor:
        return values_nme.half().view(torch.uint8)


class ScaledQuantizer(Quantizer):
    """int8 and int4: see `storage.codecs.integer`."""

    def __init__(self, codec: Int8Codec | Int4Codec) -> None:
        super().__init__(codec, MAX_HALF * codec.levels)
        self.levels, self.code_bytes = codec.levels, codec.code_bytes

    def encode(self, values_nme: Tensor) -> Tensor:
        scales_nm = self._scales(values_nme.abs().amax(dim=-1))
        steps_nm1 = scales_nm.float()[..., None]
        quotients_nme = torch.where(steps_nm1 > 0, values_nme / steps_nm1, values_nme.new_zeros(()))
        codes_nme = quotients_nme.round().clamp(-self.levels, self.levels).to(torch.int8)
        return torch.cat([self.pack(codes_nme).flatten(1), scales_nm.view(torch.uint8).flatten(1)], dim=1)

    def _scales(self, largest_nm: Tensor) -> Tensor:
        # A tensor divisor: torch turns a division by a Python number into a product with its
        # reciprocal on some devices, which is not the same float.
        scales_nm = (largest_nm / largest_nm.new_tensor(float(self.levels))).half()
        too_small_nm = scales_nm.float() * (self.levels + 0.5) < largest_nm
        return (scales_nm.view(torch.int16) + too_small_nm.to(torch.int16)).view(torch.float16)

    def pack(self, codes_nme: Tensor) -> Tensor:
        """Signed codes to bytes (n, M, code_bytes)."""
        raise NotImplementedError


class Int8Quantizer(ScaledQuantizer):
    """One code a byte."""

    def pack(self, codes_nme: Tensor) -> Tensor:
        return codes_nme.view(torch.uint8)


class Int4Quantizer(ScaledQuantizer):
    """Two codes a byte, the low nibble first."""

    def pack(self, codes_nme: Tensor) -> Tensor:
        nibbles_nme = (codes_nme + 8).to(torch.uint8)
        if self.dim % 2:
            nibbles_nme = nn.functional.pad(nibbles_nme, (0, 1), value=8)
        return nibbles_nme[..., 0::2] | (nibbles_nme[..., 1::2] << 4)


class ProductQuantizer(Quantizer):
    """pq and opq: the nearest centroid of every part, as the largest `y . c - |c|^2 / 2`."""

    columns_sdf: Tensor
    half_norms_s1f: Tensor
    mean_me: Tensor
    rotation_ee: Tensor | None

    def __init__(self, codec: ProductCodec) -> None:
        super().__init__(codec, MAX_HALF)
        self.code_bytes = codec.code_bytes
        columns, half_norms = codec.scoring_table
        self.register_buffer("columns_sdf", torch.from_numpy(columns.copy()), persistent=False)
        self.register_buffer("half_norms_s1f", torch.from_numpy(half_norms.copy()), persistent=False)
        self.register_buffer("mean_me", torch.from_numpy(codec.codebook.arrays["mean"].copy()), persistent=False)
        rotation = None if codec.rotation is None else torch.from_numpy(codec.rotation.T.copy())
        self.register_buffer("rotation_ee", rotation, persistent=False)

    def encode(self, values_nme: Tensor) -> Tensor:
        centred_te = (values_nme - self.mean_me).flatten(0, 1)
        return torch.cat(
            [
                self._assign(chunk_te)
                for chunk_te in torch.split(centred_te, _CHUNK_TOKENS.get(centred_te.device.type, 8192))
            ]
        )

    def _assign(self, centred_te: Tensor) -> Tensor:
        rotated_te = centred_te if self.rotation_ee is None else centred_te @ self.rotation_ee
        parts_std = rotated_te.view(len(rotated_te), self.code_bytes, -1).transpose(0, 1)
        scores_stf = torch.baddbmm(self.half_norms_s1f, parts_std, self.columns_sdf, beta=-1)
        return scores_stf.argmax(dim=-1).T.to(torch.uint8)


def quantizer(codec: Codec, device: torch.device | str = "cpu") -> Quantizer:
    """The torch module that encodes tokens with `codec` on `device`.

    Raises:
        CodecError: a codec without a torch path.
    """
    if isinstance(codec, Float16Codec):
        return Float16Quantizer(codec, MAX_MAGNITUDE).to(device)
    if isinstance(codec, Int8Codec):
        return Int8Quantizer(codec).to(device)
    if isinstance(codec, Int4Codec):
        return Int4Quantizer(codec).to(device)
    if isinstance(codec, ProductCodec):
        return ProductQuantizer(codec).to(device)
    raise CodecError(f"codec {codec.name} has no torch quantizer")
