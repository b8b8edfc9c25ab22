"""`python without.py WHAT CMD...`: runs a command that lacks "leases", as on most network file systems, or "adoption" of orphans.

The kernel answers its fcntl(F_SETLEASE), or its prctl(PR_SET_CHILD_SUBREAPER), with EINVAL (seccomp(2)); everything else is
as it was.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EINVAL
NUMBER, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 16, 24
"""Where they lie in struct seccomp_data."""
PR_SET_CHILD_SUBREAPER = 36
LACKS = {
    "leases": ({"x86_64": 72, "aarch64": 25}, SECOND_ARGUMENT, fcntl.F_SETLEASE),
    "adoption": ({"x86_64": 157, "aarch64": 167}, FIRST_ARGUMENT, PR_SET_CHILD_SUBREAPER),
}
"""The number of the system call, where its argument lies, and which value is refused."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main(what: str, *command: str) -> None:
    """Filter, then become the command."""
    numbers, argument, refused = LACKS[what]
    steps = [
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 3, numbers[platform.machine()]),
        (LOAD, 0, 0, argument),
        (JUMP_IF_EQUAL, 0, 1, refused),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    packed = b"".join(struct.pack("=HBBI", *step) for step in steps)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    filtering = ctypes.byref(_Program(len(steps), packed))
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filtering):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
