"""Which image formats are decoded, and why the others are not.

Left out although Pillow knows them: EPS and WMF/EMF hand the file to another program (Ghostscript,
GDI), BUFR, GRIB, HDF5 and MPEG have no decoder in Pillow, IPTC wraps a second file.
"""

from __future__ import annotations

import re
from functools import lru_cache

from PIL import Image

FORMATS = tuple(
    # Most common first: Pillow asks them in this order, and TGA, which has no signature, must come last.
    word
    for line in (
        "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM ICO PSD DIB QOI DDS ICNS CUR PCX DCX SGI SUN FLI BLP",
        "FTEX GBR IM IMT MCIDAS MSP PCD PIXAR SPIDER XBM XPM XVTHUMB FITS TGA",
    )
    for word in line.split()
)

MAX_PIXELS_OF_FORMAT = {
    # Decoded by Pillow in Python, a microsecond a pixel or more.
    **dict.fromkeys(("BLP", "FITS", "MSP", "QOI", "XPM"), 1 << 23),
    # OpenJPEG keeps four bytes a sample besides the image: 2.2 GB at Pillow's limit, 1.6 GB at this one.
    "JPEG2000": 1 << 26,
}
"""Lower pixel caps where decoding is slow or takes much memory."""

_SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", True),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", True),
    (re.compile(rb"GIF8[79]a"), "GIF", True),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP", True),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "BMP", True),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF", True),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF", True),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG2000", True),
    (re.compile(rb"P[1-7fFy][\s#]"), "PPM", True),
    (re.compile(rb"8BPS"), "PSD", True),
    (re.compile(rb"DDS "), "DDS", True),
    (re.compile(rb"BLP[012]"), "BLP", True),
    (re.compile(rb"qoif"), "QOI", True),
    (re.compile(rb"SIMPLE  ="), "FITS", True),
    (re.compile(rb"\x01\xda[\0\x01][\x01\x02]"), "SGI", True),
    (re.compile(rb"\0\0[\x01\x02]\0[^\0]", re.DOTALL), "ICO", True),
    (re.compile(rb"icns"), "ICNS", True),
    (re.compile(rb"....[\x11\x12]\xaf", re.DOTALL), "FLI", True),
    (re.compile(rb"/\* XPM \*/"), "XPM", True),
    (re.compile(rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", re.DOTALL), "HEIC", False),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL", False),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "EPS", False),
    (re.compile(rb"%PDF-"), "PDF", False),
    (re.compile(rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", re.DOTALL), "WMF/EMF", False),
    (re.compile(rb"GRIB"), "GRIB", False),
    (re.compile(rb"BUFR"), "BUFR", False),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "HDF5", False),
    (re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "OLE (FlashPix, MIC)", False),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", re.DOTALL), "SVG", False),
)


@lru_cache(maxsize=1)
def decodable_formats() -> tuple[str, ...]:
    """FORMATS that the installed Pillow has (AVIF, JPEG 2000 and WebP depend on how it was built)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def signature(data: bytes) -> tuple[str, bool] | None:
    """(format, whether this package decodes it) by the first bytes; None when no known one fits."""
    head = data[:1024]
    for pattern, name, decodes in _SIGNATURES:
        if pattern.match(head):
            return name, decodes and name in decodable_formats()
    return None
