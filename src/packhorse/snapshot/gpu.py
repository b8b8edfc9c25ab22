"""GPU code in shared libraries: which ranges of a file only some GPUs read, and how such a file is cut.

Promises to call a range cold for a GPU only where NVIDIA's published rules say that its driver picks something else;
whatever is malformed, unknown or unsure counts as needed by all. Decodes headers only, and knows no manifest. The
rules, the layout of the containers and the sources of both are in `docs/design/010-gpu-code.md`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ctypes import CDLL

LEAST_COLD = 4096
"""A payload of fewer bytes is called needed: it would save less than it costs to list."""
LONGEST_LABEL = 256
"""No label is longer, in characters; real ones have at most some forty."""
NEWEST = 12
"""The newest major compute capability whose rules are known here. A newer GPU needs everything."""

_FULL = (b".nv_fatbin\0", b"__nv_relfatbin\0")
"""The sections that have nothing but containers."""
_MIXED = b".cask_resource\0"
"""One that has other things between them (cuBLASLt, cuSPARSELt, cuDNN)."""
_BEGIN = b"\x50\xed\x55\xba\x01"
"""Of a container: its magic and the first byte of its version."""
_CONTAINER = struct.Struct("<5sBHQ")
"""These, the second byte of the version, size of this header, size of the entries."""
_FIRST_LOOK, _LOOK = 4096, 1 << 20
"""Bytes that are read at once where the next container is looked for: at first, and at most."""
_ENTRY = struct.Struct("<HHIQIIHHIIIQ")
"""Kind, version, size of this header, size of the payload, compressed size, offset of options, minor and major version,
architecture, offset and length of a name, flags."""
_ENTRY_LEAST = 64
_ENTRIES_MOST = 512
"""Of one container; real ones have some twenty."""
_PTX, _CUBIN = 1, 2
_PLAIN, _ARCHITECTURE, _FAMILY = 0, 1 << 20, 1 << 21
"""Flags of a cubin: neither, sm_90a and its kind, sm_100f and its kind."""
_KNOWN_FLAGS = _ARCHITECTURE | _FAMILY | 1 << 24 | 0xA011
"""Also: a cubin of sm_100 or newer, LZ4, zstd, Linux, 64 bits. Not among them: debugging."""

_END = 1000
_COMPATIBLE = frozenset((50, 52, 60, 61, 70, 75, 80, 86, 89, 90, 100, 103, 120, 121))
"""Of these the higher surely run cubins of the lower with the same major. Tegra has no such guarantee."""
_RENAMED = frozenset((101, 110))
"""One GPU (Thor): CUDA 12 calls it 10.1, CUDA 13 calls it 11.0."""


class Extent(NamedTuple):
    """A range of a file: offset and length in bytes, and which GPUs need it, as `needed` reads it.

    `gpus` is empty where every worker needs the range.
    """

    offset: int
    length: int
    gpus: str


class Gathered(NamedTuple):
    """The content of one frame: ranges (offset, length) of one file, in order, that the same GPUs need."""

    gpus: str
    runs: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """In bytes."""
        return sum(length for _, length in self.runs)


class _Entry(NamedTuple):
    """What decides which GPUs read an entry: kind, architecture (90 for sm_90) and variant; 0 where unknown."""

    kind: int
    architecture: int
    variant: int


class _Section(NamedTuple):
    """One that holds containers: start and end in the file, and whether other things lie between them."""

    start: int
    end: int
    mixed: bool


class _MalformedError(Exception):
    """The bytes are not what they should be, or are of a kind that is not known here."""


def extents(descriptor: int, size: int) -> list[Extent]:
    """The ranges of the file of `size` bytes, in order and without gaps; neighbours differ in `gpus`.

    A file without GPU code, or one whose ELF headers are malformed, is one extent that all need. A malformed container
    counts as needed; where one cannot be told from the next, so does the rest of its section. Never raises.
    """
    cold: list[Extent] = []
    try:
        for section in _sections(descriptor, size):
            cold.extend(_cold(descriptor, section))
    except (OSError, _MalformedError):
        cold = []
    return list(_covering(cold, size))


def pieces(extents: Iterable[Extent], piece: int) -> list[Gathered]:
    """The frames of a file with these extents, at most `piece` bytes each, ordered by their first offsets.

    What the same GPUs need is gathered in the order of the file and cut every `piece` bytes; so a file without GPU
    code is cut at the multiples of `piece`. Depends on the extents alone.
    """
    frames: list[Gathered] = []
    current: dict[str, tuple[Gathered, int]] = {}
    for start, size, gpus in extents:
        offset, end = start, start + size
        while offset < end:
            frame, room = current.get(gpus, (None, 0))
            if frame is None or not room:
                frame, room = Gathered(gpus, []), piece
                frames.append(frame)
            length = min(end - offset, room)
            frame.runs.append((offset, length))
            current[gpus] = (frame, room - length)
            offset += length
    return frames


def needed(gpus: str, capability: int) -> bool:
    """Whether a GPU of this compute capability (90 for 9.0) may read what is labelled `gpus`.

    A label lists capabilities and ranges of them: "80-85,90-". True as well for a GPU newer than all that are known
    here, and for a label that cannot be read.
    """
    if not gpus or capability // 10 > NEWEST:
        return True
    try:
        for part in gpus.split(","):
            first, dash, last = part.partition("-")
            if int(first) <= capability and (
                capability <= int(last or _END) if dash else int(first) == capability
            ):
                return True
    except ValueError:
        return True
    return False


def parse_gpus(text: str) -> tuple[int, ...] | None:
    """The compute capabilities that `text` names ("sm_86, sm_90a"), in order; None for "all".

    Raises ValueError, with a sentence, for anything else.
    """
    if text.strip() == "all":
        return None
    capabilities = set()
    for name in text.split(","):
        match = re.fullmatch(r"sm_([1-9][0-9]{1,2})[af]?", name.strip(), re.ASCII)
        if match is None:
            raise ValueError(
                f'{name.strip()!r} names no GPU: write "all", or architectures such as "sm_90" or "sm_86,sm_90".'
            )
        capabilities.add(int(match[1]))
    return tuple(sorted(capabilities))


class Choice(NamedTuple):
    """Whose code comes first: compute capabilities, none where all code is alike; `only`: the rest never comes."""

    gpus: tuple[int, ...] = ()
    only: bool = False


def choice(text: str, environ: Mapping[str, str]) -> Choice:
    """What "all", "auto", "only", "sm_86,sm_90" or "only:sm_90" mean on this machine.

    With CUDA_FORCE_PTX_JIT the driver compiles PTX where there are cubins, so that all code counts. Raises ValueError,
    with a sentence, for any other text.
    """
    only = text == "only" or text.startswith("only:")
    named = text.removeprefix("only").removeprefix(":") or "auto"
    gpus = tuple(detect()) if named == "auto" else parse_gpus(named) or ()
    if environ.get("CUDA_FORCE_PTX_JIT", "0") not in ("", "0"):
        gpus = ()
    return Choice(gpus, only and bool(gpus))


def detect(nvml: str = "libnvidia-ml.so.1", cuda: str = "libcuda.so.1") -> list[int]:
    """The compute capabilities of this machine's GPUs, in order, each once; empty where none is found. Never raises.

    Asks NVML, which only looks; where a container has no NVML it asks the driver, which starts up for it. Neither makes
    a context on a GPU. GPUs that CUDA_VISIBLE_DEVICES hides from programs count as well.
    """
    import ctypes

    for ask, library in ((_ask_nvml, nvml), (_ask_cuda, cuda)):
        try:
            found = ask(ctypes.CDLL(library))
        except (OSError, AttributeError):
            continue
        if found:
            return sorted(found)
    return []


def _ask_nvml(nvml: CDLL) -> set[int]:
    """By NVML; functions as in NVIDIA's NVML API reference, 0 is success."""
    import ctypes

    found = set()
    count, major, minor, device = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if nvml.nvmlInit_v2():
        return set()
    try:
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return set()
        for number in range(count.value):
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(device)):
                return set()  # better no answer than half of one
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
                return set()
            found.add(major.value * 10 + minor.value)
    finally:
        nvml.nvmlShutdown()
    return found


def _ask_cuda(cuda: CDLL) -> set[int]:
    """By the driver API; 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
    import ctypes

    found = set()
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return set()
    for number in range(count.value):
        if (
            cuda.cuDeviceGet(ctypes.byref(device), number)
            or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        ):
            return set()
        found.add(major.value * 10 + minor.value)
    return found


def _covering(cold: Iterable[Extent], size: int) -> Iterator[Extent]:
    """The cold extents, which are in order and have headers between them, and all that lies around them."""
    position = 0
    for extent in cold:
        yield Extent(position, extent.offset - position, "")
        yield extent
        position = extent.offset + extent.length
    if position < size:
        yield Extent(position, size - position, "")


def _read(descriptor: int, length: int, offset: int, end: int) -> bytes:
    """Exactly `length` bytes at `offset`, which lie before `end`."""
    if offset + length > end:
        raise _MalformedError
    read = os.pread(descriptor, length, offset)
    if len(read) != length:
        raise _MalformedError
    return read


def _sections(descriptor: int, size: int) -> list[_Section]:
    """The sections with GPU code, in order (System V ABI, chapter 4, "ELF Header" and "Sections").

    Only of 64-bit little-endian ELF files, and only where nothing else of the file lies in the same bytes.
    """
    header = _read(descriptor, 64, 0, size)
    if header[:6] != b"\x7fELF\x02\x01":
        return []
    table, entry_size, count, names = struct.unpack("<40xQ10xHHH", header)
    if entry_size != 64 or names >= count:
        return []
    sections = list(struct.iter_unpack("<IIQQQQIIQQ", _read(descriptor, 64 * count, table, size)))
    strings = _read(descriptor, min(sections[names][5], 1 << 20), sections[names][4], size)
    found: list[_Section] = []
    others = [(0, 64), (table, table + 64 * count)]
    for name, kind, flags, _, offset, length, *_ in sections:
        if kind in {0, 8} or not length:  # SHT_NULL, SHT_NOBITS: no bytes in the file
            continue
        mixed = strings.startswith(_MIXED, name)
        if (mixed or strings.startswith(_FULL, name)) and not flags & 0x800:  # SHF_COMPRESSED
            found.append(_Section(offset, offset + length, mixed))
        else:
            others.append((offset, offset + length))
    _require_apart(found, others, size)
    return sorted(found)


def _require_apart(found: Iterable[_Section], others: Iterable[tuple[int, int]], size: int) -> None:
    """Raise _MalformedError where a section reaches beyond the file or has a byte in common with anything else."""
    end = end_of_found = 0
    for start, stop, is_found in sorted(
        [
            *((start, stop, True) for start, stop, _ in found),
            *((start, stop, False) for start, stop in others),
        ]
    ):
        if start < (end if is_found else end_of_found) or (is_found and stop > size):
            raise _MalformedError
        end = max(end, stop)
        if is_found:
            end_of_found = max(end_of_found, stop)


def _cold(descriptor: int, section: _Section) -> Iterator[Extent]:
    """The payloads of a section that not every GPU needs; ends where a container is none after all."""
    position = section.start
    while position < section.end:
        if section.mixed:
            position = _next(descriptor, position, section.end)
        try:
            begin, version, header_size, length = _CONTAINER.unpack(
                _read(descriptor, _CONTAINER.size, position, section.end)
            )
        except _MalformedError:
            return
        start = position + header_size
        position = start + length
        if begin != _BEGIN or version or header_size < _CONTAINER.size or position > section.end:
            return
        try:
            found = list(islice(_entries(descriptor, start, position), _ENTRIES_MOST + 1))
        except _MalformedError:
            found = []
        labels = _labels(tuple(entry for _, _, entry in found)) if len(found) <= _ENTRIES_MOST else ()
        for (offset, size, _), gpus in zip(found, labels):
            if gpus and size >= LEAST_COLD:
                yield Extent(offset, size, gpus)


def _next(descriptor: int, position: int, end: int) -> int:
    """Where the next container seems to begin; `end` where none does."""
    look = _FIRST_LOOK
    while position < end:
        read = os.pread(descriptor, min(look, end - position), position)
        if (found := read.find(_BEGIN)) >= 0:
            return position + found
        if len(read) < len(_BEGIN):
            break
        position += len(read) - len(_BEGIN) + 1
        look = min(2 * look, _LOOK)
    return end


def _entries(descriptor: int, position: int, stop: int) -> Iterator[tuple[int, int, _Entry]]:
    """The entries of a container: offset and size of the payload, and what it is. Raises _MalformedError."""
    while position < stop:
        header = _read(descriptor, _ENTRY.size, position, stop)
        kind, version, header_size, size, _, _, _, _, architecture, _, _, flags = _ENTRY.unpack(header)
        payload = position + header_size
        if version != 0x0101 or header_size < _ENTRY_LEAST or payload + size > stop:
            raise _MalformedError
        variant = flags & (_ARCHITECTURE | _FAMILY)
        known = not flags & ~_KNOWN_FLAGS and variant != _ARCHITECTURE | _FAMILY and 20 <= architecture < _END
        yield payload, size, _Entry(kind, architecture, variant) if known else _Entry(0, 0, 0)
        position = payload + size


@lru_cache(maxsize=1024)
def _labels(entries: tuple[_Entry, ...]) -> list[str]:
    """Which GPUs need each entry of a container with these entries.

    All PTX of a container has one label: as text for several GPUs it is alike, and compresses well only together.
    """
    capabilities = [_needing(entry, entries) for entry in entries]
    ptx = set().union(*(those for those, entry in zip(capabilities, entries) if entry.kind == _PTX))
    return [_label(ptx if entry.kind == _PTX else those) for those, entry in zip(capabilities, entries)]


def _needing(entry: _Entry, entries: Sequence[_Entry]) -> set[int]:
    """The compute capabilities whose driver may pick `entry` among `entries`: where it may run, and none is better.

    Better than PTX is an ordinary cubin for that very capability, better than a cubin one for a higher minor that runs.
    """
    capabilities = set(_may_run(entry))
    for other in entries:
        if other.kind != _CUBIN:
            continue
        if entry.kind == _PTX:
            if other.variant == _PLAIN:
                capabilities.discard(other.architecture)
        elif other.architecture > entry.architecture:
            capabilities -= _surely_runs(other)
    if capabilities & _RENAMED:
        capabilities |= _RENAMED
    return capabilities


def _may_run(entry: _Entry) -> Iterable[int]:
    """The capabilities that may run an entry; none where it is not known what it is."""
    if entry.kind == _PTX:
        return range(entry.architecture, _END)
    if entry.kind == _CUBIN:
        return (entry.architecture,) if entry.variant == _ARCHITECTURE else _same_major(entry.architecture)
    return ()


def _surely_runs(cubin: _Entry) -> set[int]:
    """The capabilities whose driver takes a cubin before one for a lower minor: its own, and the compatible ones.

    None for sm_103a and its kind: NVIDIA's linker prefers sm_100 to it when asked for sm_103.
    """
    if cubin.variant == _ARCHITECTURE:
        return set()
    if cubin.variant == _FAMILY or cubin.architecture not in _COMPATIBLE:
        return {cubin.architecture}
    return {cubin.architecture, *_COMPATIBLE.intersection(_same_major(cubin.architecture))}


def _same_major(architecture: int) -> range:
    """The capabilities of the same major from this minor on; the number is 10 * major + minor."""
    return range(architecture, architecture // 10 * 10 + 10)


def _label(capabilities: set[int]) -> str:
    """The text that `needed` reads.

    Empty, that is all, where it would be too long, or where no GPU is known to need it: such a rule is not trusted.
    """
    runs: list[list[int]] = []
    for capability in sorted(capabilities):
        if runs and runs[-1][1] == capability - 1:
            runs[-1][1] = capability
        else:
            runs.append([capability, capability])
    label = ",".join(
        f"{first}-" if last == _END - 1 else f"{first}-{last}" if last > first else f"{first}"
        for first, last in runs
    )
    return label if len(label) <= LONGEST_LABEL else ""
