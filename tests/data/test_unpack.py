"""Archives that try to write elsewhere, to fill the disk, or are simply damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from leantrain.data.errors import CorruptData
from leantrain.data.registry import File
from leantrain.data.unpack import unpack

GOOD = b"what the member holds\n" * 50
WANTED = {"set/a.txt": File(hashlib.sha256(GOOD).hexdigest(), len(GOOD))}


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, content


def zip_of(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_only_the_registered_members_are_unpacked(tmp_path, kind):
    if kind == "zip":
        archive = zip_of(tmp_path / "set.zip", {"set/readme": b"hello", "set/a.txt": GOOD})
    else:
        archive = tar_of(
            tmp_path / "set.tar.gz",
            [entry("set", kind=tarfile.DIRTYPE), entry("set/readme", b"hello"), entry("set/a.txt", GOOD)],
        )
    places = unpack(archive, kind, WANTED, tmp_path / "out")
    assert {member: place.read_bytes() for member, place in places.items()} == {"set/a.txt": GOOD}
    assert everything(tmp_path / "out") == {"0"}


@pytest.mark.parametrize("kind", ["gz", "file"])
def test_a_single_file(tmp_path, kind):
    archive = tmp_path / "set.gz"
    archive.write_bytes(gzip.compress(GOOD) if kind == "gz" else GOOD)
    (place,) = unpack(archive, kind, {"": WANTED["set/a.txt"]}, tmp_path / "out").values()
    assert place.read_bytes() == GOOD


OUTSIDE = ["../a.txt", "set/../../a.txt", "/etc/a.txt", "..\\a.txt", "C:\\a.txt", "set/.."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_names_that_point_outside_are_refused(tmp_path, kind, name):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        zip_of(archive, {"set/a.txt": GOOD, name: b"evil"})
    else:
        tar_of(archive, [entry("set/a.txt", GOOD), entry(name, b"evil")])
    with pytest.raises(CorruptData, match="points outside"):
        unpack(archive, kind, WANTED, tmp_path / "deep" / "er" / "out")
    assert everything(tmp_path) == {archive.name}


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt"])
def test_a_registered_name_is_no_excuse(tmp_path, name):
    archive = tar_of(tmp_path / "set.tar.gz", [entry(name, GOOD)])
    with pytest.raises(CorruptData, match="points outside"):
        unpack(archive, "tar.gz", {name: WANTED["set/a.txt"]}, tmp_path / "out")


@pytest.mark.parametrize(
    "evil",
    [
        entry("set/a.txt", kind=tarfile.SYMTYPE, link="/etc/hostname"),
        entry("set/a.txt", kind=tarfile.LNKTYPE, link="/etc/hostname"),
        entry("set", kind=tarfile.SYMTYPE, link="/etc"),
        entry("set/b", kind=tarfile.CHRTYPE),
        entry("set/b", kind=tarfile.FIFOTYPE),
    ],
    ids=["symlink", "hard link", "folder link", "device", "pipe"],
)
def test_links_and_devices_are_refused(tmp_path, evil):
    archive = tar_of(tmp_path / "set.tar.gz", [evil, entry("set/a.txt", GOOD)])
    with pytest.raises(CorruptData, match="link or a device"):
        unpack(archive, "tar.gz", WANTED, tmp_path / "out")
    assert everything(tmp_path) == {"set.tar.gz"}


def test_a_link_in_a_zip_is_refused(tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        info = zipfile.ZipInfo("set/a.txt")
        info.external_attr = 0o120777 << 16
        packed.writestr(info, "/etc/hostname")
    with pytest.raises(CorruptData, match="link or a device"):
        unpack(archive, "zip", WANTED, tmp_path / "out")
    assert everything(tmp_path) == {"set.zip"}


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "gz"])
def test_a_bomb_is_stopped_at_the_registered_size(tmp_path, kind):
    bomb = bytes(20_000_000)
    archive = tmp_path / f"set.{kind}"
    wanted = WANTED
    if kind == "zip":
        zip_of(archive, {"set/a.txt": bomb})
    elif kind == "gz":
        archive.write_bytes(gzip.compress(bomb))
        wanted = {"": WANTED["set/a.txt"]}
    else:
        tar_of(archive, [entry("set/a.txt", bomb)])
    written = []
    real = Path.open

    def counting(self, mode="r", *args, **kwargs):
        stream = real(self, mode, *args, **kwargs)
        if "w" in mode:
            write = stream.write
            stream_proxy = io.BytesIO()
            stream_proxy.write = lambda data: (written.append(len(data)), write(data))[1]
            stream_proxy.close = stream.close
            return stream_proxy
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", counting)
        with pytest.raises(CorruptData, match="longer than the 1100 bytes"):
            unpack(archive, kind, wanted, tmp_path / "out")
    assert sum(written) == len(GOOD) + 1
    assert everything(tmp_path) == {archive.name}


def test_a_bomb_in_a_member_that_nobody_wants(tmp_path):
    archive = tar_of(tmp_path / "set.tar.gz", [entry("set/other", bytes(70_000_000)), entry("set/a.txt", GOOD)])
    with pytest.raises(CorruptData, match="unpacks to more than expected"):
        unpack(archive, "tar.gz", WANTED, tmp_path / "out")


@pytest.mark.parametrize("content", [GOOD[:-1], GOOD[:-1] + b"!"], ids=["short", "changed"])
@pytest.mark.parametrize("kind", ["tar.gz", "zip", "gz", "file"])
def test_a_member_that_is_not_the_registered_one(tmp_path, kind, content):
    archive = tmp_path / f"set.{kind}"
    wanted = {"": WANTED["set/a.txt"]}
    if kind == "file":
        archive.write_bytes(content)
    elif kind == "gz":
        archive.write_bytes(gzip.compress(content))
    else:
        wanted = WANTED
        if kind == "zip":
            zip_of(archive, {"set/a.txt": content})
        else:
            tar_of(archive, [entry("set/a.txt", content)])
    with pytest.raises(CorruptData, match="expected"):
        unpack(archive, kind, wanted, tmp_path / "out")
    assert everything(tmp_path / "out") == set()


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_member_that_is_not_there_or_there_twice(tmp_path, kind):
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        zip_of(archive, {"set/b.txt": GOOD})
    else:
        tar_of(archive, [entry("set/b.txt", GOOD)])
    with pytest.raises(CorruptData, match=r"does not hold set/a\.txt"):
        unpack(archive, kind, WANTED, tmp_path / "out")
    if kind == "tar.gz":
        tar_of(archive, [entry("set/a.txt", GOOD), entry("set/a.txt", GOOD)])
        with pytest.raises(CorruptData, match="twice"):
            unpack(archive, kind, WANTED, tmp_path / "out")
        assert everything(tmp_path / "out") == set()


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "gz"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "flipped"])
def test_a_damaged_archive(tmp_path, kind, damage):
    archive = tmp_path / f"set.{kind}"
    wanted = WANTED
    if kind == "zip":
        zip_of(archive, {"set/a.txt": GOOD})
    elif kind == "gz":
        archive.write_bytes(gzip.compress(GOOD))
        wanted = {"": WANTED["set/a.txt"]}
    else:
        tar_of(archive, [entry("set/a.txt", GOOD)])
    content = archive.read_bytes()
    middle = len(content) // 2
    broken = {
        "cut": content[:middle],
        "noise": b"noise" * 100,
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
    }[damage]
    archive.write_bytes(broken)
    with pytest.raises(CorruptData):
        unpack(archive, kind, wanted, tmp_path / "out")
    assert everything(tmp_path / "out") == set()
