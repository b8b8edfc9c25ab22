"""Wheels built with a real torch's own headers, for both C++ ABIs: chosen, checked and loaded, as flash-attn's would be.

`make test-torch` runs them: it downloads torch first, into the directory that TORCH_WHEELS names. They need g++.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, wheel

from packhorse.errors import PackhorseError
from packhorse.install import torch_build
from packhorse.install.interpreter import worker_interpreter

pytestmark = pytest.mark.torch

MODULE = f"fast{sysconfig.get_config_var('EXT_SUFFIX')}"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}-cp{sys.version_info.major}{sys.version_info.minor}-linux_x86_64"
SOURCE = """
#include <Python.h>
#include <c10/util/Exception.h>
#include <ATen/core/Tensor.h>
static PyObject* answer(PyObject*, PyObject* argument) {
  std::string text("no answer");
  if (argument == nullptr) throw c10::Error({"", "", 1}, text);
  TORCH_CHECK(PyLong_AsLong(argument) != 13, "not ", text);
  return PyLong_FromLong(at::Tensor().defined() ? 0 : 42);
}
static PyMethodDef methods[] = {{"answer", answer, METH_O, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "fast", "", -1, methods};
PyMODINIT_FUNC PyInit_fast() { return PyModule_Create(&module); }
"""


@pytest.fixture(scope="session")
def wheels() -> Path:
    """A directory with the wheels of torch and of all that it needs."""
    return Path(os.environ["TORCH_WHEELS"]).resolve()


@pytest.fixture(scope="session")
def torch(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of torch holds."""
    directory = tmp_path_factory.mktemp("torch")
    [file] = wheels.glob("torch-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(directory)
    return directory


@pytest.fixture(scope="session")
def build(torch: Path) -> torch_build.Torch:
    """How it was built."""
    found = torch_build.find([torch], worker_interpreter(sys.executable, os.environ), os.environ)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def modules(torch: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """The extension module by its C++11 ABI."""
    directory = tmp_path_factory.mktemp("modules")
    (directory / "fast.cpp").write_text(SOURCE)
    for abi in (True, False):
        subprocess.run(
            [
                *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi:d}"),
                *(f"-I{sysconfig.get_path('include')}", f"-I{torch}/torch/include", directory / "fast.cpp"),
                *(f"-L{torch}/torch/lib", "-lc10", "-ltorch", "-ltorch_cpu", "-o", directory / f"{abi}.so"),
            ],
            check=True,
        )
    return {abi: (directory / f"{abi}.so").read_bytes() for abi in (True, False)}


@pytest.fixture
def installer(installer: Installer, index: Index, wheels: Path) -> Installer:
    """Finds torch in the directory, and the extension on a page of the index."""
    installer.environ["PIP_FIND_LINKS"] = str(wheels)
    return installer


def _offer(index: Index, module: bytes, build: torch_build.Torch, *, abi: bool) -> None:
    """A wheel named as flash-attn's are."""
    files = {MODULE: module, "start.py": "import torch, fast\nassert fast.answer(1) == 42\n"}
    made = wheel(index.directory, "fast", "1.0", files, tag=TAG)
    cuda = f"cu{build.cuda.partition('.')[0]}" if build.cuda else ""
    minor = ".".join(build.version.split(".")[:2])
    made.rename(made.with_name(made.name.replace("1.0", f"1.0+{cuda}torch{minor}cxx11abi{str(abi).upper()}")))


def test_of_two_abis_that_of_torch_is_chosen_and_works(
    index: Index, installer: Installer, modules: dict[bool, bytes], build: torch_build.Torch
) -> None:
    for abi, module in modules.items():
        _offer(index, module, build, abi=abi)

    done = installer(
        dependencies=["torch"],
        wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}],
        verify=["start"],
    )

    assert [outcome.ok for outcome in done.imports] == [True]
    assert any(
        f"cxx11abi{str(build.cxx11_abi).upper()}" in note and "1 of 2 fit" in note for note in installer.notes
    )


def test_the_other_abi_under_the_right_name_is_refused_before_it_is_imported(
    index: Index, installer: Installer, modules: dict[bool, bytes], build: torch_build.Torch
) -> None:
    _offer(index, modules[not build.cxx11_abi], build, abi=build.cxx11_abi)

    with pytest.raises(PackhorseError) as caught:
        installer(
            dependencies=["torch"],
            wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}],
            verify=["start"],
        )

    assert caught.value.what.startswith(
        f"A wheel of [[environment.wheels]] cannot be loaded here: {MODULE} needs "
    )
    assert "torch/lib/libc10.so" in caught.value.what
    with contextlib.suppress(FileNotFoundError):
        assert not os.listdir(installer.root.packages)
