"""Repacking: frames are copied from pack to pack as they are stored, proven, and never compressed again."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from packhorse.errors import MEND, IntegrityError
from packhorse.progress import Progress, Silent
from packhorse.snapshot import frames
from packhorse.snapshot.writer import NONCE, PACK, Placed
from packhorse.store.objects import NotFoundError, Store

_READERS = 4
"""Packs that are read at the same time, which bounds the memory: what is wanted of each is held."""


class _Held(NamedTuple):
    digest: bytes
    at: Placed
    stored: bytes


def copy_frames(
    store: Store, places: Mapping[bytes, Placed], progress: Progress | None = None
) -> dict[bytes, Placed]:
    """Copy frames, as they are stored, into new packs; returns where they lie there, by their digests.

    Every frame is checked against its stored digest. Each new pack ends with random bytes that no manifest uses, so
    that its name is one that no pack ever had. Raises IntegrityError, StorageError.
    """
    progress = progress or Silent()
    by_pack: dict[str, list[tuple[bytes, Placed]]] = {}
    for digest, at in places.items():
        by_pack.setdefault(at.pack, []).append((digest, at))
    packs = list(by_pack)
    moved: dict[bytes, Placed] = {}
    waiting: list[_Held] = []

    def read(pack: str) -> list[_Held]:
        wanted = sorted(by_pack[pack], key=lambda each: each[1].offset)
        stored = _stored(store, [at for _, at in wanted])
        return [_Held(digest, at, content) for (digest, at), content in zip(wanted, stored)]

    with ThreadPoolExecutor(_READERS, thread_name_prefix="copy") as pool:
        for start in range(0, len(packs), _READERS):
            for found in pool.map(read, packs[start : start + _READERS]):
                for each in found:
                    waiting.append(each)
                    progress.advance(each.at.length)
                    if sum(held.at.length for held in waiting) >= PACK:
                        moved |= _put_pack(store, waiting)
                        waiting = []
    if waiting:
        moved |= _put_pack(store, waiting)
    return moved


def _stored(store: Store, places: Sequence[Placed]) -> list[bytes]:
    """The stored bytes of frames of one pack, proven; in one request where the store knows no ranges."""
    key = f"packs/{places[0].pack}"
    spans = sorted({(at.offset, at.length) for at in places})
    try:
        parts = [[span] for span in spans] if store.keeps_ranges(key) else [spans]
        found = {span: bytes(stored) for part in parts for span, stored in zip(part, store.ranges(key, part))}
    except NotFoundError as error:
        raise IntegrityError(
            f"The pack {places[0].pack[:12]} is missing from the store.", f"Try again; if it stays: {MEND}"
        ) from error
    result = []
    for at in places:
        content = found[at.offset, at.length]
        if frames.digest_of(content) != at.digest:
            raise IntegrityError(
                f"A frame of the pack {at.pack[:12]} is corrupt: its stored bytes do not have the digest "
                f"{at.digest.hex()[:12]}.",
                MEND,
            )
        result.append(content)
    return result


def _put_pack(store: Store, waiting: Sequence[_Held]) -> dict[bytes, Placed]:
    nonce = secrets.token_bytes(NONCE)
    name = frames.group_digest([*(held.at.digest for held in waiting), frames.digest_of(nonce)]).hex()
    moved, offset = {}, 0
    for held in waiting:
        moved[held.digest] = held.at._replace(pack=name, offset=offset)
        offset += held.at.length
    store.put(f"packs/{name}", b"".join([*(held.stored for held in waiting), nonce]))
    return moved
