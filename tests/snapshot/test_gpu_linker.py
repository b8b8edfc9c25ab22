"""GPU code: that what NVIDIA's own linker picks for a GPU is never called cold.

nvJitLink chooses from a container as the driver does when it links at load, and needs no GPU for it.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.snapshot.fatbins import Section, extents_of, installed, library, with_holes

from packhorse.snapshot import gpu

pytestmark = [
    pytest.mark.gpu_code,
    pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA publishes its tools for Linux only"),
]

ARCHITECTURES = (
    *("75", "80", "86", "87", "88", "89", "90", "90a", "100", "100a", "100f", "103", "103a", "103f"),
    *("110", "110a", "110f", "120", "120a", "120f", "121", "121a", "121f"),
)
CODES = [f"{kind}_{architecture}" for architecture in ARCHITECTURES for kind in ("sm", "compute")]
_FATBIN = 4  # NVJITLINK_INPUT_FATBIN


def _run(program: str, *arguments: str | Path) -> None:
    subprocess.run([installed("nvidia-cuda-nvcc", program), *arguments], check=True, capture_output=True)


def _mark(code: str) -> bytes:
    """What only this code has in it, and large enough to be worth a hole."""
    return random.Random(code).randbytes(2 * gpu.LEAST_COLD)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one file for each of CODES: relocatable cubins and PTX, each with its mark."""
    directory = tmp_path_factory.mktemp("compiled")
    for code in CODES:
        kind, _, architecture = code.partition("_")
        mark = ", ".join(map(str, _mark(code)))
        source = directory / (f"{architecture}.ptx" if kind == "sm" else code)
        source.write_text(
            f".version 9.0\n.target sm_{architecture}\n.address_size 64\n"
            f".visible .global .align 4 .b8 mark[{2 * gpu.LEAST_COLD}] = {{{mark}}};\n"
            ".visible .entry kernel() { ret; }\n"
        )
        if kind == "sm":
            _run("ptxas", "-c", f"-arch=sm_{architecture}", source, "-o", directory / code)
    return directory


@pytest.fixture(scope="session")
def linker() -> ctypes.CDLL:
    """nvJitLink, whose functions answer 0 for success."""
    return ctypes.CDLL(str(installed("nvidia-nvjitlink", "libnvJitLink.so")))


def _linked(linker: ctypes.CDLL, fatbin: bytes, architecture: str) -> bytes | None:
    """The cubin that is linked from a container for a GPU; None where nothing in it fits."""
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(f"-arch=sm_{architecture}".encode())
    assert linker.nvJitLinkCreate(ctypes.byref(handle), 1, options) == 0
    try:
        if linker.nvJitLinkAddData(handle, _FATBIN, fatbin, ctypes.c_size_t(len(fatbin)), b"library"):
            return None
        if linker.nvJitLinkComplete(handle):
            return None
        assert linker.nvJitLinkGetLinkedCubinSize(handle, ctypes.byref(size)) == 0
        cubin = ctypes.create_string_buffer(size.value)
        assert linker.nvJitLinkGetLinkedCubin(handle, cubin) == 0
        return cubin.raw
    finally:
        linker.nvJitLinkDestroy(ctypes.byref(handle))


@settings(max_examples=400)
@given(
    codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=8, unique=True),
    target=st.sampled_from(ARCHITECTURES),
    compress=st.booleans(),
)
def test_what_the_linker_picks_for_a_gpu_is_needed_and_the_rest_may_be_zeros(
    compiled: Path, linker: ctypes.CDLL, codes: list[str], target: str, compress: bool
) -> None:
    path = compiled / "container"
    images = []
    for code in codes:
        kind, _, architecture = code.partition("_")
        kind = "elf" if kind == "sm" else "ptx"
        images.append(f"--image3=kind={kind},sm={architecture},file={compiled / code}")
    mode = "--compress-all" if compress else "--compress=false"
    _run("fatbinary", "-64", "-c", mode, f"--create={path}", *images)
    fatbin = path.read_bytes()
    linked = _linked(linker, fatbin, target)
    if linked is None:
        return
    picked = [code for code in codes if _mark(code) in linked]
    assert len(picked) == 1

    capability = int(re.sub("[af]", "", target))
    content = library(Section(b".nv_fatbin", fatbin))
    source, sparse = compiled / "library.so", compiled / "sparse.so"
    extents = extents_of(content, source)
    assert sum(bool(extent.gpus) for extent in extents) == len(codes)
    with_holes(source, sparse, capability)
    start = content.index(fatbin)
    assert _linked(linker, sparse.read_bytes()[start : start + len(fatbin)], target) == linked, picked
