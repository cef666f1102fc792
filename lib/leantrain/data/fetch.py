"""Find, verify and, only when asked to, download data sets.

`locate` is what chapters use: it looks in the folder that the environment variable `LEANTRAIN_DATA` names, then in
the project's `data/`, and verifies every file before its first use. It never downloads. `fetch` does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leantrain import paths
from leantrain.data import registry
from leantrain.data.download import Downloader, DownloadFailed
from leantrain.data.errors import CorruptData, DataError, MissingData
from leantrain.data.registry import DataSet, Source, dataset
from leantrain.data.stamps import cached_sha256
from leantrain.data.unpack import unpack

__all__ = ["Downloader", "describe", "fetch", "folders", "locate", "verify"]

_LOCK_TIMEOUT_S = 2 * 3600.0


def folders() -> list[Path]:
    """The data folders, in the order in which they are searched; the first is where downloads go."""
    named = os.environ.get("LEANTRAIN_DATA")
    return ([Path(named).expanduser().absolute()] if named else []) + [paths.DATA]


def describe() -> list[dict[str, Any]]:
    """One row per set, for an overview.

    Returns:
        Dictionaries with the keys name, title, kind (embedded, download or manual), present (whether all files are
        here with the right size; their content is not read), bytes (0 where unknown) and terms.
    """
    return [
        {
            "name": one.name,
            "title": one.title,
            "kind": one.kind,
            "present": one.kind == "embedded" or any(_looks_present(one, folder) for folder in folders()),
            "bytes": one.bytes,
            "terms": one.terms,
        }
        for one in registry.DATASETS.values()
    ]


def locate(name: str) -> Path:
    """The data folder that holds a set, its files verified.

    The SHA-256 of a file is computed before its first use and remembered with the file's size and time of change.

    Args:
        name: A set that is downloaded or laid down by hand.

    Returns:
        The folder below which the set's registered paths lie.

    Raises:
        MissingData: If no folder holds the whole set; the message says how to get it.
        CorruptData: If a file is not the registered one.
        ValueError: If there is no such set, or it comes with a library.
    """
    one = _on_disk(name)
    for folder in folders():
        if not _missing(one, folder):
            _check(one, folder, fresh=False)
            return folder
    raise MissingData(_advice(one))


def verify(name: str) -> dict[str, str]:
    """Hash all files of a set anew, whatever was remembered.

    Returns:
        File or array -> SHA-256. Empty for a set that is laid down by hand, of which only the folders are known.

    Raises:
        MissingData: If the set is not here.
        CorruptData: If anything differs from the registry; names every file that does.
        ValueError: If there is no such set.
    """
    one = dataset(name)
    if one.kind == "embedded":
        # Reading the arrays checks them against the registry.
        from leantrain.data.digits import read_digits
        from leantrain.data.docstrings import read_docstrings

        readers: dict[str, Callable[[], object]] = {"digits": read_digits, "docstrings": read_docstrings}
        readers[name]()
        return one.checksums
    for folder in folders():
        if not _missing(one, folder):
            _check(one, folder, fresh=True)
            return one.checksums
    raise MissingData(_advice(one))


def fetch(name: str, *, downloader: Downloader | None = None) -> Path:
    """Download a set into the first data folder, unless it is there.

    Files that are there and right are kept. What is downloaded is checked against the registry, unpacked beside its
    place, checked again, and moved into place file by file, so that no unchecked file ever has a registered name.
    Two processes that ask for the same set do not disturb each other: the second waits and finds it done.

    Args:
        name: The set.
        downloader: How to download; by default over https only.

    Returns:
        The folder below which the set's registered paths lie.

    Raises:
        MissingData: If it could not be had; the message gives the steps by hand.
        CorruptData: If a file that is not the registered one has its name, or a source serves other bytes.
        ValueError: If there is no such set, or it comes with a library.
    """
    one = _on_disk(name)
    folder = folders()[0]
    if one.kind == "manual":
        return locate(name)
    downloader = downloader or Downloader()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(one, folder):
            wanted = set(_missing(one, folder))
            present = [path for path in one.files if path not in wanted]
            _check(one, folder, fresh=False, only=present)
            if wanted:
                _fetch(one, folder, wanted, downloader)
    except OSError as error:
        raise DataError(f"{one.title} cannot be written to {folder}: {error}") from error
    return folder


def _fetch(one: DataSet, folder: Path, wanted: set[str], downloader: Downloader) -> None:
    # Beside its place, so that moving a file is one step; whatever a killed process left there goes first.
    scratch = folder / f".fetch-{one.slug}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        for source in one.sources:
            if not wanted.isdisjoint(source.members.values()):
                archive = _download(one, source, scratch, downloader)
                files = {m: one.files[p] for m, p in source.members.items()}
                for member, unpacked in unpack(archive, source.kind, files, scratch / "unpacked").items():
                    place = folder / source.members[member]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(unpacked, place)
                    cached_sha256(place)
                archive.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(one: DataSet, source: Source, scratch: Path, downloader: Downloader) -> Path:
    failures = []
    kind: type[DataError] = MissingData
    for url in source.urls:
        try:
            return replace(downloader, max_bytes=source.bytes or downloader.max_bytes).get(url, source.sha256, scratch)
        except DownloadFailed as failure:
            failures.append(str(failure))
        except CorruptData as failure:
            failures.append(str(failure))
            kind = CorruptData
    raise kind("\n".join([f"{one.title} could not be downloaded.", *failures, "", _advice(one)]))


def _on_disk(name: str) -> DataSet:
    one = dataset(name)
    if one.kind == "embedded":
        raise ValueError(f"{one.title} comes with a library: it needs no files and there is nothing to fetch")
    return one


def _lock(one: DataSet, folder: Path) -> Any:
    from filelock import FileLock

    return FileLock(folder / f".{one.slug}.lock", timeout=_LOCK_TIMEOUT_S)


def _missing(one: DataSet, folder: Path) -> list[str]:
    absent = [path for path in one.files if not (folder / path).is_file()]
    return absent + [path for path in one.folders if not (folder / path).is_dir()]


def _looks_present(one: DataSet, folder: Path) -> bool:
    return not _missing(one, folder) and all(
        (folder / path).stat().st_size == file.bytes for path, file in one.files.items()
    )


def _check(one: DataSet, folder: Path, *, fresh: bool, only: Sequence[str] | None = None) -> None:
    wrong = []
    for path in one.files if only is None else only:
        file, expected = folder / path, one.files[path]
        size = file.stat().st_size
        if size != expected.bytes:
            wrong.append(f"{file}: {size} bytes, expected {expected.bytes}")
        elif (digest := cached_sha256(file, fresh=fresh)) != expected.sha256:
            wrong.append(f"{file}: SHA-256 {digest}, expected {expected.sha256}")
    if wrong:
        get = f"delete what is wrong, then run: leantrain data fetch {one.name}"
        raise CorruptData("\n".join([f"{one.title} is not what the registry knows; {get}", *wrong]))


def _advice(one: DataSet) -> str:
    """What is missing, where it was looked for, and how to get it."""
    searched = folders()
    target = searched[0]
    lines = [f"{one.title} is not complete in " + " or ".join(str(folder) for folder in searched) + "."]
    if one.kind == "manual":
        lines += [
            f"It cannot be downloaded by this project. Get it from {one.home} and lay it down as",
            *(f"  {target / path}/<class>/<image files>" for path in one.folders),
        ]
    else:
        lines += ["Missing:", *(f"  {target / path}" for path in _missing(one, target))]
        lines += [f"To download it ({one.bytes / 1e6:.0f} MB on the disk), run: leantrain data fetch {one.name}"]
        lines += ["Or by hand: download, unpack if packed, and give the files the names above:"]
        lines += [f"  {source.urls[0]}" for source in one.sources]
    lines += ["The environment variable LEANTRAIN_DATA can name another folder.", f"Terms: {one.terms}"]
    return "\n".join(lines)
