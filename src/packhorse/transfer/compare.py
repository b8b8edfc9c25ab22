"""Compare a root with what a tag points to, and its files with their digests; changes nothing."""

from __future__ import annotations

import os
import stat

import msgspec

from packhorse.errors import NoSuchSnapshotError, PackhorseError
from packhorse.install.imports import ImportOutcome
from packhorse.progress import Progress
from packhorse.root import SHARED
from packhorse.snapshot.manifest import Directory, File, Frame, Manifest, Symlink
from packhorse.snapshot.scan import scan
from packhorse.snapshot.writer import content_of, content_on_disk
from packhorse.transfer.local import Local
from packhorse.transfer.pull import find
from packhorse.transfer.push import changed_paths
from packhorse.transfer.union import union
from packhorse.transfer.workplace import Workplace


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
    """Shared manifests of the tag that were not restored here."""


def compare(place: Workplace) -> Comparison:
    """Hold the root against the tag. Raises NoSuchSnapshotError, StorageError, IntegrityError."""
    target = find(place.store, place.config.storage.tag, lambda: place.interpreter, place.fingerprint)
    local = Local(place.root)
    state = place.root.state()
    packages_equal = state.manifest == target.snapshot.packages
    if packages_equal and state.manifest:
        packages_equal = local.equals(
            local.packages(), local.manifest(place.store, state.manifest, "packages")
        )
    base = os.fsencode(place.root.path)
    found = scan(base, [name.encode() for name in SHARED], exclude=place.config.run.exclude)
    present = union(
        (stamp, digest, local.manifest(place.store, digest, "shared"))
        for stamp, digest in target.snapshot.shared
    )
    unsaved = len(changed_paths(base, found, present, local))
    missing = len({digest for _, digest in target.snapshot.shared} - set(state.shared))
    return Comparison(
        snapshot=target.snapshot.id,
        time=target.time,
        equal=packages_equal and not unsaved and not missing and state.state == "complete",
        packages_equal=packages_equal,
        unsaved=unsaved,
        missing=missing,
    )


class Verification(msgspec.Struct):
    """What a check of every file against its digest found; lists hold paths relative to the root."""

    snapshot: str
    files: int = 0
    bytes: int = 0
    corrupt: list[str] = []
    """Size and time are those of the snapshot, the content is not."""
    changed: list[str] = []
    missing: list[str] = []
    added: list[str] = []
    """Files of packages/ that the snapshot does not have, such as bytecode written since."""
    imports: list[ImportOutcome] = []
    """How the modules of environment.verify were imported, where that was asked for."""

    @property
    def sound(self) -> bool:
        """Whether nothing is corrupt, changed or missing."""
        return not (self.corrupt or self.changed or self.missing)


def verify(place: Workplace, progress: Progress) -> Verification:
    """Read every restored file and compare it with its manifest.

    Raises NoSuchSnapshotError where the root was never pushed or pulled, PackhorseError where a pull is
    unfinished.
    """
    state = place.root.state()
    if state.state == "partial":
        raise PackhorseError(
            f"The last pull into {place.root.path} was not finished.", "Run `packhorse pull` first."
        )
    if not state.manifest and not state.shared:
        raise NoSuchSnapshotError(
            f"{place.root.path} was neither pushed nor pulled, so there are no digests to check it against.",
            "Run `packhorse push` first.",
        )
    local = Local(place.root)
    lock = place.root.use_packages()
    try:
        found = Verification(snapshot=state.snapshot)
        if state.manifest:
            manifest = local.manifest(place.store, state.manifest, "packages")
            progress.stage("checking packages", manifest.bytes)
            _check(place.root.packages, "packages/", manifest, found, progress)
            own = {entry.path for entry in manifest.entries}
            found.added = [
                _readable(b"packages/" + item.path) for item in local.packages() if item.path not in own
            ]
        for digest in state.shared:
            manifest = local.manifest(place.store, digest, "shared")
            progress.stage("checking shared files", manifest.bytes)
            _check(place.root.path, "", manifest, found, progress)
    finally:
        os.close(lock)
    return found


def _check(
    base: os.PathLike[str], prefix: str, manifest: Manifest, found: Verification, progress: Progress
) -> None:
    for entry in manifest.entries:
        if isinstance(entry, Directory):
            continue
        path = os.path.join(os.fsencode(base), entry.path)
        name = prefix + _readable(entry.path)
        found.files += 1
        try:
            status = os.lstat(path)
            if isinstance(entry, Symlink):
                if not stat.S_ISLNK(status.st_mode) or os.readlink(path) != entry.target:
                    found.changed.append(name)
            elif isinstance(entry, File):
                _check_file(path, name, entry, manifest.frames, status, found)
                progress.advance(entry.size)
        except FileNotFoundError:
            found.missing.append(name)


def _check_file(
    path: bytes,
    name: str,
    entry: File,
    frames: tuple[Frame, ...],
    status: os.stat_result,
    found: Verification,
) -> None:
    found.bytes += entry.size
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        found.changed.append(name)
    elif content_on_disk(path, entry.size) != content_of(entry, frames):
        (found.corrupt if status.st_mtime_ns == entry.mtime else found.changed).append(name)
    elif status.st_mode & 0o777 != entry.mode:
        found.changed.append(name)


def _readable(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
