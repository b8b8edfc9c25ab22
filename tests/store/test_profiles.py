"""Profiles: the newest of a name counts, a bad one is no error, and commands keep theirs apart."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse import profile_name
from packhorse.config import Storage
from packhorse.profile_name import name_of
from packhorse.snapshot.order import MOST_FILES, Opened
from packhorse.store import profiles
from packhorse.store.objects import Store
from packhorse.store.profiles import KEPT, LARGEST, Profile

FILES = (Opened(b"packages/torch/lib/libtorch.so", 0.25), Opened(b"models/\xff", 1.5))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(url=tmp_path.as_uri()), {})


def read(store: Store, name: str = "serve", tag: str = "main") -> Profile | None:
    """The profile, where nothing is to be warned of."""
    return profiles.read(store, tag, name, pytest.fail)


def test_the_newest_profile_of_a_name_is_read_and_others_stay_apart(store: Store) -> None:
    assert read(store) is None
    for number in range(4):
        profiles.write(store, "main", Profile("serve", "python serve.py", FILES[:number]))
    profiles.write(store, "main", Profile("train", files=FILES))
    profiles.write(store, "main2", Profile("serve"))
    assert read(store) == Profile("serve", "python serve.py", FILES[:3])
    assert read(store, "train") == Profile("train", files=FILES)
    assert read(store, "serv") is None
    assert profiles.names(store, "main") == ["serve", "train"]
    assert profiles.names(store, "mai") == []


def test_a_writer_leaves_the_newest_and_the_one_before(store: Store) -> None:
    for _ in range(5):
        profiles.write(store, "main", Profile("serve", files=FILES))
    profiles.write(store, "main", Profile("train", files=FILES))
    kept = profiles.listed_profiles(store.list("profiles/"))
    assert [each.name for each in kept] == ["serve"] * KEPT + ["train"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no profile", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x93\x01\x02\x03", "cannot be read"),
        (b"x" * (LARGEST + 1), "too large"),
        (Profile("serve", format=2).encode(), "format 2"),
    ],
)
def test_a_profile_that_cannot_be_read_is_passed_over_with_a_warning(
    store: Store, content: bytes, reason: str
) -> None:
    profiles.write(store, "main", Profile("serve", files=FILES))
    store.put(f"profiles/main/serve/{'0' * 14}-12345678", content)
    warnings: list[str] = []
    assert profiles.read(store, "main", "serve", warnings.append) == Profile("serve", files=FILES)
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_other_objects_are_no_profiles(store: Store) -> None:
    for key in ("1-12345678", f"{'1' * 14}-xyz", f"{'1' * 14}-12345678/more", "note"):
        store.put(f"profiles/main/serve/{key}", b"foreign")
    assert read(store) is None
    assert profiles.names(store, "main") == []


@pytest.mark.parametrize("length", [10, 4000])
def test_a_stored_profile_is_bounded_and_keeps_the_first_files(store: Store, length: int) -> None:
    files = tuple(Opened(b"%d/" % number + b"x" * length, float(number)) for number in range(MOST_FILES + 10))
    profiles.write(store, "main", Profile("serve", files=files))
    [kept] = store.list("profiles/main/")
    assert kept.size <= LARGEST
    found = read(store)
    assert found is not None
    assert 10 < len(found.files) <= MOST_FILES
    assert found.files == files[: len(found.files)]


@pytest.mark.parametrize(
    ("command", "begins"),
    [
        (["python", "-u", "handler.py"], "python-handler.py-"),
        (["/usr/bin/python3.11", "/app/handler.py", "--key", "secret"], "python3.11-handler.py-"),
        (["python", "-m", "uvicorn", "app:app"], "python-uvicorn-"),
        (["python", "-um", "http.server"], "python-http.server-"),
        (["python", "-X", "dev", "-W", "error", "a.py"], "python-a.py-"),
        (["python", "-c", "print('secret')"], "python-"),
        (["/opt/my tools/serve+", "secret"], "serve-"),
        (["..."], ""),
    ],
)
def test_the_name_tells_the_program_and_its_script_and_nothing_more(command: list[str], begins: str) -> None:
    name = name_of(command)
    assert re.fullmatch(re.escape(begins) + "[0-9a-f]{8}", name), name


def test_a_script_whose_name_is_not_utf_8_can_be_shown() -> None:
    shown = profile_name.shown(["python", os.fsdecode(b"serve-\xff.py")])
    assert shown.encode() == rb"python serve-\udcff.py"


def test_the_name_depends_on_every_word_but_not_on_where_the_program_lies() -> None:
    assert name_of(["/a/python", "x.py", "1"]) == name_of(["python", "x.py", "1"])
    assert (
        len({name_of(["python", *rest]) for rest in (["x.py"], ["x.py", "1"], ["x.py1"], ["x.py", "2"])}) == 4
    )


@given(st.lists(st.text(), min_size=1))
def test_every_command_has_a_name_that_fits_a_key(command: list[str]) -> None:
    try:
        name = name_of(command)
    except UnicodeEncodeError:  # no word of a command line is like that
        return
    assert re.fullmatch(profile_name.PATTERN, name)
