"""Runs a command, or several joined by pipes, and says what it cost: seconds, processor, memory, bytes, requests.

What the commands do is not known here. The server's share comes from its process and its own counters.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.servers import S3Server

Pipeline = Sequence[Sequence[str]]
"""Commands, each with its words; what one prints the next one reads."""

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_EVERY = 0.03
_COUNTED = re.compile(
    r"^SeaweedFS_s3_(bucket_traffic_(?:sent|received)_bytes_total|request_total)\{[^}]*\} (\S+)$",
    re.MULTILINE,
)


class BrokenError(Exception):
    """A contender that is there did not do its work; the text says what it said."""


@dataclass(frozen=True)
class Cost:
    """What one run cost. None where it cannot be known."""

    seconds: float
    cpu: float | None
    """CPU-seconds of the commands and their children."""
    server_cpu: float | None
    """CPU-seconds of the server meanwhile."""
    peak_memory: int | None
    """Bytes: the largest resident set that one process reached."""
    together: int | None
    """Bytes: the largest sum of the resident sets of all processes of the run at one moment."""
    moved: int | None
    """Bytes of objects that the server sent and received."""
    requests: int | None
    """S3 requests that the server answered."""
    output: str = field(default="", repr=False)
    """What the last command printed."""


@dataclass(frozen=True)
class ServerCount:
    """What a server has done since it started."""

    cpu: float
    moved: int
    requests: int

    @classmethod
    def of(cls, server: S3Server) -> ServerCount:
        """Read the server's counters and its process's times (proc(5))."""
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        parts = urlsplit(server.metrics)
        connection = http.client.HTTPConnection(parts.netloc, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", parts.path)
            text = connection.getresponse().read().decode()
        moved = requests = 0.0
        for name, value in _COUNTED.findall(text):
            if name == "request_total":
                requests += float(value)
            else:
                moved += float(value)
        return cls((int(fields[11]) + int(fields[12])) / _TICK, int(moved), int(requests))


def run(
    pipeline: Pipeline,
    *,
    environ: Mapping[str, str],
    directory: Path,
    server: S3Server | None = None,
    limit: float = 3600,
    at_once: bool = False,
) -> Cost:
    """Run the commands in `directory` to their end and count. `limit` is in seconds.

    They are joined by pipes, or each for itself where they run `at_once`.

    Raises BrokenError where one of them fails, is not there, or where the limit is over.
    """
    os.sync()
    before = ServerCount.of(server) if server else None
    with contextlib.ExitStack() as stack:
        says = stack.enter_context(tempfile.TemporaryFile())
        output = stack.enter_context(tempfile.TemporaryFile())
        started = time.perf_counter()
        processes = _start(pipeline, environ, directory, output.fileno(), says.fileno(), at_once)
        stack.callback(_kill, processes)  # also when this program is interrupted
        expiry = threading.Timer(limit, _kill, (processes,))
        expiry.daemon = True
        expiry.start()
        watch = MemoryWatch([process.pid for process in processes])
        cpu = 0.0
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu += usage.ru_utime + usage.ru_stime
        seconds = time.perf_counter() - started
        expiry.cancel()
        peak, together = watch.stop()
        after = ServerCount.of(server) if server else None
        for stream in (says, output):
            stream.seek(0)
        if any(process.returncode for process in processes):
            codes = ", ".join(str(process.returncode) for process in processes)
            tail = b"".join((says.read() + output.read()).splitlines(keepends=True)[-15:])
            raise BrokenError(
                f"`{shown(pipeline)}` ended with {codes} after {seconds:.1f} s:\n{tail.decode(errors='replace')}"
            )
        printed = output.read().decode(errors="replace")
    if before is None or after is None:
        return Cost(seconds, cpu, None, peak, together, None, None, printed)
    return Cost(
        seconds,
        cpu,
        after.cpu - before.cpu,
        peak,
        together,
        after.moved - before.moved,
        after.requests - before.requests,
        printed,
    )


def _start(
    pipeline: Pipeline, environ: Mapping[str, str], directory: Path, output: int, says: int, at_once: bool
) -> list[subprocess.Popen[bytes]]:
    processes: list[subprocess.Popen[bytes]] = []
    reads: int = subprocess.DEVNULL
    for number, words in enumerate(pipeline):
        last = at_once or number == len(pipeline) - 1
        passed_on, writes = (subprocess.DEVNULL, output) if last else os.pipe()
        try:
            processes.append(
                subprocess.Popen(
                    words,
                    stdin=reads,
                    stdout=writes,
                    stderr=says,
                    cwd=directory,
                    env=dict(environ),
                    start_new_session=True,  # so that it can be killed with its children
                )
            )
        except OSError as error:
            _kill(processes)
            raise BrokenError(f"`{words[0]}` cannot be started: {error}") from error
        finally:
            if reads >= 0:
                os.close(reads)
            if not last:
                os.close(writes)
        reads = passed_on
    return processes


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def shown(pipeline: Pipeline) -> str:
    """The commands as somebody would type them, without the directories of the programs."""
    return " | ".join(" ".join((os.path.basename(words[0]), *words[1:])) for words in pipeline)


class MemoryWatch:
    """Looks at the memory of processes and their children until it is stopped.

    getrusage(2) would not do: a program that was started by a larger one begins with the maximum of that one.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._peaks: dict[int, int] = {}
        self._together = 0
        self._ended = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        """Bytes of the largest process, and of all at one moment."""
        self._ended.set()
        self._thread.join()
        largest = max(self._peaks.values(), default=0)
        return largest, max(largest, self._together)

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY):
            self._look()

    def _look(self) -> None:
        together = 0
        waiting = list(self._pids)
        while waiting:
            pid = waiting.pop()
            try:
                status = Path(f"/proc/{pid}/status").read_bytes()
                for task in os.listdir(f"/proc/{pid}/task"):
                    waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
            sizes = dict(re.findall(rb"^(VmHWM|VmRSS):\s+(\d+) kB", status, re.MULTILINE))
            if sizes:  # a process that has ended has none
                self._peaks[pid] = max(self._peaks.get(pid, 0), int(sizes[b"VmHWM"]) * 1024)
                together += int(sizes[b"VmRSS"]) * 1024
        self._together = max(self._together, together)
