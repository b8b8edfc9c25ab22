"""GPU code: that nothing a GPU may read is called cold, that nothing is lost, and that no input is too strange."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.snapshot.fatbins import (
    DEBUG,
    LINUX,
    LZ4,
    ZSTD,
    Code,
    Section,
    check_cover,
    code,
    container,
    cuobjdump,
    extents_of,
    extents_of_file,
    installed,
    library,
    says_itself,
    with_holes,
)

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import PIECE
from packhorse.snapshot.gpu import Extent

FATBIN, RELOCATABLE, MIXED = b".nv_fatbin", b"__nv_relfatbin", b".cask_resource"
TEXT = Section(b".text", b"\x90" * 5000)


def _labels(content: bytes, path: Path) -> dict[str, str]:
    """Which GPUs need each code of a library, by its name; a name may not occur twice."""
    labels: dict[str, str] = {}
    for offset, length, gpus in extents_of(content, path):
        if gpus:
            name = content[offset : offset + length].split(b" ")[0].decode()
            assert name not in labels
            labels[name] = gpus
    return labels


def _needed(names: str, capability: int, path: Path, section: bytes = FATBIN) -> str:
    """Those of the codes of one container that a GPU needs."""
    content = library(TEXT, Section(section, container(*(code(name) for name in names.split()))))
    labels = _labels(content, path)
    return " ".join(name for name in names.split() if gpu.needed(labels.get(name, ""), capability))


# The rules

RULES = [
    # the cubin of its own capability
    ("sm_75 sm_80 sm_86 sm_90", 75, "sm_75"),
    ("sm_75 sm_80 sm_86 sm_90", 90, "sm_90"),
    # the highest minor that is not above its own
    ("sm_75 sm_80 sm_86 sm_90", 89, "sm_86"),
    ("sm_75 sm_80 sm_90", 86, "sm_80"),
    ("sm_100 sm_103 sm_120", 103, "sm_103"),
    ("sm_120 sm_121", 121, "sm_121"),
    # no other major, no higher minor
    ("sm_86 sm_90", 80, ""),
    ("sm_80 sm_90", 100, ""),
    ("sm_50 sm_60 sm_70", 61, "sm_60"),
    # an architecture-specific cubin for that GPU alone, and the ordinary one beside it stays
    ("sm_90a", 90, "sm_90a"),
    ("sm_80 sm_90 sm_90a", 90, "sm_90 sm_90a"),
    ("sm_100a sm_100", 103, "sm_100"),
    ("sm_100a", 103, ""),
    # a family-specific one for its family
    ("sm_100f sm_120f", 100, "sm_100f"),
    ("sm_100f sm_120f", 103, "sm_100f"),
    ("sm_103f sm_100", 100, "sm_100"),
    ("sm_103f sm_100", 103, "sm_103f"),
    ("sm_120f sm_121", 121, "sm_121"),
    ("sm_100 sm_100f sm_100a", 100, "sm_100 sm_100f sm_100a"),
    ("sm_100 sm_103a", 103, "sm_100 sm_103a"),
    # whether a later GPU is of the family is not known
    ("sm_80 sm_86f", 89, "sm_80 sm_86f"),
    ("sm_100f sm_103f", 107, "sm_100f sm_103f"),
    # PTX from its own capability on, unless there is an ordinary cubin for exactly this one
    ("sm_80 sm_90 compute_90", 90, "sm_90"),
    ("sm_80 sm_90 compute_90", 80, "sm_80"),
    ("sm_80 sm_90 compute_90", 100, "compute_90"),
    ("sm_80 compute_86", 86, "sm_80 compute_86"),
    ("sm_80 compute_86", 89, "sm_80 compute_86"),
    ("sm_90a compute_90", 90, "sm_90a compute_90"),
    ("sm_100f compute_100", 100, "sm_100f compute_100"),
    ("compute_75 compute_80", 90, "compute_75 compute_80"),
    # all PTX of a container together
    ("sm_86 compute_80 compute_86", 80, "compute_80 compute_86"),
    ("sm_80 sm_86 compute_80 compute_86", 80, "sm_80"),
    ("compute_90a sm_80", 90, "compute_90a"),
    ("compute_120f", 90, ""),
    # Tegra and desktop GPUs are not known to run each other's code
    ("sm_80 sm_86 sm_87", 87, "sm_87"),
    ("sm_80 sm_87", 89, "sm_80 sm_87"),
    ("sm_80 sm_86", 87, "sm_80 sm_86"),
    # Thor is 10.1 or 11.0, by the age of its driver
    ("sm_101 sm_90", 110, "sm_101"),
    ("sm_110 sm_90", 101, "sm_110"),
    ("sm_110 sm_90", 90, "sm_90"),
    # a GPU of a major that is not known here may need anything
    ("sm_75 sm_80 sm_90 sm_90a sm_120 compute_120", 130, "sm_75 sm_80 sm_90 sm_90a sm_120 compute_120"),
    ("sm_75 sm_80", 200, "sm_75 sm_80"),
]


@pytest.mark.parametrize("section", [FATBIN, RELOCATABLE, MIXED])
@pytest.mark.parametrize(("names", "capability", "expected"), RULES)
def test_a_gpu_needs(names: str, capability: int, expected: str, section: bytes, tmp_path: Path) -> None:
    assert _needed(names, capability, tmp_path / "lib.so", section) == expected


def test_containers_are_judged_one_by_one(tmp_path: Path) -> None:
    content = library(
        Section(FATBIN, container(code("sm_80"), code("sm_86")) + container(code("sm_75"), code("sm_100a"))),
        TEXT,
        Section(RELOCATABLE, container(code("sm_90"), code("compute_90"))),
    )
    assert _labels(content, tmp_path / "lib.so") == {
        "sm_80": "80-85,87-88",
        "sm_86": "86-89",
        "sm_75": "75-79",
        "sm_100a": "100",
        "sm_90": "90-99",
        "compute_90": "91-",
    }


def test_only_payloads_are_cold_and_every_byte_is_in_one_extent(tmp_path: Path) -> None:
    entries = [
        code("sm_80"),
        code("sm_86", header_size=112),
        code("sm_90"),
        code("compute_90", header_size=80),
    ]
    content = library(TEXT, Section(FATBIN, container(*entries)), TEXT._replace(name=b".data"))
    extents = extents_of(content, tmp_path / "lib.so")
    check_cover(extents, len(content))
    assert [content[offset : offset + length] for offset, length, gpus in extents if gpus] == [
        entry.payload for entry in entries
    ]


def test_a_payload_that_is_not_worth_a_hole_is_needed_and_its_neighbours_become_one_extent(
    tmp_path: Path,
) -> None:
    least = gpu.LEAST_COLD
    content = library(
        Section(FATBIN, container(code("sm_80", least - 1), code("sm_86", 0), code("sm_90", least)))
    )
    extents = extents_of(content, tmp_path / "lib.so")
    check_cover(extents, len(content))
    assert [extent.gpus for extent in extents] == ["", "90-99", ""]


@pytest.mark.parametrize("flags", [LINUX | LZ4, LINUX | ZSTD])
def test_compressed_code_is_like_other_code(flags: int, tmp_path: Path) -> None:
    content = library(Section(FATBIN, container(code("sm_80", flags=flags), code("compute_90", flags=flags))))
    assert _labels(content, tmp_path / "lib.so") == {"sm_80": "80-89", "compute_90": "90-"}


@pytest.mark.parametrize(
    "strange",
    [
        code("sm_86", kind=3),
        code("sm_86", kind=16),
        code("sm_86", flags=LINUX | DEBUG),
        code("sm_86", flags=LINUX | 1 << 40),
        code("sm_86a", flags=LINUX | 1 << 21),
        code("sm_9"),
        code("sm_1000"),
    ],
)
def test_code_of_an_unknown_kind_is_needed_and_makes_no_other_code_cold(
    strange: Code, tmp_path: Path
) -> None:
    content = library(Section(FATBIN, container(code("sm_80"), strange, code("sm_90"))))
    assert _labels(content, tmp_path / "lib.so") == {"sm_80": "80-89", "sm_90": "90-99"}


def test_a_label_that_would_be_long_says_that_all_need_it(tmp_path: Path) -> None:
    every_second = [code(f"sm_{number}", 8) for number in range(20, 600, 2)]
    assert _labels(
        library(Section(FATBIN, container(code("compute_20"), *every_second[:40]))), tmp_path / "a.so"
    ) == {"compute_20": ",".join(str(number) for number in range(21, 99, 2)) + ",99-"}
    assert (
        _labels(library(Section(FATBIN, container(code("compute_20"), *every_second))), tmp_path / "b.so")
        == {}
    )


# What is malformed

GOOD = container(code("sm_70"))


@pytest.mark.parametrize(
    "bad",
    [
        container(code("sm_80"), code("sm_90", version=0x0102)),
        container(code("sm_80"), code("sm_90", says=1 << 40)),
        container(code("sm_80"), code("sm_90", says=3 * gpu.LEAST_COLD)),
        container(code("sm_80"), code("sm_90", says=2 * gpu.LEAST_COLD - 8)),
        container(code("sm_80"), code("sm_90", header_size=56)),
        container(*(code("sm_80", 0) for _ in range(600)), code("sm_90")),
    ],
    ids=["version", "too long", "longer", "shorter", "short header", "too many"],
)
def test_a_malformed_container_is_needed_and_the_others_stay_cold(bad: bytes, tmp_path: Path) -> None:
    content = library(TEXT, Section(FATBIN, GOOD + bad + container(code("sm_75"))))
    assert _labels(content, tmp_path / "lib.so") == {"sm_70": "70-79", "sm_75": "75-79"}


@pytest.mark.parametrize(
    "bad",
    [
        container(code("sm_80"), magic=0x466243B1),
        container(code("sm_80"), version=2),
        container(code("sm_80"), says=1 << 63),
        container(code("sm_80"), says=20 * gpu.LEAST_COLD),
        b"\0" * 24,
        container(code("sm_80"))[:12],
    ],
    ids=["magic", "version", "too long", "longer", "zeros", "cut off"],
)
def test_after_what_is_no_container_the_rest_of_the_section_is_needed(bad: bytes, tmp_path: Path) -> None:
    content = library(Section(FATBIN, GOOD + bad + container(code("sm_75"))), Section(RELOCATABLE, GOOD))
    extents = extents_of(content, tmp_path / "lib.so")
    check_cover(extents, len(content))
    assert [extent.gpus for extent in extents] == ["", "70-79", "", "70-79", ""]


@pytest.mark.parametrize("between", [0, 1, 7, 4076, 4092, 4093, 4096, 4097, 12_283, 12_284, 3 << 20])
def test_containers_are_found_between_other_things(between: int, tmp_path: Path) -> None:
    other = bytes(between)
    content = library(
        TEXT, Section(MIXED, other + GOOD + other + container(code("sm_80")) + b"\x50\xed\x55\xba\2" + other)
    )
    assert _labels(content, tmp_path / "lib.so") == {"sm_70": "70-79", "sm_80": "80-89"}


@pytest.mark.parametrize(
    "bad",
    [
        container(code("sm_80"), version=0x101),
        container(code("sm_80"), says=1 << 63),
        container(code("sm_80"), says=20 * gpu.LEAST_COLD),
        container(code("sm_80"))[:12],
    ],
    ids=["version", "too long", "longer", "cut off"],
)
def test_after_what_only_begins_like_a_container_the_rest_of_the_section_is_needed(
    bad: bytes, tmp_path: Path
) -> None:
    content = library(Section(MIXED, GOOD + b"..." + bad + container(code("sm_75"))), Section(FATBIN, GOOD))
    extents = extents_of(content, tmp_path / "lib.so")
    check_cover(extents, len(content))
    assert [extent.gpus for extent in extents] == ["", "70-79", "", "70-79", ""]


def test_a_container_of_countless_entries_takes_little_memory(tmp_path: Path) -> None:
    entry = code("sm_80", 0)
    path = tmp_path / "lib.so"
    path.write_bytes(library(Section(FATBIN, container(entry._replace(payload=entry.header * 100_000)))))
    tracemalloc.start()
    try:
        assert extents_of_file(path) == [Extent(0, path.stat().st_size, "")]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_library_of_countless_sections_takes_no_time(tmp_path: Path) -> None:
    """Each is compared with its neighbours, not with all others."""
    content = library(*[Section(FATBIN, b".")] * 60_000)
    assert extents_of(content, tmp_path / "lib.so") == [Extent(0, len(content), "")]


FATBIN_SECTION = Section(FATBIN, GOOD)
LIBRARY = library(TEXT, FATBIN_SECTION)


def _moved_to_the_end(content: bytes, section: bytes) -> bytes:
    """The library with its second section after everything else."""
    table = struct.unpack_from("<Q", content, 40)[0]
    return _patched(content, table + 2 * 64 + 24, struct.pack("<Q", len(content))) + section


def _patched(content: bytes, offset: int, patch: bytes) -> bytes:
    return content[:offset] + patch + content[offset + len(patch) :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        b"\x7fELF\x02\x01",
        b"PK\x03\x04" * 5000,
        GOOD,
        library(TEXT),
        LIBRARY[:64],
        LIBRARY[:-1],
        LIBRARY[:9000],
        _patched(LIBRARY, 4, b"\x01"),
        _patched(LIBRARY, 5, b"\x02"),
        _patched(LIBRARY, 40, b"\xff" * 8),
        _patched(LIBRARY, 58, b"\x28\0"),
        _patched(LIBRARY, 60, b"\0\0"),
        _patched(LIBRARY, 60, b"\xff\xff"),
        _patched(LIBRARY, 62, b"\xff\xff"),
        library(TEXT, FATBIN_SECTION._replace(kind=8)),
        library(TEXT, FATBIN_SECTION._replace(flags=0x800)),
        library(TEXT, FATBIN_SECTION._replace(says=1 << 62)),
        library(TEXT._replace(says=6000), FATBIN_SECTION),
        library(FATBIN_SECTION._replace(says=len(GOOD) + 17), Section(RELOCATABLE, GOOD)),
        library(FATBIN_SECTION._replace(name=b".nv_fatbin2"), TEXT),
        library(TEXT, FATBIN_SECTION._replace(says=len(GOOD) - 8)),
        _moved_to_the_end(LIBRARY, GOOD)[:-8],
    ],
    ids=[
        *(
            "empty",
            "four bytes",
            "six bytes",
            "zip",
            "bare container",
            "no GPU code",
            "header alone",
            "cut at the end",
        ),
        *(
            "cut in the code",
            "32 bits",
            "big-endian",
            "table elsewhere",
            "other table",
            "no sections",
            "too many",
        ),
        *(
            "no names",
            "no bytes",
            "compressed",
            "too long",
            "overlapped",
            "overlapping",
            "another name",
            "too short",
        ),
        "beyond the end",
    ],
)
def test_other_files_are_one_extent_that_all_need(content: bytes, tmp_path: Path) -> None:
    assert extents_of(content, tmp_path / "lib.so") == ([Extent(0, len(content), "")] if content else [])


def test_a_section_may_lie_after_the_table_of_sections(tmp_path: Path) -> None:
    content = _moved_to_the_end(LIBRARY, GOOD)
    assert [extent.gpus for extent in extents_of(content, tmp_path / "lib.so")] == ["", "70-79"]


def test_a_file_that_cannot_be_read_or_shrinks_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(LIBRARY)
    writing = os.open(path, os.O_WRONLY)
    assert gpu.extents(writing, len(LIBRARY)) == [Extent(0, len(LIBRARY), "")]
    os.close(writing)
    reading = os.open(path, os.O_RDONLY)
    check_cover(gpu.extents(reading, 2 * len(LIBRARY)), 2 * len(LIBRARY))
    os.truncate(path, 5000)
    assert gpu.extents(reading, len(LIBRARY)) == [Extent(0, len(LIBRARY), "")]
    os.close(reading)


ARCHITECTURES = st.sampled_from([50, 61, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121, 130])
CODES = st.builds(
    lambda prefix, architecture, variant, size, header: code(
        f"{prefix}_{architecture}{variant}", size, header_size=header
    ),
    st.sampled_from(["sm", "compute"]),
    ARCHITECTURES,
    st.sampled_from(["", "a", "f"]),
    st.sampled_from([0, 8, 4088, 4096, 5000]),
    st.sampled_from([64, 80, 112]),
)


@settings(max_examples=200)
@given(st.lists(st.lists(CODES, max_size=6), max_size=4), st.lists(st.lists(CODES, max_size=6), max_size=2))
def test_whatever_is_in_the_containers_headers_are_needed_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, executable: list[list[Code]], relocatable: list[list[Code]]
) -> None:
    content = library(
        TEXT,
        Section(FATBIN, b"".join(container(*entries) for entries in executable)),
        Section(RELOCATABLE, b"".join(container(*entries) for entries in relocatable)),
    )
    extents = extents_of(content, tmp_path_factory.getbasetemp() / "lib.so")
    check_cover(extents, len(content))
    payloads = Counter(entry.payload for entries in (*executable, *relocatable) for entry in entries)
    cold = Counter(content[offset : offset + length] for offset, length, gpus in extents if gpus)
    assert cold <= payloads


@settings(max_examples=200)
@given(st.lists(CODES, min_size=1, max_size=8), ARCHITECTURES)
def test_whatever_gpu_it_is_a_code_for_exactly_it_is_needed(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Code], capability: int
) -> None:
    content = library(Section(FATBIN, container(*entries)))
    for offset, length, gpus in extents_of(content, tmp_path_factory.getbasetemp() / "lib.so"):
        if not gpu.needed(gpus, capability):
            name = content[offset : offset + length].split(b" ")[0].decode()
            assert not re.fullmatch(rf"sm_{capability}[af]?", name)


# Labels


def test_a_label_is_read_as_a_list_of_capabilities_and_ranges() -> None:
    assert [number for number in range(10, 130) if gpu.needed("52,80-85,121-", number)] == [
        52,
        *range(80, 86),
        *range(121, 130),
    ]
    assert all(gpu.needed("", number) for number in range(10, 130))


@pytest.mark.parametrize("label", ["x", "80-x", "-", "80,,90", "75-79;", "sm_80", "\0"])
def test_what_a_label_does_not_say_is_needed(label: str) -> None:
    assert gpu.needed(label, 90)


@pytest.mark.parametrize(
    ("text", "capabilities"),
    [
        ("all", None),
        (" all ", None),
        ("sm_90", (90,)),
        ("sm_90a", (90,)),
        ("sm_120, sm_86,sm_86", (86, 120)),
        ("sm_103f", (103,)),
    ],
)
def test_gpus_are_named_as_the_compiler_names_them(text: str, capabilities: tuple[int, ...] | None) -> None:
    assert gpu.parse_gpus(text) == capabilities


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sm_",
        "sm_9",
        "sm_0090",
        "sm_90b",
        "90",
        "9.0",
        "H100",
        "sm_90,",
        "sm_90;sm_80",
        "all,sm_90",
        "SM_90",
        "sm_٩٠",
    ],
)
def test_a_name_that_is_none_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r'names no GPU: write "all", or architectures such as "sm_90"'):
        gpu.parse_gpus(text)


# Cutting

EXTENTS = st.lists(
    st.tuples(st.integers(1, 3000), st.sampled_from(["", "75-79", "90-99", "91-"])), max_size=30
)


def _in_order(parts: list[tuple[int, str]]) -> list[Extent]:
    position, extents = 0, []
    for length, gpus in parts:
        extents.append(Extent(position, length, gpus))
        position += length
    return extents


@given(EXTENTS, st.integers(1, 2000))
def test_each_byte_is_in_one_frame_with_others_that_the_same_gpus_need(
    parts: list[tuple[int, str]], piece: int
) -> None:
    extents = _in_order(parts)
    cut = gpu.pieces(extents, piece)
    runs = sorted((offset, length, frame.gpus) for frame in cut for offset, length in frame.runs)
    joined: list[Extent] = []
    for offset, length, gpus in runs:
        if joined and joined[-1].offset + joined[-1].length == offset and joined[-1].gpus == gpus:
            joined[-1] = joined[-1]._replace(length=joined[-1].length + length)
        else:
            joined.append(Extent(offset, length, gpus))
    expected: list[Extent] = []
    for extent in extents:
        if expected and expected[-1].gpus == extent.gpus:
            expected[-1] = expected[-1]._replace(length=expected[-1].length + extent.length)
        else:
            expected.append(extent)
    assert joined == expected


@given(EXTENTS, st.integers(1, 2000))
def test_frames_are_full_but_for_the_last_of_each_kind_and_in_the_order_of_the_file(
    parts: list[tuple[int, str]], piece: int
) -> None:
    cut = gpu.pieces(_in_order(parts), piece)
    sizes: dict[str, list[int]] = {}
    for frame in cut:
        assert frame.runs == sorted(frame.runs)
        sizes.setdefault(frame.gpus, []).append(sum(length for _, length in frame.runs))
    for lengths in sizes.values():
        assert all(length == piece for length in lengths[:-1])
        assert 0 < lengths[-1] <= piece
    first = [frame.runs[0] for frame in cut]
    assert first == sorted(first)


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 12345])
def test_a_file_without_gpu_code_is_cut_as_every_other_large_file(size: int) -> None:
    ours = [[tuple(run) for run in frame.runs] for frame in gpu.pieces([Extent(0, size, "")], PIECE)]
    assert ours == [
        [(span.offset, span.length) for span in spans] for spans, _ in frames.cut([(b"lib.so", size)])
    ]


# A real library


linux = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA publishes its libraries for Linux only")


@pytest.fixture(scope="module")
def nvjpeg() -> Path:
    """NVIDIA's JPEG library: 6 MB, with code for ten architectures and PTX."""
    return installed("nvidia-nvjpeg", "libnvjpeg.so")


@linux
def test_what_is_cold_in_a_real_library_is_what_it_says_itself_and_what_cuobjdump_lists(
    nvjpeg: Path, tmp_path: Path
) -> None:
    content = nvjpeg.read_bytes()
    extents = extents_of_file(nvjpeg)
    check_cover(extents, len(content))
    listed = Counter(
        (kind, int(number))
        for option in ("-lelf", "-lptx")
        for number, kind in re.findall(
            r"\.sm_(\d+)[af]?\.(cubin|ptx)", cuobjdump(option, nvjpeg, cwd=tmp_path)
        )
    )
    found: Counter[tuple[str, int]] = Counter()
    for offset, length, gpus in extents:
        if not gpus:
            continue
        kind, architecture = says_itself(content[offset : offset + length])
        found[kind, architecture] += 1
        assert gpu.needed(gpus, architecture) or kind == "ptx"
        assert not gpu.needed(gpus, architecture - 10)
    assert found <= listed
    assert found.total() > 50


@linux
def test_nvidias_own_reader_finds_the_same_code_for_a_gpu_where_the_rest_is_zeros(
    nvjpeg: Path, tmp_path: Path
) -> None:
    cubins, ptx = (
        set(re.findall(r"\.sm_(\d+)", cuobjdump(option, nvjpeg, cwd=tmp_path)))
        for option in ("-lelf", "-lptx")
    )
    assert len(cubins) >= 8
    for number in (
        cubins - ptx
    ):  # cuobjdump expands all that names the architecture it is asked for, PTX as well
        sparse = tmp_path / nvjpeg.name
        assert with_holes(nvjpeg, sparse, int(number)) > 1_000_000
        extracted = []
        for source in (nvjpeg, sparse):
            directory = tmp_path / f"{number}-{len(extracted)}"
            directory.mkdir()
            cuobjdump("-arch", f"sm_{number}", "-xelf", "all", source, cwd=directory)
            extracted.append({path.name: path.read_bytes() for path in directory.iterdir()})
        assert extracted[0] == extracted[1]
        assert len(extracted[0]) > 5


@linux
@settings(max_examples=300)
@given(data=st.data())
def test_a_real_library_with_bytes_changed_anywhere_in_its_headers_is_read(
    data: st.DataObject, nvjpeg: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(nvjpeg.read_bytes())
    table = struct.unpack_from("<Q", content, 40)[0]
    headers = [extent for extent in extents_of_file(nvjpeg) if not extent.gpus and extent.length < 200]
    places = st.one_of(
        st.integers(0, 63),
        st.integers(table, len(content) - 1),
        st.sampled_from(headers).flatmap(
            lambda extent: st.integers(extent.offset, extent.offset + extent.length - 1)
        ),
    )
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.so"
    extents = extents_of(bytes(content), path)
    check_cover(extents, len(content))
    if bytes(content[:64]) == nvjpeg.read_bytes()[:64]:
        first, last = extents[0], extents[-1]
        assert not first.gpus
        assert not last.gpus


# The GPUs of this machine: untested on a real GPU; these libraries answer as NVIDIA's reference says

NVML = """
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(0x100000000UL + index);
    return LAST == 2 && index == 2 ? 15 : 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    unsigned long index = (unsigned long)device - 0x100000000UL;
    if (index > 2) return 2;
    *major = index == 1 ? 12 : 8;
    *minor = index == 1 ? 0 : 9;
    return LAST == 1 && index == 2 ? 15 : 0;
}
"""
CUDA = """
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 7; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
    return device == 7 ? 0 : 101;
}
"""


def _compiled(source: str, path: Path, *defines: str) -> str:
    flags = [f"-D{define}" for define in defines]
    subprocess.run(
        ["cc", "-shared", "-fPIC", *flags, "-o", path, "-x", "c", "-"], input=source, text=True, check=True
    )
    return str(path)


def test_the_gpus_of_a_machine_are_asked_of_nvml(tmp_path: Path) -> None:
    nvml = _compiled(NVML, tmp_path / "libnvml.so", "INIT=0", "LAST=0")
    assert gpu.detect(nvml, "no-such-library.so") == [89, 120]


@pytest.mark.parametrize(
    "defines",
    [("INIT=9", "LAST=0"), ("INIT=0", "LAST=1"), ("INIT=0", "LAST=2")],
    ids=["no driver", "a lost GPU", "no handle"],
)
def test_where_nvml_has_no_answer_the_driver_is_asked(defines: tuple[str, ...], tmp_path: Path) -> None:
    nvml = _compiled(NVML, tmp_path / "libnvml.so", *defines)
    cuda = _compiled(CUDA, tmp_path / "libcuda.so")
    assert gpu.detect(nvml, cuda) == [90]
    assert gpu.detect("no-such-library.so", cuda) == [90]


def test_where_nothing_answers_there_are_no_gpus(tmp_path: Path) -> None:
    other = _compiled("int other(void) { return 0; }", tmp_path / "libother.so")
    (tmp_path / "text.so").write_text("no library")
    assert gpu.detect("no-such-library.so", "no-such-library.so") == []
    assert gpu.detect(other, other) == []
    assert gpu.detect(str(tmp_path / "text.so"), other) == []
