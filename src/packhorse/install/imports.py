"""The import check: each module in a fresh interpreter of the worker, under the worker's environment.

Promises to name what failed and of which kind it is, with what to do; and to call nothing passed that could not be
checked, since it needs a GPU that is not here.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from packhorse.errors import UNREADABLE, PackhorseError
from packhorse.install import process
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import Log
from packhorse.watch import memory

if TYPE_CHECKING:
    from packhorse.install.symbols import Scope

TIMEOUT = 600.0
SLOW = 10.0
"""Seconds from which an import is pointed out."""

_SHARE = 2 << 30
"""Bytes of free memory that each import beside another must find: torch with its CUDA libraries takes under 1 GB."""
_PROBE = Path(__file__).with_name("import_probe.py")
_TRACEBACK = "Traceback (most recent call last):"

_LIBRARY = re.compile(r"(lib[\w.+-]*\.so(?:\.\w+)*): cannot open shared object file")
_SYMBOL = re.compile(r"(/\S+): undefined symbol: (\w+)")
_VERSION = re.compile(r"(/\S+): version [`'](\S+)' not found \(required by (\S+)\)")
_ABI = re.compile(
    r"binary incompatibility|compiled against (?:ABI|API) version|compiled using NumPy 1\.x cannot be run"
)
_NO_GPU = re.compile(
    r"Found no NVIDIA driver on your system|No CUDA GPUs are available|no CUDA-capable device is detected"
    r"|CUDA driver version is insufficient for CUDA runtime version|cudaErrorNoDevice|cudaErrorInsufficientDriver"
    r"|CUDA_ERROR_NO_DEVICE|NVML Shared Library Not Found|NVIDIA driver .{0,40}not found"
    r"|0 active drivers \(\[\]\)|Failed to infer device type|No HIP GPUs are available"
)
"""What torch, CUDA, CuPy, NVML, Triton and vLLM say where there is no GPU or no driver."""
_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
_PACKAGES = {
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "PyMuPDF",
    "google.protobuf": "protobuf",
    "jwt": "PyJWT",
    "magic": "python-magic",
    "mpl_toolkits": "matplotlib",
    "multipart": "python-multipart",
    "nacl": "PyNaCl",
    "OpenSSL": "pyOpenSSL",
    "PIL": "Pillow",
    "pkg_resources": "setuptools<81",
    "sentencepiece_model_pb2": "sentencepiece",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}
"""Modules that are called otherwise than their distribution."""


class ImportOutcome(msgspec.Struct, frozen=True):
    """How the import of a module went: wall seconds, the most memory, and the error in one line with its remedy.

    `files` and `bytes` are those of `packages/` that it opened or mapped. `outcome` is one of ok, missing-module,
    missing-library, abi, not-checkable, crash, timeout, error. Where the interpreter did not live to tell,
    `seconds` are those of the whole process and the other figures 0.
    """

    module: str
    seconds: float
    ok: bool
    error: str = ""
    outcome: str = "ok"
    remedy: str = ""
    peak_rss_bytes: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def failed(self) -> bool:
        """Whether the environment must not come into force: what cannot be checked here may be right."""
        return not self.ok and self.outcome != "not-checkable"

    @property
    def slow(self) -> bool:
        """Whether it took so long that a worker's start suffers."""
        return self.seconds >= SLOW


class _Raised(msgspec.Struct):
    type: str
    text: str
    name: str = ""


class _Report(msgspec.Struct):
    seconds: float
    peak_rss_bytes: int
    files: int
    bytes: int
    errors: list[_Raised]


def check(
    modules: Sequence[str],
    *,
    interpreter: Interpreter,
    environ: Mapping[str, str],
    directory: Path,
    log: Log,
    packages: Path,
    timeout: float = TIMEOUT,
    before: Callable[[str], None] = lambda modules: None,
) -> list[ImportOutcome]:
    """Import each module under `environ`, in `directory`, several at a time where memory allows.

    All output goes to `log`. `packages` is where the environment lies. `timeout` is in seconds for each. `before`
    is called once, with the names of all.
    """
    if not modules:
        return []
    before(", ".join(modules))
    kinds = _Kinds(interpreter, environ, packages)
    stopping = threading.Event()
    outcomes: dict[int, ImportOutcome] = {}

    def run(index: int) -> tuple[process.Ended, float, list[str], _Report | None]:
        report = directory / f".import-{index}.json"
        command = [interpreter.path, "-c", source, modules[index], str(report), str(packages)]
        output: list[str] = []
        started = time.monotonic()
        ended = process.run(
            command,
            environ=environ,
            directory=directory,
            on_line=output.append,
            timeout=timeout,
            stopping=stopping.is_set,
        )
        return ended, time.monotonic() - started, output, _read(report)

    source = _PROBE.read_text(encoding="utf-8")
    with ThreadPoolExecutor(at_a_time(len(modules))) as pool:
        waiting = {pool.submit(run, index): index for index in range(len(modules))}
        try:
            for future in as_completed(waiting):
                index = waiting[future]
                ended, seconds, output, report = future.result()
                log.begin([interpreter.path, "-c", "import " + modules[index]])
                lines = [log.add(line) for line in output]
                outcomes[index] = kinds.outcome(modules[index], ended, seconds, lines, report, timeout)
        finally:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            kinds.close()
    return [outcomes[index] for index in range(len(modules))]


def failure(outcomes: Iterable[ImportOutcome], kept: str, log: Path) -> PackhorseError:
    """The error for those that failed; `kept` is a sentence on what stays."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    listed = "; ".join(f"`import {outcome.module}`: {outcome.error}" for outcome in failed)
    remedies = list(dict.fromkeys(outcome.remedy for outcome in failed if outcome.remedy))
    remedy = " ".join(remedies) or "Correct the requirements, or environment.verify."
    return PackhorseError(
        f"The environment failed the import check: {listed}.{kept}", f"{remedy} The whole output is in {log}."
    )


def at_a_time(modules: int) -> int:
    """How many imports to run beside one another: as many as there are processors, and memory for each."""
    used, limit = memory.memory()
    return max(1, min(modules, len(os.sched_getaffinity(0)), (limit - used) // _SHARE))


def driver_present() -> bool:
    """Whether this machine has a GPU's driver."""
    return any(map(os.path.exists, _DRIVERS))


def _read(report: Path) -> _Report | None:
    try:
        return msgspec.json.decode(report.read_bytes(), type=_Report)
    except (FileNotFoundError, *UNREADABLE):  # it did not live to write it
        return None
    finally:
        report.unlink(missing_ok=True)


class _Kinds:
    """Sorts failures."""

    def __init__(self, interpreter: Interpreter, environ: Mapping[str, str], packages: Path) -> None:
        self._interpreter, self._environ, self._packages = interpreter, environ, packages

    def outcome(
        self,
        module: str,
        ended: process.Ended,
        seconds: float,
        output: list[str],
        report: _Report | None,
        timeout: float,
    ) -> ImportOutcome:
        """What came of one import."""
        if ended.timed_out:
            kind, error = "timeout", f"not done after {timeout:g} seconds"
            remedy = f"Look at what it waits for: its output is in the log; `python -X importtime -c 'import {module}'`."
        elif ended.code < 0:
            kind, error = "crash", process.signal_name(-ended.code)
            remedy = "A library crashed: look at its last words in the log, and at the versions beside one another."
        elif ended.code == 0 and (report is None or report.errors):
            kind, error, remedy = "error", "it ended the interpreter", ""
        elif ended.code > 0:
            error = _error(output) or f"exit code {ended.code}"
            kind, remedy = self._sorted(module, report.errors if report else [], error)
        else:
            kind, error, remedy = "ok", "", ""
        outcome = ImportOutcome(module, round(seconds, 3), kind == "ok", error, kind, remedy)
        if report is None:
            return outcome
        return msgspec.structs.replace(
            outcome,
            seconds=round(report.seconds, 3) if kind != "timeout" else outcome.seconds,
            peak_rss_bytes=report.peak_rss_bytes,
            files=report.files,
            bytes=report.bytes,
        )

    def _sorted(self, module: str, errors: list[_Raised], error: str) -> tuple[str, str]:
        """The kind and the remedy: by the exception, else by one that it came from."""
        for each in errors or [_Raised("", error)]:
            if found := self._kind(module, each):
                return found
        return "error", ""

    def _kind(self, module: str, raised: _Raised) -> tuple[str, str] | None:
        if _NO_GPU.search(raised.text) and not driver_present():
            return "not-checkable", "Run `packhorse verify --imports` on a worker that has a GPU."
        if library := _LIBRARY.search(raised.text):
            return self._library(library[1])
        if symbol := _SYMBOL.search(raised.text):
            return "abi", self._symbol(Path(symbol[1]), symbol[2])
        if version := _VERSION.search(raised.text):
            return "abi", (
                f"{version[1]} is older than the one that {os.path.basename(version[3])} was built with: take a "
                "build for an older system, or a newer image."
            )
        if _ABI.search(raised.text):
            return (
                "abi",
                "It was built for another version of a package it uses, often numpy: pin the one it was built for.",
            )
        if raised.type == "ModuleNotFoundError" and raised.name:
            return "missing-module", self._module(module, raised.name)
        return None

    def _library(self, name: str) -> tuple[str, str]:
        from packhorse.install import providers

        if providers.is_driver(name):
            if not driver_present():
                return "not-checkable", "Run `packhorse verify --imports` on a worker that has a GPU."
            return (
                "missing-library",
                "The container does not see the driver: start it with access to the GPU.",
            )
        reason, remedy = providers.advice(name, self._scope.packaged)
        return "missing-library", f"{name}: {reason}. {remedy}"

    def _symbol(self, file: Path, symbol: str) -> str:
        from packhorse.install import symbols

        finding = symbols.explain(file, symbol, self._scope)
        if finding is None:
            return "It was built for other versions than are installed; take a build for these."
        return f"{symbols.sentence(finding)}. {finding.remedy}"

    def _module(self, module: str, missing: str) -> str:
        if missing == module or module.startswith(f"{missing}."):
            return "Correct its name in environment.verify, or add what brings it to the requirements."
        top = missing.partition(".")[0]
        if top != missing and (self._packages / top).exists():
            return f"{top} is installed, but a version without {missing}: pin one that {module} was made for."
        return f"Add {_PACKAGES.get(missing) or _PACKAGES.get(top, top)} to the requirements."

    @cached_property
    def _scope(self) -> Scope:
        from packhorse.install.symbols import Scope

        return Scope([self._packages], self._interpreter, self._environ)

    def close(self) -> None:
        """Close what was opened to explain."""
        if "_scope" in self.__dict__:
            self._scope.close()


def _error(output: list[str]) -> str:
    """The line of the exception: the first after the last traceback's frames, which are indented."""
    lines = [line for line in output if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith(_TRACEBACK):
            after = (line for line in lines[index + 1 :] if not line.startswith(" "))
            return next(after, lines[-1])
    return lines[-1] if lines else ""
