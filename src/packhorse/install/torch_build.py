"""Which torch an environment has and how it was built: its version, its CUDA or ROCm, its C++ ABI.

Read from files, so that it takes milliseconds and needs no GPU; torch is imported only where they do not tell.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from packhorse.install.interpreter import Interpreter

_ASSIGNMENT = re.compile(r"^(__version__|cuda|hip|rocm)\b[^=\n]*=\s*(.+?)\s*$", re.MULTILINE)
_LOCAL_CUDA = re.compile(r"\+cu(\d+)(\d)$")
_ERROR = {
    "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE": True,
    "_ZN3c105ErrorC2ENS_14SourceLocationESs": False,
}
"""The constructor c10::Error(SourceLocation, std::string), by whether std::string is that of the C++11 ABI."""
_ASK_ABI = "import torch; print(torch._C._GLIBCXX_USE_CXX11_ABI)"
_PATIENCE = 300.0


class Torch(msgspec.Struct, frozen=True):
    """A torch: `cuda` and `rocm` are versions ("12.4"), "" where it was built without.

    `cxx11_abi` is what `torch.compiled_with_cxx11_abi()` would say; None where that could not be found out.
    """

    version: str
    cuda: str = ""
    rocm: str = ""
    cxx11_abi: bool | None = None
    directory: str = ""

    @property
    def minor(self) -> str:
        """Major and minor version: "2.6"."""
        return ".".join(self.version.split("+")[0].split(".")[:2])


TELLING = ("torch/__init__.py", "torch/version.py", "torch/lib/libc10.so")
"""The files of a torch that tell how it was built: 2 MB of a wheel that may have a thousand."""


def find(
    places: Iterable[Path], interpreter: Interpreter, environ: Mapping[str, str], *, ask: bool = True
) -> Torch | None:
    """The torch in the first of `places` (entries of sys.path) that has one.

    `environ` is the environment in which it can be imported, should its files not tell the ABI; it is not where
    `ask` is false.
    """
    for place in places:
        directory = place / "torch"
        if not (directory / "__init__.py").is_file():
            continue
        known = _assigned(directory / "version.py")
        version = known.get("__version__") or _metadata_version(place)
        if not version:
            continue
        local = _LOCAL_CUDA.search(version)
        cuda = known.get("cuda") or (f"{local[1]}.{local[2]}" if local else "")
        rocm = known.get("rocm") or known.get("hip") or ""
        abi = _abi(directory)
        if abi is None and ask:
            abi = _ask(interpreter, environ)
        return Torch(version, cuda, rocm, abi, str(directory))
    return None


def _assigned(file: Path) -> dict[str, str]:
    """The texts that a torch/version.py assigns, without running it."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    values = {}
    for name, source in _ASSIGNMENT.findall(text):
        try:
            value = ast.literal_eval(source)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, str):
            values[name] = value
    return values


def _metadata_version(place: Path) -> str:
    found = next(iter(importlib.metadata.distributions(name="torch", path=[str(place)])), None)
    return found.version if found is not None else ""


def _abi(directory: Path) -> bool | None:
    """Told by libc10: c10::Error takes a std::string, which has another name in each ABI."""
    from packhorse.install import elf

    library = elf.open_library(directory / "lib" / "libc10.so")
    if library is not None:
        with library:
            for symbol, cxx11 in _ERROR.items():
                if symbol in library.defined:
                    return cxx11
    return None


def _ask(interpreter: Interpreter, environ: Mapping[str, str]) -> bool | None:
    try:
        asked = subprocess.run(
            [interpreter.path, "-c", _ASK_ABI],
            env=dict(environ),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return {"True": True, "False": False}.get(asked.stdout.strip().rpartition("\n")[2])
