"""Profiles: which files of 64 KiB and more a command opens, in which order and when.

    profiles/<tag>/<name>/<stamp>-<nonce>

The newest of a name counts. A profile decides what comes first and nothing else, so one that cannot be read is left
out with a warning, and one that is removed while somebody reads costs an order, never a boot.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from packhorse import profile_name
from packhorse.errors import UNREADABLE, StorageError
from packhorse.snapshot.order import MOST_FILES, Opened
from packhorse.store import tags
from packhorse.store.objects import Listed, NotFoundError, Store

FORMAT = 1
LARGEST = 256 << 10
"""Bytes of a stored profile; a reader takes no larger one."""
KEPT = 2
"""Of each name: the newest, and the one that somebody may just be about to read."""
_KEY = re.compile(rf"profiles/([^/]+)/({profile_name.PATTERN})/([0-9]{{14}})-[0-9a-f]{{8}}")


class Profile(msgspec.Struct, frozen=True):
    """What a command opened of the files of a root, in the order of the first time."""

    name: str
    command: str = ""
    """For people: the program and its script."""
    files: tuple[Opened, ...] = ()
    format: int = FORMAT

    def encode(self) -> bytes:
        """The bytes that are stored: as many files as fit, the first ones."""
        profile = msgspec.structs.replace(self, files=self.files[:MOST_FILES])
        while len(encoded := msgspec.msgpack.encode(profile)) > LARGEST:
            profile = msgspec.structs.replace(profile, files=profile.files[: len(profile.files) * 3 // 4])
        return encoded


class Kept(NamedTuple):
    """A stored profile. `stamp` is the inverted time: smaller is newer."""

    tag: str
    name: str
    stamp: str
    listed: Listed


def listed_profiles(listing: Iterable[Listed]) -> list[Kept]:
    """The profiles among listed objects, by tag and name, newest first."""
    return sorted(
        Kept(match[1], match[2], match[3], item) for item in listing if (match := _KEY.fullmatch(item.key))
    )


def surplus(profiles: Iterable[Kept]) -> list[str]:
    """The keys of those of `profiles`, ordered newest first, that are older than the newest KEPT of their name."""
    count: dict[tuple[str, str], int] = {}
    keys = []
    for each in profiles:
        count[each.tag, each.name] = count.get((each.tag, each.name), 0) + 1
        if count[each.tag, each.name] > KEPT:
            keys.append(each.listed.key)
    return keys


def names(store: Store, tag: str) -> list[str]:
    """The names of the profiles of a tag. Raises StorageError."""
    return sorted({each.name for each in listed_profiles(store.list(f"profiles/{tag}/"))})


def read(store: Store, tag: str, name: str, warn: Callable[[str], None]) -> Profile | None:
    """The newest profile of that name, or None: one listing and one request. Raises StorageError.

    Those that cannot be read are passed over with a warning.
    """
    for each in listed_profiles(store.list(f"profiles/{tag}/")):
        if each.name != name:
            continue
        if each.listed.size > LARGEST:
            warn(f"the profile {each.listed.key} is too large to be one and is ignored")
            continue
        try:
            profile = msgspec.msgpack.decode(store.get(each.listed.key), type=Profile)
        except NotFoundError:  # removed since it was listed
            continue
        except UNREADABLE:
            warn(f"the profile {each.listed.key} cannot be read and is ignored")
            continue
        if profile.format == FORMAT:
            return msgspec.structs.replace(profile, files=profile.files[:MOST_FILES])
        warn(f"the profile {each.listed.key} has format {profile.format}, which this packhorse does not know")
    return None


def write(store: Store, tag: str, profile: Profile) -> None:
    """Store a profile, which counts from now on; older ones of its name but one are removed. Raises StorageError.

    It is stored first of all, with a stamp by the local clock, and once more where that is not before all that are there: a
    writer may be short of time.
    """
    below = f"profiles/{tag}/{profile.name}/"
    content, now = profile.encode(), int(time.time() * 1000)

    def put(newest: str) -> str:
        key = f"{below}{tags.stamp_after(now, newest)}-{secrets.token_hex(4)}"
        store.put(key, content)
        return key

    key = put("")
    kept = listed_profiles(store.list(below))
    if kept and kept[0].listed.key != key:
        put(kept[0].stamp)
        kept = listed_profiles(store.list(below))
    with contextlib.suppress(StorageError):  # whoever may write need not be allowed to delete
        store.delete(surplus(kept))
