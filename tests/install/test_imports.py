from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.install import native
from tests.worker.conftest import alive, until

from packhorse.cli import import_table
from packhorse.install import imports
from packhorse.install.imports import ImportOutcome
from packhorse.install.interpreter import worker_interpreter
from packhorse.install.log import Log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    (tmp_path / "logs").mkdir()
    log = Log(tmp_path / "logs", "test")
    yield log
    log.close()


def _check(tmp_path: Path, log: Log, *modules: str, timeout: float = 60) -> list[ImportOutcome]:
    return imports.check(
        modules,
        interpreter=worker_interpreter(sys.executable, {}),
        environ={**os.environ, "PYTHONPATH": str(tmp_path)},
        directory=tmp_path / "logs",
        log=log,
        packages=tmp_path,
        timeout=timeout,
    )


def test_each_module_has_a_fresh_interpreter_and_its_time(tmp_path: Path, log: Log) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.3)")
    (tmp_path / "clean.py").write_text("import sys; assert 'slow' not in sys.modules")

    slow, clean = _check(tmp_path, log, "slow", "clean")

    assert slow.ok and clean.ok
    assert slow.seconds > 0.3


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise ImportError('a.so: undefined symbol: _ZN3c105Error')", "ImportError: a.so: undefined symbol: _ZN3c105Error"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("try:\n  1/0\nexcept Exception:\n  raise ValueError('last')", "ValueError: last"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, often for want of memory"),
        ("print('no GPU'); import os; os._exit(3)", "no GPU"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os._exit(0)", "it ended the interpreter"),
        ("raise SystemExit(0)", "it ended the interpreter"),
    ],
)  # fmt: skip
def test_a_failure_is_named(tmp_path: Path, log: Log, source: str, error: str) -> None:
    (tmp_path / "broken.py").write_text(source)

    [outcome] = _check(tmp_path, log, "broken")

    assert not outcome.ok
    assert outcome.error == error


def test_the_whole_output_is_in_the_log(tmp_path: Path, log: Log) -> None:
    (tmp_path / "broken.py").write_text("print('before')\nraise RuntimeError('why\\nmore')")

    _check(tmp_path, log, "broken")

    logged = log.path.read_text()
    assert all(text in logged for text in ("before", "Traceback", "RuntimeError: why", "more"))


# --- figures ---


def test_memory_files_and_bytes_are_those_that_the_import_took(tmp_path: Path, log: Log) -> None:
    (tmp_path / "large.bin").write_bytes(b"x" * 1_000_000)
    (tmp_path / "large.py").write_text(
        f"import small, os\nkept = bytearray(200_000_000)\nopen({str(tmp_path / 'large.bin')!r}).close()\n"
        f"os.stat({str(tmp_path / 'unread.bin')!r})\n"
    )
    (tmp_path / "small.py").write_text("")
    (tmp_path / "unread.bin").write_bytes(b"x" * 1_000_000)

    large, small = _check(tmp_path, log, "large", "small")

    assert 200_000_000 < large.peak_rss_bytes < 300_000_000
    assert 1_000_000 < small.peak_rss_bytes < 100_000_000
    assert 1_000_000 < large.bytes < 1_010_000
    assert small.bytes < 10_000 and 0 < small.files < large.files
    assert list((tmp_path / "logs").iterdir()) == [log.path]


def test_libraries_that_were_loaded_count(tmp_path: Path, log: Log) -> None:
    library = native.library(tmp_path, "libfoo.so", "int foo;")
    (tmp_path / "loads.py").write_text(f"import ctypes; ctypes.CDLL({str(library)!r})")

    [outcome] = _check(tmp_path, log, "loads")

    assert outcome.bytes > library.stat().st_size


def test_a_slow_import_is_pointed_out() -> None:
    assert [ImportOutcome("a", seconds, True).slow for seconds in (0.1, 9.9, 10.0)] == [False, False, True]
    assert "slow: over 10 s" in import_table.lines([ImportOutcome("a", 12.0, True)])[0]


def test_imports_run_beside_one_another_where_there_is_room(tmp_path: Path, log: Log) -> None:
    """Each waits for the other to have begun."""
    if imports.at_a_time(2) < 2:
        pytest.skip("this machine has one processor, or too little memory for two imports at a time")
    for one, other in (("left", "right"), ("right", "left")):
        (tmp_path / f"{one}.py").write_text(
            f"import os, time\nopen({str(tmp_path / one)!r}, 'w').close()\n"
            f"while not os.path.exists({str(tmp_path / other)!r}): time.sleep(0.01)\n"
        )

    assert [outcome.ok for outcome in _check(tmp_path, log, "left", "right")] == [True, True]


# --- kinds of failures ---


def _kind(tmp_path: Path, log: Log, source: str) -> ImportOutcome:
    (tmp_path / "broken.py").write_text(source)
    [outcome] = _check(tmp_path, log, "broken")
    return outcome


@pytest.mark.parametrize(
    ("source", "kind", "remedy"),
    [
        ("import not_there", "missing-module", "Add not_there to the requirements."),
        ("import not_there.sub", "missing-module", "Add not_there to the requirements."),
        ("raise ModuleNotFoundError('x', name='cv2')", "missing-module", "Add opencv-python-headless to"),
        ("import ctypes; ctypes.CDLL('libgone.so.4')", "missing-library", "libgone.so.4: nothing installed has it"),
        ("import ctypes; ctypes.CDLL('libcudart.so.99')", "missing-library", "Add nvidia-cuda-runtime to the requirements."),
        ("raise ValueError('numpy.dtype size changed, may indicate binary incompatibility. Expected 96')", "abi", "often numpy"),
        ("raise ImportError(\"/lib/libstdc++.so.6: version `GLIBCXX_3.4.99' not found (required by /a/b.so)\")", "abi", "libstdc++.so.6 is older than the one that b.so was built with"),
        ("import os; os.kill(os.getpid(), 11)", "crash", "A library crashed"),
        ("1 / 0", "error", ""),
    ],
)  # fmt: skip
def test_failures_are_sorted_and_have_a_remedy(
    tmp_path: Path, log: Log, source: str, kind: str, remedy: str
) -> None:
    outcome = _kind(tmp_path, log, source)

    assert (outcome.ok, outcome.failed, outcome.outcome) == (False, True, kind)
    assert remedy in outcome.remedy


def test_a_verified_module_that_is_not_there_is_perhaps_called_otherwise(tmp_path: Path, log: Log) -> None:
    [outcome] = _check(tmp_path, log, "flash-attn".replace("-", "_"))
    assert outcome.outcome == "missing-module"
    assert outcome.remedy.startswith("Correct its name in environment.verify")


def test_a_part_that_an_installed_package_lacks_is_a_matter_of_its_version(tmp_path: Path, log: Log) -> None:
    (tmp_path / "there").mkdir()
    outcome = _kind(tmp_path, log, "import there.gone")
    assert "there is installed, but a version without there.gone" in outcome.remedy


def test_what_is_behind_an_exception_counts(tmp_path: Path, log: Log) -> None:
    outcome = _kind(
        tmp_path,
        log,
        "try:\n  import not_there\nexcept ImportError as e:\n  raise RuntimeError('lazy') from e",
    )
    assert (outcome.outcome, outcome.error) == ("missing-module", "RuntimeError: lazy")


def test_an_undefined_symbol_is_explained(tmp_path: Path, log: Log) -> None:
    for name, content in native.torch(tmp_path / "builds", cxx11_abi=False).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    module = native.extension(tmp_path / "builds", "fast", cxx11_abi=True)
    (tmp_path / f"fast{native.SUFFIX}").write_bytes(module)
    shutil.rmtree(tmp_path / "builds")

    outcome = _kind(tmp_path, log, "import torch, fast")

    assert outcome.outcome == "abi"
    assert "undefined symbol: _ZN3c105ErrorC1" in outcome.error
    assert "it was built with the C++11 ABI TRUE, and torch/lib/libc10.so with FALSE" in outcome.remedy
    assert "Take the wheel for cxx11abiFALSE" in outcome.remedy


# --- without a GPU ---

WITHOUT_DRIVER = pytest.mark.skipif(
    imports.driver_present(), reason="what a module says without a GPU is not believed where one is"
)


@WITHOUT_DRIVER
@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('libcuda.so.1: cannot open shared object file: No such file or directory')",
        "raise ImportError('libnvidia-ml.so.1: cannot open shared object file: No such file or directory')",
        "raise RuntimeError('Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU')",
        "raise RuntimeError('No CUDA GPUs are available')",
        "raise RuntimeError('0 active drivers ([]). There should only be one.')",
        "raise RuntimeError('Failed to infer device type')",
        "try:\n  raise OSError('libcuda.so.1: cannot open shared object file')\nexcept OSError as e:\n  raise ImportError('no backend') from e",
    ],
)
def test_what_needs_a_gpu_is_neither_passed_nor_failed(tmp_path: Path, log: Log, source: str) -> None:
    outcome = _kind(tmp_path, log, source)

    assert (outcome.ok, outcome.failed, outcome.outcome) == (False, False, "not-checkable")
    assert "on a worker that has a GPU" in outcome.remedy
    assert "not checkable here" in import_table.lines([outcome])[0]


@pytest.mark.parametrize(
    "source",
    [
        "raise AssertionError('Torch not compiled with CUDA enabled')",
        "raise ImportError('libcudart.so.99: cannot open shared object file: No such file or directory')",
        "raise RuntimeError('CUDA error: out of memory')",
    ],
)
def test_what_speaks_of_cuda_is_not_for_want_of_a_gpu(tmp_path: Path, log: Log, source: str) -> None:
    assert _kind(tmp_path, log, source).failed


# --- the end ---


def test_whoever_waits_for_imports_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    )
    (tmp_path / "logs").mkdir()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom packhorse.install import imports, interpreter, log\n"
        f"here = Path({str(tmp_path)!r})\n"
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "imports.check(['endless'] * 3, interpreter=interpreter.worker_interpreter(sys.executable, {}),\n"
        "    environ={**os.environ, 'PYTHONPATH': str(here)}, directory=here / 'logs', packages=here,\n"
        "    log=log.Log(here / 'logs', 'x'))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert not alive(int((tmp_path / "pid").read_text()))


def test_an_import_that_never_ends_is_stopped(tmp_path: Path, log: Log) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(300)")

    [outcome] = _check(tmp_path, log, "endless", timeout=0.5)

    assert (outcome.error, outcome.outcome) == ("not done after 0.5 seconds", "timeout")


def test_a_failure_does_not_keep_the_others_from_being_tried(tmp_path: Path, log: Log) -> None:
    assert [outcome.ok for outcome in _check(tmp_path, log, "not_there", "json", "not_there_either")] == [
        False,
        True,
        False,
    ]
