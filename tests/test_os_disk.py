"""The disk that overflowed: where plain pip fills a small OS disk, packhorse leaves it as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import small_os_disk
from tests.small_os_disk import Outcome

pytestmark = pytest.mark.namespaces

REQUIREMENTS = ["scipy", "pandas", "scikit-learn", "pyarrow", "opencv-python-headless"]
MODULES = ["scipy.linalg", "pandas", "sklearn.linear_model", "pyarrow.parquet", "cv2"]
OS_DISK = 100_000_000
Runner = Callable[[list[str]], Outcome]


@pytest.fixture
def big_disk(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.mkdir()
    return path


@pytest.fixture
def on_small_os_disk(tmp_path: Path, big_disk: Path, environ: dict[str, str]) -> Runner:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return lambda command: small_os_disk.run(
        command, size=OS_DISK, big_disk=big_disk, scratch=scratch, environ=environ
    )


def test_the_os_disk_is_small_everywhere_and_the_big_disk_is_not(
    on_small_os_disk: Runner, big_disk: Path
) -> None:
    places = ["/", "/tmp", "/root", "/var/tmp", "/opt", str(big_disk)]
    shown = on_small_os_disk(["df", "--output=size", "--block-size=1", *places])
    *os_disk, big = (int(line) for line in shown.stdout.split()[1:])
    assert set(os_disk) == {os_disk[0]}
    assert OS_DISK <= os_disk[0] < 1.01 * OS_DISK
    assert big > 10 * OS_DISK


def test_what_is_written_to_the_os_disk_is_seen_and_stays_in_the_namespace(
    on_small_os_disk: Runner, tmp_path: Path
) -> None:
    wrote = on_small_os_disk(["dd", "if=/dev/zero", f"of={tmp_path}/zeros", "bs=1000000", "count=30"])
    assert wrote.exit_code == 0
    assert 30_000_000 <= wrote.free_before - wrote.free_after < 31_000_000
    assert not (tmp_path / "zeros").exists()


def test_plain_pip_fills_the_os_disk_and_fails(on_small_os_disk: Runner, big_disk: Path) -> None:
    target = big_disk / "packages"
    pip = on_small_os_disk([sys.executable, "-m", "pip", "install", "--target", str(target), *REQUIREMENTS])
    assert pip.exit_code != 0
    full = pip.free_least < 1_000_000 or "No space left on device" in pip.stderr
    assert full, pip.stderr  # pip may also blame the network


def test_packhorse_installs_the_same_and_leaves_the_os_disk_alone(
    on_small_os_disk: Runner, big_disk: Path, environ: dict[str, str]
) -> None:
    config = big_disk / "packhorse.toml"
    config.write_text(
        f"[environment]\ndependencies = {json.dumps(REQUIREMENTS)}\nverify = {json.dumps(MODULES)}\n"
    )
    root = big_disk / "root"
    installed = on_small_os_disk(
        [sys.executable, "-m", "packhorse", "install", "--json", "--root", str(root), "--config", str(config)]
    )
    assert installed.exit_code == 0, installed.stderr
    facts = json.loads(installed.stdout)
    assert facts["root_bytes"] > 300_000_000
    assert installed.free_before - installed.free_least < 10_000_000
    grew = installed.free_before - installed.free_after
    assert grew < 10_000_000
    assert abs(facts["os_disk_bytes"] - grew) < 1_000_000

    imported = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(MODULES)}"],
        env={**environ, "PYTHONPATH": str(root / "packages")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr


def test_doctor_tells_a_full_os_disk_and_a_root_on_a_disk_of_its_own(
    on_small_os_disk: Runner, big_disk: Path
) -> None:
    fill = f"head -c {OS_DISK * 98 // 100} /dev/zero > /var/tmp/zeros"
    doctor = [sys.executable, "-m", "packhorse", "doctor", "--json", "--root", str(big_disk / "root")]

    done = on_small_os_disk(["sh", "-c", f'{fill}; exec "$@"', "sh", *doctor])

    found = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "disks"]
    assert done.exit_code == 1
    assert [each["what"].partition(" has ")[0] for each in found] == ["The disk of the OS"]
