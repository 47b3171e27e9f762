"""Removing files of an index, and nothing else: no link is ever followed to what lies outside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from edje_pipeline.storage.location import Location, storage_errors


def files_below(index: Location, folder: str) -> list[str]:
    """Paths (relative to the index) of the plain files directly in `folder`; temporary ones included."""
    directory = index.child(folder)
    if not index.is_local:
        return [f"{folder}/{entry.path}" for entry in directory.list_files(recursive=False)]
    path = Path(directory.path)
    if path.is_symlink() or not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(f"{folder}/{entry.name}" for entry in entries if not entry.is_dir(follow_symlinks=False))


def remove_files(index: Location, folder: str, *, is_needed: Callable[[str], bool]) -> list[str]:
    """Removes the files directly in `folder` for which `is_needed(path)` is False; returns their paths.

    A symbolic link is removed itself, its target stays; a folder that is a link is left alone.
    """
    removed = []
    for path in files_below(index, folder):
        if not is_needed(path):
            remove_file(index, path)
            removed.append(path)
    return removed


def remove_file(index: Location, path: str) -> None:
    """Removes one file by its path relative to the index; one that is gone already is fine."""
    location = index.child(path)
    if not index.is_local:
        location.delete_file()
        return
    with storage_errors(location):
        Path(location.path).unlink(missing_ok=True)


def remove_tree(index: Location, folder: str) -> None:
    """Removes a folder of the index with all below it; links inside are removed, not followed."""
    location = index.child(folder)
    if not index.is_local:
        location.delete_dir()
        return
    path = Path(location.path)
    with storage_errors(location):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            # rmtree does not follow links. A file may vanish meanwhile: a worker of a killed run that ends.
            shutil.rmtree(path, onerror=_ignore_missing)


def _ignore_missing(_function: object, _path: str, info: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
