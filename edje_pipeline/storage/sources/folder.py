"""A folder of image files, at any depth; image_id = relative POSIX path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from edje_pipeline.storage import files
from edje_pipeline.storage.sources.base import WHOLE_FILE, Source, count_phrase
from edje_pipeline.storage.sources.walk import walk_files


class FolderSource(Source):
    """Files with an image suffix below a directory; other files (captions, metadata) are counted and left."""

    kind: ClassVar[str] = "folder"

    def describe(self) -> str:
        count = f" of {count_phrase(self.num_listed, 'image')}" if self.num_listed else " of images"
        return f"folder{count} at {files.shown(self.uri)}"

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        for relative, uri in walk_files(self.uri):
            name = files.readable(relative)
            if self.options.takes(name):
                yield name, uri, uri, 0, WHOLE_FILE
            else:
                self.notes.add("files without an image suffix passed over", name)
