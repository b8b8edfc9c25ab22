"""Tags: keys that sort newest first for every reader alike, and snapshots that can be named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.config import Storage
from packhorse.errors import IntegrityError, NoSuchSnapshotError
from packhorse.store import prices, tags
from packhorse.store.objects import Listed, Store
from packhorse.store.tags import EntryFacts, SnapshotFacts

DIGEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(url=tmp_path.as_uri()), {})


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=30))
def test_each_new_entry_sorts_before_all_that_were_listed(moments: list[int]) -> None:
    stamps: list[str] = []
    for moment in moments:
        stamps.append(tags.stamp_after(moment, min(stamps, default="")))
    assert sorted(stamps) == stamps[::-1]
    assert all(len(stamp) == 14 for stamp in stamps)
    assert len(set(stamps)) == len(stamps)


@given(st.sampled_from(["packages", "shared"]), st.integers(0, 10**13), st.sampled_from(["put", "fold"]))
def test_an_entry_is_read_back_from_its_key(part: tags.Part, moment: int, kind: str) -> None:
    entry = tags.new_entry(
        "v1.0_x-y", part, DIGEST, tags.stamp_after(moment, ""), fingerprint=OTHER, kind=kind
    )  # type: ignore[arg-type]
    assert tags.listed_entries([Listed(entry.key, 1, 1)]) == [entry]
    assert entry.time == moment / 1000


@pytest.mark.parametrize(
    "key",
    [
        "tags/main/packages/1-put-a-b-c",
        f"tags/main/other/{'1' * 14}-put-{DIGEST}-{DIGEST}-12345678",
        f"tags/main/packages/{'1' * 14}-put-{DIGEST}-{DIGEST}-12345678/more",
        f"tags/main/packages/{'1' * 14}-future-{DIGEST}-{DIGEST}-12345678",
        f"tags/a/b/packages/{'1' * 14}-put-{DIGEST}-{DIGEST}-12345678",
    ],
)
def test_other_objects_are_no_entries(key: str) -> None:
    assert tags.listed_entries([Listed(key, 1, 1)]) == []


def test_what_a_fold_names_is_not_read_and_nothing_else(store: Store) -> None:
    entries = [tags.new_entry("main", "shared", DIGEST, f"{n:014d}") for n in range(1, 4)]
    fold = tags.new_entry("main", "shared", OTHER, f"{0:014d}", kind="fold")
    import msgspec

    for entry in entries:
        store.put(entry.key, msgspec.json.encode(EntryFacts(snapshot="s")))
    store.put(
        fold.key, msgspec.json.encode(EntryFacts(snapshot="s", absorbs=(entries[0].key, entries[2].key)))
    )
    assert tags.read_tag(store, "main") == [fold, entries[1]]
    assert tags.read_tags(store) == [fold, entries[1]]
    assert tags.read_tag(store, "mai") == []


def test_the_newest_packages_of_a_fingerprint_are_chosen() -> None:
    old, new, others = (
        tags.new_entry("main", "packages", digest, stamp, fingerprint=fingerprint)
        for digest, stamp, fingerprint in (
            (DIGEST, "2" * 14, "f" * 64),
            (OTHER, "1" * 14, "f" * 64),
            (DIGEST, "0" * 14, ""),
        )
    )
    assert tags.newest_packages([others, new, old], "f" * 64) == new
    assert tags.newest_packages([others, new, old], "") == others
    assert tags.newest_packages([others, new, old], "e" * 64) is None


def test_a_snapshot_does_not_depend_on_the_order_in_which_it_was_listed() -> None:
    entries = [
        tags.new_entry("main", "shared", digest, stamp)
        for digest in (DIGEST, OTHER)
        for stamp in ("1" * 14, "2" * 14)
    ]
    assert tags.snapshot_of(None, entries).id == tags.snapshot_of(None, entries[::-1]).id


def test_a_snapshot_is_found_by_the_beginning_of_its_id(store: Store) -> None:
    snapshots = [
        SnapshotFacts(packages=DIGEST, shared=()),
        SnapshotFacts(packages=OTHER, shared=(("1" * 14, DIGEST),)),
    ]
    for snapshot in snapshots:
        store.put(f"snapshots/{snapshot.id}", snapshot.encode())
        assert tags.read_snapshot(store, snapshot.id) == snapshot
        assert tags.read_snapshot(store, snapshot.id[:8].upper()) == snapshot
    twin = snapshots[0].id[:20] + "0" * 44
    store.put(f"snapshots/{twin}", b"")
    for wrong in (
        snapshots[0].id[:10],
        "0123456789",
        "0" * 64,
        "short",
        "",
        "x" * 64,
        "../../tags",
        "a" * 65,
    ):
        with pytest.raises(NoSuchSnapshotError) as refused:
            tags.read_snapshot(store, wrong)
        assert refused.value.exit_code == 3
    with pytest.raises(IntegrityError):
        tags.read_snapshot(store, twin)


@pytest.mark.parametrize(
    ("storage", "endpoint", "provider"),
    [
        (Storage(url="s3://b", endpoint="https://s3.us-west-004.backblazeb2.com"), "", "Backblaze B2"),
        (Storage(url="s3://b", endpoint="https://id.r2.cloudflarestorage.com"), "", "Cloudflare R2"),
        (Storage(url="s3://b"), "https://s3api-eu-ro-1.runpod.io", "RunPod network volume"),
        (Storage(url="s3://b"), "", "Amazon S3"),
        (Storage(url="s3://b", endpoint="https://notamazonaws.com"), "", None),
        (Storage(url="file:///store"), "", None),
    ],
)
def test_the_price_is_that_of_the_provider_behind_the_endpoint(
    storage: Storage, endpoint: str, provider: str | None
) -> None:
    found = prices.price_of(storage, endpoint)
    assert (found.provider if found else None) == provider
