"""Installing from an index behind a relay that breaks what passes: whole packages, or an error that says why."""

from __future__ import annotations

import hashlib
import os
import random
import re

import pytest
from tests.install.conftest import Installer
from tests.install.faults import Fault, Plan, Relay, relay, seeded
from tests.install.index import Index, Status

from packhorse.config import Network
from packhorse.errors import IntegrityError, PackhorseError
from packhorse.install.network import NetworkError

FOO = "foo-1.0-py3-none-any.whl"
QUICK = Network(attempts=25, timeout_small=0.5, timeout_large=0.5, large_attempts=25)


@pytest.fixture(params=["pip", "uv"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _contents(index: Index) -> dict[str, bytes]:
    """Offer a package that needs two others, with content that nothing makes smaller."""
    contents = {name: random.Random(name).randbytes(size) for name, size in _SIZES.items()}
    index.add("foo", "1.0", {"foo.bin": contents["foo"]}, requires=["bar", "baz"])
    index.add("bar", "1.0", {"bar.bin": contents["bar"]})
    index.add("baz", "1.0", {"baz.bin": contents["baz"]})
    return contents


_SIZES = {"foo": 3_000_000, "bar": 400_000, "baz": 5_000}


def _through(installer: Installer, between: Relay) -> None:
    installer.environ |= {"PIP_INDEX_URL": between.url, "UV_DEFAULT_INDEX": between.url}


def _installed(installer: Installer) -> dict[str, bytes]:
    return {name: (installer.root.packages / f"{name}.bin").read_bytes() for name in _SIZES}


# --- what passes by ---


@pytest.mark.parametrize("seed", range(4))
def test_connections_that_break_at_any_byte_cost_attempts_alone(
    index: Index, installer: Installer, engine: str, seed: int
) -> None:
    contents = _contents(index)
    with relay(index.host, seeded(seed, connections=12, most=300_000)) as between:
        _through(installer, between)
        installer(dependencies=["foo"], engine=engine, network=QUICK)

    assert _installed(installer) == contents
    assert between.broken > 3
    assert any("; attempt " in note and " of 25 in " in note for note in installer.notes)


@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
def test_a_wheel_goes_on_where_its_connection_ended(index: Index, installer: Installer, kind: str) -> None:
    """The log says which wheel, how many bytes, which attempt, and how long until the next."""
    content = os.urandom(2_000_000)
    index.add("foo", "1.0", {"foo.bin": content})
    with relay(index.host, _first(Fault(kind, 1_200_000))) as between:  # type: ignore[arg-type]
        installer(wheels=[{"name": "foo", "url": f"http://{between.host}/files/{FOO}"}], network=QUICK)

    assert (installer.root.packages / "foo.bin").read_bytes() == content
    reason = "no answer in time" if kind == "stall" else "the connection broke"
    [told] = [note for note in installer.notes if note.startswith(f"{FOO}: {reason}")]
    # A reset takes what had arrived but was not read yet with it.
    arrived = re.search(r" at ([\d,]+) of 2,000,\d+ bytes; attempt 2 of 25 in 1\.\d s$", told)
    assert arrived is not None and 0 < int(arrived[1].replace(",", "")) < 1_200_000
    assert told in installer.log
    assert index.requests.count(FOO) == 2


def _first(fault: Fault) -> Plan:
    """Break the first connection, on which the end of the wheel was asked for before."""
    return lambda number: fault if number == 0 else None


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_says_when_to_come_back(index: Index, installer: Installer, engine: str, code: int) -> None:
    installer.environ["UV_DEFAULT_INDEX"] = index.url
    index.add("foo", "1.0")
    index.fail(FOO, Status(code, {"Retry-After": "17"}))

    installer(dependencies=["foo"], engine=engine)

    [wait] = installer.waits
    assert 17 <= wait <= 17 * 1.25
    assert any(f"{FOO}: the server answered {code}; attempt 2 of 3 in " in note for note in installer.notes)


class _Waits(list[float]):
    """Waits, at one of which the index comes back."""

    def __init__(self, between: Relay, at: int) -> None:
        super().__init__()
        self._between, self._at = between, at

    def append(self, seconds: float) -> None:
        super().append(seconds)
        if len(self) == self._at:
            self._between.start()


def test_an_index_that_is_dead_for_some_attempts_is_waited_for(
    index: Index, installer: Installer, engine: str
) -> None:
    contents = _contents(index)
    with relay(index.host) as between:
        _through(installer, between)
        between.die()
        installer.waits = _Waits(between, 3)
        installer(dependencies=["foo"], engine=engine, network=Network(attempts=5))

    assert _installed(installer) == contents
    assert [int(wait) for wait in installer.waits[:3]] == [1, 2, 4]
    assert "; attempt 4 of 5 in " in installer.notes[2]
    assert all(note in installer.log for note in installer.notes)


def test_an_index_that_dies_in_the_middle_of_a_wheel_is_waited_for(
    index: Index, installer: Installer
) -> None:
    content = os.urandom(2_000_000)
    index.add("foo", "1.0", {"foo.bin": content})

    with relay(index.host, _first(Fault("stall", 700_000))) as between:

        class Dying(list[str]):
            def append(self, text: str) -> None:
                super().append(text)
                if "no answer in time at" in text:
                    between.die()

        installer.notes, installer.waits = Dying(), _Waits(between, 3)
        installer(wheels=[{"name": "foo", "url": f"http://{between.host}/files/{FOO}"}], network=QUICK)

    assert (installer.root.packages / "foo.bin").read_bytes() == content
    assert any(f"{FOO}: no connection to its server at 6" in note for note in installer.notes)


# --- what does not ---


def test_a_byte_that_was_changed_on_the_way_is_noticed_and_not_tried_again(
    index: Index, installer: Installer
) -> None:
    content = random.Random(0).randbytes(500_000)
    path = index.add("foo", "1.0", {"foo.bin": content})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with relay(index.host, _first(Fault("flip", 300_000))) as between:
        url = f"http://{between.host}/files/{FOO}#sha256={digest}"
        with pytest.raises(IntegrityError, match="is not the file that was announced"):
            installer(wheels=[{"name": "foo", "url": url}], network=QUICK)

    assert between.broken == 1
    assert installer.waits == []
    assert list(installer.root.packages.iterdir()) == []


def test_a_name_that_is_not_found_is_told(index: Index, installer: Installer, engine: str) -> None:
    nowhere = "https://packages.invalid/simple/"
    installer.environ |= {"PIP_INDEX_URL": nowhere, "UV_DEFAULT_INDEX": nowhere}

    with pytest.raises(NetworkError) as raised:
        installer(dependencies=["foo"], engine=engine, network=Network(attempts=2))

    assert len(installer.waits) == 1
    assert "packages.invalid" in raised.value.what
    assert raised.value.exit_code == 1


def test_a_wheel_whose_server_is_not_found_is_told(installer: Installer) -> None:
    with pytest.raises(NetworkError, match="the name of its server is not found"):
        installer(wheels=[{"name": "foo", "url": f"http://packages.invalid/{FOO}"}])
    assert [int(wait) for wait in installer.waits] == [1, 2]


def test_an_index_that_stays_dead_ends_the_attempts(index: Index, installer: Installer, engine: str) -> None:
    _contents(index)
    with relay(index.host) as between:
        _through(installer, between)
        between.die()
        with pytest.raises(PackhorseError, match="the connection broke"):
            installer(dependencies=["foo"], engine=engine, network=Network(attempts=2))

    assert [int(wait) for wait in installer.waits] == [1]
    assert list(installer.root.packages.iterdir()) == []
