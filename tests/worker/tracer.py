"""A debugger's part in few lines: `python tracer.py MANNER CMD...` runs a command under it, `python tracer.py MANNER
--attach PID` traces a process that runs already, and says so.

MANNER: "seize" keeps a stopped process stopped, as strace does; "attach" hands stop signals on and then has the process
run again, as older debuggers do; "ignore" keeps SIGSTOP from it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# linux/ptrace.h
CONT, ATTACH, SEIZE, LISTEN = 7, 16, 0x4206, 0x4208
EVENT_STOP = 128
WALL = 0x40000000  # linux/wait.h
REFUSED = 77

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, number: int = 0) -> None:
    if _libc.ptrace(request, pid, None, number) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def main(manner: str, *command: str) -> int:
    if command[0] == "--attach":
        pid = int(command[1])
    else:
        ready, told = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(told)
            os.read(ready, 1)
            os.execvp(command[0], command)
    try:
        _ptrace(SEIZE if manner == "seize" else ATTACH, pid)
    except PermissionError:
        return REFUSED
    if command[0] == "--attach":
        os.write(1, b"traced\n")
    else:
        os.close(told)
    while True:
        _, status = os.waitpid(pid, WALL)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        number = os.WSTOPSIG(status)
        if status >> 16 == EVENT_STOP:
            _ptrace(LISTEN if number != signal.SIGTRAP else CONT, pid)
        else:
            held_back = number == signal.SIGTRAP or (manner == "ignore" and number == signal.SIGSTOP)
            _ptrace(CONT, pid, 0 if held_back else number)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
