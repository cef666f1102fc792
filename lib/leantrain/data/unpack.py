"""Unpack a download: the registered members only, each no longer than registered and checked before it is kept."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from leantrain.data.errors import CorruptData
from leantrain.data.registry import File
from leantrain.data.stamps import sha256_of

__all__ = ["unpack"]

_CHUNK = 1 << 18
# What a tar archive may hold besides the registered members: to skip a member means to unpack it.
_SLACK = 64 << 20


def unpack(
    archive: Path, kind: Literal["file", "gz", "tar.gz", "zip"], members: Mapping[str, File], folder: Path
) -> dict[str, Path]:
    """Take the registered members out of a download.

    No name from the archive is ever used as a path: a member is written under a number in `folder`. An archive that
    holds a link, a device, an absolute path or `..` is refused as a whole.

    Args:
        archive: The download.
        kind: What it is; `file` and `gz` have one member, whose name is empty.
        members: Name in the archive -> what it must be.
        folder: Where to; made if missing.

    Returns:
        Name in the archive -> the file written, for each of `members`.

    Raises:
        CorruptData: If the archive is damaged or unsafe, or a member is missing, too long or has a wrong checksum.
            Then nothing that was unpacked is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = {member: folder / str(number) for number, member in enumerate(members)}
    try:
        if kind == "file":
            ((member, place),) = places.items()
            _check(archive.name, member, archive.stat().st_size, sha256_of(archive), members[member])
            archive.replace(place)
        elif kind == "gz":
            ((member, place),) = places.items()
            with gzip.open(archive, "rb") as stream:
                _write(archive.name, member, stream, members[member], place)
        elif kind == "tar.gz":
            _untar(archive, members, places)
        else:
            _unzip(archive, members, places)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        _discard(places)
        raise CorruptData(f"{archive.name}: damaged archive: {error}") from error
    except (CorruptData, OSError) as error:
        _discard(places)
        if isinstance(error, gzip.BadGzipFile):
            raise CorruptData(f"{archive.name}: damaged archive: {error}") from error
        raise
    return places


def _untar(archive: Path, members: Mapping[str, File], places: Mapping[str, Path]) -> None:
    limit = _SLACK + 2 * sum(file.bytes for file in members.values())
    seen: set[str] = set()
    with tarfile.open(archive, "r|gz") as tar:
        for info in tar:
            _refuse_unsafe_name(archive.name, info.name)
            if not (info.isreg() or info.isdir()):
                raise CorruptData(f"{archive.name}: {info.name!r} is a link or a device: refused")
            limit -= info.size
            if limit < 0:
                raise CorruptData(f"{archive.name}: unpacks to more than expected: refused")
            if info.name in members and info.isreg():
                _refuse_twice(archive.name, info.name, seen)
                stream = tar.extractfile(info)
                if stream is None:
                    raise CorruptData(f"{archive.name}: {info.name!r} cannot be read")
                _write(archive.name, info.name, stream, members[info.name], places[info.name])
    _refuse_missing(archive.name, members, seen)


def _unzip(archive: Path, members: Mapping[str, File], places: Mapping[str, Path]) -> None:
    seen: set[str] = set()
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            _refuse_unsafe_name(archive.name, info.filename)
            # The upper half of the attributes is the Unix mode, whose type bits say what the member is.
            if (info.external_attr >> 28) not in (0, 0o4, 0o10):
                raise CorruptData(f"{archive.name}: {info.filename!r} is a link or a device: refused")
            if info.filename in members:
                _refuse_twice(archive.name, info.filename, seen)
                if info.flag_bits & 1:
                    raise CorruptData(f"{archive.name}: {info.filename!r} is encrypted")
                with packed.open(info) as stream:
                    _write(archive.name, info.filename, stream, members[info.filename], places[info.filename])
    _refuse_missing(archive.name, members, seen)


def _refuse_unsafe_name(archive: str, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise CorruptData(f"{archive}: {name!r} points outside the archive: refused")


def _refuse_twice(archive: str, name: str, seen: set[str]) -> None:
    if name in seen:
        raise CorruptData(f"{archive}: {name!r} stands in it twice: refused")
    seen.add(name)


def _refuse_missing(archive: str, members: Mapping[str, File], seen: set[str]) -> None:
    if absent := sorted(members.keys() - seen):
        raise CorruptData(f"{archive}: does not hold {', '.join(absent)}")


def _write(archive: str, member: str, stream: IO[bytes] | gzip.GzipFile, expected: File, place: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with place.open("wb") as out:
        # One byte more than expected is enough to know.
        while size <= expected.bytes and (chunk := stream.read(min(_CHUNK, expected.bytes + 1 - size))):
            size += len(chunk)
            digest.update(chunk)
            out.write(chunk)
    _check(archive, member, size, digest.hexdigest(), expected)


def _check(archive: str, member: str, size: int, sha256: str, expected: File) -> None:
    what = f"{archive}: {member}" if member else archive
    if size > expected.bytes:
        raise CorruptData(f"{what}: longer than the {expected.bytes} bytes expected: refused")
    if size != expected.bytes:
        raise CorruptData(f"{what}: {size} bytes, expected {expected.bytes}")
    if sha256 != expected.sha256:
        raise CorruptData(f"{what}: SHA-256 {sha256}, expected {expected.sha256}")


def _discard(places: Mapping[str, Path]) -> None:
    for place in places.values():
        with contextlib.suppress(OSError):
            place.unlink()
