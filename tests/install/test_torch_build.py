from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.install import native

from packhorse.install import torch_build
from packhorse.install.interpreter import Interpreter, worker_interpreter
from packhorse.install.torch_build import Torch


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    return worker_interpreter(sys.executable, {})


def _write(place: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return place


@pytest.mark.parametrize("cxx11_abi", [True, False])
def test_version_cuda_and_abi_are_read_without_importing_torch(
    cxx11_abi: bool, interpreter: Interpreter, tmp_path: Path
) -> None:
    place = _write(tmp_path / "packages", native.torch(tmp_path, version="2.6.0+cu124", cxx11_abi=cxx11_abi))
    (place / "torch" / "__init__.py").write_text("raise AssertionError('imported')")

    found = torch_build.find([tmp_path / "empty", place], interpreter, {})

    assert found == Torch("2.6.0+cu124", "12.4", "", cxx11_abi, str(place / "torch"))
    assert found.minor == "2.6"


@pytest.mark.parametrize(
    ("version_py", "expected"),
    [
        ("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", ("2.14", "13.0", "")),
        ("__version__ = '1.13.1'\ncuda = '11.7'\nhip = None\n", ("1.13", "11.7", "")),
        ("__version__ = '2.6.0+cpu'\ncuda = None\n", ("2.6", "", "")),
        ("__version__ = '2.6.0+rocm6.2.4'\ncuda = None\nhip = '6.2.41134-65d174c3e'\n", ("2.6", "", "6.2.41134-65d174c3e")),
        ("__version__ = '2.10.0'\ncuda: Optional[str] = None\nrocm: Optional[str] = '7.1'\n", ("2.10", "", "7.1")),
    ],
)  # fmt: skip
def test_what_torch_says_of_itself_is_understood(
    version_py: str, expected: tuple[str, str, str], interpreter: Interpreter, tmp_path: Path
) -> None:
    place = _write(tmp_path, {"torch/__init__.py": "", "torch/version.py": version_py})

    found = torch_build.find([place], interpreter, {"PYTHONPATH": str(place)})

    assert found is not None
    assert (found.minor, found.cuda, found.rocm) == expected


def test_a_torch_without_libc10_is_asked_for_its_abi(interpreter: Interpreter, tmp_path: Path) -> None:
    source = "class _C:\n    _GLIBCXX_USE_CXX11_ABI = True\nprint('hello')\n"
    place = _write(tmp_path, {"torch/__init__.py": source, "torch/version.py": "__version__ = '2.6.0'\n"})

    found = torch_build.find([place], interpreter, {"PYTHONPATH": str(place)})

    assert found is not None and found.cxx11_abi is True


def test_an_abi_that_nothing_tells_stays_open(interpreter: Interpreter, tmp_path: Path) -> None:
    place = _write(tmp_path, {"torch/__init__.py": "1/0", "torch/version.py": "__version__ = '2.6.0'\n"})

    found = torch_build.find([place], interpreter, {"PYTHONPATH": str(place)})

    assert found is not None and found.cxx11_abi is None


def test_without_a_version_file_the_metadata_tells(interpreter: Interpreter, tmp_path: Path) -> None:
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0+cu124\n"
    place = _write(tmp_path, {"torch/__init__.py": "", "torch-2.6.0+cu124.dist-info/METADATA": metadata})

    found = torch_build.find([place], interpreter, {"PYTHONPATH": str(place)})

    assert found is not None
    assert (found.version, found.cuda) == ("2.6.0+cu124", "12.4")


def test_no_torch_is_no_error(interpreter: Interpreter, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()  # a directory of somebody's, without a module

    assert torch_build.find([tmp_path, tmp_path / "gone"], interpreter, {}) is None
