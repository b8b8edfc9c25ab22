"""What the resolver chose → a generation of `packages/`: what is installed already is linked, the rest brought.

Promises that beside the installed files no more than the largest wheel lies on the disk, and that the generation
in force is only read. Wheels are fetched, unpacked and removed one by one; pip builds what is no wheel.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packhorse import atomic
from packhorse.errors import IntegrityError, NoSpaceError, PackhorseError
from packhorse.install import sizes, slim, unpack, wheels
from packhorse.install.access import Access
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError, checked, no_space, sha256
from packhorse.install.hashes import allowed_by
from packhorse.install.log import without_credentials
from packhorse.install.pip import Engine

_THREADS = 4
_INSTALLER = b"packhorse\n"
_CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError)
_RECORD = re.compile(r"[^/]+\.dist-info/RECORD")


class Applied(NamedTuple):
    """How many distributions were linked, unpacked from wheels, and left to pip; and the names of those that came
    last, with their versions."""

    linked: int
    unpacked: int
    by_pip: int
    last: Mapping[str, str]


class _StoppedError(Exception):
    """Another thread failed, or the command was stopped."""


def apply(
    chosen: Sequence[Chosen],
    engine: Engine,
    access: Access,
    options: Sequence[str],
    *,
    base: Path | None,
    mark: str,
    staging: Path,
    scratch: Path,
    last: Sequence[Chosen] = (),
) -> Applied:
    """Make `staging` hold the distributions `chosen`, and then the wheels `last`, in their order, each in place of
    what has its name.

    `base` is an environment of the same Python whose unchanged distributions are linked, those that the slim
    profile took something from only if it did so by the same rules (slim.mark); `options` are the lines
    of requirements files that tell pip where to look; `scratch` is a path on the same disk that is not there yet.
    Raises what Downloads.fetch and Engine.install raise.
    """
    os.mkdir(scratch, 0o700)
    work = _Work(engine, access, staging, scratch)
    # By name: one repository may hold several distributions.
    found = {each.name: _found(each, base, mark) if base is not None else () for each in (*chosen, *last)}
    for each in last:
        if base is not None and _shared(found[each.name], base):
            found[each.name] = ()  # what lies there may be the other's
    if base is not None:
        for name in _overwritten(found, base):
            found[name] = ()
    linked = [each for each in chosen if found[each.name]]
    for each in (each for each in (*chosen, *last) if found[each.name]):
        engine.log.add(f"unchanged: {each.name} {each.version}")
    placed: dict[Path, _Rank] = {}
    for each in sorted(linked, key=_rank):
        _link_all(found[each.name], base, staging)
        placed.update((staging / path, _rank(each)) for path in found[each.name])
    rest = [each for each in chosen if not found[each.name]]
    wanted = [*(each for each in rest if each.is_wheel), *(each for each in last if not found[each.name])]
    sized = {each.url: each for each in work.fitting(wanted, slimmed=bool(mark))}
    refused = work.bring([sized[each.url] for each in rest if each.is_wheel], placed)
    left = [*(each for each in rest if not each.is_wheel), *refused]

    def by_pip(each: Chosen) -> None:
        engine.progress.stage(f"building {each.name}")
        target = scratch / "pip"
        os.mkdir(target, 0o700)
        engine.install((), [*options, each.requirement(access.with_user)], target, "--no-deps")
        unpack.hide_signatures(target)
        wheels.merge(target, staging)
        atomic.remove_tree(target)

    for each in left:
        by_pip(each)
    for each in last:
        wheels.displace(each.name, staging)
        if found[each.name]:
            _link_all(found[each.name], base, staging)
            linked.append(each)
            continue
        for unfetched in work.bring([sized[each.url]]):
            by_pip(unfetched)
    if work.infos:
        engine.progress.stage("compiling bytecode")
        unpack.compile_sources(
            staging,
            work.infos,
            engine.session.root.packages,
            engine.interpreter,
            environ=engine.environ,
            scratch=scratch,
            log=engine.log,
        )
    atomic.remove_tree(scratch)
    names = {each.name for each in last}
    brought = {each.name: each.version for each in wheels.distributions(staging) if each.name in names}
    return Applied(len(linked), len(work.infos), len(left), brought)


# --- what is there already ---


def _found(chosen: Chosen, base: Path, mark: str) -> Sequence[str]:
    """The files of a distribution in `base` that is whole and was made from the same file; empty for none."""
    for info in _infos(chosen, base):
        if slim.marked(base / info) not in ("", mark) or not _same(chosen, base / info):
            continue
        paths = list(unpack.recorded(base / info))
        if f"{info}/RECORD" in paths and all(os.path.lexists(base / path) for path in paths):
            return paths
    return ()


def _shared(paths: Sequence[str], base: Path) -> bool:
    """Whether another distribution in `base` has one of these files, too."""
    wanted = set(paths)
    if not wanted:
        return False
    records = (info for info in base.glob("*.dist-info") if f"{info.name}/RECORD" not in wanted)
    for info in records:
        with contextlib.suppress(FileNotFoundError):
            if not wanted.isdisjoint(unpack.recorded(info)):
                return True
    return False


def _overwritten(found: Mapping[str, Sequence[str]], base: Path) -> list[str]:
    """The names of those of which a file in `base` is that of a distribution which goes, or is replaced."""
    staying = {name: _info(paths) for name, paths in found.items() if paths}
    going: set[str] = set()
    for record in base.glob("*.dist-info/RECORD"):
        if record.parent.name not in staying.values():
            going.update(unpack.recorded(record.parent))
    return [
        name
        for name, info in staying.items()
        if not going.isdisjoint(found[name]) and not unpack.as_recorded(base / info, going)
    ]


def _info(paths: Iterable[str]) -> str:
    """The dist-info of the distribution with these files, which may bring those of others along, deeper."""
    return next(path.partition("/")[0] for path in paths if _RECORD.fullmatch(path))


def _link_all(paths: Iterable[str], base: Path | None, staging: Path) -> None:
    assert base is not None
    for path in paths:
        _link(base / path, staging / path)


def _infos(chosen: Chosen, base: Path) -> Iterator[str]:
    from packaging.utils import canonicalize_name

    # The name of a wheel that was built for one torch has a longer version than its metadata.
    version = chosen.version.partition("+")[0] if chosen.direct else chosen.version
    for path in base.glob(f"*-{version}*.dist-info"):
        name, _, found = path.name.removesuffix(".dist-info").partition("-")
        if canonicalize_name(name) == chosen.name and found in (version, chosen.version):
            yield path.name


def _same(chosen: Chosen, info: Path) -> bool:
    """Whether a distribution was made from the chosen file: by the hashes that its metadata tells."""
    for name in (unpack.PROVENANCE, "direct_url.json"):
        with contextlib.suppress(OSError, ValueError):
            origin = json.loads((info / name).read_bytes())
            direct = chosen.direct or {}
            if origin.get("subdirectory") != direct.get("subdirectory"):
                return False
            if vcs := direct.get("vcs_info"):
                return bool(
                    origin.get("vcs_info", {}).get("commit_id") == vcs["commit_id"]
                    and without_credentials(origin["url"]) == direct["url"]
                    and not origin.get("dir_info")
                )
            had: Mapping[str, str] = origin.get("archive_info", {}).get("hashes") or {}
            if not allowed_by(chosen.allowed, had):
                return False
            hashes = chosen.hashes
            if not hashes and had.get("sha256") and chosen.is_wheel and chosen.local is not None:
                hashes = {"sha256": sha256(chosen.local)}
            common = had.keys() & hashes.keys()
            same = (had[each].lower() == hashes[each].lower() for each in common)
            return bool(common or chosen.allowed) and all(same)
    return False


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place, follow_symlinks=False)
    except FileExistsError:  # of another distribution too
        place.unlink()
        os.link(source, place, follow_symlinks=False)


# --- wheels ---

_Rank = tuple[bool, str]


def _rank(chosen: Chosen) -> _Rank:
    """Of a file that several distributions have, that of the highest stays: pip builds last, wheels go by name."""
    return not chosen.is_wheel, chosen.name


class _Room:
    """Bytes of wheels that may lie on the disk at once: as many as the largest has."""

    def __init__(self, largest: int) -> None:
        self._largest, self._taken = largest, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int, check: Callable[[], None]) -> Iterator[None]:
        with self._changed:
            while self._taken and self._taken + size > self._largest:
                self._changed.wait(0.2)
                check()
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


class _Work:
    """Wheels on their way, several at a time."""

    def __init__(self, engine: Engine, access: Access, staging: Path, scratch: Path) -> None:
        self._engine, self._staging = engine, staging
        self._keeps = engine.keep_downloads
        self._directory = engine.session.root.pip / "wheels" if self._keeps else scratch / "wheels"
        self._directory.mkdir(exist_ok=True)
        self._downloads = Downloads(
            access, engine.settings, engine.note, sleep=engine.sleep, arrived=engine.progress.advance
        )
        self._refused: list[Chosen] = []
        self._errors: list[BaseException] = []
        self._stopping = threading.Event()
        self._writing: set[int] = set()
        self._room = _Room(0)
        self._placing = threading.Lock()
        self._placed: dict[Path, _Rank] = {}
        self.infos: list[str] = []
        """The dist-info of each that was unpacked."""

    def fitting(self, chosen: Sequence[Chosen], *, slimmed: bool) -> list[Chosen]:
        """The wheels with their sizes. Raises NoSpaceError where it is known that they do not fit.

        `slimmed` says that the slim profile is chosen; it takes files out when all are there.
        """
        engine = self._engine
        engine.progress.stage("looking at the sizes of the wheels")
        found = sizes.sized(chosen, self._downloads, engine.session.heartbeat)
        files = sum(map(_unpacked, found))
        beside, which = self._beside_all([each.chosen for each in found])
        free = engine.watch.look()
        engine.log.add(f"wheels to bring: {len(found)}, unpacked {files} bytes; free: {free} bytes")
        if found and files + beside > free:
            largest = sorted(found, key=_unpacked, reverse=True)[:3]
            listed = ", ".join(f"{each.chosen.name} ({_mb(_unpacked(each))})" for each in largest)
            goes = (file.bytes for each in found for file in each.files if slim.would_go(file.path))
            saved = 0 if slimmed else sum(goes)
            hints = ["Free that much, or choose a root on a larger disk with --root."]
            if self._keeps:
                hints.append("Without keep-downloads only the largest wheel needs room.")
            if saved:
                hints.append(f'To workers that restore it profile = "slim" saves about {_mb(saved)}.')
            raise NoSpaceError(
                f"{engine.session.root.path} has {_mb(free)} free, but what is to be installed takes {_mb(files)}"
                f"{which}: {_mb(files + beside - free)} are missing. The largest are {listed}.",
                " ".join(hints),
            )
        return [each.chosen for each in found]

    def _beside_all(self, chosen: Sequence[Chosen]) -> tuple[int, str]:
        """The most bytes that wheels take beside their files, and which these are."""
        if self._keeps:
            new = sum(_beside(each) for each in chosen if not (self._directory / each.file).exists())
            return new, f", and the wheels that keep-downloads keeps {_mb(new)}" if new else ""
        largest = max(chosen, key=_beside, default=None)
        beside = _beside(largest) if largest is not None else 0
        if largest is None or not beside:
            return 0, ""
        return beside, f", and its largest wheel ({largest.file}) {_mb(beside)} while it is unpacked"

    def bring(self, chosen: Sequence[Chosen], placed: Mapping[Path, _Rank] = {}) -> list[Chosen]:
        """Install the wheels beside what is `placed` already; returns those that only pip may fetch."""
        total = sum(map(_beside, chosen))
        self._refused = []
        self._stopping.clear()
        self._placed = dict(placed)
        self._engine.progress.stage("downloading and installing", total or None)
        self._room = _Room(max(map(_beside, chosen), default=0))
        # The largest first: it lies beside its own files before those of the others are there.
        pending = iter(sorted(chosen, key=lambda each: -each.size))
        taking = threading.Lock()

        def work() -> None:
            while not self._stopping.is_set():
                with taking:
                    each = next(pending, None)
                if each is None:
                    return
                try:
                    self._bring(each)
                except _StoppedError:
                    return
                except BaseException as error:
                    self._errors.append(error)
                    self._stopping.set()

        # Daemons: one that waits for a silent server must not keep the command from ending.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(chosen)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not self._errors:
                    thread.join(0.1)
                    self._engine.session.heartbeat()
        finally:
            self._stopping.set()
            while any(thread.ident in self._writing for thread in threads if thread.is_alive()):
                self._stopping.wait(0)
                threads[0].join(0.01)
        if self._errors:
            raise self._errors[0]
        return self._refused

    def _bring(self, chosen: Chosen) -> None:
        try:
            if chosen.local is not None:
                digest = checked(chosen.file, chosen.local, chosen.hashes, chosen.allowed, chosen.url)
                self._install(chosen, chosen.local, digest)
                return
            path = self._directory / chosen.file
            with self._room.taken(0 if self._keeps else chosen.size, self._check):
                digest = self._kept(chosen, path) or self._downloads.fetch(
                    chosen.url, path, chosen.hashes, chosen.size, chosen.allowed
                )
                self._install(chosen, path, digest)
                if not self._keeps:
                    path.unlink()
        except RefusedError as error:
            self._engine.note(f"{chosen.file}: {error}; pip fetches it")
            self._refused.append(chosen)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(self._engine.session.root.path, chosen.file) from error
            if isinstance(error, _CLASHES):
                raise _clash(chosen.file, error, self._staging) from error
            raise

    def _check(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def _kept(self, chosen: Chosen, path: Path) -> str:
        """The digest of a file that an installation before this one kept, if it is the right one."""
        if not path.exists() or not (chosen.allowed or "sha256" in chosen.hashes):
            return ""
        try:
            return checked(chosen.file, path, chosen.hashes, chosen.allowed, chosen.url)
        except IntegrityError:
            return ""

    def _settle(self, rank: _Rank, written: Path, place: Path) -> None:
        """Move a file to its place, unless one is there that stays: not the thread that was the slowest decides."""
        with self._placing:
            if self._placed.get(place, rank) > rank:
                written.unlink()
                return
            self._placed[place] = rank
            os.replace(written, place)

    def _install(self, chosen: Chosen, path: Path, digest: str) -> None:
        own = threading.get_ident()
        self._writing.add(own)
        try:
            self._check()
            metadata = {"INSTALLER": _INSTALLER}
            if chosen.requested:
                metadata["REQUESTED"] = b""
            origin = {"hashes": {**chosen.hashes, "sha256": digest}}
            if chosen.direct is not None:
                metadata["direct_url.json"] = _json({**chosen.direct, "archive_info": origin})
            else:
                metadata[unpack.PROVENANCE] = _json(
                    {"url": without_credentials(chosen.url), "archive_info": origin}
                )
            self.infos.append(
                unpack.unpack(
                    path,
                    self._staging,
                    self._engine.interpreter,
                    metadata,
                    digest,
                    self._check,
                    lambda written, place: self._settle(_rank(chosen), written, place),
                )
            )
        finally:
            self._writing.discard(own)
        self._engine.log.add(f"installed {chosen.name} {chosen.version} from {chosen.file}, sha256 {digest}")


def _clash(file: str, error: OSError, staging: Path) -> PackhorseError:
    place = os.fsdecode(error.filename2 or error.filename)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return PackhorseError(
        f"{file} cannot be installed beside the others: {os.path.relpath(place, staging)} is a directory of one "
        "distribution and a file of another.",
        "Take one of them out of the requirements, or another version of it.",
    )


def _beside(chosen: Chosen) -> int:
    """The bytes that a wheel takes beside its files."""
    return chosen.size if chosen.local is None else 0


def _unpacked(sized: sizes.Sized) -> int:
    """The bytes that a wheel's files take, with their bytecode."""
    return sum(file.bytes for file in sized.files)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, sort_keys=True).encode()
