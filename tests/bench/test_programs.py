"""Each benchmark prints one Markdown table with what it ran on below, and writes the same figures with --json.

Those that save and restore have a small mode, which `make bench-small` runs.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.bench.tables import table
from tests.install import native
from tests.install.index import wheel
from tests.snapshot.fatbins import installed

BENCH = Path(__file__).parent.parent.parent / "bench"


def printed(work: Path, program: str, *words: str | Path, status: int = 0) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and what it wrote into a file."""
    file = work / "figures.json"
    command = [sys.executable, BENCH / program, *words, "--json", file]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    figures: dict[str, Any] = json.loads(file.read_text())
    ran_on = done.stdout.splitlines()[-1]
    assert figures["machine"]["python"] == platform.python_version()
    assert ran_on.startswith(f"- {figures['machine']['cores']} cores, ")
    assert f"Python {platform.python_version()}, Linux {platform.release()}" in ran_on
    return done.stdout, figures


def test_the_start_of_a_command(tmp_path: Path) -> None:
    text, figures = printed(tmp_path, "startup.py", "--rounds", "2")
    rows = table(text, "start of a command")
    assert list(rows) == ["`python -c pass`", "`packhorse run -- true`"]
    for name, seconds in figures["seconds"].items():
        assert len(seconds) == figures["rounds"] == 2
        middle = f"{statistics.median(seconds):.3f} ({min(seconds):.3f}..{max(seconds):.3f})"
        assert rows[f"`{name}`"] == {"seconds": middle}


def test_levels_of_compression(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "text").write_bytes(b"to be compressed " * 100_000)
    (tree / "noise").write_bytes(random.Random(1).randbytes(300_000))
    text, figures = printed(tmp_path, "levels.py", tree, "--every", "1", "--levels", "1,3")
    rows = table(text, "levels of compression")
    assert figures["frames"] == figures["chosen_frames"]
    assert figures["bytes"] == 2_000_000
    assert list(rows) == ["1", "3"]
    for each in figures["levels"]:
        assert 300_000 <= each["stored"] < 320_000
        assert rows[str(each["level"])]["stored, MB"] == "0.3"


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA publishes its libraries for Linux only")
def test_gpu_code(tmp_path: Path) -> None:
    nvjpeg = installed("nvidia-nvjpeg", "libnvjpeg.so")
    (tmp_path / "packages" / "nvidia").mkdir(parents=True)
    shutil.copy(nvjpeg, tmp_path / "packages" / "nvidia" / "library.so")
    (tmp_path / "packages" / "link.so").symlink_to("nvidia/library.so")
    (tmp_path / "packages" / "other.so").write_bytes(b"no library")
    text, figures = printed(tmp_path, "gpu_code.py", "packages", "--gpus", "sm_90", "--check")
    rows = table(text, "GPU code")
    [(name, row)] = figures["libraries"].items()
    assert name == "nvidia/library.so"
    assert (figures["libraries_read"], row["size"]) == (2, nvjpeg.stat().st_size)
    assert list(rows) == [name, "together"]
    assert rows[name] == rows["together"]
    assert rows[name]["cold sm_90, MB"] == f"{row['cold sm_90'] / 1e6:,.1f}"
    assert rows[name]["extents"] == f"{row['extents']}"
    assert figures["checks"]["cubins extracted from sparse copies for sm_90"] > 0


def test_the_check_of_symbols_tells_what_it_found(tmp_path: Path) -> None:
    module = native.extension(tmp_path, "fast", cxx11_abi=True)
    for made in (
        wheel(tmp_path, "torch", "2.6.0", native.torch(tmp_path, cxx11_abi=False), tag=native.TAG),
        wheel(tmp_path, "fast", "1.0", {f"fast{native.SUFFIX}": module}, tag=native.TAG),
    ):
        with zipfile.ZipFile(made) as archive:
            archive.extractall(tmp_path / "packages")
    text, figures = printed(tmp_path, "accelerator.py", tmp_path / "packages", status=1)
    assert list(table(text, "check of symbols")) == ["how torch was built", "all packages"]
    assert (figures["torch"]["cuda"], figures["torch"]["cxx11_abi"]) == ("12.4", False)
    [finding] = figures["findings"]
    assert finding["library"] == "torch/lib/libc10.so"
    assert f"- fast{native.SUFFIX} needs " in text


@pytest.mark.namespaces
def test_installing_from_local_wheels(tmp_path: Path) -> None:
    wheels, requirements = tmp_path / "wheels", tmp_path / "requirements.txt"
    wheels.mkdir()
    wheel(wheels, "foo", "1.0", {"foo/__init__.py": "", "foo/large": bytes(3_000_000)}, requires=["bar"])
    wheel(wheels, "bar", "1.0")
    requirements.write_text("foo\n")
    text, figures = printed(
        tmp_path, "install.py", "--wheels", wheels, "--requirements", requirements, "--size", "0.5"
    )
    rows = table(text, "install from local wheels")
    assert list(rows) == [
        "`packhorse install, pip resolves`",
        "`pip install --target`",
        "`packhorse install, uv resolves`",
        "`uv pip install --target --compile-bytecode`",
    ]
    for each in figures["contenders"]:
        assert each["peak"] >= each["size"] >= 3_000_000
        assert rows[f"`{each['name']}`"]["MB at the end"] == f"{each['size'] / 1e6:,.0f}"
        assert (each["said_peak"] is not None) == each["name"].startswith("packhorse")
