"""Where models come from: a directory, the Hugging Face Hub, or a name that this package knows.

Bundled names are directories inside the package (`edje_pipeline/bundled/NAME`, used where they lie), and random models,
made in the user's cache folder on first use.

From the Hub only safetensors, JSON and Markdown files of the top level are fetched.
"""

from __future__ import annotations

import os
import re
import tempfile
from importlib.resources import files
from pathlib import Path

from edje_pipeline.errors import ModelError, ModelNotFoundError

HUB_PREFIX = "hf:"
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
ALLOWED_FILES = ("*.safetensors", "*.json", "*.md", "*.txt")
BUNDLED: dict[str, dict[str, object]] = {
    "random-tiny": {"size": "tiny", "seed": 0},
    "random-demo": {"size": "demo", "seed": 0},
}
"""Random models that `--model` knows, and the arguments of `write_random_model` that make them."""

BUNDLED_DIRECTORIES = Path(str(files("edje_pipeline"))) / "bundled"
"""One folder a trained model."""

EMOJI_MODEL = "emoji-small"
"""Trained on emoji drawings: good for drawings asked for by their names, of little use for photographs."""

BUNDLED_REVISION = 1
"""Part of the cached directory's name: raise it when the same arguments give other weights."""


def resolve(text: str | Path) -> Path:
    """The local directory that `--model` names; fetched or made when it has to be.

    Raises:
        ModelNotFoundError: nothing is there; says what was tried.
        ModelError: a Hub id of another form, or the Hub could not be reached.
    """
    if isinstance(text, Path):
        return text
    if text.startswith(HUB_PREFIX):
        return _from_hub(text)
    if text in bundled_names() and not Path(text).is_dir():
        return bundled(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    raise ModelNotFoundError(
        f"no model {text!r}: there is no such directory, and it is none of the bundled {', '.join(bundled_names())}; "
        "a model on the Hugging Face Hub is written hf:organisation/name or hf:organisation/name@revision"
    )


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """`hf:org/name[@revision]` -> (org/name, revision or None).

    Raises:
        ModelError: another form.
    """
    match = HUB_ID.fullmatch(text.removeprefix(HUB_PREFIX))
    if match is None or ".." in text:
        raise ModelError(f"{text!r} is not a Hub id; expected hf:organisation/name or hf:organisation/name@revision")
    return match["repo"], match["revision"]


def snapshot(repo: str, revision: str | None = None, *, patterns: tuple[str, ...] = ALLOWED_FILES) -> Path:
    """A local snapshot of a Hub repository: from the cache when it is there, else downloaded.

    Files in sub-folders are left out: models of other libraries keep duplicates of their weights there.

    Raises:
        ModelNotFoundError: no such repository or revision, or it is not in the cache and the Hub is off.
        ModelError: the Hub could not be reached or refused.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name = f"{HUB_PREFIX}{repo}" + (f"@{revision}" if revision else "")
    offline_advice = (
        f"on a machine with a network run `hf download {repo}` and copy the cache folder, or give the directory itself "
        "to --model"
    )
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} asks for an agreement first: accept it on its web page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: the Hub has no such repository, or it is private (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name}: the repository has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        off = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelNotFoundError(f"{name} is not in the local cache and {off}; {offline_advice}") from error
    # errors.HTTPError is that of the HTTP library which the installed version uses; there have been three.
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise ModelError(
            f"{name} could not be fetched: {_first_line(error)}; try again, or {offline_advice}"
        ) from error
    return Path(found)


def bundled_names() -> tuple[str, ...]:
    """Names that `--model` knows: trained models in the package first."""
    return (*sorted(path.parent.name for path in BUNDLED_DIRECTORIES.glob("*/config.json")), *BUNDLED)


def default_model() -> str:
    """What a command uses that was given no model: the bundled trained one, else a random one."""
    return EMOJI_MODEL if EMOJI_MODEL in bundled_names() else "random-demo"


def about(name: str) -> str:
    """What a default model is good for, for the note of a command that was given none."""
    if name == EMOJI_MODEL:
        return "trained on emoji drawings; expect little from it on photographs"
    return "its weights are random; its scores mean nothing"


def bundled(name: str) -> Path:
    """The directory of a bundled model: inside the package, or made on first use in the user's cache folder."""
    from edje_pipeline.models.random_model import write_random_model

    if name not in BUNDLED:
        return BUNDLED_DIRECTORIES / name
    for root in _cache_roots():
        directory = root / f"{name}-{BUNDLED_REVISION}"
        if (directory / "config.json").is_file():
            return directory
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if not os.access(root, os.W_OK):
            continue
        try:
            write_random_model(directory, name=name, **BUNDLED[name])  # type: ignore[arg-type]
        except (ModelError, OSError):
            # Another process made it in the meantime; otherwise the error is real.
            if not (directory / "config.json").is_file():
                raise
        return directory
    raise ModelError(f"no writable folder for the bundled model {name}; set EDJE_CACHE to one")


def _cache_roots() -> list[Path]:
    if "EDJE_CACHE" in os.environ:
        return [Path(os.environ["EDJE_CACHE"]) / "models"]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [base / "edje-pipeline" / "models", Path(tempfile.gettempdir()) / f"edje-pipeline-{os.getuid()}" / "models"]


def _from_hub(text: str) -> Path:
    repo, revision = parse_hub_id(text)
    directory = snapshot(repo, revision)
    if not (directory / "config.json").exists():
        raise ModelNotFoundError(f"{text} has no config.json; it is not a model of this program")
    return directory


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
