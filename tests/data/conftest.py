"""A project folder and a registry of its own for every test, tiny sets in the official layouts, and a faulty server."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from leantrain import paths
from leantrain.data import registry
from leantrain.data.registry import DataSet, File


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder; the real one, and any data that this machine has, are out of sight."""
    monkeypatch.setattr(paths, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.delenv("LEANTRAIN_DATA", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace entries of the registry."""

    def put(*sets: DataSet) -> None:
        monkeypatch.setattr(registry, "DATASETS", {**registry.DATASETS, **{one.name: one for one in sets}})

    return put


@pytest.fixture
def lay_down(project: Path, known: Callable[..., None]) -> Callable[..., Path]:
    """Write files into the data folder and register them as a set's official ones."""

    def write(name: str, contents: Mapping[str, bytes]) -> Path:
        folder = project / "data"
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        files = {path: File(hashlib.sha256(c).hexdigest(), len(c)) for path, c in contents.items()}
        known(replace(registry.dataset(name), files=files))
        return folder

    return write


def cifar_batch(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch in the official form: the pickle that Python 2 wrote, opcode by opcode."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    array += b"(K\x01M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", 3072) + b"\x86" + dtype
    array += b"\x89T" + struct.pack("<I", images.size) + images.tobytes() + b"tb"
    names = b"".join(short(b"picture_%d.png" % k) for k in range(len(images)))
    return (
        (b"\x80\x02}q\x01(" + short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5"))
        + (short(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e")
        + (short(b"data") + array + short(b"filenames") + b"](" + names + b"eu.")
    )


@pytest.fixture
def cifar_bytes() -> Callable[[np.ndarray, list[int]], bytes]:
    return cifar_batch


@pytest.fixture
def fake_cifar(lay_down: Callable[..., Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """CIFAR-10 with 100 training and 20 test images; returns both as arrays."""
    rng = np.random.default_rng(7)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    images = rng.integers(0, 256, (6, 20, 3, 32, 32), dtype=np.uint8)
    labels = np.stack([rng.permutation(np.arange(20) % 10) for _ in names])
    contents = {n: cifar_batch(x, y.tolist()) for n, x, y in zip(names, images, labels, strict=True)}
    lay_down("cifar10", {f"cifar-10-batches-py/{name}": content for name, content in contents.items()})
    return images[:5].reshape(-1, 3, 32, 32), labels[:5].reshape(-1), images[5], labels[5]


class Server:
    """Answers on 127.0.0.1 as the test says; counts what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler, int], None]] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked.append(self.path)
                owner.answers[self.path](self, owner.asked.count(self.path))

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def serve(self, path: str, content: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> str:
        def answer(handler: BaseHTTPRequestHandler, _count: int) -> None:
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content)

        self.answers[path] = answer
        return self.url(path)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()
