"""Leases: of the workers that want to build the same environment, one builds and the others wait.

Needs no conditional write: each puts a claim, and the oldest living one, by the store's clock, holds the lease.
Should two build after all, that is waste and no harm: both push the same content.
"""

from __future__ import annotations

import contextlib
import secrets
import threading

from packhorse.errors import StorageError
from packhorse.store.objects import Store

ALIVE = 60.0
"""Seconds without a sign of life after which a claim counts no more."""
SIGN = 15.0
"""Seconds between signs of life."""


class Lease:
    """A claim on building `name`; use as a context."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._prefix = f"leases/{name}/"
        self._nonce = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._signs, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._store.put(f"{self._prefix}{self._nonce}.claim", b"")
        self._sign()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(StorageError):  # without signs the claim stops counting by itself
            self._store.delete([f"{self._prefix}{self._nonce}.{kind}" for kind in ("claim", "sign", "held")])

    def held(self) -> bool:
        """Whether this claim holds the lease: asked until it does. Raises StorageError.

        Many stores tell times by the second, so that of two claims the later one can look older. So the oldest
        marks the lease as held, and lets go if another marked it at the same moment.
        """
        oldest, marked = self._claims()
        if marked or oldest != self._nonce:
            return marked == {self._nonce}
        self._store.put(f"{self._prefix}{self._nonce}.held", b"")
        _, marked = self._claims()
        if marked == {self._nonce}:
            return True
        self._store.delete([f"{self._prefix}{self._nonce}.held"])
        return False

    def _claims(self) -> tuple[str, set[str]]:
        """The oldest living claim, and those living ones that are marked as holding."""
        times: dict[str, dict[str, int]] = {"claim": {}, "sign": {}, "held": {}}
        for item in self._store.list(self._prefix):
            nonce, _, kind = item.key.rpartition("/")[2].partition(".")
            times.setdefault(kind, {})[nonce] = item.modified
        claims, signs = times["claim"], times["sign"]
        now = signs.get(self._nonce, 0)
        living = [
            (claimed, nonce)
            for nonce, claimed in claims.items()
            if now - signs.get(nonce, claimed) < ALIVE * 1000
        ]
        oldest = min(living, default=(0, self._nonce))[1]
        return oldest, times["held"].keys() & {nonce for _, nonce in living}

    def _sign(self) -> None:
        self._store.put(f"{self._prefix}{self._nonce}.sign", b"")

    def _signs(self) -> None:
        while not self._ended.wait(SIGN):
            try:
                self._sign()
            except StorageError:
                continue
