"""Objects behind a URL: put, get, ranges, list, times; every failure as one of our errors.

The one module that talks to obstore. A process that imported it must never fork without exec: the runtime
of obstore does not survive that. A process that asked is free to end right after an answer.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from packhorse.config import Storage
from packhorse.errors import MEND, IntegrityError, NoSpaceError, PackhorseError, StorageError
from packhorse.snapshot.frames import LARGEST_DOCUMENT, Bytes
from packhorse.store import credentials
from packhorse.store.sending import Sending
from packhorse.store.soonest import PATIENCE, soonest
from packhorse.watch.memory import few_arenas

AT_A_TIME = 8
"""Requests for small objects."""
_CHUNK = 4 << 20
_HEARD = 64 << 10
_LARGE = 1 << 20
"""Objects of this size and more may take long to be sent."""
_SLOW = 32 << 10
"""Bytes a second: what is shorter is given so much more time before it counts as stuck."""
_UNFINISHED = re.compile(r"[^#]+#\d+")
"""What obstore writes in a directory, before it has its name. Its listings do not show it."""
_RETRIES: Any = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=180),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=8)},
}


_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Listed(NamedTuple):
    """One object of a listing; `modified` is the store's time in milliseconds since the epoch."""

    key: str
    size: int
    modified: int


class NotFoundError(StorageError):
    """There is no object with this key."""


class UnreachableError(StorageError):
    """No answer, or one that broke off: what may work the next time."""


def side_by_side(work: Callable[[_Item], _Made], items: Sequence[_Item]) -> list[_Made]:
    """What `work`, which asks a store, makes of each of `items`, AT_A_TIME of them at a time. Raises what it raises."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), AT_A_TIME)) as pool:
        return list(pool.map(work, items))


def _let_answers_end() -> None:
    """Waits for the client's threads that are still busy with an answer which somebody has by now.

    CPython up to 3.13 ends a thread that asks for the interpreter while this is going: for one of Rust's that is an abort.
    """
    deadline = time.monotonic() + 0.5
    while True:
        # Lets those through, too, that have not got as far as a frame, with an answer that nobody needs now.
        time.sleep(0.005)
        known = {thread.ident for thread in threading.enumerate()}
        if sys._current_frames().keys() <= known or time.monotonic() >= deadline:
            return


atexit.register(_let_answers_end)


class Store:
    """The objects below the URL of a configuration. Safe to use from several threads."""

    def __init__(self, storage: Storage, environ: Mapping[str, str]) -> None:
        """Prepare access; nothing is sent yet. Raises StorageError where no credentials can be found."""
        few_arenas()  # before the client starts its threads
        self.url = storage.url
        self._ranged: bool | None = None
        self._directory = storage.directory
        self._large = Sending()
        self._options = credentials.options(storage, environ)
        if self.is_there:
            _ = self._sending, self._objects  # what cannot be opened is told now

    def _client(self, **options: Any) -> Any:
        """A client of the store; one of a directory creates it. Raises StorageError."""
        try:
            if self._directory is not None:
                return from_url(self.url, mkdir=True)
            return from_url(self.url, config=self._options.config, **options)
        except (exceptions.BaseError, ValueError, OSError) as error:
            raise StorageError(
                f"The store {self.url} cannot be opened: {str(error).splitlines()[0]}.",
                f"Check storage.url and storage.endpoint{credentials.ALSO.get(urlsplit(self.url).scheme, '')}.",
            ) from error

    @property
    def is_there(self) -> bool:
        """False for a directory that no push has created yet."""
        return self._directory is None or _is_there(self._directory)

    @cached_property
    def _sending(self) -> Any:
        """A client for what is large, or one that creates the directory of a store."""
        return self._client(client_options=self._options.sending, retry_config=_RETRIES)

    @cached_property
    def _objects(self) -> Any:
        """A client for all else. Raises FileNotFoundError, as for an object, while there is no directory to read from:
        who reads creates none, so that a slip in its name makes no store."""
        if self._directory is not None:
            if not self.is_there:
                raise FileNotFoundError(f"There is no directory {self._directory}.")
            return self._sending
        return self._client(client_options=self._options.client, retry_config=_RETRIES)

    @cached_property
    def _once(self) -> Any:
        """A client that tries nothing twice."""
        if self._directory is not None:
            return self._objects
        return self._client(client_options=self._options.client, retry_config={"max_retries": 0})

    def put(self, key: str, content: bytes | Sequence[Bytes]) -> None:
        """Create the object `key`; several buffers are put one after the other. Raises StorageError.

        What is stuck is put once more beside, and may still arrive later: a key stands for one content.
        """
        size = len(content) if isinstance(content, bytes) else sum(map(len, content))

        async def ask(again: bool, heard: Callable[[], None]) -> None:
            client = self._sending if size >= _LARGE else self._once if again else self._objects
            await obstore.put_async(client, key, content, use_multipart=False)

        with _told(self.url, key):
            if self._directory is not None:
                obstore.put(self._sending, key, content, use_multipart=False)
            elif size >= _LARGE:
                with self._large.one(size) as stuck:
                    soonest(ask, stuck)
            else:
                soonest(ask, lambda silent: silent >= PATIENCE + size / _SLOW)

    def get(self, key: str, most: int = LARGEST_DOCUMENT) -> bytes:
        """The content of a document. Raises NotFoundError, StorageError, IntegrityError where it has more than `most` bytes."""

        async def ask(again: bool, heard: Callable[[], None]) -> bytes:
            found = await obstore.get_async(self._once if again else self._objects, key)
            heard()
            if found.meta["size"] > most:
                raise IntegrityError(
                    f"The object {key} of {self.url} is {found.meta['size'] / 1e6:,.0f} MB long, too long for a document.",
                    MEND,
                )
            content = bytearray()
            async for chunk in found.stream(min_chunk_size=_HEARD):
                heard()
                content += memoryview(chunk)
            return bytes(content)

        with _told(self.url, key):
            return soonest(ask)

    def ranges(self, key: str, wanted: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """For each (offset, length) of `wanted`, which ascend, the bytes there.

        One request from the first to the last. Where the store ignores ranges the object is streamed from its
        beginning and cut here; what is not wanted is let go as it passes.
        """
        if not self.keeps_ranges(key):
            yield from self._streamed(key, wanted)
            return
        start, end = wanted[0][0], wanted[-1][0] + wanted[-1][1]
        with _told(self.url, key):
            if end - start <= _HEARD:
                view = self._soonest_range(key, start, end)
            else:
                view = memoryview(obstore.get_range(self._objects, key, start=start, end=end))
        if len(view) != end - start:
            raise _cut_short(self.url, key)
        for offset, length in wanted:
            yield view[offset - start : offset - start + length]

    async def get_range_async(self, key: str, start: int, end: int) -> memoryview:
        """The bytes from `start` to `end` of an object in a store that keeps ranges; cancelling ends the request.

        Raises NotFoundError, UnreachableError where the answer breaks off, StorageError, IntegrityError where the
        object is shorter.
        """
        with _told(self.url, key):
            view = memoryview(await obstore.get_range_async(self._objects, key, start=start, end=end))
        if len(view) != end - start:
            raise _cut_short(self.url, key)
        return view

    def keeps_ranges(self, key: str) -> bool:
        """Whether the store sends only what is asked for, found out once, with the first byte of an object."""
        if self._ranged is None:
            with _told(self.url, key):
                try:
                    self._soonest_range(key, 0, 1)
                    self._ranged = True
                except exceptions.GenericError as error:
                    if "NotPartial" not in repr(error):
                        raise
                    self._ranged = False
        return self._ranged

    def _soonest_range(self, key: str, start: int, end: int) -> memoryview:
        """A few bytes, which come at once or not at all."""

        async def ask(again: bool, heard: Callable[[], None]) -> memoryview:
            client = self._once if again else self._objects
            return memoryview(await obstore.get_range_async(client, key, start=start, end=end))

        return soonest(ask)

    def _streamed(self, key: str, wanted: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        held = bytearray()
        position = 0  # of the first byte held
        pending = list(wanted)
        with _told(self.url, key):
            for chunk in obstore.get(self._objects, key).stream(min_chunk_size=_CHUNK):
                held += memoryview(chunk)
                while pending and position + len(held) >= sum(pending[0]):
                    offset, length = pending.pop(0)
                    yield memoryview(bytes(held[offset - position : offset - position + length]))
                    del held[: offset - position + length]
                    position = offset + length
                if not pending:
                    return
                surplus = min(pending[0][0] - position, len(held))
                if surplus > 0:
                    del held[:surplus]
                    position += surplus
        raise _cut_short(self.url, key)

    def list(self, prefix: str) -> list[Listed]:
        """Every object below `prefix` (a directory), by key. Raises StorageError."""
        if not self.is_there:
            return []

        async def ask(again: bool, heard: Callable[[], None]) -> list[Listed]:
            found = []
            async for page in obstore.list(self._once if again else self._objects, prefix, chunk_size=1000):
                heard()
                found += [
                    Listed(
                        str(item["path"]), int(item["size"]), int(item["last_modified"].timestamp() * 1000)
                    )
                    for item in page
                ]
            return sorted(found)

        with _told(self.url, prefix):
            return soonest(ask)

    def has(self, key: str) -> bool:
        """Whether there is an object `key`."""
        try:
            self.modified(key)
        except NotFoundError:
            return False
        return True

    def modified(self, key: str) -> int:
        """The store's time of an object, in milliseconds since the epoch."""

        async def ask(again: bool, heard: Callable[[], None]) -> int | Exception:
            try:
                found = await obstore.head_async(self._once if again else self._objects, key)
            except (
                exceptions.NotFoundError,
                FileNotFoundError,
            ) as error:  # an answer, whichever request has it
                return error
            return int(found["last_modified"].timestamp() * 1000)

        with _told(self.url, key):
            found = soonest(ask)
            if isinstance(found, Exception):
                raise found
            return found

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; what is not there is no error."""
        if not keys:
            return
        try:
            with _told(self.url, keys[0]):
                obstore.delete(self._objects, list(keys))
        except NotFoundError:  # a directory tells, and stops there
            for key in keys if len(keys) > 1 else ():
                self.delete([key])

    def remove_unfinished(self, age: float) -> None:
        """Remove what killed puts left in a directory `age` seconds ago or before. Other stores show none of it."""
        if self._directory is None:
            return
        for path in self._directory.rglob("*#*"):
            with suppress(OSError):
                if _UNFINISHED.fullmatch(path.name) and time.time() - path.stat().st_mtime > age:
                    path.unlink()


def _is_there(directory: Path) -> bool:
    """Whether anything is; also where that may not be known, and so is told by whoever tries to open it."""
    try:
        os.lstat(directory)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


class _told:  # noqa: N801 - reads as a verb
    """Turns what obstore raises into our errors, without the request's headers and secrets."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (exceptions.BaseError, FileNotFoundError)):
            raise _translated(self._url, self._key, error) from error
        if isinstance(error, OSError) and not isinstance(error, PackhorseError) and error.errno is None:
            raise _translated(self._url, self._key, error) from error


def _cut_short(url: str, key: str) -> IntegrityError:
    return IntegrityError(
        f"The object {key} of {url} is shorter than it should be.",
        MEND,
    )


def _translated(url: str, key: str, error: BaseException) -> PackhorseError:
    """Our error for one of obstore's, without the request's address, headers and secrets."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3} [A-Za-z ]+)", text)
    reason = code.group(1) if code else status.group(1) if status else ""
    if reason.startswith("416") or reason == "InvalidRange" or "Requested range was invalid" in text:
        return _cut_short(url, key)
    if "No space left on device" in text:
        return NoSpaceError(
            f"There is no space left in the store {url}.", "Free some space, or choose another store."
        )
    if reason in ("NoSuchBucket", "ContainerNotFound"):
        return StorageError(f"The bucket of {url} does not exist.", "Create it, or correct storage.url.")
    if isinstance(error, (exceptions.NotFoundError, FileNotFoundError)):
        return NotFoundError(f"There is no object {key} in {url}.", "Check storage.url.")
    denied = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
    if denied or (status and status.group(1)[:3] in ("401", "403")):
        return StorageError(
            f"The store {url} refuses the credentials ({reason}).",
            "Check the key, its secret and what it may do: list, read and write are needed.",
        )
    if "Permission denied" in text:
        return StorageError(
            f"The store {url} cannot be used: permission denied for {key}.",
            "Check the owner and the mode of its directory.",
        )
    if status is None:
        said, _, source = text.partition("\n\nDebug source:")
        heart = re.findall(r"(?:HTTP error: |source: )?([^\n:]{3,200})", said)
        return UnreachableError(
            f"The store {url} cannot be reached: {_innermost(source) or (heart or [type(error).__name__])[-1].strip()}.",
            "Check storage.url, storage.endpoint and the network.",
        )
    return StorageError(
        f"The store {url} answered {reason} for {key}.", "Try again; if it stays, ask the store's provider."
    )


def _innermost(source: str) -> str:
    """The reason of a connection's failure in what obstore tells for debugging, which has the request's address further
    out; nothing where it has none."""
    if certificate := re.search(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)", source):
        return f"its certificate is not accepted ({certificate.group(1)})"
    if "InvalidContentType" in source:
        return "it does not speak TLS (an http:// endpoint?)"
    reasons = re.findall(r'(?:message|error): "([^"\n]{3,200})"', source)
    if reasons:
        return str(reasons[-1])
    return "no answer in time" if "TimedOut" in source else ""
