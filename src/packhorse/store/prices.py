"""What a store costs a month, by its provider's list price."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from packhorse.config import Storage

DATED = "2026-11"
"""When the table was last compared with the providers' price lists."""


class Price(NamedTuple):
    """A provider's list price in US dollars for a GB (10^9 bytes) and month."""

    provider: str
    dollars: float


_BY_HOST = (
    ("backblazeb2.com", Price("Backblaze B2", 0.006)),
    ("r2.cloudflarestorage.com", Price("Cloudflare R2", 0.015)),
    ("runpod.io", Price("RunPod network volume", 0.07)),
    ("amazonaws.com", Price("Amazon S3", 0.023)),
)


def price_of(storage: Storage, endpoint: str = "") -> Price | None:
    """The list price of a store, or None where it is not known (another provider, or a disk of one's own)."""
    host = urlsplit(storage.endpoint or endpoint).hostname or ""
    if not host and urlsplit(storage.url).scheme in ("s3", "s3a"):
        host = "s3.amazonaws.com"
    return next((price for end, price in _BY_HOST if host == end or host.endswith("." + end)), None)
