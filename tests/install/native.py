"""A small library that plays torch's part, and extensions built against it, in both C++ ABIs: compiled for real."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TAG = "cp{0}-cp{0}-linux_{1}".format(
    sysconfig.get_config_var("py_version_nodot"), sysconfig.get_platform().rpartition("-")[2]
)
"""The tag of wheels that hold such extensions, as setuptools writes it."""

_C10_HEADER = """
#include <string>
namespace c10 {
struct SourceLocation { const char* function; const char* file; unsigned line; };
class Error {
public:
  Error(SourceLocation where, std::string what);
private:
  std::string what_;
};
int answer();
#ifdef NEWER
int only_in_newer(int);
#endif
}
"""
_C10 = """
#include "c10.h"
namespace c10 {
Error::Error(SourceLocation, std::string what) : what_(what) {}
int answer() { return 42; }
#ifdef NEWER
int only_in_newer(int value) { return value; }
#endif
}
"""
_EXTENSION = """
#include <Python.h>
#include "c10.h"
extern "C" int optional_part() __attribute__((weak));
static PyObject* answer(PyObject*, PyObject*) {
  c10::Error error({"", "", 1}, "text");
  if (optional_part) return PyLong_FromLong(optional_part());
#ifdef NEWER
  return PyLong_FromLong(c10::only_in_newer(42));
#else
  return PyLong_FromLong(c10::answer());
#endif
}
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "MODULE", "", -1, methods};
PyMODINIT_FUNC PyInit_MODULE() { return PyModule_Create(&module); }
"""
_TORCH_INIT = """
import ctypes, os
from torch.version import __version__
class _C:
    pass
ctypes.CDLL(os.path.join(os.path.dirname(__file__), "lib", "libc10.so"), mode=ctypes.RTLD_GLOBAL)
"""


def torch(
    directory: Path, *, version: str = "2.6.0+cu124", cxx11_abi: bool = False, newer: bool = False
) -> dict[str, str | bytes]:
    """The files of a torch: its version, and a libc10.so built with or without the C++11 ABI.

    `newer` adds a function that others do not have.
    """
    library = _c10(directory, cxx11_abi, newer)
    cuda = version.partition("+cu")[2]
    told = f"{cuda[:-1]}.{cuda[-1]}" if cuda else None
    return {
        "torch/__init__.py": _TORCH_INIT,
        "torch/version.py": f"from typing import Optional\n\n__version__ = {version!r}\ndebug = False\n"
        f"cuda: Optional[str] = {told!r}\nhip: Optional[str] = None\n",
        "torch/lib/libc10.so": library.read_bytes(),
    }


def extension(directory: Path, module: str, *, cxx11_abi: bool = False, newer: bool = False) -> bytes:
    """An extension module that takes c10::Error from libc10.so, and does without `optional_part`."""
    library = _c10(directory, cxx11_abi, newer)
    source = _source(library.parent / f"{module}.cpp", _EXTENSION.replace("MODULE", module))
    built = source.with_suffix(".so")
    include = sysconfig.get_path("include")
    _compile(source, built, cxx11_abi, newer, f"-I{include}", f"-L{library.parent}", "-lc10")
    return built.read_bytes()


def library(directory: Path, name: str, source: str, *options: str) -> Path:
    """A shared library `directory/name` made of C."""
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    text = _source(target.with_name(f"{name}.c"), source)
    subprocess.run(["gcc", "-shared", "-fPIC", str(text), *options, "-o", str(target)], check=True)
    text.unlink()
    return target


def _c10(directory: Path, cxx11_abi: bool, newer: bool) -> Path:
    place = directory / f"c10-{cxx11_abi}-{newer}"
    place.mkdir(parents=True, exist_ok=True)
    library = place / "libc10.so"
    if not library.exists():
        _source(place / "c10.h", _C10_HEADER)
        _compile(_source(place / "c10.cpp", _C10), library, cxx11_abi, newer, "-Wl,-soname,libc10.so")
    return library


def _source(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _compile(source: Path, target: Path, cxx11_abi: bool, newer: bool, *options: str) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi:d}"]
    flags += ["-DNEWER"] if newer else []
    subprocess.run(["g++", *flags, str(source), *options, "-o", str(target)], check=True)
