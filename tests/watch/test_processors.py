"""As many processors count as this process can keep busy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from packhorse.watch import processors

TELL = "from packhorse.watch import processors; print(processors.usable())"


def _usable(*before: str) -> int:
    """What a process that is started behind the command `before` counts."""
    done = subprocess.run([*before, sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_at_least_one_and_no_more_than_it_may_run_on() -> None:
    assert 1 <= processors.usable() <= len(os.sched_getaffinity(0))


def test_one_that_may_run_on_one_only_counts_one() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert processors.usable() == 1
        assert _usable() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def _seen(directory: Path, files: dict[str, str]) -> int:
    """The same where the kernel shows these files below /sys/fs/cgroup."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)
    return _usable(
        "unshare", "--mount", "sh", "-c", f'mount --bind {directory} /sys/fs/cgroup && exec "$@"', "sh"
    )


@pytest.mark.namespaces
def test_the_quota_of_a_container_counts_by_version_2_and_1_rounded_up(tmp_path: Path) -> None:
    every = len(os.sched_getaffinity(0))

    def v1(quota: str) -> dict[str, str]:
        return {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000\n"}

    for number, (files, expected) in enumerate(
        [
            ({"cpu.max": "50000 100000\n"}, 1),
            ({"cpu.max": "100000 100000\n"}, 1),
            ({"cpu.max": "110000 100000\n"}, min(2, every)),
            ({"cpu.max": "max 100000\n"}, every),
            ({"cpu.max": "6400000 100000\n"}, min(64, every)),
            ({"cpu.max": "what this is nobody knows\n"}, every),
            (v1("50000\n"), 1),
            (v1("150000\n"), min(2, every)),
            (v1("-1\n"), every),
            ({}, every),
        ]
    ):
        assert _seen(tmp_path / str(number), files) == expected, files


def test_who_steps_back_does_so_alone() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    told = []

    def step_back() -> None:
        processors.step_back()
        told.append(os.getpriority(os.PRIO_PROCESS, 0))

    thread = threading.Thread(target=step_back)
    thread.start()
    thread.join()
    assert told == [max(before, 10)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
