"""The same index on an S3 server that runs here: publish, read, verify, resume after a kill and after a lost server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edje_pipeline.errors import IndexLockedError, IndexNotFoundError, StorageError
from edje_pipeline.storage import lock
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.snapshots import delete, prune, rollback
from edje_pipeline.storage.staging import Staging
from edje_pipeline.storage.verify import verify
from tests.index_factory import default_codec, fingerprints_of, run_extract, tokens_of, write_chunk

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[2]
IDS = [f"x{number:04d}" for number in range(60)]


class Server:
    """moto's S3 server in its own process, so that a test can kill it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the S3 server did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def uri(self, name: str) -> str:
        query = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1&allow_bucket_creation=true"
        return f"s3://bucket/{name}?{query}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
    server = Server()
    server.start()
    Location.parse(server.uri("")).filesystem.create_dir("bucket")
    yield server
    server.stop()


@pytest.fixture
def uri(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 3.0)
    monkeypatch.setenv("EDJE_LEASE_SECONDS", "3")
    return server.uri(uuid.uuid4().hex)


def assert_good(uri: str) -> None:
    report = verify(Location.parse(uri))
    assert report.problems == (), report.to_text()


def test_publish_read_change(uri: str) -> None:
    location = Location.parse(uri)
    with pytest.raises(IndexNotFoundError):
        Index.open(uri)
    run_extract(uri, IDS, rejected=IDS[:2], part_rows=25)
    index = Index.open(uri)
    assert index.ids() == IDS[2:]
    np.testing.assert_array_equal(index.tokens(["x0042"])[0], tokens_of("x0042").astype(np.float32))
    run_extract(uri, ["y1"], mode="add", part_rows=25)
    assert delete(location, ["x0010", "who"]).num_unknown == 1
    assert len(Index.open(uri)) == 58
    assert len(index.ids()) == 58
    assert_good(uri)
    rollback(location)
    assert len(Index.open(uri)) == 59
    prune(location)
    assert_good(uri)
    assert not [entry for entry in location.list_files() if entry.path.startswith("staging/") and entry.size_bytes]


def run_process(uri: str, crash_at: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.crash_run", uri, "60", "new"],
        cwd=REPO,
        env={**os.environ, "EDJE_CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("crash_at", ["write.middle:3", "publish.swapped:1"])
def test_a_killed_run_resumes(uri: str, crash_at: str) -> None:
    killed = run_process(uri, crash_at)
    assert killed.returncode == -9, killed.stderr
    again = run_process(uri)
    assert again.returncode == 0, again.stderr
    assert Index.open(uri).ids() == sorted(set(IDS) - {"x0007", "x0030"})
    assert_good(uri)


def test_a_second_run_is_refused_and_a_dead_lease_ends(uri: str) -> None:
    location = Location.parse(uri)
    codec = default_codec()
    with Staging.begin(location, fingerprints=fingerprints_of(codec), config={}):
        with pytest.raises(IndexLockedError, match=rf"process {os.getpid()} "):
            Staging.begin(location, fingerprints=fingerprints_of(codec), config={})
        time.sleep(2.5)  # past the first lease: the heartbeat has renewed it
        with pytest.raises(IndexLockedError):
            Staging.begin(location, fingerprints=fingerprints_of(codec), config={})
    lease = b'{"token": "t", "pid": 1, "host": "elsewhere", "purpose": "extract", "until": %d}'
    location.child(".lease.json").write_bytes(lease % (time.time() + 30))
    with pytest.raises(IndexLockedError, match=r"elsewhere .*its lease ends in (29|30) s"):
        Staging.begin(location, fingerprints=fingerprints_of(codec), config={})
    location.child(".lease.json").write_bytes(lease % (time.time() - 1))
    Staging.begin(location, fingerprints=fingerprints_of(codec), config={}).release()


class Line:
    """A TCP forwarder to the server that a test can cut and mend; the server keeps its objects."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.is_up = True
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.is_up:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        self.is_up = False
        for item in self._sockets:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()
        self._sockets.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()


def cut_off_run(location: Location, line: Line) -> None:
    codec = default_codec()
    with Staging.begin(location, fingerprints=fingerprints_of(codec), config={}) as staging:
        staging.set_plan_info({"num_rows": 60})
        staging.journal([write_chunk(staging, IDS[:20], 0, codec)])
        line.cut()
        staging.journal([write_chunk(staging, IDS[20:40], 20, codec)])


def test_a_lost_connection_in_the_middle(server: Server, uri: str) -> None:
    """The line is cut between two shards: one clear line; what was journalled counts when it is back."""
    line = Line(server.port)
    uri = uri.replace(f":{server.port}", f":{line.port}")
    location = Location.parse(uri)
    codec = default_codec()
    try:
        with pytest.raises(StorageError) as caught:
            cut_off_run(location, line)
        assert "\n" not in str(caught.value)
        assert "run the same command again" in str(caught.value)
        with pytest.raises(StorageError, match="run the same command again"):
            Index.open(uri)
        line.is_up = True
        time.sleep(3.1)  # the lease of the run that lost its line
        with Staging.begin(location, fingerprints=fingerprints_of(codec), config={}) as staging:
            assert staging.is_resumed
            assert staging.covered.num_rows == 20
        run_extract(uri, IDS)
        assert Index.open(uri).ids() == IDS
        assert_good(uri)
    finally:
        line.close()
