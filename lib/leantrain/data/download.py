"""Download one file: https only, bounded in redirects, retries, size and time, and checked before it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from leantrain.data.errors import CorruptData, DataError

if TYPE_CHECKING:
    import requests

__all__ = ["DownloadFailed", "Downloader"]

_CHUNK = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class DownloadFailed(DataError):
    """One address could not be downloaded; another may work."""


class _TryAgain(Exception):
    """A fault that may pass: the network, or an overloaded server."""


@dataclass(frozen=True)
class Downloader:
    """How to download. Pooch keeps the file only if its checksum is right; this decides what is asked and accepted.

    Attributes:
        timeout_s: Longest silence of the server, in seconds.
        limit_s: Longest time for one attempt, in seconds.
        attempts: Attempts for each address; only faults that may pass are tried again.
        pause_s: Pause before the second attempt, in seconds; doubled before each further one.
        max_redirects: Redirects that are followed, https to https only.
        max_bytes: Refuse a longer download.
        allow_loopback: Also accept http from this very machine, for tests.
        sleep: Waits for a number of seconds.
    """

    timeout_s: float = 30.0
    limit_s: float = 3600.0
    attempts: int = 3
    pause_s: float = 1.0
    max_redirects: int = 5
    max_bytes: int = 1 << 30
    allow_loopback: bool = False
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")

    def get(self, url: str, sha256: str | None, folder: Path) -> Path:
        """Download a file into a folder.

        Args:
            url: Where from.
            sha256: What it must be; None if that is not known.
            folder: Where to; must exist.

        Returns:
            The file, named as in the address.

        Raises:
            DownloadFailed: If it could not be had from this address.
            CorruptData: If what came is something else; nothing is kept.
        """
        import pooch

        name = Path(urlsplit(url).path).name or "download"
        known = f"sha256:{sha256}" if sha256 else None
        heads: list[bytes] = []

        def download(url: str, output_file: Any, _pooch: Any) -> None:
            heads.append(self._with_retries(url, Path(output_file)))

        # Pooch names every file that it downloads, as information; the caller says what is needed.
        log = pooch.get_logger()
        level = log.level
        log.setLevel("WARNING")
        try:
            return Path(pooch.retrieve(url, known, fname=name, path=folder, downloader=download))
        except ValueError as error:
            page = heads and heads[-1].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
            what = "the server sent a web page instead of the file" if page else str(error)
            raise CorruptData(f"{url}: not the file that the registry knows, not kept: {what}") from error
        finally:
            log.setLevel(level)

    def _with_retries(self, url: str, file: Path) -> bytes:
        attempt, pause = 1, self.pause_s
        while True:
            try:
                return self._once(url, file)
            except _TryAgain as fault:
                if attempt == self.attempts:
                    raise DownloadFailed(f"{url}: {fault} (attempts: {attempt})") from fault
                self.sleep(pause)
                attempt, pause = attempt + 1, 2 * pause

    def _once(self, url: str, file: Path) -> bytes:
        """One attempt; returns the first bytes of what came."""
        import requests
        import urllib3

        deadline = time.monotonic() + self.limit_s
        try:
            with requests.Session() as session, self._open(session, url) as response:
                return self._save(response, file, url, deadline)
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise DownloadFailed(f"{url}: {error}") from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error

    def _open(self, session: requests.Session, url: str) -> requests.Response:
        asked = url
        for _ in range(self.max_redirects + 1):
            self._refuse_unless_secure(url, asked)
            response = session.get(
                url,
                stream=True,
                allow_redirects=False,
                timeout=self.timeout_s,
                headers={"Accept-Encoding": "identity"},
            )
            status = response.status_code
            if status in _REDIRECTS and "location" in response.headers:
                url = urljoin(url, response.headers["location"])
                response.close()
                continue
            if status == 200:
                return response
            response.close()
            if status == 429 or status >= 500:
                raise _TryAgain(f"the server answered {status} {response.reason}")
            raise DownloadFailed(f"{asked}: the server answered {status} {response.reason}")
        raise DownloadFailed(f"{asked}: more than {self.max_redirects} redirects, the last to {url}")

    def _refuse_unless_secure(self, url: str, asked: str) -> None:
        parts = urlsplit(url)
        local = self.allow_loopback and parts.scheme == "http" and parts.hostname in {"127.0.0.1", "::1"}
        if parts.scheme != "https" and not local:
            how = "" if url == asked else f" redirects to {url}, which"
            raise DownloadFailed(f"{asked}:{how} is not https: refused")

    def _save(self, response: requests.Response, file: Path, url: str, deadline: float) -> bytes:
        size, head = 0, b""
        with file.open("wb") as out:
            # The bytes as they come: a packed file must not be unpacked on the way.
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                size += len(chunk)
                head = head or chunk[:64]
                if size > self.max_bytes:
                    raise DownloadFailed(f"{url}: longer than the {self.max_bytes} bytes expected: refused")
                if time.monotonic() > deadline:
                    raise _TryAgain(f"not complete after {self.limit_s:.0f} s")
                out.write(chunk)
        return head
