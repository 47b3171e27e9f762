"""From whatever a decoder throws to one reason of the closed list and a message that never varies."""

from __future__ import annotations

import re

from PIL import Image, UnidentifiedImageError

from edje_pipeline.stages.image_formats import signature
from edje_pipeline.stages.preprocess import ImpossibleSizeError
from edje_pipeline.storage.schema import RejectReason

MAX_MESSAGE = 300

_OBJECT = re.compile(r"<[\w.]+(?: object)? at 0x[0-9a-fA-F]+>")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{8,}")
_TRUNCATED = re.compile(
    r"truncated|unexpected end|broken data stream|not enough|end of file|premature|reached EOF|could not read all"
    r"|buffer is not large enough|too short|ran out of",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|not implemented|unimplemented|cannot (?:handle|decode) this|no .*decoder"
    r"|not available|unknown (?:compression|pixel mode|data organization|.*format)|can ?not find loader|cannot find",
    re.IGNORECASE,
)
_SIZE = re.compile(
    r"(?:zero|negative|invalid|must be (?:greater|>)).{0,30}(?:width|height|size|dimension)", re.IGNORECASE
)


class PixelCapError(ValueError):
    """The header announces more pixels than allowed."""


class BadDimensionsError(ValueError):
    """The header announces no pixel at all."""


def describe_failure(error: BaseException, data: bytes) -> tuple[RejectReason, str]:
    """(reason, message) of an image whose decoding raised `error`.

    The message holds the exception's class and text; object addresses are taken out, so that a second
    run says the same.
    """
    text = _ADDRESS.sub("0x...", _OBJECT.sub("the image", str(error)))
    text = " ".join(text.split())[:MAX_MESSAGE]
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    if isinstance(error, Image.DecompressionBombError):
        # Raised by Pillow from the header, with a limit in it that is ours halved and doubled again.
        found = re.search(r"\d+", text)
        message = f"the header announces {int(found[0]) if found else 0:,} pixels, more than allowed"
    return _reason(error, text), message


def _reason(error: BaseException, text: str) -> RejectReason:
    if isinstance(error, PixelCapError | Image.DecompressionBombError):
        return RejectReason.TOO_MANY_PIXELS
    if isinstance(error, BadDimensionsError | ImpossibleSizeError):
        return RejectReason.BAD_DIMENSIONS
    if isinstance(error, NotImplementedError):
        return RejectReason.UNSUPPORTED
    if isinstance(error, EOFError) or _TRUNCATED.search(text):
        return RejectReason.TRUNCATED
    if _UNSUPPORTED.search(text):
        return RejectReason.UNSUPPORTED
    if _SIZE.search(text):
        return RejectReason.BAD_DIMENSIONS
    return RejectReason.CORRUPT


def _unidentified(data: bytes) -> tuple[RejectReason, str]:
    found = signature(data)
    if found is None:
        start = data[:8].hex(" ")
        return RejectReason.UNKNOWN_FORMAT, f"no decoder recognises the bytes (they begin with {start})"
    name, decodes = found
    if not decodes:
        return RejectReason.UNSUPPORTED, f"{name} images are not decoded here; convert them first"
    if _announces_nothing(name, data):
        return RejectReason.BAD_DIMENSIONS, f"the {name} header announces a side of 0 pixels"
    return RejectReason.CORRUPT, f"the bytes begin like {name}, but the header cannot be read"


def _announces_nothing(name: str, data: bytes) -> bool:
    if name == "GIF" and len(data) >= 10:
        return not any(data[6:8]) or not any(data[8:10])
    return name == "PNG" and len(data) >= 24 and (not any(data[16:20]) or not any(data[20:24]))
