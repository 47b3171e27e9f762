"""Keeps libtiff and Pillow from writing to stderr.

libtiff reports odd tags and damaged strips on the process's stderr, past Python's warnings; over a
corpus that is a flood, and what matters of it is in the verdict already.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

from PIL import Image


@lru_cache(maxsize=1)
def silence_decoders() -> bool:
    """Takes the handlers out of the libtiff that Pillow loaded; False when it cannot be found.

    Linux only (the loaded libraries are read from /proc); elsewhere libtiff keeps talking.
    """
    # Without a handler, Python prints what a library logs; a handler that the program sets still gets it.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    Image.init()  # loads PIL._imaging, and libtiff with it
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libtiff" in line}
    except OSError:
        return False
    silenced = False
    for path in sorted(paths):
        if not Path(path).is_file():
            continue
        library = ctypes.CDLL(path)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name, None)
            if setter is not None:
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)
                silenced = True
    return silenced
