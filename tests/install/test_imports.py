from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_an_import_that_never_ends_is_stopped(tmp_path: Path, log: Log) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(300)")

    [outcome] = _check(tmp_path, log, "endless", timeout=0.5)

    assert outcome.error == "not done after 0.5 seconds"


def test_a_failure_does_not_keep_the_others_from_being_tried(tmp_path: Path, log: Log) -> None:
    assert [outcome.ok for outcome in _check(tmp_path, log, "not_there", "json", "not_there_either")] == [
        False,
        True,
        False,
    ]
