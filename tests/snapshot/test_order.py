"""The order of held files: small ones, the profile's, what nobody asks for last, and the same for every reader."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from packhorse.snapshot.frames import LARGE_FILE
from packhorse.snapshot.order import MOST_FILES, UNCALLED, Opened, ranks, refined

PATHS = st.sampled_from([f"packages/{letter}.so".encode() for letter in "abcdefgh"])
SECONDS = st.integers(0, 30).map(lambda tenths: tenths / 10)
PROFILES = st.lists(st.tuples(PATHS, SECONDS), unique_by=lambda each: each[0]).map(
    lambda items: tuple(Opened(*each) for each in sorted(items, key=lambda each: each[1]))
)
WANTED = st.lists(st.tuples(PATHS, SECONDS), unique_by=lambda each: each[0]).map(
    lambda items: sorted(items, key=lambda each: each[1])
)


def paths(files: tuple[Opened, ...]) -> list[bytes]:
    return [opened.path for opened in files]


def large(paths: Iterable[bytes]) -> dict[bytes, int]:
    return dict.fromkeys(paths, LARGE_FILE)


def test_without_a_profile_packages_come_first_and_what_compilers_read_last() -> None:
    wanted = [
        b"models/small",
        b"packages/a.so",
        b"packages/torch/z.so",
        b"deps/tool",
        b"models/weights",
        b"pip/wheel.whl",
        b"packages/torch/aten.h",
        b"packages/liba.a",
        b"models/b.lib",
    ]
    small = {b"models/small": LARGE_FILE - 1, b"packages/torch/aten.h": 100_000}
    found = ranks({**large(reversed(wanted)), **small})
    assert sorted(found, key=found.__getitem__) == wanted
    assert sorted(found.values()) == list(range(len(wanted)))


def test_the_profile_decides_within_each_size() -> None:
    profile = [Opened(b"models/w", 0.1), Opened(b"packages/x.a", 0.2), Opened(b"packages/gone.so", 0.3)]
    profile += [Opened(b"packages/c.pyc", 0.4)]
    sizes = large([b"packages/a.so", b"packages/x.a", b"models/w"])
    found = ranks({**sizes, b"packages/b.pyc": 100_000, b"packages/c.pyc": 100_000}, profile)
    wanted = [b"packages/c.pyc", b"packages/b.pyc", b"models/w", b"packages/x.a", b"packages/a.so"]
    assert sorted(found, key=found.__getitem__) == wanted
    assert [rank for rank in found.values() if rank >= UNCALLED] == [found[b"packages/a.so"]]


@given(PROFILES, WANTED)
def test_what_was_observed_once_changes_nothing_the_second_time(
    profile: tuple[Opened, ...], wanted: list[tuple[bytes, float]]
) -> None:
    once = refined(profile, wanted)
    assert refined(once, wanted) == once


@given(PROFILES, WANTED)
def test_wanted_files_come_in_the_order_in_which_they_were_wanted(
    profile: tuple[Opened, ...], wanted: list[tuple[bytes, float]]
) -> None:
    order = paths(refined(profile, wanted))
    among = [path for path, _ in wanted]
    assert [path for path in order if path in among] == among
    assert set(order) == {*paths(profile), *among}
    assert len(order) == len(set(order))


@given(PROFILES, WANTED)
def test_the_others_keep_their_order_and_none_of_them_passes_a_wanted_file(
    profile: tuple[Opened, ...], wanted: list[tuple[bytes, float]]
) -> None:
    before, after = paths(profile), paths(refined(profile, wanted))
    among = {path for path, _ in wanted}
    assert [path for path in after if path not in among] == [path for path in before if path not in among]
    for path in among.intersection(before):
        ahead = set(after[: after.index(path)]) - among
        assert ahead <= set(before[: before.index(path)])


def test_a_file_that_came_too_late_comes_earlier() -> None:
    profile = (Opened(b"a", 1.0), Opened(b"b", 2.0), Opened(b"c", 3.0))
    assert paths(refined(profile, [(b"c", 0.5)])) == [b"c", b"a", b"b"]
    assert paths(refined(profile, [(b"new", 1.5)])) == [b"a", b"new", b"b", b"c"]
    assert refined(profile, [(b"c", 9.0)]) == profile
    assert refined(profile, []) == profile


def test_a_profile_does_not_grow_beyond_its_bound() -> None:
    profile = tuple(Opened(b"%d" % number, float(number)) for number in range(MOST_FILES))
    grown = refined(profile, [(b"new", 0.5), (b"late", 9e9)])
    assert len(grown) == MOST_FILES
    assert paths(grown)[:2] == [b"0", b"new"]
    assert refined(grown, [(b"new", 0.5), (b"late", 9e9)]) == grown
