"""The one policy for a network that fails: which failures are worth another attempt, how many, and when.

Knows the words of pip's messages, nothing of how pip is run or how files are fetched.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from packhorse.config import Network
from packhorse.errors import PackhorseError

if TYPE_CHECKING:
    from tenacity import RetryCallState

LONGEST_WAIT = 60.0
"""Seconds; also the most that a server may ask for by Retry-After."""
_JITTER = 0.25
T = TypeVar("T")

_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
_HASH = re.compile(r"DO NOT MATCH THE HASHES")
_PERMANENT = re.compile(
    r"HTTP error 4(?!08|25|29)\d\d|ssl-verification-failed|certificate verify failed",
    re.IGNORECASE,
)
_STATUS = re.compile(r"(?:HTTP error|too many) (408|425|429|5\d\d)\b|\b(408|425|429|5\d\d) \w+ Error: ")
_SILENCE = re.compile(r"connection-timeout|timed out|didn't respond within|TimeoutError")
_BROKEN = re.compile(
    r"incomplete-download|connection-failed|proxy-connection-failed|proxy connection error|connection error"
    r"|Max retries exceeded|Connection (?:aborted|reset|refused|broken)|ConnectionResetError|IncompleteRead"
    r"|RemoteDisconnected|NewConnectionError|NameResolutionError|Temporary failure in name resolution"
    r"|ProtocolError|UNEXPECTED_EOF|EOF occurred in violation of protocol"
)
_RESOLUTION = re.compile(r"No matching distribution found|Could not find a version|ResolutionImpossible")
_SKIPPED = re.compile(r"Could not fetch URL (\S+): (.*) - skipping")
_URL = re.compile(
    r"(?:while getting|while fetching|Unable to fetch|URL:|exceeded with url:|Could not fetch URL) ([^\s:]+://)?"
    r"([^\s?#]+)"
)
_DOWNLOAD = re.compile(
    r"^\s*(?:Downloading|Resuming download|Using cached) (\S+) \((?:[^/]*/)?([\d.]+) (\w+)\)"
)
_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$|([\d.]+)/([\d.]+) [kKMG]?B .*\beta\b")
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}  # pip._internal.utils.misc.format_size


class Download(NamedTuple):
    """A file that pip began to fetch, and its size in bytes as pip rounds it."""

    file: str
    size: int


class Failure(NamedTuple):
    """What went wrong: `network` is worth another attempt. `size` is 0 where pip did not tell it."""

    kind: Literal["network", "space", "hash", "other"]
    reason: str = ""
    file: str = ""
    size: int = 0
    arrived: int = 0
    """Bytes that are there, where a download goes on from them."""
    retry_after: float = 0
    """Seconds that the server asked for (RFC 9110, section 10.2.3)."""
    further: bool = False
    """Whether the attempt got so much further that the count begins anew."""


class NetworkError(PackhorseError):
    """An attempt failed for a reason that may pass."""

    def __init__(self, failure: Failure, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.failure = failure


def download(line: str) -> Download | None:
    """The download that a line of pip's output announces."""
    match = _DOWNLOAD.match(line)
    if match is None or match[3] not in _UNITS:
        return None
    return Download(_base(match[1]), int(float(match[2]) * _UNITS[match[3]]))


def progress(line: str) -> tuple[float, float] | None:
    """How much of how much has arrived, by a line of pip's bar: in bytes where it is the raw one."""
    match = _PROGRESS.search(line)
    if match is None:
        return None
    return float(match[1] or match[3]), float(match[2] or match[4])


def judge(output: Iterable[str], details: Iterable[str], unfinished: Download | None = None) -> Failure:
    """Why pip failed, by the lines of its output and of its detailed log (pip's --log).

    An index that does not answer is in the details only: pip goes on without it and then finds nothing. Before
    25.2 pip takes a download that broke off (`unfinished`) for a whole file, and complains about its hash.
    """
    failure = _judge(output, details)
    if failure.kind in ("hash", "other") and unfinished is not None:
        return Failure("network", "the connection broke", unfinished.file, unfinished.size)
    return failure


def _judge(output: Iterable[str], details: Iterable[str]) -> Failure:
    lines = list(output)
    text = "\n".join(lines)
    sizes = dict(filter(None, map(download, lines)))
    if _NO_SPACE.search(text):
        return Failure("space")
    if _HASH.search(text):
        return Failure("hash")
    if _PERMANENT.search(text):
        return Failure("other")
    reason = _transient(text)
    if _RESOLUTION.search(text):
        pages = skipped_pages(details)
        if not pages:
            return Failure("other")
        text, reason = next(iter(pages.items()))
    if not reason:
        return Failure("other")
    named = [_base(path) for _, path in _URL.findall(text)]
    file = named[-1] if named else next(reversed(sizes), "")
    return Failure("network", reason, file, sizes.get(file, 0))


def skipped_pages(details: Iterable[str]) -> dict[str, str]:
    """The pages that pip went on without for a reason that may pass: the line about each, and the reason."""
    found = (match for match in map(_SKIPPED.search, details) if match is not None)
    reasons = {match[0]: "" if _PERMANENT.search(match[2]) else _transient(match[2]) for match in found}
    return {line: reason for line, reason in reasons.items() if reason}


def _transient(text: str) -> str:
    if status := _STATUS.search(text):
        return f"the server answered {status[1] or status[2]}"
    if _SILENCE.search(text):
        return "no answer in time"
    return "the connection broke" if _BROKEN.search(text) else ""


def _base(url: str) -> str:
    """The file's name, or for a page of an index the last part of its path with a slash."""
    path = url.rstrip("'\"):")
    return path.rsplit("/", 1)[-1] or path.rstrip("/").rsplit("/", 1)[-1] + "/"


class Attempts:
    """The attempts at one command: counted for each file, so that one that gets further gets its full count.

    Once a file is known to be at or over `large-size`, the next attempts run with `timeout-large`, and that
    file has `large-attempts`.
    """

    def __init__(
        self,
        settings: Network,
        note: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
        size: int = 0,
    ) -> None:
        """`size` in bytes, where the attempts are at one file of a known size."""
        self._settings, self._note, self._sleep = settings, note, sleep
        self._failed: Counter[str] = Counter()
        self._timeout = settings.timeout_large if size >= settings.large_size else settings.timeout_small

    def run(self, attempt: Callable[[float], T]) -> T:
        """Call `attempt` with the timeout (seconds without a byte) until it raises no NetworkError, or the
        attempts are used up. Waits 1, 2, 4, ... seconds and some jitter in between."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(NetworkError),
            stop=lambda state: self._failed[_failure(state).file] >= self._limit(_failure(state)),
            wait=lambda state: self._wait(_failure(state)),
            before_sleep=self._tell,
            sleep=self._sleep,
            reraise=True,
        )
        result: T = retrying(self._attempt, attempt)
        return result

    def _attempt(self, attempt: Callable[[float], T]) -> T:
        try:
            return attempt(self._timeout)
        except NetworkError as error:
            if error.failure.further:
                self._failed[error.failure.file] = 0
            self._failed[error.failure.file] += 1
            if self._large(error.failure):
                self._timeout = self._settings.timeout_large
            raise

    def _large(self, failure: Failure) -> bool:
        return failure.size >= self._settings.large_size

    def _limit(self, failure: Failure) -> int:
        return self._settings.large_attempts if self._large(failure) else self._settings.attempts

    def _wait(self, failure: Failure) -> float:
        doubled = min(2.0 ** (self._failed[failure.file] - 1), LONGEST_WAIT)
        asked = min(failure.retry_after, LONGEST_WAIT)
        return max(doubled, asked) * random.uniform(1, 1 + _JITTER)  # noqa: S311 - keeps workers apart, no secret

    def _tell(self, state: RetryCallState) -> None:
        failure = _failure(state)
        assert state.next_action is not None
        arrived = f" at {failure.arrived:,} of {failure.size:,} bytes" if failure.arrived else ""
        self._note(
            f"{failure.file or 'pip'}: {failure.reason}{arrived}; attempt {self._failed[failure.file] + 1} of "
            f"{self._limit(failure)} in {state.next_action.sleep:.1f} s"
        )


def _failure(state: RetryCallState) -> Failure:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, NetworkError)
    return error.failure
