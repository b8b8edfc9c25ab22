"""Tags: keys that sort newest first for every reader alike, and snapshots that can be named."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.servers import S3Server
from tests.transfer.relay import Relay

from packhorse.config import Storage
from packhorse.errors import IntegrityError, NoSuchSnapshotError
from packhorse.snapshot.frames import digest_of
from packhorse.snapshot.manifest import Placement
from packhorse.store import prices, tags
from packhorse.store.objects import Listed, Store
from packhorse.store.tags import EntryFacts, SnapshotFacts, TagEntry

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
        "tags/main/packages/" + "\u0661" * 14 + f"-put-{DIGEST}-{DIGEST}-12345678",
    ],
)
def test_other_objects_are_no_entries(key: str) -> None:
    assert tags.listed_entries([Listed(key, 1, 1)]) == []


def test_what_a_fold_names_is_not_read_and_nothing_else(store: Store) -> None:
    entries = [tags.new_entry("main", "shared", DIGEST, f"{n:014d}") for n in range(1, 4)]
    fold = tags.new_entry("main", "shared", OTHER, f"{0:014d}", kind="fold")
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
    store.put(f"snapshots/{snapshots[1].id}.bak", b"")
    assert tags.read_snapshot(store, snapshots[1].id[:8]) == snapshots[1]
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


# --- what a hostile or broken store may hold ---


@pytest.mark.parametrize(
    "document",
    [
        {"packages": "../../../../etc/passwd"},
        {"packages": "../" + "a" * 61},
        {"packages": "A" * 64},
        {"packages": DIGEST + "\n"},
        {"shared": [["1" * 14, "../../state.json"]]},
        {"shared": [["1" * 14, DIGEST], ["../" + "1" * 11, DIGEST]]},
        {"shared": [["\u0661" * 14, DIGEST]]},
        {"shared": [["", DIGEST]]},
    ],
)
def test_names_in_the_document_of_a_snapshot_are_digests_and_stamps(
    store: Store, document: dict[str, object]
) -> None:
    body = msgspec.json.encode({"packages": "", "shared": [], "format": 1, **document})
    name = digest_of(body).hex()
    store.put(f"snapshots/{name}", body)
    with pytest.raises(IntegrityError, match="corrupt") as refused:
        tags.read_snapshot(store, name)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    "body",
    [
        b'{"packages":"\xff","snapshot":"\xff","shared":[],"format":1}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"packages":"","format":1,"shared":[' + b'["",""],' * 2_200_000 + b'["",""]]}',
        b"[]",
        b"",
    ],
    ids=["no UTF-8", "deep nesting", "gigantic", "another type", "nothing"],
)
def test_bytes_made_to_break_the_reader_of_snapshots_and_entries_are_refused(
    store: Store, body: bytes
) -> None:
    name = digest_of(body).hex()
    store.put(f"snapshots/{name}", body)
    with pytest.raises(IntegrityError):
        tags.read_snapshot(store, name)
    put = tags.new_entry("main", "shared", DIGEST, "1" * 14)
    fold = tags.new_entry("main", "shared", DIGEST, "1" * 14, kind="fold")
    for entry in (put, fold):
        store.put(entry.key, body)
    assert tags.entry_facts(store, [put, put]) == [EntryFacts()] * 2  # all that counts of it is in its key
    with pytest.raises(IntegrityError, match="cannot be read"):
        tags.entry_facts(store, [fold])


def test_the_newest_placement_counts_whatever_the_clock_of_an_earlier_writer_said(store: Store) -> None:
    placement = Placement(manifest=bytes.fromhex(DIGEST), packs=(), frames=(), places=())
    ahead = tags.stamp_after(int(time.time() * 1000) + 10 * 365 * 24 * 3600 * 1000, "")
    store.put(f"placements/{DIGEST}/{ahead}-12345678", b"")
    store.put(f"placements/{DIGEST}/0", b"no placement")
    seen = {tags.newest_placement(store, DIGEST)}
    for _ in range(3):
        tags.put_placement(store, placement)
        newest = tags.newest_placement(store, DIGEST)
        assert newest not in seen
        seen.add(newest)
    store.put(f"placements/{DIGEST}/{0:014d}-12345678", b"")
    tags.put_placement(store, placement)  # there is no earlier stamp
    assert all(len(item.key.rpartition("/")[2]) in (1, 23) for item in store.list(f"placements/{DIGEST}/"))


# --- folds of folds ---


def _with_history(store: Store, folds: int) -> list[TagEntry]:
    """The shared entries of a tag in which each fold replaced all that was there before: two puts and a fold."""
    entries: list[TagEntry] = []
    counting: list[TagEntry] = []
    for _fold in range(folds):
        for _ in range(2):
            put = tags.new_entry("main", "shared", DIGEST, f"{90000 - len(entries):014d}")
            store.put(put.key, b"{}")
            entries.append(put)
            counting.append(put)
        fold = tags.new_entry("main", "shared", OTHER, f"{90000 - len(entries):014d}", kind="fold")
        facts = EntryFacts(
            absorbs=tuple(entry.key for entry in counting),
            replaced=len(entries),
            history=tags.history(entries),
        )
        store.put(fold.key, msgspec.json.encode(facts))
        entries.append(fold)
        counting = [fold]
    return entries


def _replaced(store: Store, entries: list[TagEntry]) -> set[TagEntry]:
    """By all bodies."""
    folds = [entry for entry in entries if entry.kind == "fold"]
    absorbed = {key for facts in tags.entry_facts(store, folds) for key in facts.absorbs}
    return {entry for entry in entries if entry.key in absorbed}


def test_a_tag_with_much_history_is_read_with_few_requests(seaweedfs: S3Server) -> None:
    where = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    store = Store(where, seaweedfs.environ())
    entries = _with_history(store, 40)
    assert len(_replaced(store, entries)) == 119
    with Relay(seaweedfs.endpoint) as relay:
        far = Store(Storage(url=where.url, endpoint=relay.endpoint), seaweedfs.environ())
        assert tags.read_tag(far, "main") == [entries[-1]]
        assert len(relay.asked) <= 1 + 8
        late = tags.new_entry("main", "shared", "c" * 64, entries[-2].stamp)
        store.put(late.key, b"{}")
        asked = len(relay.asked)
        assert set(tags.read_tag(far, "main")) == {entries[-1], late}
        assert len(relay.asked) - asked <= 1 + 8


@settings(max_examples=30)
@given(st.sets(st.integers(0, 35)), st.sets(st.integers(0, 36), max_size=3))
def test_whatever_was_deleted_or_written_late_folds_replace_what_they_name(
    gone: set[int], late: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Storage(url=Path(directory).as_uri()), {})
        entries = _with_history(store, 12)
        store.delete([entries[number].key for number in gone])
        left = [entry for number, entry in enumerate(entries) if number not in gone]
        for number in late:
            entry = tags.new_entry("main", "shared", "c" * 64, f"{90000 - number:014d}")
            store.put(entry.key, b"{}")
            left.append(entry)
        assert set(tags.read_tag(store, "main")) == set(left) - _replaced(store, left)
        assert tags.read_tags(store) == tags.read_tag(store, "main")
