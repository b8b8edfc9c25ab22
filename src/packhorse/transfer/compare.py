"""Compare a root with what a tag points to, and its files with their digests; changes nothing, but that the index vouches no
more for what is corrupt."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping

import msgspec

from packhorse.errors import NoSuchSnapshotError, PackhorseError
from packhorse.install.imports import ImportOutcome
from packhorse.progress import Progress
from packhorse.root import SHARED
from packhorse.snapshot.contents import content_on_disk
from packhorse.snapshot.holes import cold
from packhorse.snapshot.holes import lacking as lacking_files
from packhorse.snapshot.manifest import PERMISSIONS, Directory, File, Symlink
from packhorse.snapshot.scan import readable, scan, signature_of
from packhorse.transfer import arriving
from packhorse.transfer.local import PACKAGES, Local, source_of
from packhorse.transfer.merge import changed_paths, mended_by_pull, plan
from packhorse.transfer.pull import find
from packhorse.transfer.setup import Setup
from packhorse.transfer.union import Winner, union


class Comparison(msgspec.Struct):
    """A root beside the snapshot that its tag offers this worker."""

    snapshot: str
    time: float
    """When the tag was last written, in seconds since the epoch by the store's clock."""
    equal: bool
    packages_equal: bool
    unsaved: int
    """Entries of the shared directories that the tag does not have as they are here."""
    missing: int
    """Entries of the tag's shared directories that are missing here, or older."""


def compare(setup: Setup) -> Comparison:
    """Hold the root against the tag. Raises NoSuchSnapshotError, StorageError, IntegrityError."""
    target = find(setup.store, setup.config.storage.tag, lambda: setup.interpreter, lambda: setup.fingerprint)
    local = Local(setup.root)
    state = setup.root.state()
    partial = state.state == "partial"
    packages_equal = state.manifest == target.snapshot.packages and not partial
    if packages_equal:
        packages = local.packages()
        packages_equal = (
            local.equals(packages, local.manifest(setup.store, state.manifest, "packages"))
            if state.manifest
            else not packages
        )
    found = scan(local.base, [name.encode() for name in SHARED], exclude=setup.config.run.exclude)
    found = arriving.without(setup.root, found)
    winners = union(
        (stamp, digest, local.manifest(setup.store, digest, "shared"))
        for stamp, digest in target.snapshot.shared
    )
    changed, _ = changed_paths(found, winners, local, synced=_synced(setup, local))
    unsaved = len(changed)
    # A file that is still on its way is not read: whoever opens it waits for it.
    missing = (
        len(winners.keys() - {item.path for item in found}) if partial else len(plan(local, winners).wanted)
    )
    return Comparison(
        snapshot=target.snapshot.id,
        time=target.time,
        equal=packages_equal and not unsaved and not missing and state.state in ("complete", "sparse"),
        packages_equal=packages_equal,
        unsaved=unsaved,
        missing=missing,
    )


def _synced(setup: Setup, local: Local) -> bool:
    return local.synced().source == source_of(setup.store, setup.config.storage.tag)


class Verification(msgspec.Struct):
    """What a check of every file against its digest found; lists hold paths relative to the root."""

    snapshot: str
    files: int = 0
    bytes: int = 0
    corrupt: list[str] = []
    """Size and time are those of the snapshot, the content is not."""
    changed: list[str] = []
    missing: list[str] = []
    holes: list[str] = []
    """Files that lack code for other GPUs, which is not read: the root is sparse."""
    hole_bytes: int = 0
    """What they lack, in bytes."""
    added: list[str] = []
    """Files of packages/ that the snapshot does not have, such as bytecode written since."""
    imports: list[ImportOutcome] = []
    """How the modules of environment.verify were imported, where that was asked for."""

    @property
    def sound(self) -> bool:
        """Whether nothing is corrupt, changed or missing."""
        return not (self.corrupt or self.changed or self.missing)


def verify(setup: Setup, progress: Progress) -> Verification:
    """Read every restored file and compare it with its manifest.

    Raises NoSuchSnapshotError where the root was never pushed or pulled, PackhorseError where a pull is
    unfinished.
    """
    state = setup.root.state()
    if state.state == "partial":
        raise PackhorseError(
            f"The last pull into {setup.root.path} was not finished.", "Run `packhorse pull` first."
        )
    if not state.manifest and not state.shared:
        raise NoSuchSnapshotError(
            f"What {setup.root.path} holds was neither pushed nor pulled, so there are no digests to check it against.",
            "Run `packhorse push` first.",
        )
    local = Local(setup.root)
    corrupt: list[bytes] = []
    lock = setup.root.use_packages(reading=True)
    try:
        found = Verification(snapshot=state.snapshot)
        if state.manifest:
            manifest = local.manifest(setup.store, state.manifest, "packages")
            winners = union([("", state.manifest, manifest)])
            progress.stage("checking packages", manifest.bytes)
            numbers = cold(manifest, state.gpus)
            lacking = lacking_files(manifest, numbers)
            found.holes = [readable(PACKAGES + path) for path in lacking]
            found.hole_bytes = sum(lacking.values())
            digests = {number: manifest.frames[number].digest for number in numbers}
            corrupt += _check(setup.root.packages, PACKAGES, winners, found, progress, digests)
        else:  # such as after an installation that was not pushed
            winners = {}
        found.added = [
            readable(PACKAGES + item.path)
            for item in local.packages()
            if item.kind != "directory" and item.path not in winners
        ]
        winners = union(
            (stamp, digest, local.manifest(setup.store, digest, "shared"))
            for stamp, digest in local.synced().manifests
        )
        sizes = (winner.entry.size for winner in winners.values() if isinstance(winner.entry, File))
        progress.stage("checking shared files", sum(sizes))
        shared = _check(setup.root.path, b"", winners, found, progress)
        found.corrupt = [readable(path) for path in (*corrupt, *shared)]
        corrupt += [path for path in shared if mended_by_pull(winners[path])]
        if corrupt:
            for path in corrupt:
                local.index.distrust(path)
            with contextlib.suppress(OSError):  # a disk that is bad, full or read-only
                local.index.save()
    finally:
        os.close(lock)
    return found


def _check(
    base: os.PathLike[str],
    prefix: bytes,
    winners: Mapping[bytes, Winner],
    found: Verification,
    progress: Progress,
    holes: Mapping[int, bytes] | None = None,
) -> list[bytes]:
    """Check what counts for each path; returns the paths of what is corrupt, relative to the root."""
    corrupt: list[bytes] = []
    for entry_path, winner in winners.items():
        path, relative = os.path.join(os.fsencode(base), entry_path), prefix + entry_path
        is_directory = isinstance(winner.entry, Directory)
        found.files += not is_directory
        try:
            status = os.lstat(path)
            if is_directory:
                as_it_was = stat.S_ISDIR(status.st_mode)
            elif isinstance(winner.entry, Symlink):
                as_it_was = stat.S_ISLNK(status.st_mode) and os.readlink(path) == winner.content
            else:
                as_it_was = _check_file(path, relative, winner, status, found, corrupt, holes)
                progress.advance(status.st_size)
            if not as_it_was:
                found.changed.append(readable(relative))
        except (FileNotFoundError, NotADirectoryError):
            found.missing.append(readable(relative))
    return corrupt


def _check_file(
    path: bytes,
    relative: bytes,
    winner: Winner,
    status: os.stat_result,
    found: Verification,
    corrupt: list[bytes],
    holes: Mapping[int, bytes] | None,
) -> bool:
    """Whether a file is as its entry says, or at least damaged in a way that is told already."""
    entry = winner.entry
    if not stat.S_ISREG(status.st_mode) or (isinstance(entry, File) and status.st_size != entry.size):
        return False
    found.bytes += status.st_size
    if content_on_disk(path, status.st_size, winner.file, holes) != winner.content:
        if signature_of(status).mtime != winner.mtime:
            return False
        corrupt.append(relative)
        return True
    return status.st_mode & PERMISSIONS == winner.mode
