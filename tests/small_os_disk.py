"""Runs a command on a machine with a small OS disk, as far as the command can tell.

Run as a script inside a fresh mount namespace. Lays one overlay over each file system of this machine; all of
them write to the same tmpfs of the size asked for, which so becomes the OS disk. One directory, the big disk,
is reached as it is. Changes nothing outside the namespace.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

# mount(2)
MS_BIND = 1 << 12
MS_REC = 1 << 14
KERNEL = ("/proc", "/sys", "/dev")  # no disks: taken over as they are


class Outcome(NamedTuple):
    """What a command did: its exit code and words, and the OS disk's free bytes before, at the least and after."""

    exit_code: int
    stdout: str
    stderr: str
    free_before: int
    free_least: int
    free_after: int


@functools.cache
def refusal() -> str:
    """Why this machine cannot run commands in namespaces, in one sentence; "" if it can."""
    if os.geteuid() != 0:
        return "Namespaces need root, and these tests run as another user."
    if shutil.which("unshare") is None:
        return "The command unshare (util-linux) is not installed."
    probe = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"Namespaces are refused: {probe.stderr.strip()}" if probe.returncode else ""


def run(command: list[str], *, size: int, big_disk: Path, scratch: Path, environ: dict[str, str]) -> Outcome:
    """Run `command` in `big_disk`, where the OS disk is another file system with `size` bytes free.

    `scratch` is an empty directory for the mount points, `environ` the command's whole environment.
    """
    script = [sys.executable, str(Path(__file__).resolve()), str(size), str(big_disk), str(scratch)]
    done = subprocess.run(
        ["unshare", "--mount", *script, *command], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"The small OS disk could not be set up: {done.stderr}")
    return Outcome(**json.loads(done.stdout))


def _main(size: int, big_disk: str, scratch: str, command: list[str]) -> None:
    enter(size, big_disk, scratch)
    json.dump(_sampled(command)._asdict(), sys.stdout)


def enter(size: int, big_disk: str, scratch: str) -> None:
    """Make the small OS disk and go there for good."""
    layers, new_root = os.path.join(scratch, "layers"), os.path.join(scratch, "root")
    os.mkdir(layers)
    os.mkdir(new_root)
    # What overlays write when they begin is not the command's: a few pages each.
    _mount("tmpfs", layers, "tmpfs", f"size={size + 256 * 1024},mode=0755")
    for number, point in enumerate(_mount_points(apart_from=scratch)):
        target = new_root + point.rstrip("/")
        if point in KERNEL:
            _mount(point, target, flags=MS_BIND | MS_REC)
        elif os.path.isdir(point):
            upper, work = f"{layers}/{number}", f"{layers}/{number}.work"
            os.mkdir(upper)
            os.mkdir(work)
            shutil.copymode(point, upper)
            try:
                _mount("overlay", target, "overlay", f"lowerdir={point},upperdir={upper},workdir={work}")
            except OSError:  # vfat and the like cannot lie under an overlay
                if point == "/":
                    raise
                _mount(point, target, flags=MS_BIND)
        elif os.path.isfile(point):  # a container's /etc/resolv.conf and the like
            _mount(point, target, flags=MS_BIND)
    _mount(big_disk, new_root + big_disk, flags=MS_BIND)
    os.chroot(new_root)
    os.chdir(big_disk)


def _mount_points(apart_from: str) -> list[str]:
    """The places where file systems are mounted, outer before inner, without those that come with KERNEL."""
    inner = tuple(f"{point}/" for point in (*KERNEL, apart_from))
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        fields = [line.split()[4] for line in file]
    # proc_pid_mountinfo(5): a space is written \040
    points = {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in fields}
    return sorted(point for point in points if not point.startswith(inner))


def _sampled(command: list[str]) -> Outcome:
    """Run the command to its end, looking at the free bytes of the OS disk all the time."""
    before = least = _free()
    ended = threading.Event()

    def watch() -> None:
        nonlocal least
        while not ended.wait(0.005):
            least = min(least, _free())

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    ended.set()
    watcher.join()
    return Outcome(done.returncode, done.stdout, done.stderr, before, least, _free())


def _free() -> int:
    usage = os.statvfs("/")
    return usage.f_bavail * usage.f_frsize


def _mount(source: str, target: str, kind: str = "", options: str = "", flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options)):
        code = ctypes.get_errno()
        raise OSError(code, f"mount of {source}: {os.strerror(code)}", target)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
