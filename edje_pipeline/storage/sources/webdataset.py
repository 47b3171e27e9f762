"""WebDataset tars: one, a folder of them, or a pattern; image_id = key, dots and directories kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from edje_pipeline.errors import SourceError, SourceNotFoundError
from edje_pipeline.storage import files
from edje_pipeline.storage.sources.base import Source, SourceOptions, count_phrase
from edje_pipeline.storage.sources.tar_headers import TarError, TruncatedTarError, WindowReader, scan_members
from edje_pipeline.storage.sources.walk import walk_files

LOCAL_WINDOW = 8 << 10
REMOTE_WINDOW = 1 << 20
"""A request to an object store costs about as much as a megabyte does."""

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


class WebDatasetSource(Source):
    """Members with an image suffix; the key is everything before the last known image suffix."""

    kind: ClassVar[str] = "webdataset"

    def __init__(self, uri: str, options: SourceOptions) -> None:
        super().__init__(uri, options)
        self.num_tars = 0

    def describe(self) -> str:
        tars = count_phrase(self.num_tars, "WebDataset tar") if self.num_tars else "WebDataset tars"
        count = f" with {count_phrase(self.num_listed, 'image')}" if self.num_listed else ""
        return f"{tars}{count} at {files.shown(self.uri)}"

    def looked_for(self) -> str:
        return f"members of .tar files: {super().looked_for()}"

    def tars(self) -> Iterator[tuple[str, str]]:
        """(name for people, URI) of each tar in order."""
        if files.has_pattern(self.uri):
            for uri in files.expand_pattern(self.uri):
                yield files.path_name(uri).rsplit("/", 1)[-1], uri
        elif files.kind_of(self.uri) == "dir":
            for relative, uri in walk_files(self.uri):
                if relative.lower().endswith(b".tar"):
                    yield files.readable(relative), uri
                elif relative.decode("utf-8", "replace").lower().endswith(COMPRESSED_TARS):
                    refuse_compressed(uri)
        else:
            refuse_compressed(self.uri)
            yield files.path_name(self.uri).rsplit("/", 1)[-1], files.absolute_uri(self.uri)

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        self.num_tars = 0
        for name, uri in self.tars():
            self.num_tars += 1
            yield from self._one_tar(name, uri)

    def _one_tar(self, name: str, uri: str) -> Iterator[tuple[str, str, str, int, int]]:
        prefix = f"{name.removesuffix('.tar')}/" if self.options.qualify_ids else ""
        num_members = 0
        try:
            with files.open_binary(uri) as stream:
                window = LOCAL_WINDOW if files.is_local_uri(uri) else REMOTE_WINDOW
                for member in scan_members(WindowReader(stream, files.file_size(uri), window)):
                    num_members += 1
                    end = self.options.stem_length(member.name)
                    if end is None:
                        continue
                    key = member.name[:end].removeprefix("./")
                    yield prefix + key, f"{uri}#{member.name}", uri, member.offset, member.length
        except FileNotFoundError as error:
            raise SourceNotFoundError(
                f"the tar {files.shown(uri)} does not exist; check the path or the pattern"
            ) from error
        except TruncatedTarError as error:
            if num_members == 0:
                raise SourceError(self._not_a_tar(uri, error)) from error
            self.notes.add("tars end too early; the whole members before the end are used", name)
        except TarError as error:
            if num_members == 0:
                raise SourceError(self._not_a_tar(uri, error)) from error
            self.notes.add("tars have a damaged header; the members before it are used", f"{name}@{error.offset}")
        except OSError as error:
            raise SourceError(f"cannot read the tar {files.shown(uri)}: {error}") from error

    @staticmethod
    def _not_a_tar(uri: str, error: TarError) -> str:
        return f"{files.shown(uri)} is not a usable tar: {error} at byte {error.offset}; write it again or leave it out"


def refuse_compressed(uri: str) -> None:
    """Raises SourceError for a compressed tar: its members cannot be found by offset."""
    if files.path_name(uri).lower().endswith(COMPRESSED_TARS):
        raise SourceError(
            f"{files.shown(uri)} is compressed as a whole, so its members cannot be read by offset; "
            "decompress it first (images do not shrink: gunzip, zstd -d)"
        )
