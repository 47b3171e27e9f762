"""Offline batch pipeline for vision-language reranking with EDJE (arXiv 2510.06820).

    from edje_pipeline import Index, Reranker

Importing this package imports neither torch nor ray; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EdjeError": "edje_pipeline.errors",
    "Index": "edje_pipeline.storage.index",
    "Reranker": "edje_pipeline.reranker",
}

__all__ = ["EdjeError", "Index", "Reranker", "__version__"]

if TYPE_CHECKING:
    from edje_pipeline.errors import EdjeError
    from edje_pipeline.reranker import Reranker
    from edje_pipeline.storage.index import Index


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
