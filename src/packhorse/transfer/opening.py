"""What a pull and whoever starts a command beside it say to each other: what was brought, what is held back, and when to start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from packhorse.transfer.line import Wanted


class PullResult(msgspec.Struct):
    """What a pull did. `files` and `bytes` count what the snapshot holds, sizes are bytes."""

    snapshot: str
    tag: str
    files: int = 0
    bytes: int = 0
    transferred_bytes: int = 0
    cold_bytes: int = 0
    """What the root lacks of the files, since only other GPUs need it."""
    cold_stored_bytes: int = 0
    """What of it would have been fetched; 0 where `packages` had not to be brought."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    pulled: list[str] = []
    """`packages` and `shared`, as far as they had to be brought."""
    kept: list[str] = []
    """Paths that changed here and were left alone."""


class Gate(Protocol):
    """What holds files back from those who open them, until they have arrived."""

    wanted: Wanted

    def hold(self, files: Sequence[Held]) -> Collection[bytes]:
        """Hold these back from now on, beside those of other calls. Returns the paths of those that cannot be."""

    def arrived(self, path: bytes, descriptor: int) -> None:
        """Let go of a file, and close its descriptor."""

    @property
    def most(self) -> int:
        """How many files can be held back at a time."""


class Held(NamedTuple):
    """A file that is there, but for its bytes."""

    path: bytes
    """Relative to the root."""
    descriptor: int
    program: bool
    """Whether somebody may execute it."""
    want: Callable[[], None]
    """Has the file brought before everything that nobody waits for."""


@dataclass(frozen=True)
class Opening:
    """How a command starts before everything is there."""

    start: Callable[[PullResult], None]
    """Called once, when the command may start."""
    ranks: Callable[[Mapping[bytes, int]], Mapping[bytes, int]]
    """The order of files that are held back, by their paths relative to the root and their sizes in bytes."""
    gate: Gate | None = None
    """Without one all but the code for other GPUs is there at the start."""
    arrived: Callable[[], None] = lambda: None
    """Called when all but the code for other GPUs is there and recorded, and again when that is. Must not take long."""
