"""The link between the supervisor and the process that restores while the child runs.

The restorer hands over copies of the descriptors that hold files back, says when the child may start, and which files
are there. A side that dies is seen by the other as the end of the link.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

_MOST = 200
"""Descriptors in one message; the kernel takes 253 (unix(7), SCM_MAX_FD)."""
_LONGEST = 64 << 10
_F_SETSIG = 10  # linux/fcntl.h


class Hold(msgspec.Struct, frozen=True, array_like=True, tag="hold"):
    """From the restorer, with as many descriptors: hold these files back.

    `numbers` name them in later messages; `programs` are those of them that somebody may execute.
    """

    numbers: tuple[int, ...]
    programs: tuple[int, ...] = ()


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """From the restorer: the child may start."""


class Arrived(msgspec.Struct, frozen=True, array_like=True, tag="arrived"):
    """From the restorer, which has closed its own descriptors: these files are there, let go of them."""

    numbers: tuple[int, ...]


class Child(msgspec.Struct, frozen=True, array_like=True, tag="child"):
    """From the supervisor: the child has started as this process, the leader of its own process group."""

    pid: int


Message: TypeAlias = Hold | Start | Arrived | Child


class Link:
    """One end. Messages arrive whole and in order."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Link, Link]:
        """Two ends joined; both are closed on exec."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def inherited(cls, descriptor: int) -> Link:
        """The end that this process was started with."""
        end = socket.socket(fileno=descriptor)
        end.set_inheritable(False)
        return cls(end)

    def fileno(self) -> int:
        """The descriptor of this end."""
        return self._socket.fileno()

    def announce(self, number: int) -> None:
        """Have this process sent the signal `number` for each message and at the end."""
        descriptor = self.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, _F_SETSIG, number)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)

    def close(self) -> None:
        """The other side sees the end of the link."""
        self._socket.close()

    def send(self, message: Message) -> None:
        """Send a message; waits while the other side is behind. Raises OSError where it is gone."""
        self._socket.send(msgspec.msgpack.encode(message))

    def hold(self, held: Sequence[tuple[int, int, bool]]) -> None:
        """Hand over files as (number, descriptor, whether it may be executed). Raises OSError."""
        for start in range(0, len(held), _MOST):
            part = held[start : start + _MOST]
            message = Hold(
                tuple(number for number, _, _ in part),
                tuple(number for number, _, program in part if program),
            )
            descriptors = array.array("i", [descriptor for _, descriptor, _ in part])
            self._socket.sendmsg(
                [msgspec.msgpack.encode(message)],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
            )

    def receive(self, *, wait: bool = True) -> tuple[Message, list[int]] | None:
        """The next message and the descriptors that came with it, in the order of its numbers; None at the end.

        They are closed on exec; where there was no room for them there are fewer than numbers. Raises BlockingIOError where there is none yet and it should not wait.
        """
        descriptors = array.array("i")
        # Not socket.recv_fds, which forgets the flags.
        flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        room = socket.CMSG_SPACE(_MOST * descriptors.itemsize)
        try:
            content, ancillary, _, _ = self._socket.recvmsg(_LONGEST, room, flags)
        except ConnectionResetError:
            # The other side ended before it had read everything. The kernel says so once, ahead of what that side sent.
            content, ancillary, _, _ = self._socket.recvmsg(_LONGEST, room, flags)
        for level, kind, passed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(passed[: len(passed) - len(passed) % descriptors.itemsize])
        if not content:
            return None
        return msgspec.msgpack.decode(content, type=Message), descriptors.tolist()
