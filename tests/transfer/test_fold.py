"""Folds: many small backups become one entry, and nothing of what they said changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import packhorse.transfer.push as push_module
from packhorse.config import Storage
from packhorse.errors import IntegrityError
from packhorse.install.interpreter import worker_interpreter
from packhorse.progress import Silent
from packhorse.root import Root
from packhorse.snapshot.manifest import Directory, Manifest
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.transfer.fold import LIMIT
from packhorse.transfer.pull import find, pull
from packhorse.transfer.push import push
from packhorse.transfer.union import union

INTERPRETER = worker_interpreter("", os.environ)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(url=(tmp_path / "store").as_uri()), {})


@pytest.fixture
def save(store: Store) -> Callable[[Root], list[str]]:
    def save(root: Root) -> list[str]:
        said = {"interpreter": lambda: INTERPRETER, "progress": Silent(), "warn": print}
        return push(root, store, "main", directories=("models",), **said).pushed

    return save


def restored(store: Store, path: Path) -> Root:
    root = Root.open(path)
    target = find(store, "main", lambda: INTERPRETER, lambda: "")
    said = {"interpreter": lambda: INTERPRETER, "progress": Silent(), "waiting": print}
    pull(root, store, target, **said)
    return root


def shared(store: Store) -> list[tags.TagEntry]:
    return tags.shared_of(tags.read_tag(store, "main"))


def test_many_backups_become_one_entry_with_the_same_content(
    store: Store, save: Callable[[Root], list[str]], tmp_path: Path
) -> None:
    root = Root.open(tmp_path / "root")
    for number in range(LIMIT + 1):
        (root.models / f"model{number}").write_bytes(bytes([number]) * 1000)
        (root.models / "changing").write_text(str(number))
        assert save(root) == ["shared"]
    os.link(root.models / "changing", root.models / "linked")
    assert len(shared(store)) == LIMIT + 1
    assert save(root) == ["shared"]
    assert [entry.kind for entry in shared(store)].count("fold") == 1
    assert len(shared(store)) == 2
    there = restored(store, tmp_path / "another").models
    assert (there / "changing").read_text() == str(LIMIT)
    assert (there / "linked").read_text() == str(LIMIT)
    for number in range(LIMIT + 1):
        assert (there / f"model{number}").read_bytes() == bytes([number]) * 1000
    assert save(root) == []
    assert save(Root.open(tmp_path / "another")) == []


def test_of_thousands_of_folds_the_newest_tells_enough(
    store: Store, save: Callable[[Root], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "LIMIT", 1)
    root = Root.open(tmp_path / "root")
    for number in range(14):
        (root.models / f"model{number}").write_text(str(number))
        assert save(root) == ["shared"]
    folds = [entry for entry in tags.listed_entries(store.list("tags/main/shared/")) if entry.kind == "fold"]
    assert len(folds) == 12
    for fold in folds[8:]:
        store.put(fold.key, b"so many are not asked for")
    there = restored(store, tmp_path / "another").models
    assert sorted(path.name for path in there.iterdir()) == sorted(f"model{number}" for number in range(14))
    store.delete([folds[0].key])  # what the others find now is not what their writers found
    late = tags.new_entry("main", "shared", folds[0].digest, folds[-1].stamp)
    store.put(late.key, b"")
    with pytest.raises(IntegrityError, match="cannot be read"):
        tags.read_tag(store, "main")


def test_a_backup_made_while_another_folds_still_wins_over_what_was_folded(
    store: Store, save: Callable[[Root], list[str]], tmp_path: Path
) -> None:
    root = Root.open(tmp_path / "root")
    for number in range(LIMIT):
        (root.models / "changing").write_text(str(number))
        save(root)
    # An entry that the folding push does not see, as if it was written after that push had listed the tag.
    listing = {entry.key for entry in shared(store)}
    late = Root.open(tmp_path / "late")
    (late.models / "changing").write_text("late")
    save(late)
    [unseen] = [entry for entry in shared(store) if entry.key not in listing]
    body = store.get(unseen.key)
    store.delete([unseen.key])
    for name in ("one", "two"):
        (root.models / name).write_text(name)
        save(root)
    assert any(entry.kind == "fold" for entry in shared(store))
    store.put(unseen.key, body)
    assert (restored(store, tmp_path / "another").models / "changing").read_text() == "late"


def test_a_path_of_any_depth_has_a_place_in_the_union() -> None:
    """A tree that one worker saved by mistake keeps no other one from what the tag holds."""
    deep = [Directory(b"models" + b"/d" * depth, 0o755, 0) for depth in range(1500)]
    found = union([("0" * 14, "", Manifest(kind="shared", entries=tuple(deep)))])
    assert list(found) == [each.path for each in deep]
