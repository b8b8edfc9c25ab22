"""Downloads: files that the resolver chose → the disk, resumed where they broke, checked by their hash.

Promises that a file is handed out only whole and with the hash that the index gave, and that what went wrong
is told: which file, which attempt, how many bytes, how long until the next. Knows nothing of wheels' insides.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from packhorse.config import Network
from packhorse.errors import IntegrityError, NoSpaceError, PackhorseError
from packhorse.install import network
from packhorse.install.access import Access, without_user
from packhorse.install.hashes import allowed_by
from packhorse.install.log import without_credentials
from packhorse.install.network import Failure, NetworkError

if TYPE_CHECKING:
    import urllib3

_CHUNK = 1 << 18
_FURTHER = 1 << 20
"""Bytes that an attempt has to bring so that the count of attempts begins anew."""
_CONNECT = 30.0
"""Seconds to wait for a connection, at most: silence says nothing about a file's size there."""
_WEAK = ("md5", "sha1")
"""Checked where nothing better is told."""
_CHECKED = sorted(
    name for name in hashlib.algorithms_guaranteed if not name.startswith("shake") and name not in _WEAK
)
_REDIRECTIONS = 10
_REMEDY = "Check the network, and try again."


class RefusedError(Exception):
    """The server wants credentials or certificates that only pip may have, or its proxy what only pip may know."""


class Downloads:
    """Fetches files for one installation; callable from several threads."""

    def __init__(
        self,
        access: Access,
        settings: Network,
        note: Callable[[str], None],
        *,
        sleep: Callable[[float], None] = time.sleep,
        arrived: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`arrived` is told of bytes as they come, and of fewer than none where a download begins anew."""
        self._access, self._settings, self._note, self._sleep = access, settings, note, sleep
        self._arrived = arrived
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._asking = threading.Lock()

    def fetch(
        self,
        url: str,
        path: Path,
        hashes: Mapping[str, str],
        size: int = 0,
        allowed: Mapping[str, Sequence[str]] = {},
    ) -> str:
        """Bring the file at `url` to `path`; returns its SHA-256. `size` is 0 where it is not known. It must have
        all of `hashes`, and one of `allowed` where there are any.

        Raises NetworkError when the attempts are used up, IntegrityError for another hash, RefusedError,
        NoSpaceError, and PackhorseError where the server does not have it.
        """
        attempts = network.Attempts(self._settings, self._note, self._sleep, size)
        one = _Download(self, url, path, hashes, size, allowed)
        try:
            return attempts.run(one.attempt)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def open(
        self, url: str, timeout: float, headers: Mapping[str, str]
    ) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer to a GET, whatever its status, its body unread, and the URL that gave it.

        Redirections are followed, each with the credentials, certificates and proxy of its host; without credentials
        once one led from https to http. `timeout` is in seconds without a byte. Raises urllib3's HTTPError, and
        PackhorseError for redirections without end.
        """
        private = True
        for _ in range(_REDIRECTIONS + 1):
            response = self._request(url, timeout, headers, private)
            if response.status == 401 and private and self._authorized(url):
                response.close()
                response = self._request(url, timeout, headers, private)
            target = response.get_redirect_location()
            if not target:
                return response, url
            response.close()
            before, url = url, _redirected(url, target)
            private = private and not (before.startswith("https:") and url.startswith("http:"))
        raise PackhorseError(
            f"{without_credentials(url)} was reached by more than {_REDIRECTIONS} redirections.",
            "Correct the URL, or ask who keeps the server.",
        )

    def _authorized(self, url: str) -> bool:
        """Whether a keyring knows the host."""
        with self._asking:  # one thread asks, the others find what it was told
            return self._access.ask_keyring(url) or bool(self._access.keyring.get(urlsplit(url).netloc))

    def _request(
        self, url: str, timeout: float, headers: Mapping[str, str], private: bool
    ) -> urllib3.BaseHTTPResponse:
        import urllib3

        host = urlsplit(url).netloc
        pool = self._pools.get(host) or self._pools.setdefault(host, self._access.pool(url))
        authorization = self._access.authorization(url) if private else {}
        return pool.request(
            "GET",
            url,
            headers={"Accept-Encoding": "identity", **authorization, **headers},
            timeout=urllib3.Timeout(connect=min(timeout, _CONNECT), read=timeout),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )


class _Download:
    """One file on its way, over all attempts at it."""

    def __init__(
        self,
        downloads: Downloads,
        url: str,
        path: Path,
        hashes: Mapping[str, str],
        size: int,
        allowed: Mapping[str, Sequence[str]],
    ) -> None:
        self._downloads, self._url, self._path = downloads, url, path
        self._allowed = allowed
        self._expected = {name: hashes[name].lower() for name in checkable(hashes)}
        self._size = size
        self._file = path.name
        self._etag = ""
        self._had = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self._digests = {name: hashlib.new(name) for name in {"sha256", *self._expected, *self._allowed}}
        self._have = 0
        self._pieces = 0

    def attempt(self, timeout: float) -> str:
        """Go on where the attempt before ended; returns the SHA-256."""
        import urllib3

        self._had = self._have
        try:
            self._receive(timeout)
        except urllib3.exceptions.HTTPError as error:
            raise self._failed(why(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(self._path.parent, self._file) from error
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise self._failed(str(error)) from error
            raise
        return self._checked()

    def _receive(self, timeout: float) -> None:
        headers = {}
        if self._have:
            headers = {"Range": f"bytes={self._have}-"}
            if self._etag:
                headers["If-Range"] = self._etag
        response, _ = self._downloads.open(self._url, timeout, headers)
        try:
            resumed = self._begin(response)
            with open(self._path, "r+b" if resumed else "wb") as file:
                file.seek(self._have)
                # Not stream(): it loses what a silent server sent of the last chunk.
                while chunk := response.read1(_CHUNK, decode_content=False):
                    file.write(chunk)
                    self._have += len(chunk)
                    self._downloads._arrived(len(chunk))
                    for digest in self._digests.values():
                        digest.update(chunk)
        finally:
            # What is left unread would be read by who uses the connection next.
            response.close()
        if self._size and self._have < self._size:
            raise self._failed("the connection broke")

    def _begin(self, response: urllib3.BaseHTTPResponse) -> bool:
        """Look at the answer; returns whether it goes on from what is there."""
        status = response.status
        if status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {self._have}-"):
            self._pieces += 1
            return True
        if status in (200, 206, 416):
            self._downloads._arrived(-self._have)
            self._start_anew()
        if status == 200:
            self._pieces = 1
            etag = response.headers.get("ETag", "")
            self._etag = "" if etag.startswith("W/") else etag  # RFC 9110, section 13.1.5
            self._size = self._size or response.length_remaining or 0
            return False
        if status in (401, 407):
            raise RefusedError(f"the server answered {status}")
        if may_pass(status) or status in (206, 416):
            raise self._failed(f"the server answered {status}", retry_after(response))
        raise PackhorseError(
            f"{self._file} cannot be downloaded: HTTP error {status} for {without_credentials(self._url)}.",
            "Correct the requirements or the index, or ask who keeps it.",
        )

    def _checked(self) -> str:
        found = {name: digest.hexdigest() for name, digest in self._digests.items()}
        wrong = next((name for name, expected in self._expected.items() if found[name] != expected), "")
        refused = not allowed_by(self._allowed, found)
        if (wrong or refused) and self._pieces > 1:  # pieces of two different files: whole it may be right
            self._downloads._arrived(-self._have)
            self._start_anew()
            raise self._failed("its pieces do not fit together")
        if wrong:
            raise wrong_hash(self._file, wrong, self._expected[wrong], found[wrong], self._url)
        if refused:
            raise not_allowed(self._file, self._allowed, found["sha256"], self._url)
        return found["sha256"]

    def _failed(self, reason: str, retry_after: float = 0) -> NetworkError:
        further = self._have - self._had >= _FURTHER
        failure = Failure("network", reason, self._file, self._size, self._have, retry_after, further)
        return NetworkError(
            failure,
            f"{self._file} could not be downloaded: {reason}, from {without_credentials(self._url)}; "
            f"{self._have:,} bytes had arrived.",
            _REMEDY,
        )


def why(error: urllib3.exceptions.HTTPError) -> str:
    """What an error of the client means, as the reason of a failure that may pass. Raises RefusedError for a
    certificate and a proxy."""
    import urllib3.exceptions as known

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RefusedError(f"its certificate is not trusted: {cause.verify_message}") from error
        if isinstance(cause, known.ProxySchemeUnknown):
            raise RefusedError("its proxy is of a kind that is not known here") from error
        if isinstance(cause, known.NameResolutionError):
            return "the name of its server is not found"
        if isinstance(cause, (known.NewConnectionError, known.ProxyError)):
            return "no connection to its server"
        if isinstance(cause, (known.TimeoutError, TimeoutError)):
            return "no answer in time"
        # urllib3 keeps what it wraps as the first argument, SSLError by that alone.
        wrapped = (each for each in (cause.__cause__, *cause.args[:1]) if isinstance(each, BaseException))
        cause = next(wrapped, None)
    return "the connection broke"


def _redirected(url: str, target: str) -> str:
    """The address that an answer names. Raises PackhorseError where it is none."""
    try:
        found = without_user(urljoin(url, target))
    except ValueError:
        found = ""
    if found.startswith(("http://", "https://")):
        return found
    raise PackhorseError(
        f"{without_credentials(url)} leads to {without_credentials(target)}, which is no address to download from.",
        "Correct the URL, or ask who keeps the server.",
    )


def may_pass(status: int) -> bool:
    """Whether a server that answered so may answer otherwise a little later."""
    return status in (408, 425, 429) or status >= 500


def retry_after(response: urllib3.BaseHTTPResponse) -> float:
    """Retry-After (RFC 9110, section 10.2.3) as seconds from now, 0 where it is not told."""
    told = response.headers.get("Retry-After", "")
    if told.strip().isdigit():
        return float(told)
    with contextlib.suppress(TypeError, ValueError):
        return max(email.utils.parsedate_to_datetime(told).timestamp() - time.time(), 0)
    return 0


def checkable(hashes: Mapping[str, str]) -> list[str]:
    """The algorithms to check by: the strong ones, and only where there are none the weak."""
    return [name for name in _CHECKED if hashes.get(name)] or [name for name in _WEAK if hashes.get(name)]


def sha256(path: Path) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def wrong_hash(file: str, algorithm: str, expected: str, found: str, url: str) -> IntegrityError:
    """For a file that is not the one that was announced."""
    return IntegrityError(
        f"{file} is not the file that was announced: its {algorithm} is {found}, expected {expected}, "
        f"from {without_credentials(url)}.",
        "Somebody or something changed it. Find out what before you install it.",
    )


def checked(
    file: str, path: Path, hashes: Mapping[str, str], allowed: Mapping[str, Sequence[str]], url: str
) -> str:
    """The SHA-256 of a file of this machine. Raises IntegrityError where it is another than was announced, and
    PackhorseError where it cannot be read."""
    names = {"sha256", *allowed, *checkable(hashes)}
    digests = {name: hashlib.new(name) for name in names}
    try:
        with open(path, "rb") as content:
            while chunk := content.read(1 << 20):
                for digest in digests.values():
                    digest.update(chunk)
    except OSError as error:
        raise PackhorseError(
            f"{file} cannot be read from {path.parent}: {error.strerror}.",
            "Put it there, or correct the requirements; a lock file is made anew by `packhorse lock`.",
        ) from error
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    for name in names & hashes.keys():
        if found[name] != hashes[name].lower():
            raise wrong_hash(file, name, hashes[name], found[name], url)
    if not allowed_by(allowed, found):
        raise not_allowed(file, allowed, found["sha256"], url)
    return found["sha256"]


def not_allowed(file: str, allowed: Mapping[str, Sequence[str]], found: str, url: str) -> IntegrityError:
    """For a file with none of the hashes that the requirements give."""
    listed = " or ".join(f"{name}:{each}" for name, digests in allowed.items() for each in digests)
    return IntegrityError(
        f"{file} is not a file that the requirements allow: its sha256 is {found}, allowed is {listed}, "
        f"from {without_credentials(url)}.",
        "Somebody changed it, or the requirements were made for other files. Find out before you change the hash.",
    )


def no_space(place: Path, file: str) -> NoSpaceError:
    """For a disk that became full."""
    return NoSpaceError(
        f"The disk of {place} was full while {file} was installed.",
        "Free some space, or choose a root on a larger disk with --root.",
    )
