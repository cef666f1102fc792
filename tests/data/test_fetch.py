"""Finding, verifying and fetching whole sets, with tiny sets in a folder of the test's own."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from leantrain import paths
from leantrain.data import fetch as fetching
from leantrain.data import registry, stamps
from leantrain.data.errors import CorruptData, DataError, MissingData
from leantrain.data.fetch import Downloader, describe, fetch, locate, verify
from leantrain.data.registry import File, Source

A, B = b"first file\n" * 100, b"second\n" * 300


def known_file(content: bytes) -> File:
    return File(hashlib.sha256(content).hexdigest(), len(content))


def tar_gz(contents: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(contents: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def downloader() -> Downloader:
    return Downloader(allow_loopback=True, timeout_s=5, sleep=lambda seconds: None)


@pytest.fixture
def pair(server, known):
    """A set of two files in one archive, served from this machine."""

    def make(kind: str = "tar.gz", *, mirror: bool = False, name: str = "tinyshakespeare"):
        files = {"pair/a.txt": known_file(A), "pair/sub/b.txt": known_file(B)}
        contents = {"old/a.txt": A, "old/b.txt": B, "old/unused": b"unused"}
        archive = tar_gz(contents) if kind == "tar.gz" else zip_bytes(contents)
        urls = [server.serve(f"/pair.{kind}", archive)]
        if mirror:
            urls.insert(0, server.serve(f"/broken/pair.{kind}", b"<html>sorry</html>"))
        source = Source(
            urls=tuple(urls),
            sha256=hashlib.sha256(archive).hexdigest(),
            bytes=len(archive),
            members={"old/a.txt": "pair/a.txt", "old/b.txt": "pair/sub/b.txt"},
            kind=kind,
        )
        known(replace(registry.dataset(name), files=files, sources=(source,)))
        return name

    return make


def everything(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize("mirror", [False, True])
def test_fetch_leaves_the_registered_files_and_nothing_else(pair, project, downloader, kind, mirror):
    name = pair(kind, mirror=mirror)
    with pytest.raises(MissingData):
        locate(name)
    assert fetch(name, downloader=downloader) == project / "data"
    assert everything(project / "data") == {"pair/a.txt": A, "pair/sub/b.txt": B}
    assert locate(name) == project / "data"
    assert verify(name) == {"pair/a.txt": known_file(A).sha256, "pair/sub/b.txt": known_file(B).sha256}


def test_fetch_goes_to_the_named_folder(pair, project, downloader, monkeypatch):
    name = pair()
    monkeypatch.setenv("LEANTRAIN_DATA", str(project / "my data ü"))
    fetch(name, downloader=downloader)
    assert locate(name) == project / "my data ü"
    assert not (project / "data").exists()
    # The project's own folder is searched after it.
    (project / "my data ü").rename(project / "data")
    assert locate(name) == project / "data"


def test_what_is_there_is_not_downloaded_again(pair, server, downloader, project):
    name = pair()
    fetch(name, downloader=downloader)
    fetch(name, downloader=downloader)
    assert len(server.asked) == 1
    (project / "data/pair/a.txt").unlink()
    fetch(name, downloader=downloader)
    assert len(server.asked) == 2
    assert everything(project / "data") == {"pair/a.txt": A, "pair/sub/b.txt": B}


def test_a_wrong_file_is_not_overwritten(pair, server, downloader, project):
    name = pair()
    wrong = project / "data/pair/a.txt"
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"my own notes")
    with pytest.raises(CorruptData, match="delete what is wrong"):
        fetch(name, downloader=downloader)
    assert wrong.read_bytes() == b"my own notes"
    assert server.asked == []


def test_single_files_packed_and_plain(server, known, downloader, project):
    packed = gzip.compress(A)
    sources = (
        Source((server.serve("/x.gz", packed),), hashlib.sha256(packed).hexdigest(), len(packed), {"": "s/x"}, "gz"),
        Source((server.serve("/y.txt", B),), known_file(B).sha256, len(B), {"": "s/y.tokens"}, "file"),
    )
    files = {"s/x": known_file(A), "s/y.tokens": known_file(B)}
    known(replace(registry.dataset("wikitext-2"), files=files, sources=sources))
    fetch("wikitext-2", downloader=downloader)
    assert everything(project / "data") == {"s/x": A, "s/y.tokens": B}
    # Only what is missing is asked for.
    (project / "data/s/x").unlink()
    fetch("wikitext-2", downloader=downloader)
    assert server.asked == ["/x.gz", "/y.txt", "/x.gz"]


def test_a_changed_upstream_fails_loudly(pair, server, downloader, project):
    name = pair()
    server.serve("/pair.tar.gz", tar_gz({"old/a.txt": A, "old/b.txt": B + b"a new line\n"})[:100])
    with pytest.raises(CorruptData, match="not the file that the registry knows"):
        fetch(name, downloader=downloader)
    assert everything(project / "data") == {}


def test_a_changed_member_fails_even_without_an_archive_checksum(pair, server, known, downloader, project):
    name = pair()
    one = registry.dataset(name)
    known(replace(one, sources=(replace(one.sources[0], sha256=None, bytes=None),)))
    server.serve("/pair.tar.gz", tar_gz({"old/a.txt": A, "old/b.txt": B[:-1] + b"!"}))
    with pytest.raises(CorruptData, match=r"old/b\.txt: SHA-256"):
        fetch(name, downloader=downloader)
    assert everything(project / "data") == {}


def test_offline_gives_the_steps_by_hand(known, downloader, project):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/gone.tar.gz"
    source = Source((url,), "0" * 64, 10, {"a": "pair/a.txt"}, "tar.gz")
    known(replace(registry.dataset("cifar10"), files={"pair/a.txt": known_file(A)}, sources=(source,)))
    with pytest.raises(MissingData) as caught:
        fetch("cifar10", downloader=downloader)
    message = str(caught.value)
    for part in [url, str(project / "data/pair/a.txt"), "leantrain data fetch cifar10", "LEANTRAIN_DATA", "licence"]:
        assert part in message
    assert everything(project / "data") == {}


def test_offline_with_good_data_works(pair, downloader, server):
    name = pair()
    fetch(name, downloader=downloader)
    server.answers.clear()
    assert fetch(name, downloader=downloader) == locate(name)


def test_what_a_killed_download_left_is_cleared_away(pair, downloader, project):
    name = pair()
    left = project / "data" / f".fetch-{name}" / "pair.tar.gz"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    fetch(name, downloader=downloader)
    assert everything(project / "data") == {"pair/a.txt": A, "pair/sub/b.txt": B}


def test_a_folder_that_cannot_be_written_to(pair, downloader, project):
    name = pair()
    (project / "data").write_text("a file, not a folder")
    with pytest.raises(DataError, match="cannot be written"):
        fetch(name, downloader=downloader)


PROCESS = """
import sys
from dataclasses import replace
from pathlib import Path
from leantrain import paths
from leantrain.data import registry
from leantrain.data.fetch import Downloader, fetch
from leantrain.data.registry import File, Source
url, sha256, size, folder = sys.argv[1:]
paths.DATA, paths.BUILD = Path(folder) / "data", Path(folder) / "_build"
one = replace(
    registry.dataset("tinyshakespeare"),
    files={"big.txt": File(sha256, int(size))},
    sources=(Source((url,), sha256, int(size), {"": "big.txt"}, "file"),),
)
registry.DATASETS = {one.name: one}
print("ready", flush=True)
sys.stdin.readline()
fetch(one.name, downloader=Downloader(allow_loopback=True))
"""


def test_two_processes_download_once(server, project):
    server.serve("/big.txt", A)
    good = server.answers["/big.txt"]

    def slow(handler, count):
        import time

        time.sleep(0.5)
        good(handler, count)

    server.answers["/big.txt"] = slow
    command = [sys.executable, "-c", PROCESS, server.url("/big.txt"), known_file(A).sha256, str(len(A)), str(project)]
    environment = {**os.environ, "PYTHONPATH": str(Path(paths.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    assert server.asked == ["/big.txt"]
    assert everything(project / "data") == {"big.txt": A}


def test_missing_data_says_all_that_is_needed(project):
    with pytest.raises(MissingData) as caught:
        locate("mnist")
    message = str(caught.value)
    one = registry.dataset("mnist")
    for part in [*(str(project / "data" / path) for path in one.files), "leantrain data fetch mnist", one.terms]:
        assert part in message
    assert all(source.urls[0] in message for source in one.sources)


def test_missing_imagenet_says_what_to_lay_down(project):
    for ask in (locate, fetch, verify):
        with pytest.raises(MissingData) as caught:
            ask("imagenet")
        assert str(project / "data/imagenet/train") in str(caught.value)
        assert "leantrain data fetch" not in str(caught.value)
        assert registry.dataset("imagenet").terms in str(caught.value)


@pytest.mark.parametrize("ask", [locate, fetch, verify])
def test_unknown_names_are_refused(ask):
    with pytest.raises(ValueError, match=r"unknown data set 'cifar-10'; the sets are bccd, cifar10, "):
        ask("cifar-10")


def test_an_embedded_set_is_not_fetched():
    for ask in (locate, fetch):
        with pytest.raises(ValueError, match="comes with a library"):
            ask("digits")
    assert verify("digits") == registry.dataset("digits").checksums


@pytest.mark.parametrize("change", ["size", "content"])
def test_a_changed_file_is_found_out(lay_down, change):
    folder = lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": A})
    file = folder / "tinyshakespeare/input.txt"
    locate("tinyshakespeare")
    file.write_bytes(A + b"more" if change == "size" else A[:-1] + b"!")
    os.utime(file, ns=(1, 1))
    with pytest.raises(CorruptData, match="input.txt: " + ("1104 bytes" if change == "size" else "SHA-256")):
        locate("tinyshakespeare")


def test_a_file_is_hashed_once_until_it_changes(lay_down, monkeypatch):
    hashed = []
    real = stamps.sha256_of
    monkeypatch.setattr(stamps, "sha256_of", lambda path: (hashed.append(path.name), real(path))[1])
    folder = lay_down("wikitext-2", {"wikitext-2/a": A, "wikitext-2/b": B})
    locate("wikitext-2")
    locate("wikitext-2")
    assert sorted(hashed) == ["a", "b"]
    os.utime(folder / "wikitext-2/a", ns=(10, 10))
    locate("wikitext-2")
    assert sorted(hashed) == ["a", "a", "b"]
    verify("wikitext-2")
    assert sorted(hashed) == ["a", "a", "a", "b", "b"]


def test_verify_sees_what_the_stamp_cannot(lay_down):
    folder = lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": A})
    file = folder / "tinyshakespeare/input.txt"
    locate("tinyshakespeare")
    time = file.stat().st_mtime_ns
    file.write_bytes(A[:-1] + b"!")
    os.utime(file, ns=(time, time))
    with pytest.raises(CorruptData, match="SHA-256"):
        verify("tinyshakespeare")
    # And from then on the stamp knows, too.
    with pytest.raises(CorruptData, match="SHA-256"):
        locate("tinyshakespeare")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 1}', "null", "\x00"])
def test_a_damaged_stamp_file_is_made_anew(lay_down, content):
    folder = lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": A})
    paths.BUILD.mkdir()
    stamps.stamp_file().write_text(content)
    assert locate("tinyshakespeare") == folder
    key = str(folder / "tinyshakespeare/input.txt")
    assert json.loads(stamps.stamp_file().read_text())[key][2] == known_file(A).sha256


def test_without_a_place_for_the_stamps_all_goes_on(lay_down):
    folder = lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": A})
    paths.BUILD.write_text("a file, not a folder")
    assert locate("tinyshakespeare") == folder
    (folder / "tinyshakespeare/input.txt").write_bytes(B)
    with pytest.raises(CorruptData):
        locate("tinyshakespeare")


def test_describe(lay_down):
    rows = {row["name"]: row for row in describe()}
    assert list(rows) == list(registry.DATASETS)
    assert rows["digits"]["present"]
    assert not rows["cifar10"]["present"]
    assert rows["cifar10"]["bytes"] == 186_214_026
    assert {row["kind"] for row in rows.values()} == {"embedded", "download", "manual"}
    folder = lay_down("tinyshakespeare", {"tinyshakespeare/input.txt": A})
    assert {row["name"]: row["present"] for row in describe()}["tinyshakespeare"]
    (folder / "tinyshakespeare/input.txt").write_bytes(A[:-1])
    assert not {row["name"]: row["present"] for row in describe()}["tinyshakespeare"]


def test_imagenet_is_present_when_both_folders_are(project):
    for part in ("train", "val"):
        assert not {row["name"]: row["present"] for row in describe()}["imagenet"]
        (project / "data/imagenet" / part).mkdir(parents=True)
    assert {row["name"]: row["present"] for row in describe()}["imagenet"]
    assert locate("imagenet") == project / "data"


def test_finding_data_needs_no_heavy_library():
    code = (
        "import sys, leantrain.data, leantrain.data.registry, leantrain.data.fetch as f; f.describe();"
        "print(sorted({'torch', 'numpy', 'pandas', 'lightning', 'sklearn', 'requests'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(paths.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_default_downloader_is_strict():
    assert not fetching.Downloader().allow_loopback
