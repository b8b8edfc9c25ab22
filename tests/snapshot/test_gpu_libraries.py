"""GPU code in the large libraries of an environment: every payload that is called cold is one that NVIDIA's reader lists.

`make test-gpu-code` runs this: it installs the libraries first, into the directory that GPU_LIBRARIES names.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from tests.snapshot.fatbins import check_cover, cuobjdump, extents_of_file, says_itself, with_holes

from packhorse.snapshot import gpu

pytestmark = [
    pytest.mark.gpu_code,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA publishes its libraries for Linux only"),
]

LIBRARIES = [
    "libtorch_cuda.so",
    "libnccl.so.2",
    "libcusparse.so.12",
    "libcudnn_adv.so.9",
    "libcudnn_ops.so.9",
]
GPUS = (75, 86, 90, 100, 120)
"""One of each kind that these libraries have code for."""


def _found(name: str) -> Path:
    [path] = Path(os.environ["GPU_LIBRARIES"]).resolve().rglob(name)
    return path


def _listed(path: Path, work: Path) -> Counter[tuple[str, int]]:
    """Kind and architecture of all the code that NVIDIA's reader finds, containers that are linked again included."""
    return Counter(
        (kind, int(number))
        for option in ("-lelf", "-lptx")
        for number, kind in re.findall(
            r"\.sm_(\d+)[af]?\.(cubin|ptx)", cuobjdump("-all", option, path, cwd=work)
        )
    )


def _cold(path: Path) -> Iterator[tuple[int, str, int]]:
    """Where each payload lies that is cold for some GPU, its kind and its architecture, which must be one that needs it."""
    extents = extents_of_file(path)
    check_cover(extents, path.stat().st_size)
    with path.open("rb") as library:
        for offset, length, gpus in extents:
            if gpus:
                library.seek(offset)
                kind, architecture = says_itself(library.read(length))
                assert kind != "unknown", offset
                assert kind == "ptx" or gpu.needed(gpus, architecture), (offset, gpus, architecture)
                yield offset, kind, architecture


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_payload_that_is_cold_for_some_gpu_is_one_that_cuobjdump_lists_and_names_another(
    name: str, tmp_path: Path
) -> None:
    path = _found(name)
    cold = Counter((kind, architecture) for _, kind, architecture in _cold(path))
    listed = _listed(path, tmp_path)
    assert cold <= listed, cold - listed
    assert cold.total() > 100
    sparse = tmp_path / name
    for capability in GPUS:
        assert with_holes(path, sparse, capability) > 1_000_000
    sparse.unlink()


def test_code_that_cuobjdump_does_not_list_is_for_the_gpus_that_it_is_called_needed_by() -> None:
    path = _found("libcudnn_engines_precompiled.so.9")
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".cask_resource")
        start, end = section["sh_offset"], section["sh_offset"] + section["sh_size"]
    assert sum(start <= offset < end for offset, _, _ in _cold(path)) > 100
