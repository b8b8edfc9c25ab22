"""Frames → files: rebuilds a tree in a private directory, resumable after a kill at any moment.

Promises that `finish` returns only when every wanted entry is there with its bytes, mode and times, but for the
files that are held open: those have their size, mode and times from the start, and their bytes come when they come. The
bytes come proven (frames.decompress) by the time that the last of a frame has come. Knows no network, and nothing of
where the tree goes afterwards.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, KeysView, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE
from packhorse.root import boot_id
from packhorse.snapshot import frames
from packhorse.snapshot.manifest import Directory, Entry, File, Hardlink, Manifest, Member, Symlink, members
from packhorse.snapshot.scan import Signature, signature_of


class _Header(msgspec.Struct):
    manifest: str
    fetched: str
    boot: str


class Space(NamedTuple):
    """Room on a disk."""

    bytes: int
    inodes: int


class Tree:
    """One manifest, or the `wanted` paths of it, on its way into the directory `base`.

    `base` is private to this process: nobody else creates or follows anything in it. `kept` are paths that lie
    unchanged elsewhere: path → absolute path on the same disk, hard-linked instead of fetched.
    """

    def __init__(
        self,
        base: Path,
        manifest: Manifest,
        digest: str,
        *,
        wanted: Collection[bytes] | None = None,
        kept: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.manifest = manifest
        self.kept = kept or {}
        self._base = os.fsencode(base)
        self._digest = digest
        self._journal = base.with_name(base.name + ".journal")
        self._whole = wanted is None
        self.entries = list(manifest.entries) if wanted is None else _chosen(manifest, wanted)
        self._files = [
            entry for entry in self.entries if isinstance(entry, File) and entry.path not in self.kept
        ]
        self._members = members(self._files, len(manifest.frames))
        self._holes = {
            number
            for number, inside in enumerate(self._members)
            if manifest.frames[number].digest == frames.ZEROS
            and all(member.file.size >= frames.LARGE_FILE for member in inside)
        }
        self._fetched = frames.names_digest(file.path for file in self._files).hex()
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        """Held by whoever writes small files: side by side that takes half as much processor time again."""
        self._log = -1
        self.signatures: dict[bytes, Signature] = {}
        """Of the files written here, as they are now; without those that have several names."""
        self.held: dict[bytes, int] = {}
        """Files that are brought through a descriptor kept open, wherever they are meanwhile."""
        self.on_arrival: Callable[[bytes, int], None] = lambda path, descriptor: os.close(descriptor)
        """Called from `put` when a held file is whole, with its descriptor, which is to be closed."""
        self._held_files: dict[bytes, File] = {}
        self._missing: dict[bytes, int] = {}
        """The number of frames that a held file still lacks."""

    @property
    def names(self) -> tuple[str, str]:
        """What it takes in the directory where it is staged."""
        return os.fsdecode(os.path.basename(self._base)), self._journal.name

    def new_space(self, block: int, without: Collection[int] = ()) -> Space:
        """What the tree will take on a disk with blocks of `block` bytes beyond what is linked, without some frames."""
        lengths = {file.path: file.size for file in self._files}
        for number in self._holes.union(without):
            for member in self._members[number]:
                lengths[member.file.path] -= member.length
        directories = sum(isinstance(entry, Directory) for entry in self.entries)
        links = sum(isinstance(entry, Symlink) for entry in self.entries)
        return Space(
            sum(-(-length // block) for length in lengths.values()) * block + directories * block,
            len(lengths) + directories + links,
        )

    @cached_property
    def missing(self) -> list[int]:
        """The frames still to bring.

        What an earlier, killed attempt brought counts when it was of this boot, and is read and proven when
        it was of another.
        """
        done = self._holes | (self._resumed or set())
        return [number for number, inside in enumerate(self._members) if inside and number not in done]

    def prepare(self, hold: Collection[bytes] = ()) -> None:
        """Create directories, large files at their size and empty files; then `put` can be called.

        The paths `hold`, some of `holdable`, are created as well, get their mode and times now and are kept open in
        `held`.
        A leftover of anything else is removed.
        """
        if self._resumed is None:
            atomic.remove_tree(Path(os.fsdecode(self._base)))
            os.makedirs(self._base, mode=0o700)
            for entry in self.entries:
                if isinstance(entry, Directory):
                    self._make_directory(entry.path)
            self._start_journal()
        else:
            for entry in self.entries:
                if isinstance(entry, Directory):
                    with contextlib.suppress(FileNotFoundError):
                        os.chmod(self._at(entry.path), 0o700)
        for path, source in self.kept.items():
            self._link(source, path)
        for file in self._files:
            held = file.path in hold
            if not file.size or file.size >= frames.LARGE_FILE or held:
                descriptor = self._open(file.path, 0, os.O_RDWR if held else os.O_WRONLY)
                os.ftruncate(descriptor, file.size)
                if held or not file.size:
                    self._settle(descriptor, file)
                if held:
                    self.held[file.path] = descriptor
                    self._held_files[file.path] = file
                else:
                    os.close(descriptor)
        self._log = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @property
    def late(self) -> KeysView[bytes]:
        """The files that were held when the tree was prepared, but for those let go of since."""
        return self._held_files.keys()

    @cached_property
    def holdable(self) -> dict[bytes, File]:
        """The files that are not kept and, as a rule, share no frame with small ones."""
        return {file.path: file for file in self._files if file.size >= frames.MEDIUM_FILE}

    def paths(self, number: int) -> set[bytes]:
        """The files that need the frame `number`."""
        return {member.file.path for member in self._members[number]}

    def creates(self, number: int) -> bool:
        """Whether files come into being with the frame `number`, unless they are held."""
        return any(member.file.size < frames.LARGE_FILE for member in self._members[number])

    @cached_property
    def _links(self) -> dict[bytes, list[bytes]]:
        links: dict[bytes, list[bytes]] = {}
        for entry in self.entries:
            if isinstance(entry, Hardlink):
                links.setdefault(entry.target, []).append(entry.path)
        return links

    def names_of(self, path: bytes) -> list[bytes]:
        """All names of a file."""
        return [path, *self._links.get(path, ())]

    def numbers(self, path: bytes) -> set[int]:
        """The frames that a file to hold needs."""
        return set(self._held_files[path].pieces[::3])

    def expect(self, numbers: Iterable[int]) -> None:
        """Held files are whole when these frames have come; those that lack none are whole now."""
        for path in self.held:
            self._missing[path] = 0
        for number in numbers:
            for path in self.paths(number):
                if path in self._missing:
                    self._missing[path] += 1
        for path in [path for path, missing in self._missing.items() if not missing]:
            self._arrive(path)

    def let_go(self, path: bytes) -> None:
        """Bring a held file like the others: it is there when `finish` returns."""
        os.close(self.held.pop(path))
        del self._held_files[path], self._missing[path]

    def _arrive(self, path: bytes) -> None:
        with self._lock:
            descriptor = self.held.pop(path)
        self.signatures[path] = signature_of(os.fstat(descriptor))
        self.on_arrival(path, descriptor)

    def put(self, number: int, parts: Iterable[frames.Bytes]) -> None:
        """Write what the frame `number` holds for this tree. Callable from several threads.

        What `parts` raises is raised here; the frame can be put once more.
        """
        inside = self._members[number]
        created = [member for member in inside if self._created(member.file)]
        if len(created) < len(inside):
            raw = b"".join(parts)
            with self._creating:
                self._put_small(inside, memoryview(raw))
            parts = [raw]
        whole = self._put_into(created, parts) if created else ()
        with self._lock:
            if self._log >= 0:
                os.write(self._log, number.to_bytes(4, "little"))
        for path in whole:
            self._arrive(path)

    def _created(self, file: File) -> bool:
        """Whether it exists at its size before its bytes come."""
        return file.size >= frames.LARGE_FILE or file.path in self._held_files

    def _put_small(self, inside: Iterable[Member], raw: memoryview) -> None:
        """The small files among these members, as a rule all there is of each."""
        for member in inside:
            file = member.file
            if self._created(file):
                continue
            whole = member.length == file.size
            descriptor = self._open(file.path, os.O_TRUNC if whole else 0, mode=file.mode)
            try:
                start = member.frame_offset
                write_at(descriptor, raw[start : start + member.length], member.file_offset)
                if whole:
                    self._settle(descriptor, file)
            finally:
                os.close(descriptor)

    def _put_into(self, inside: Sequence[Member], parts: Iterable[frames.Bytes]) -> list[bytes]:
        """Pieces of files that exist, part by part as they come; returns the held files that are whole now."""
        files = {member.file.path: member.file for member in inside}
        with contextlib.ExitStack() as opened:
            descriptors = {}
            for path in files:
                descriptors[path] = self.held.get(path, -1)
                if descriptors[path] < 0:
                    descriptors[path] = self._open(path, 0)
                    opened.callback(os.close, descriptors[path])
            late = [path for path in files if path in self._missing]
            start = 0
            for part in parts:
                view, end = memoryview(part), start + len(part)
                for member in inside:
                    shift = member.file_offset - member.frame_offset
                    first = max(member.frame_offset, start)
                    behind = min(member.frame_offset + member.length, end)
                    if first < behind:
                        write_at(
                            descriptors[member.file.path], view[first - start : behind - start], first + shift
                        )
                # Who looks at the file meanwhile sees the times that it will have. By them it is known as one that
                # never arrived, should the rest of the frame not be what it must be.
                for path in late:
                    os.utime(descriptors[path], ns=(files[path].mtime, files[path].mtime))
                start = end
        whole = []
        with self._lock:
            for path in late:
                self._missing[path] -= 1
                if not self._missing[path]:
                    whole.append(path)
        return whole

    def finish(self) -> None:
        """Give links, directories and files of several frames what can only be given at the end. The journal stays, so
        that a tree that could not be published is not brought again.

        Directories of a tree that is only a part stay open: its files are moved out of them.
        """
        self.close()
        for file in self._files:
            # Of a small file put whole that is done.
            if (file.size >= frames.LARGE_FILE or len(file.pieces) > 3) and file.path not in self._held_files:
                self._settle_again(file)
        for entry in self.entries:
            if isinstance(entry, (Symlink, Hardlink)):
                self._make_parents(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._at(entry.path))
            if isinstance(entry, Symlink):
                os.symlink(entry.target, self._at(entry.path))
                os.utime(self._at(entry.path), ns=(entry.mtime, entry.mtime), follow_symlinks=False)
            elif isinstance(entry, Hardlink):
                os.link(self._at(entry.target), self._at(entry.path), follow_symlinks=False)
                self.signatures.pop(entry.target, None)  # a name more changed the ctime
        if self._whole:
            for entry in reversed(self.entries):
                if isinstance(entry, Directory):
                    os.chmod(self._at(entry.path), entry.mode)
                    os.utime(self._at(entry.path), ns=(entry.mtime, entry.mtime))

    def close(self) -> None:
        """Take nothing more; the journal stays."""
        with self._lock:
            if self._log >= 0:
                os.close(self._log)
                self._log = -1

    def path(self, path: bytes) -> bytes:
        """Where `path` lies now."""
        return self._at(path)

    # --- resuming ---

    def _start_journal(self) -> None:
        header = msgspec.json.encode(_Header(self._digest, self._fetched, boot_id()))
        # Numbers of four bytes follow. None lies over the border of two blocks, so that a full disk takes it whole or not.
        atomic.write_file(self._journal, header + b" " * (-(len(header) + 1) % 4) + b"\n")

    @cached_property
    def _resumed(self) -> set[int] | None:
        """The frames that an earlier attempt brought, or None where there is nothing to go on from."""
        try:
            head, _, body = self._journal.read_bytes().partition(b"\n")
            header = msgspec.json.decode(head, type=_Header)
        except (FileNotFoundError, *UNREADABLE):
            return None
        if (header.manifest, header.fetched) != (self._digest, self._fetched) or not os.path.isdir(
            self._base
        ):
            return None
        count = len(body) // 4
        done = {int.from_bytes(body[4 * i : 4 * i + 4], "little") for i in range(count)}
        done = {number for number in done if number < len(self._members)}
        if header.boot != boot_id():
            done = {number for number in done if self._proven(number)}
            self._start_journal()
            with open(self._journal, "ab") as journal:
                journal.write(b"".join(number.to_bytes(4, "little") for number in sorted(done)))
        return done

    def _proven(self, number: int) -> bool:
        """Whether the files hold, on disk, all bytes of a frame, which gives whole files their mode and times once
        more. A frame only partly wanted is not proven."""
        frame, inside = self.manifest.frames[number], self._members[number]
        raw = bytearray(frame.length)
        try:
            for member in inside:
                raw[member.frame_offset : member.frame_offset + member.length] = self._held(member)
            if len(raw) != frame.length or frames.digest_of(raw) != frame.digest:
                return False
            if sum(member.length for member in inside) > frame.length:  # equal bytes lie in several places
                for member in inside:
                    if self._held(member) != raw[member.frame_offset : member.frame_offset + member.length]:
                        return False
        except OSError:
            return False
        for member in self._members[number]:
            if member.length == member.file.size:
                self._settle_again(member.file)
        return True

    def _held(self, member: Member) -> bytes:
        """What lies on disk where a piece belongs."""
        with open(self._at(member.file.path), "rb") as file:
            file.seek(member.file_offset)
            return file.read(member.length)

    # --- files ---

    def _at(self, path: bytes) -> bytes:
        return self._base + b"/" + path

    def _make_directory(self, path: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            try:
                os.mkdir(self._at(path), 0o700)
            except FileNotFoundError:
                self._make_parents(path)
                os.mkdir(self._at(path), 0o700)

    def _make_parents(self, path: bytes) -> None:
        parent = os.path.dirname(self._at(path))
        if not os.path.isdir(parent):
            os.makedirs(parent, 0o700, exist_ok=True)

    def _open(self, path: bytes, flags: int, access: int = os.O_WRONLY, mode: int = 0o600) -> int:
        flags |= access | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._at(path), flags, mode)
        except PermissionError:  # a read-only file that a killed attempt had already settled
            os.chmod(self._at(path), 0o600)
        except FileNotFoundError:
            self._make_parents(path)
        return os.open(self._at(path), flags, mode)

    def _link(self, source: bytes, path: bytes) -> None:
        """Give the file `source` the name `path`, which an earlier attempt may have given to another one."""
        try:
            os.link(source, self._at(path), follow_symlinks=False)
        except FileExistsError:
            if not os.path.samestat(os.lstat(source), os.lstat(self._at(path))):
                os.unlink(self._at(path))
                os.link(source, self._at(path), follow_symlinks=False)
        except FileNotFoundError:
            self._make_parents(path)
            os.link(source, self._at(path), follow_symlinks=False)

    def _settle_again(self, file: File) -> None:
        descriptor = self._open(file.path, 0)
        try:
            self._settle(descriptor, file)
        finally:
            os.close(descriptor)

    def _settle(self, descriptor: int, file: File) -> None:
        os.utime(descriptor, ns=(file.mtime, file.mtime))
        status = os.fstat(descriptor)
        if stat.S_IMODE(status.st_mode) != file.mode:  # it was there, or the umask took something away
            os.fchmod(descriptor, file.mode)
            status = os.fstat(descriptor)
        self.signatures[file.path] = signature_of(status)


def own_space(staging: Path) -> Space:
    """What only lies below `staging` takes on its disk: what is linked from elsewhere takes nothing there."""
    total = inodes = 0
    for directory, directories, names in os.walk(os.fsencode(staging)):
        for name in (*directories, *names):
            status = os.lstat(os.path.join(directory, name))
            if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
                total += status.st_blocks * 512  # stat(2): the unit is 512 bytes everywhere
                inodes += 1
    return Space(total, inodes)


def _chosen(manifest: Manifest, wanted: Collection[bytes]) -> list[Entry]:
    """The wanted entries; a hard link whose target is not among them becomes a file of its own."""
    files = {entry.path: entry for entry in manifest.entries if isinstance(entry, File)}
    return [
        msgspec.structs.replace(files[entry.target], path=entry.path)
        if isinstance(entry, Hardlink) and entry.target not in wanted
        else entry
        for entry in manifest.entries
        if entry.path in wanted
    ]


def write_at(descriptor: int, part: memoryview, offset: int) -> None:
    """Write all of `part` at `offset`."""
    while part:
        count = os.pwrite(descriptor, part, offset)
        part = part[count:]
        offset += count
