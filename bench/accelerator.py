"""Checks the symbols of extensions against a real torch, and measures how long that takes.

Compiles a small extension with torch's own headers for each of the two C++ ABIs, asks the check of symbols about both,
and holds its answer against what the loader says. Then it checks every other package of the directory.

    python bench/accelerator.py DIRECTORY      a directory with torch, as `pip install --target` fills it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from packhorse.install import symbols, torch_build, wheels
from packhorse.install.interpreter import Interpreter, worker_interpreter

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
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


def compiled(packages: Path, place: Path, cxx11_abi: bool) -> Path:
    """An extension module in `place`, made with the headers and libraries of the torch in `packages`."""
    place.mkdir()
    source, target = place / "fast.cpp", place / f"fast{SUFFIX}"
    source.write_text(SOURCE)
    torch = packages / "torch"
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi:d}"),
            *(f"-I{sysconfig.get_path('include')}", f"-I{torch}/include", str(source)),
            *(f"-L{torch}/lib", "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(target)),
        ],
        check=True,
    )
    info = place / "fast-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{target.name},,\n")
    return place


def loaded(packages: Path, place: Path) -> str:
    """What the loader says: "" for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch, fast; assert fast.answer(1) == 42"],
        env={**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def checked(places: list[Path], interpreter: Interpreter) -> tuple[list[symbols.Finding], float]:
    """The findings about all distributions of the first place, and the seconds that it took."""
    started = time.perf_counter()
    with contextlib.closing(symbols.Scope(places, interpreter, os.environ)) as scope:
        findings = symbols.check((each.distribution for each in wheels.distributions(places[0])), scope)
    return findings, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    packages = parser.parse_args().directory.resolve()
    interpreter = worker_interpreter(sys.executable, os.environ)

    started = time.perf_counter()
    torch = torch_build.find([packages], interpreter, os.environ)
    if torch is None:
        sys.exit(f"{packages} has no torch")
    print(f"read in {time.perf_counter() - started:.3f} s: {torch}")

    wrong = False
    with tempfile.TemporaryDirectory() as scratch:
        for cxx11_abi in (True, False):
            place = compiled(packages, Path(scratch, str(cxx11_abi)), cxx11_abi)
            findings, seconds = checked([place, packages], interpreter)
            said = loaded(packages, place)
            missing = [symbol for finding in findings for symbol in finding.missing]
            agree = bool(said) == bool(findings) and (not said or any(symbol in said for symbol in missing))
            wrong |= not agree or bool(findings) != (cxx11_abi != torch.cxx11_abi)
            print(
                f"\nC++11 ABI {cxx11_abi}, checked in {seconds:.2f} s, {'as' if agree else 'UNLIKE'} the loader"
            )
            print(f"  loader: {said or 'loaded'}")
            for finding in findings:
                print(f"  check:  {symbols.sentence(finding)}. {finding.remedy}")
    findings, seconds = checked([packages], interpreter)
    print(f"\nall packages, checked in {seconds:.2f} s, with {len(findings)} findings")
    for finding in findings:
        print(f"  {symbols.sentence(finding)}")
    sys.exit(wrong or bool(findings))


if __name__ == "__main__":
    main()
