"""docs/reference/format.md is enough to read a store: a reader made from it alone, held against the real command line.

Neither reader nor cut use anything of packhorse.
"""

from __future__ import annotations

import json
import os
import random
import re
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from blake3 import blake3
from tests.conftest import Packhorse
from tests.snapshot.fatbins import DEBUG, Code, Section, code, container, library

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DOCUMENT = (Path(__file__).parent.parent.parent / "docs/reference/format.md").read_text()
MEBIBYTE = 1 << 20
Content: TypeAlias = Callable[[int], bytes]
"""The raw bytes of a frame by its number."""


# --- the reader: what the document says, and no more ---

ENTRY = re.compile(r"(\d{14})-(put|fold)-([0-9a-f]{64})-([0-9a-f]{64})-[0-9a-f]{8}")


class RefusedError(Exception):
    """Something the document says a reader must not accept."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def digest(content: bytes) -> bytes:
    return blake3(content).digest()


def document(raw: bytes, formats: tuple[int, ...]) -> dict[str, Any]:
    """The map of a manifest or placement."""
    decoded: dict[str, Any] = msgspec.msgpack.decode(raw)
    require(decoded["format"] in formats, "format")
    return decoded


def raw_manifest(store: Path, name: str, steps: int = 4) -> bytes:
    """The raw bytes of a manifest, which may be stored as what differs from another one."""
    magic, _, rest = (store / "manifests" / name).read_bytes().partition(b"\n")
    if magic == b"packhorse-manifest-delta":
        require(steps > 0, "chain of deltas")
        base = raw_manifest(store, rest[:32].hex(), steps - 1)
        raw = zstd.decompress(rest[32:], zstd.ZstdDict(base, is_raw=True).as_prefix)
    else:
        require(magic == b"packhorse-manifest", "magic")
        raw = zstd.decompress(rest)
    require(digest(raw).hex() == name, "manifest")
    return raw


def newest(store: Path, tag: str, part: str) -> list[tuple[str, str]]:
    """(stamp, manifest) of the entries that count."""
    entries = {str(path.relative_to(store)): path for path in store.glob(f"tags/{tag}/*/*")}
    entries = {key: path for key, path in entries.items() if ENTRY.fullmatch(path.name)}
    folds = [json.loads(path.read_bytes()) for path in entries.values() if "-fold-" in path.name]
    absorbed = {key for fold in folds for key in fold["absorbs"]}
    names = sorted(entries[key].name for key in entries.keys() - absorbed if key.split("/")[2] == part)
    return [(match[1], match[3]) for name in names if (match := ENTRY.fullmatch(name))]


def manifest_of(store: Path, name: str) -> tuple[dict[str, Any], Content]:
    manifest, placement = document(raw_manifest(store, name), (1, 2)), placement_of(store, name)
    require((placement["manifest"].hex(), placement["frames"]) == (name, manifest["frames"]), "placement")

    def content(number: int) -> bytes:
        pack, offset, length, codec, stored_digest = placement["places"][number][:5]
        stored = (store / "packs" / placement["packs"][pack]).read_bytes()[offset : offset + length]
        require(digest(stored) == stored_digest and codec in (0, 1), "stored bytes")
        raw = zstd.decompress(stored) if codec else stored
        require([digest(raw), len(raw)] == manifest["frames"][number][:2], "frame")
        return raw

    return manifest, content


def placement_of(store: Path, name: str) -> dict[str, Any]:
    magic, _, compressed = min((store / "placements" / name).iterdir()).read_bytes().partition(b"\n")
    require(magic == b"packhorse-placement", "magic")
    return document(zstd.decompress(compressed), (1,))


def restore(store: Path, tag: str, target: Path) -> None:
    """The newest packages and all shared entries of a tag."""
    os.mkdir(target / "packages")
    for _, name in newest(store, tag, "packages")[:1]:
        manifest, content = manifest_of(store, name)
        write(target / "packages", [(entry, content) for entry in manifest["entries"]])
    shared: dict[bytes, tuple[tuple[str, str], list[Any], Content]] = {}
    for stamp, name in newest(store, tag, "shared"):
        manifest, content = manifest_of(store, name)
        for number, entry in enumerate(manifest["entries"]):
            own = (manifest["stamps"][manifest["stamped"][number]] if manifest["stamps"] else stamp, name)
            if entry[1] not in shared or own < shared[entry[1]][0]:
                shared[entry[1]] = (own, entry, content)

    def stays(path: bytes) -> bool:
        above = path.rpartition(b"/")[0]
        return not above or (above in shared and shared[above][1][0] == "d" and stays(above))

    write(target, [(entry, content) for path, (_, entry, content) in sorted(shared.items()) if stays(path)])


def write(target: Path, entries: list[tuple[list[Any], Content]]) -> None:
    directories = []
    for (kind, path, *rest), content in entries:
        place = os.path.join(os.fsencode(target), path)
        if kind == "d":
            os.mkdir(place, 0o700)
            directories.append((place, *rest[:2]))
        elif kind == "f":
            mode, mtime, size, content_digest, pieces = rest[:5]
            triples = zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
            whole = b"".join(content(number)[start : start + length] for number, start, length in triples)
            require(len(whole) == size, "size")
            require(content_digest == (digest(whole) if size < MEBIBYTE else b""), "content")
            Path(os.fsdecode(place)).write_bytes(whole)
            os.chmod(place, mode)
            os.utime(place, ns=(mtime, mtime))
        elif kind == "l":
            os.symlink(rest[1], place)
            os.utime(place, ns=(rest[0], rest[0]), follow_symlinks=False)
        else:
            require(kind == "h", "kind of entry")
            os.link(os.path.join(os.fsencode(target), rest[0]), place)
    for place, mode, mtime in reversed(directories):
        os.chmod(place, mode)
        os.utime(place, ns=(mtime, mtime))


# --- a writer's cut of large files: what the document says, and no more ---

COMPATIBLE = {50, 52, 60, 61, 70, 75, 80, 86, 89, 90, 100, 103, 120, 121}


def number(content: bytes, offset: int, size: int) -> int:
    return int.from_bytes(content[offset : offset + size], "little")


def gathered(content: bytes) -> list[tuple[bytes, str]]:
    """The frames of a large file, and their labels."""
    position, ranges = 0, []
    for start, end, label in [*labelled(content), (len(content), len(content), "")]:
        ranges += [(position, start, ""), (start, end, label)]
        position = end
    frames: list[tuple[int, bytearray, str]] = []
    for first, end, label in ranges:
        start = first
        while start < end:
            open_one = next((frame for frame in reversed(frames) if frame[2] == label), None)
            if open_one is None or len(open_one[1]) == 8 * MEBIBYTE:
                open_one = (start, bytearray(), label)
                frames.append(open_one)
            taken = min(end - start, 8 * MEBIBYTE - len(open_one[1]))
            open_one[1].extend(content[start : start + taken])
            start += taken
    return [(bytes(held), label) for _, held, label in sorted(frames, key=lambda frame: frame[0])]


def labelled(content: bytes) -> list[tuple[int, int, str]]:
    """Start, end and label of the ranges that have one. Of sound files only: nothing else is pushed here."""
    found: list[tuple[int, int, str]] = []
    if content[:6] != b"\x7fELF\x02\x01":
        return found
    table, count, names = number(content, 40, 8), number(content, 60, 2), number(content, 62, 2)
    headers = [content[table + 64 * each : table + 64 * each + 64] for each in range(count)]
    strings = number(headers[names], 24, 8)
    for header in headers:
        name = content[strings + number(header, 0, 4) :][:20].partition(b"\0")[0]
        position = number(header, 24, 8)
        end = position + number(header, 32, 8)
        if name == b".cask_resource":
            while (position := content.find(b"\x50\xed\x55\xba\1", position, end)) >= 0:
                behind = position + number(content, position + 6, 2)
                position = behind + number(content, position + 8, 8)
                found += container_labels(content, behind, position)
        if name not in (b".nv_fatbin", b"__nv_relfatbin"):
            continue
        while position < end and (number(content, position, 4), number(content, position + 4, 2)) == (
            0xBA55ED50,
            1,
        ):
            behind = position + number(content, position + 6, 2)
            position = behind + number(content, position + 8, 8)
            found += container_labels(content, behind, position)
    return sorted(found)


def container_labels(content: bytes, position: int, end: int) -> list[tuple[int, int, str]]:
    entries = []
    while position < end:
        kind, architecture, flags = (
            number(content, position + at, size) for at, size in ((0, 2), (28, 4), (40, 8))
        )
        payload = position + number(content, position + 4, 4)
        position = payload + number(content, position + 8, 8)
        if kind in (1, 2) and not flags & ~sum(1 << bit for bit in (0, 4, 13, 15, 20, 21, 24)):
            entries.append((payload, position, kind, architecture, flags >> 20 & 3))
    needing = []
    for _, _, kind, architecture, variant in entries:
        if kind == 1:
            needed = set(range(architecture, 1000))
            needed -= {other for _, _, which, other, theirs in entries if which == 2 and not theirs}
        else:
            needed = (
                {architecture} if variant == 1 else set(range(architecture, architecture // 10 * 10 + 10))
            )
            for _, _, which, other, theirs in entries:
                if which == 2 and other > architecture and theirs != 1:
                    needed.discard(other)
                    if not theirs and other in COMPATIBLE:
                        needed -= {each for each in COMPATIBLE if each // 10 == other // 10 and each > other}
        needing.append(needed | ({101, 110} if needed & {101, 110} else set()))
    all_ptx = set().union(*(needed for needed, entry in zip(needing, entries, strict=True) if entry[2] == 1))
    return [
        (start, stop, label_of(all_ptx if kind == 1 else needed))
        for needed, (start, stop, kind, *_) in zip(needing, entries, strict=True)
        if stop - start >= 4096
    ]


def label_of(capabilities: set[int]) -> str:
    parts = []
    for first in sorted(capabilities):
        if first - 1 not in capabilities:
            last = next(each for each in range(first, 1001) if each + 1 not in capabilities)
            parts.append(f"{first}-" if last == 999 else f"{first}" if last == first else f"{first}-{last}")
    return ",".join(parts)


# --- what is pushed, and how it is compared ---


def tree(base: Path) -> dict[bytes, tuple[object, ...]]:
    """All below a directory: kind, mode, time and content of each path; names of one file share its number."""
    found: dict[bytes, tuple[object, ...]] = {}
    names: dict[int, bytes] = {}
    for directory, directories, files in os.walk(os.fsencode(base)):
        for name in sorted([*directories, *files]):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                same_as = names.setdefault(status.st_ino, path)
                content: object = (
                    Path(os.fsdecode(path)).read_bytes(),
                    os.path.relpath(same_as, os.fsencode(base)),
                )
            else:
                content = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
            key = os.path.relpath(path, os.fsencode(base))
            found[key] = (status.st_mode, status.st_mtime_ns, content)
    return found


def gpu_library(noise: random.Random) -> bytes:
    """A library with code for GPUs, of every kind, more than one frame of some, and equal for two architectures."""

    def some(name: str, size: int = 10_000, **more: int) -> Code:
        made = code(name, size, **more)
        return made._replace(payload=noise.randbytes(size))

    twice = noise.randbytes(3 * MEBIBYTE)
    containers = [
        container(some("sm_80", 5 * MEBIBYTE), some("sm_90", 4 * MEBIBYTE), some("compute_90", 90_000)),
        container(some("sm_75"), some("sm_80", 4 * MEBIBYTE), some("compute_75"), some("compute_80")),
        container(some("sm_90a", 70_000), some("sm_90", 5 * MEBIBYTE), some("sm_100f"), some("sm_103f")),
        container(some("sm_101"), some("sm_110"), some("sm_87"), some("sm_86"), some("sm_90", 4095)),
        container(*(code(name, 3 * MEBIBYTE)._replace(payload=twice) for name in ("sm_50", "sm_60"))),
        container(some("sm_89", flags=DEBUG), some("sm_80"), some("sm_86", header_size=112)),
    ]
    return library(
        Section(b".text", noise.randbytes(MEBIBYTE)),
        Section(b".nv_fatbin", b"".join(containers[:3]) + container(some("sm_80"), magic=7) + containers[3]),
        Section(b".data", bytes(100_000)),
        Section(b"__nv_relfatbin", b"".join(containers[3:])),
        Section(
            b".cask_resource", noise.randbytes(5000) + containers[1] + b"..." + container(some("sm_121"))
        ),
    )


def fill(root: Path) -> None:
    """Packages with all that a manifest can hold, and models."""
    noise = random.Random(1)
    package = root / "packages/package"
    (package / "empty directory").mkdir(parents=True)
    for number in range(300):
        (package / f"module_{number}.py").write_bytes(b"x = 1\n" * noise.randrange(4000))
    (package / "empty").touch()
    (package / "library.so").write_bytes(noise.randbytes(9 * MEBIBYTE) + bytes(MEBIBYTE))
    (package / "exactly.large").write_bytes(bytes(MEBIBYTE))
    (package / "gpu.so").write_bytes(gpu_library(noise))
    (package / "tool").write_text("#!/bin/sh\n")
    (package / "tool").chmod(0o750)
    os.utime(package / "tool", ns=(-1, -1))
    (package / "link").symlink_to("../nowhere/\udcff")
    (package / "another name").hardlink_to(package / "library.so")
    (root / f"packages/{os.fsdecode(bytes([255]))} \n").write_text("no UTF-8")
    (root / "packages/top.py").write_bytes(noise.randbytes(2 * MEBIBYTE // 3))
    (root / "models/hub").mkdir(parents=True)
    (root / "models/hub/weights").write_text("old")
    (root / "models/hub/vocabulary").write_text("the same")
    (package / "empty directory").chmod(0o500)


@pytest.fixture
def root(root_path: Path) -> Path:
    root_path.mkdir()
    fill(root_path)
    return root_path


@pytest.fixture
def store(packhorse: Packhorse, root: Path, tmp_path: Path) -> Path:
    """A store with one push of `root`."""
    store = tmp_path / "store"
    push(packhorse, root, store)
    return store


def push(packhorse: Packhorse, root: Path, store: Path) -> dict[str, Any]:
    pushed = packhorse("push", "--root", root, "--store", store, "--json")
    assert pushed.returncode == 0, pushed.stderr
    facts: dict[str, Any] = json.loads(pushed.stdout)
    return facts


def restored(store: Path, tag: str, target: Path) -> dict[bytes, tuple[object, ...]]:
    target.mkdir()
    restore(store, tag, target)
    return tree(target)


def kept(root: Path) -> dict[bytes, tuple[object, ...]]:
    """What a snapshot of a root holds: not the ephemeral and private directories, nor shared ones that are empty."""
    empty = {name.encode() for name in ("deps", "pip", "models") if not any((root / name).iterdir())}
    outside = {b"tmp", b"build", b".packhorse"} | empty
    found = {path: facts for path, facts in tree(root).items() if path.split(b"/")[0] not in outside}
    del found[b"packages"]
    return found


def files(found: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    """The files and links of a snapshot."""
    persistent = (b"packages/", b"models/", b"deps/", b"pip/")
    return {
        path: facts for path, facts in found.items() if path.startswith(persistent) and facts[2] is not None
    }


# --- the promises ---


def test_a_reader_made_from_the_document_restores_a_push(store: Path, root: Path, tmp_path: Path) -> None:
    mine = restored(store, "main", tmp_path / "mine")
    del mine[b"packages"]
    assert mine == kept(root)


def test_it_takes_the_newest_packages_and_of_each_shared_path_the_newest(
    packhorse: Packhorse, store: Path, root: Path, tmp_path: Path
) -> None:
    (root / "packages/top.py").write_text("new")
    (root / "models/hub/weights").write_text("new")
    (root / "models/hub/more").write_text("more")
    push(packhorse, root, store)
    mine = restored(store, "main", tmp_path / "mine")
    del mine[b"packages"]
    assert mine == kept(root)


def test_it_reads_a_manifest_that_is_stored_by_what_differs_from_another(
    packhorse: Packhorse, store: Path, root: Path, tmp_path: Path
) -> None:
    [(_, old)] = newest(store, "main", "packages")
    (root / "packages/top.py").write_text("new")
    push(packhorse, root, store)
    (_, new), _ = newest(store, "main", "packages")
    stored = (store / "manifests" / new).read_bytes()
    assert stored.startswith(b"packhorse-manifest-delta\n" + bytes.fromhex(old))
    assert len(stored) < len(raw_manifest(store, new)) // 8
    mine = restored(store, "main", tmp_path / "mine")
    del mine[b"packages"]
    assert mine == kept(root)


@pytest.mark.parametrize(("steps", "read"), [(4, True), (5, False)])
def test_it_follows_as_many_bases_as_packhorse_does(
    packhorse: Packhorse, store: Path, tmp_path: Path, steps: int, read: bool
) -> None:
    [(_, first)] = newest(store, "main", "packages")
    manifest, placement = document(raw_manifest(store, first), (2,)), placement_of(store, first)
    for step in range(steps):
        base = raw_manifest(store, first)
        manifest["platform"] = placement["platform"] = f"step {step}"
        manifest["soabi"] = ""
        first = put(store, "main", manifest, placement, base=base)
    if read:
        assert pulled(packhorse, store, "main", tmp_path / "theirs") == 0
        assert files(restored(store, "main", tmp_path / "mine")) == files(tree(tmp_path / "theirs"))
    else:
        assert pulled(packhorse, store, "main", tmp_path / "theirs") == 4
        with pytest.raises(RefusedError):
            restored(store, "main", tmp_path / "mine")


def test_it_reads_a_fold_as_packhorse_does(
    packhorse: Packhorse, store: Path, root: Path, tmp_path: Path
) -> None:
    [(old_stamp, old)] = newest(store, "main", "shared")
    (root / "models/hub/weights").write_text("new")
    push(packhorse, root, store)
    # A fold of the first push alone: it is written last, but its entries keep the stamp that they had.
    [replaced] = [path for path in store.glob("tags/main/shared/*") if old in path.name]
    manifest = document(raw_manifest(store, old), (1, 2))
    manifest |= {"stamps": [old_stamp], "stamped": [0] * len(manifest["entries"])}
    name = put(store, "main", manifest, placement_of(store, old), kind="fold", absorbs=[replaced])
    assert newest(store, "main", "shared")[0][1] == name, "the newest entry"
    mine = restored(store, "main", tmp_path / "mine")
    assert (tmp_path / "mine/models/hub/weights").read_text() == "new"
    assert pulled(packhorse, store, "main", tmp_path / "theirs") == 0
    assert files(mine) == files(tree(tmp_path / "theirs"))


def test_the_snapshot_is_the_digest_of_the_document_described(
    packhorse: Packhorse, store: Path, root: Path
) -> None:
    example, identity = re.findall(r"`(\{\"packages\".*\})` has the id\n`(\w+)`", DOCUMENT)[0]
    assert digest(example.encode()).hex() == identity
    [(_, packages)], [(stamp, shared)] = newest(store, "main", "packages"), newest(store, "main", "shared")
    written = f'{{"packages":"{packages}","shared":[["{stamp}","{shared}"]],"format":1}}'.encode()
    assert (store / "snapshots" / digest(written).hex()).read_bytes() == written
    assert push(packhorse, root, store)["snapshot"] == digest(written).hex()


def test_every_object_of_a_store_is_in_the_document(store: Path) -> None:
    hexes, stamp = "[0-9a-f]{64}", r"\d{14}"
    patterns = {
        "packs/<pack>": f"packs/{hexes}",
        "manifests/<manifest>": f"manifests/{hexes}",
        "placements/<manifest>/<stamp>-<nonce>": f"placements/{hexes}/{stamp}-[0-9a-f]{{8}}",
        "snapshots/<snapshot>": f"snapshots/{hexes}",
        "tags/<tag>/packages/<entry>": f"tags/main/packages/{ENTRY.pattern}",
        "tags/<tag>/shared/<entry>": f"tags/main/shared/{ENTRY.pattern}",
    }
    assert [key for key in patterns if f"`{key}`" not in DOCUMENT] == []
    keys = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()]
    for pattern in patterns.values():
        assert any(re.fullmatch(pattern, key) for key in keys), pattern
        keys = [key for key in keys if not re.fullmatch(pattern, key)]
    assert keys == []


def test_packs_are_named_and_filled_as_described(store: Path) -> None:
    used: dict[str, dict[int, tuple[int, bytes]]] = {}
    for part in ("packages", "shared"):
        placement = placement_of(store, newest(store, "main", part)[0][1])
        for pack, offset, length, _, stored_digest in placement["places"]:
            used.setdefault(placement["packs"][pack], {})[offset] = (length, stored_digest)
    assert used.keys() == {path.name for path in (store / "packs").iterdir()}
    for name, frames in used.items():
        assert digest(b"".join(frames[offset][1] for offset in sorted(frames))).hex() == name
        assert sum(length for length, _ in frames.values()) == (store / "packs" / name).stat().st_size


def test_files_are_cut_as_described(store: Path) -> None:
    manifest, content = manifest_of(store, newest(store, "main", "packages")[0][1])
    files = [entry for entry in manifest["entries"] if entry[0] == "f"]
    cuts: list[tuple[bytes, str]] = []
    groups: dict[bool, list[tuple[bytes, bytes]]] = {False: [], True: []}

    def close(group: list[tuple[bytes, bytes]]) -> None:
        cuts.append((b"".join(whole for _, whole in group), ""))
        group.clear()

    for _, path, _, _, size, _, pieces in files:
        whole = b"".join(
            content(number)[start : start + length]
            for number, start, length in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        )
        if size >= MEBIBYTE:
            cuts += gathered(whole)
        elif size:
            group = groups[size >= 65_536]
            held = sum(len(each) for _, each in group)
            apart = bool(group) and path.split(b"/")[0] != group[-1][0].split(b"/")[0]
            if group and (
                held + size > 4 * MEBIBYTE or (held >= MEBIBYTE and (apart or zlib.crc32(path) % 64 == 0))
            ):
                close(group)
            group.append((path, whole))
    close(groups[False])
    if groups[True]:
        close(groups[True])
    expected: dict[tuple[bytes, int], str] = {}
    for raw, label in cuts:
        if expected.setdefault((digest(raw), len(raw)), label) != label:
            expected[digest(raw), len(raw)] = ""
    assert manifest["frames"] == [[*frame, label] for frame, label in expected.items()]
    assert len(expected) > 4, "several groups and several pieces"
    labels = {label for *_, label in manifest["frames"]}
    assert {"", "121-129", "80-89", "90-99", "100-102,104-110", "101,110-119", "76-79,81-"} <= labels, (
        "GPU code of every kind"
    )
    [library] = [entry for entry in files if entry[1] == b"package/gpu.so"]
    ends: dict[int, set[int]] = {}
    for frame, start, length in zip(library[6][::3], library[6][1::3], library[6][2::3], strict=True):
        assert start in ends.get(frame, set()) | {0}
        ends.setdefault(frame, set()).add(start + length)


# --- unknown things, written into a store as the document says ---


def put(
    store: Path,
    tag: str,
    manifest: dict[str, Any],
    placement: dict[str, Any],
    *,
    kind: str = "put",
    absorbs: list[Path] | None = None,
    base: bytes = b"",
) -> str:
    """Write a manifest (by what differs from the raw bytes `base`), its placement and an entry newer than all; returns
    the manifest's name."""
    raw = msgspec.msgpack.encode(manifest)
    name = digest(raw).hex()
    difference = zstd.compress(raw, zstd_dict=zstd.ZstdDict(base, is_raw=True).as_prefix) if base else b""
    placement = {**placement, "manifest": digest(raw), "frames": manifest["frames"]}
    stamped = [*store.glob("tags/*/*/*"), *store.glob("placements/*/*")]
    stamp = min((path.name[:14] for path in stamped), default="50000000000000")
    stamp = f"{int(stamp) - 1:014d}"
    body = {"snapshot": "", "absorbs": [str(path.relative_to(store)) for path in absorbs or []], "new": {}}
    entry = f"{stamp}-{kind}-{name}-{'0' * 64}-00000000"
    objects = {
        f"manifests/{name}": b"packhorse-manifest-delta\n" + digest(base) + difference
        if base
        else b"packhorse-manifest\n" + zstd.compress(raw),
        f"placements/{name}/{stamp}-00000000": b"packhorse-placement\n"
        + zstd.compress(msgspec.msgpack.encode(placement)),
        f"tags/{tag}/{manifest['kind']}/{entry}": json.dumps(body).encode(),
    }
    for key, content in objects.items():
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_bytes(content)
    return name


def pulled(packhorse: Packhorse, store: Path, tag: str, root: Path) -> int:
    return packhorse("pull", "--root", root, "--store", store, "--tag", tag).returncode


Change: TypeAlias = Callable[[dict[str, Any], dict[str, Any]], Any]
IGNORED: dict[str, Change] = {
    "a key in a manifest": lambda manifest, placement: manifest.update(colour="red"),
    "a key in a placement": lambda manifest, placement: placement.update(colour="red"),
    "an item of an entry": lambda manifest, placement: [e.append("red") for e in manifest["entries"]],
    "an item of a frame": lambda manifest, placement: [f.append("red") for f in manifest["frames"]],
    "an item of a place": lambda manifest, placement: [p.append("red") for p in placement["places"]],
}
REFUSED: dict[str, Change] = {
    "the format of a manifest": lambda manifest, placement: manifest.update(format=3),
    "the format of a placement": lambda manifest, placement: placement.update(format=2),
    "a kind of entry": lambda manifest, placement: manifest["entries"].append(["x", b"zebra", 0]),
    "a codec": lambda manifest, placement: [p.__setitem__(3, 2) for p in placement["places"]],
}


@pytest.mark.parametrize("unknown", [*IGNORED, *REFUSED])
def test_what_is_unknown_is_ignored_or_refused_as_described(
    packhorse: Packhorse, root_path: Path, tmp_path: Path, unknown: str
) -> None:
    (root_path / "models").mkdir(parents=True)
    (root_path / "models/weights").write_text("many numbers")
    store = tmp_path / "store"
    push(packhorse, root_path, store)
    name = newest(store, "main", "shared")[0][1]
    manifest = document(raw_manifest(store, name), (1, 2))
    placement = placement_of(store, name)
    {**IGNORED, **REFUSED}[unknown](manifest, placement)
    put(store, "other", manifest, placement)
    if unknown in IGNORED:
        assert pulled(packhorse, store, "other", tmp_path / "theirs") == 0
        assert (tmp_path / "theirs/models/weights").read_text() == "many numbers"
        assert b"models/weights" in restored(store, "other", tmp_path / "mine")
    else:
        assert pulled(packhorse, store, "other", tmp_path / "theirs") == 4
        assert not (tmp_path / "theirs/models/weights").exists()
        with pytest.raises(RefusedError):
            restored(store, "other", tmp_path / "mine")


def test_a_key_that_does_not_fit_is_ignored(packhorse: Packhorse, store: Path, tmp_path: Path) -> None:
    for key in ("tags/main/shared/notes.txt", "tags/main/later/1", "profiles/main/x"):
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).touch()
    assert pulled(packhorse, store, "main", tmp_path / "theirs") == 0
    assert restored(store, "main", tmp_path / "mine")
