"""Downloads against a real server on this machine that misbehaves in every way we know of."""

from __future__ import annotations

import gzip
import hashlib
import socket
import struct
import time
from pathlib import Path

import pytest

from leantrain.data.download import Downloader, DownloadFailed
from leantrain.data.errors import CorruptData

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Pauses(list):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def downloader(pauses: Pauses) -> Downloader:
    return Downloader(allow_loopback=True, timeout_s=5, sleep=pauses)


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_good_download_is_kept_under_its_name(server, downloader, tmp_path):
    got = downloader.get(server.serve("/set.bin?x=1", CONTENT), SHA256, tmp_path)
    assert got == tmp_path / "set.bin"
    assert got.read_bytes() == CONTENT
    assert server.asked == ["/set.bin?x=1"]


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT[:100], b""], ids=["corrupted", "short", "empty"])
def test_other_bytes_are_refused_and_removed_and_not_asked_for_again(server, downloader, tmp_path, content):
    url = server.serve("/set.bin", content)
    with pytest.raises(CorruptData, match="not the file that the registry knows"):
        downloader.get(url, SHA256, tmp_path)
    assert files(tmp_path) == []
    assert len(server.asked) == 1


def test_a_web_page_instead_of_the_file_is_called_that(server, downloader, tmp_path):
    url = server.serve(
        "/set.tar.gz", b"\n<!DOCTYPE html><title>Please log in</title>", headers={"Content-Type": "text/html"}
    )
    with pytest.raises(CorruptData, match="web page"):
        downloader.get(url, SHA256, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_asked_for_again(server, downloader, pauses, tmp_path, status):
    url = server.serve("/set.bin", b"no", status=status)
    with pytest.raises(DownloadFailed, match=f"answered {status}"):
        downloader.get(url, SHA256, tmp_path)
    assert len(server.asked) == 1
    assert pauses == []
    assert files(tmp_path) == []


def test_a_passing_fault_is_tried_again_with_growing_pauses(server, downloader, pauses, tmp_path):
    url = server.serve("/set.bin", CONTENT)
    good = server.answers["/set.bin"]

    def twice_overloaded(handler, count):
        good(handler, count) if count > 2 else handler.send_error(503 if count == 1 else 429)

    server.answers["/set.bin"] = twice_overloaded
    assert downloader.get(url, SHA256, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 3
    assert pauses == [1.0, 2.0]


def test_a_lasting_fault_is_tried_three_times(server, downloader, pauses, tmp_path):
    url = server.serve("/set.bin", b"", status=500)
    with pytest.raises(DownloadFailed, match=r"answered 500.*attempts: 3"):
        downloader.get(url, SHA256, tmp_path)
    assert len(server.asked) == 3


def test_a_file_that_breaks_off_is_tried_again(server, downloader, tmp_path):
    url = server.serve("/set.bin", CONTENT)
    good = server.answers["/set.bin"]

    def breaks_off_once(handler, count):
        if count > 1:
            good(handler, count)
        else:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(CONTENT)))
            handler.end_headers()
            handler.wfile.write(CONTENT[:5000])

    server.answers["/set.bin"] = breaks_off_once
    assert downloader.get(url, SHA256, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_reset_connection_is_tried_again(server, downloader, tmp_path):
    def reset(handler, _count):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    server.answers["/set.bin"] = reset
    with pytest.raises(DownloadFailed, match="attempts: 3"):
        downloader.get(server.url("/set.bin"), SHA256, tmp_path)
    assert len(server.asked) == 3
    assert files(tmp_path) == []


def test_a_silent_server_is_given_up(server, pauses, tmp_path):
    server.answers["/set.bin"] = lambda handler, _count: time.sleep(0.6)
    downloader = Downloader(allow_loopback=True, timeout_s=0.1, attempts=2, sleep=pauses)
    started = time.monotonic()
    with pytest.raises(DownloadFailed, match=r"(?i)timed out.*attempts: 2"):
        downloader.get(server.url("/set.bin"), SHA256, tmp_path)
    assert time.monotonic() - started < 2


def test_a_server_that_drips_is_given_up(server, pauses, tmp_path):
    def drip(handler, _count):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            try:
                handler.wfile.write(b"x" * 300_000)
            except OSError:
                return
            time.sleep(0.05)

    server.answers["/set.bin"] = drip
    downloader = Downloader(allow_loopback=True, timeout_s=5, limit_s=0.2, attempts=1, sleep=pauses)
    with pytest.raises(DownloadFailed, match="not complete after"):
        downloader.get(server.url("/set.bin"), SHA256, tmp_path)
    assert files(tmp_path) == []


def test_nobody_there(downloader, pauses, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadFailed, match="ConnectionError"):
        downloader.get(f"http://127.0.0.1:{port}/set.bin", SHA256, tmp_path)
    assert len(pauses) == 2


def test_longer_than_expected_is_cut_off(server, pauses, tmp_path):
    downloader = Downloader(allow_loopback=True, max_bytes=1000, sleep=pauses)
    with pytest.raises(DownloadFailed, match="longer than the 1000 bytes"):
        downloader.get(server.serve("/set.bin", CONTENT), None, tmp_path)
    assert files(tmp_path) == []
    assert len(server.asked) == 1


def test_redirects_are_followed_and_bounded(server, downloader, tmp_path):
    server.serve("/set.bin", CONTENT)
    first = server.serve("/old.bin", b"", status=302, headers={"Location": "/set.bin"})
    assert downloader.get(first, SHA256, tmp_path).name == "old.bin"
    loop = server.serve("/loop", b"", status=301, headers={"Location": "/loop"})
    with pytest.raises(DownloadFailed, match="more than 5 redirects"):
        downloader.get(loop, SHA256, tmp_path)
    assert server.asked.count("/loop") == 6


@pytest.mark.parametrize("target", ["http://example.org/set.bin", "ftp://example.org/set.bin", "file:///etc/hostname"])
def test_a_redirect_away_from_https_is_refused(server, downloader, tmp_path, target):
    url = server.serve("/set.bin", b"", status=302, headers={"Location": target})
    with pytest.raises(DownloadFailed, match=r"redirects to .* is not https: refused"):
        downloader.get(url, SHA256, tmp_path)


def test_only_https_is_spoken(server, tmp_path):
    with pytest.raises(DownloadFailed, match="not https"):
        Downloader().get(server.serve("/set.bin", CONTENT), SHA256, tmp_path)
    assert server.asked == []
    with pytest.raises(DownloadFailed, match="not https"):
        Downloader(allow_loopback=True).get("http://127.0.0.1.example.org/set.bin", SHA256, tmp_path)


def test_a_packed_file_arrives_packed(server, downloader, tmp_path):
    packed = gzip.compress(CONTENT)
    url = server.serve("/set.gz", packed, headers={"Content-Encoding": "gzip"})
    got = downloader.get(url, hashlib.sha256(packed).hexdigest(), tmp_path)
    assert got.read_bytes() == packed


def test_attempts_must_be_positive():
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        Downloader(attempts=0)
