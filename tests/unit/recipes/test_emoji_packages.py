"""Fetching: checksums, the registry's address, a registry on 127.0.0.1, tarballs that are none."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edje_pipeline.errors import ConfigError, CorruptionError, SourceError
from recipes import emoji_packages
from recipes.emoji_packages import PACKAGES, Package, fetch, integrity_of, read_files, read_json, registry_for


def npm_tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TARBALL = npm_tarball({"icons.json": b'{"a": 1}', "info.json": b"no json", "other.txt": b"x"})
PLANTED = Package("x", "@scope/planted", "1.0.0", integrity_of(TARBALL))


class RegistryHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        port = self.server.server_port
        answers = {
            "/@scope/planted/1.0.0": json.dumps({"dist": {"tarball": f"http://127.0.0.1:{port}/t.tgz"}}).encode(),
            "/@scope/bare/1.0.0": b"{}",
            "/t.tgz": TARBALL,
        }
        body = answers.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def registry():
    server = ThreadingHTTPServer(("127.0.0.1", 0), RegistryHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def without_npm(registry, monkeypatch):
    monkeypatch.setattr(emoji_packages.shutil, "which", lambda name: None)
    monkeypatch.setenv("npm_config_registry", registry)


def test_without_npm_the_registry_itself_gives_the_tarball(without_npm, tmp_path):
    path = fetch(PLANTED, tmp_path)
    assert path.read_bytes() == TARBALL
    assert path.name == "scope-planted-1.0.0.tgz"
    path.write_bytes(b"damaged")
    assert fetch(PLANTED, tmp_path).read_bytes() == TARBALL


def test_a_tarball_in_the_cache_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_packages.shutil, "which", lambda name: pytest.fail("fetched again"))
    (tmp_path / PLANTED.file_name).write_bytes(TARBALL)
    assert fetch(PLANTED, tmp_path) == tmp_path / PLANTED.file_name


def test_another_tarball_than_the_pinned_one_is_refused(without_npm, tmp_path):
    with pytest.raises(CorruptionError, match=r"@scope/planted@1\.0\.0 has sha512-.*expected sha512-"):
        fetch(Package("x", PLANTED.name, "1.0.0", "sha512-" + "A" * 88), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_registry_does_not_have(without_npm, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="could not be fetched"):
        fetch(Package("x", "@scope/absent", "1.0.0", "sha512-"), tmp_path)
    with pytest.raises(SourceError, match="no metadata of @scope/bare"):
        fetch(Package("x", "@scope/bare", "1.0.0", "sha512-"), tmp_path)
    monkeypatch.setenv("npm_config_registry", "ftp://somewhere")
    with pytest.raises(ConfigError, match=r"not an http\(s\) address"):
        fetch(PLANTED, tmp_path)


def test_npm_fetches_where_it_is_there(tmp_path):
    made = tmp_path / "planted.tgz"
    made.write_bytes(TARBALL)
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\ntest "$1 $2" = "pack {PLANTED.spec}" || exit 1\ncp {made} "$5"\n')
    npm.chmod(0o755)
    assert emoji_packages._by_npm(str(npm), PLANTED) == TARBALL
    npm.write_text("#!/bin/sh\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    with pytest.raises(SourceError, match=r"`npm pack @scope/planted@1\.0\.0` failed \(npm error 404 Not Found\)"):
        emoji_packages._by_npm(str(npm), PLANTED)


@pytest.mark.parametrize(
    ("name", "lines", "environment", "want"),
    [
        ("openmoji", "", {}, "https://registry.npmjs.org/"),
        ("openmoji", "registry=https://mine/npm", {}, "https://mine/npm/"),
        ("openmoji", "registry = 'https://mine/npm/'", {"npm_config_registry": "https://other"}, "https://other/"),
        ("openmoji", "registry=https://${HOST}/npm", {"HOST": "here"}, "https://here/npm/"),
        ("openmoji", "", {"NPM_CONFIG_REGISTRY": "https://upper"}, "https://upper/"),
        ("@s/p", "@s:registry=https://scoped\nregistry=https://mine", {}, "https://scoped/"),
        ("@t/p", "@s:registry=https://scoped\nregistry=https://mine", {}, "https://mine/"),
    ],
)
def test_the_registry_is_the_users_own(name, lines, environment, want, tmp_path):
    (tmp_path / ".npmrc").write_text(lines)
    assert registry_for(name, environment, (tmp_path,)) == want


def test_reading_a_tarball(tmp_path):
    path = tmp_path / "t.tgz"
    path.write_bytes(TARBALL)
    files = read_files(path, lambda name: name.endswith(".json"))
    assert set(files) == {"icons.json", "info.json"}
    assert read_json(files, "icons.json", PLANTED) == {"a": 1}
    for name in ("info.json", "absent.json"):
        with pytest.raises(CorruptionError, match=f"no readable {name}"):
            read_json(files, name, PLANTED)
    path.write_bytes(TARBALL[:50])
    with pytest.raises(CorruptionError, match=r"not a readable \.tgz"):
        read_files(path, lambda name: True)


def test_pins_are_complete():
    assert len({package.style for package in PACKAGES}) == len(PACKAGES) == 5
    assert all(package.integrity.startswith("sha512-") and len(package.integrity) == 95 for package in PACKAGES)
