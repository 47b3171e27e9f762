"""Every error this package raises on purpose, in one tree.

    EdjeError
    ├── ConfigError (ValueError)              a run.toml key, an option or a combination of options is wrong
    ├── SourceError (ValueError)              the image corpus cannot be listed or read as a whole
    │   ├── SourceNotFoundError (FileNotFoundError)
    │   └── DuplicateIdError                  one image_id stands at two places
    ├── InputFileError (ValueError)           a query, candidate, caption or id file is wrong
    ├── IndexStateError (RuntimeError)        the index cannot be used for what was asked
    │   ├── IndexNotFoundError (FileNotFoundError)
    │   ├── FormatVersionError                written by a newer (or unknown) format version
    │   ├── IndexLockedError                  another run holds the index
    │   ├── ResumeMismatchError               an unfinished run there was started with other inputs
    │   └── UnknownIdError (KeyError)         an image_id that the index does not hold
    ├── CorruptionError (ValueError)          bytes on disk are not what the manifest says
    ├── CodecError (ValueError)               a codec spec, codebook or payload is wrong
    ├── ModelError (ValueError)               a model directory or checkpoint is wrong
    │   ├── ModelNotFoundError (FileNotFoundError)
    │   └── ShapeMismatchError                two parts of a model do not fit together
    ├── DeviceError (RuntimeError)            the device asked for is not there
    ├── RejectLimitError (RuntimeError)       more images were rejected than the run allows
    ├── StorageError (OSError)                the target cannot be written (read-only, full, connection lost)
    ├── WorkerError (RuntimeError)            a Ray worker failed more often than the run allows
    └── TrainingError (RuntimeError)          a training run cannot go on (NaN loss, batch too small)

A message says what was found, where, what was expected and what to do about it. Leaves also
subclass the builtin a caller would expect, and every one pickles, because they cross the process
borders of Ray.
"""

from __future__ import annotations


class EdjeError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        # KeyError would print the repr of its argument; a message is for a person.
        return self.message


class ConfigError(EdjeError, ValueError):
    """A configuration key, an option, or a combination of options is wrong."""


class SourceError(EdjeError, ValueError):
    """The image corpus cannot be listed or read as a whole."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The corpus does not exist or holds no image."""


class DuplicateIdError(SourceError):
    """One image_id stands at two places of the corpus."""


class InputFileError(EdjeError, ValueError):
    """A query, candidate, caption or id file is wrong."""


class IndexStateError(EdjeError, RuntimeError):
    """The index cannot be used for what was asked."""


class IndexNotFoundError(IndexStateError, FileNotFoundError):
    """There is no published index at the given place."""


class FormatVersionError(IndexStateError):
    """The index was written by a format version that this reader does not know."""


class IndexLockedError(IndexStateError):
    """Another run holds the index."""


class ResumeMismatchError(IndexStateError):
    """An unfinished run in the index was started with other inputs."""


class UnknownIdError(IndexStateError, KeyError):
    """An image_id that the index does not hold."""


class CorruptionError(EdjeError, ValueError):
    """Bytes on disk are not what the manifest says they are."""


class CodecError(EdjeError, ValueError):
    """A codec spec, a codebook or a payload is wrong."""


class ModelError(EdjeError, ValueError):
    """A model directory or a checkpoint is wrong."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """The model does not exist where it was looked for."""


class ShapeMismatchError(ModelError):
    """Two parts of a model, or a model and an index, do not fit together."""


class DeviceError(EdjeError, RuntimeError):
    """The device that was asked for is not there."""


class RejectLimitError(EdjeError, RuntimeError):
    """More images were rejected than the run allows."""


class StorageError(EdjeError, OSError):
    """The target cannot be written or the source of bytes was lost."""


class WorkerError(EdjeError, RuntimeError):
    """A worker process failed more often than the run allows."""


class TrainingError(EdjeError, RuntimeError):
    """A training run cannot go on."""
