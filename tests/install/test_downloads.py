from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from tests.install.index import Cut, Index, Stall, Status

from packhorse.config import Network
from packhorse.errors import IntegrityError, PackhorseError
from packhorse.install.access import access
from packhorse.install.downloads import Downloads, RefusedError
from packhorse.install.network import NetworkError

CONTENT = random.Random(1).randbytes(3_000_000)
HASHES = {"sha256": hashlib.sha256(CONTENT).hexdigest()}
FILE = "foo-1.0-py3-none-any.whl"


class Client:
    """Fetches the one file of an index, and keeps what was said and how long it would have waited."""

    def __init__(self, index: Index, directory: Path) -> None:
        (index.directory / FILE).write_bytes(CONTENT)
        self.url, self.path = f"http://{index.host}/files/{FILE}", directory / FILE
        self.notes: list[str] = []
        self.waits: list[float] = []
        self.arrived = 0

    def __call__(
        self,
        *,
        url: str = "",
        hashes: dict[str, str] = HASHES,
        size: int = 0,
        settings: dict[str, str] | None = None,
        environ: dict[str, str] | None = None,
        **network: float,
    ) -> bytes:
        downloads = Downloads(
            access(settings or {}, [], environ or {}),
            Network(**network),  # type: ignore[arg-type]
            self.notes.append,
            sleep=self.waits.append,
            arrived=self._arrived,
        )
        digest = downloads.fetch(url or self.url, self.path, hashes, size)
        content = self.path.read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
        return content

    def _arrived(self, count: int) -> None:
        self.arrived += count


@pytest.fixture
def fetch(index: Index, tmp_path: Path) -> Client:
    return Client(index, tmp_path)


def test_a_file_arrives_and_its_bytes_are_told(fetch: Client) -> None:
    assert fetch() == CONTENT
    assert fetch.arrived == len(CONTENT)
    assert fetch.notes == []


def test_connections_that_break_at_any_byte_are_gone_on_from(fetch: Client, index: Index) -> None:
    cuts = [random.Random(seed).randrange(1_100_000, 2_000_000) for seed in range(8)]
    index.fail(FILE, Cut(after=cuts[0]), Cut(after=cuts[1] - 1_000_000), Cut(after=1))

    assert fetch(attempts=4) == CONTENT
    assert fetch.arrived == len(CONTENT)
    assert (
        f"{FILE}: the connection broke at {cuts[0]:,} of 3,000,000 bytes; attempt 2 of 4 in 1."
        in fetch.notes[0]
    )


def test_attempts_are_counted_anew_after_one_that_got_further(fetch: Client, index: Index) -> None:
    index.fail(FILE, Status(500), Cut(after=1_500_000), Status(500))

    assert fetch(attempts=3) == CONTENT
    assert [int(wait) for wait in fetch.waits] == [1, 1, 2]


def test_what_breaks_without_getting_further_comes_to_an_end_and_leaves_nothing(
    fetch: Client, index: Index
) -> None:
    index.fail(FILE, *[Cut(after=10)] * 100)

    with pytest.raises(NetworkError, match=r"the connection broke.* 30 bytes had arrived"):
        fetch(attempts=3)
    assert [int(wait) for wait in fetch.waits] == [1, 2]
    assert not fetch.path.exists()


def test_a_server_without_ranges_sends_the_file_anew(fetch: Client, index: Index) -> None:
    index.ranges = False
    index.fail(FILE, Cut(after=1_000_000))

    assert fetch() == CONTENT
    assert fetch.arrived == len(CONTENT)


def test_a_file_that_became_another_while_it_was_fetched_is_fetched_whole(
    fetch: Client, index: Index
) -> None:
    """Its two halves fit together in size only."""
    index.fail(FILE, Cut(after=1_000_000))

    def replace(seconds: float) -> None:
        (index.directory / FILE).write_bytes(CONTENT)

    (index.directory / FILE).write_bytes(bytes(len(CONTENT)))
    fetch.waits = type("Waits", (list,), {"append": lambda self, seconds: replace(seconds)})()

    assert fetch() == CONTENT
    assert any("its pieces do not fit together" in note for note in fetch.notes)


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504, 522])
def test_answers_that_may_pass_are_asked_again(fetch: Client, index: Index, code: int) -> None:
    index.fail(FILE, Status(code), Status(code))

    assert fetch() == CONTENT
    assert [int(wait) for wait in fetch.waits] == [1, 2]


@pytest.mark.parametrize("code", [400, 403, 404, 410])
def test_answers_that_will_not_pass_are_asked_once(fetch: Client, index: Index, code: int) -> None:
    index.fail(FILE, *[Status(code)] * 10)

    with pytest.raises(PackhorseError, match=f"HTTP error {code} for http://127.0.0.1.*{FILE}"):
        fetch()
    assert len(index.requests) == 1


@pytest.mark.parametrize(
    ("asked", "least"),
    [
        (lambda: "7", 7),
        (lambda: format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True), 18),
        (lambda: "100000", 60),
        (lambda: "soon", 1),
    ],
)
def test_a_server_that_says_when_is_asked_then(
    fetch: Client, index: Index, asked: Callable[[], str], least: float
) -> None:
    index.fail(FILE, Status(429, {"Retry-After": asked()}))

    assert fetch() == CONTENT
    assert least <= fetch.waits[0] <= least * 1.25 + 3


def test_a_wrong_hash_is_not_tried_again(fetch: Client, index: Index) -> None:
    with pytest.raises(IntegrityError, match=r"its sha256 is .*, expected 0000"):
        fetch(hashes={"sha256": "0" * 64})
    assert len(index.requests) == 1
    assert not fetch.path.exists()


@pytest.mark.parametrize("name", ["sha512", "sha3_256", "blake2b", "md5"])
def test_every_hash_that_is_told_is_checked(fetch: Client, name: str) -> None:
    length = hashlib.new(name).digest_size * 2
    with pytest.raises(IntegrityError, match=f"its {name} is"):
        fetch(hashes={name: "0" * length})


def test_weak_hashes_do_not_count_beside_strong_ones(fetch: Client) -> None:
    with pytest.raises(IntegrityError, match="sha512"):
        fetch(hashes={**HASHES, "sha512": "0" * 128})
    assert fetch(hashes={**HASHES, "md5": "0" * 32}) == CONTENT


def test_a_truncated_body_is_noticed(fetch: Client, index: Index) -> None:
    (index.directory / FILE).write_bytes(CONTENT[:1000])

    with pytest.raises(NetworkError, match="the connection broke"):
        fetch(size=len(CONTENT), attempts=1, large_attempts=1, hashes={})


def test_a_stall_ends_after_the_time_for_the_files_size(fetch: Client, index: Index) -> None:
    """The large file may be silent for longer than a small one; how large it is was known before."""
    index.fail(FILE, Stall(after=1_000_000, seconds=1.0))
    assert fetch(timeout_small=0.1, timeout_large=30, large_size=2_000_000, size=len(CONTENT)) == CONTENT
    assert fetch.waits == []

    index.fail(FILE, Stall(after=1_200_000))
    assert fetch(timeout_small=0.1, timeout_large=30, large_size=9_000_000, size=len(CONTENT)) == CONTENT
    assert any("no answer in time at 1,200,000 of 3,000,000 bytes" in note for note in fetch.notes)


def test_a_large_file_has_its_own_count_of_attempts(fetch: Client, index: Index) -> None:
    index.fail(FILE, *[Status(503)] * 5)

    assert fetch(attempts=1, large_attempts=6, large_size=1000, size=len(CONTENT)) == CONTENT


def test_a_server_that_is_away_for_a_while_is_waited_for(index: Index, fetch: Client) -> None:
    """Nobody listens at the port until the third attempt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NetworkError, match="no connection to its server"):
        fetch(url=f"http://127.0.0.1:{port}/{FILE}", attempts=4)
    assert [int(wait) for wait in fetch.waits] == [1, 2, 4]


def test_a_name_that_is_not_found_is_told(fetch: Client) -> None:
    with pytest.raises(NetworkError, match="the name of its server is not found"):
        fetch(url=f"http://nowhere.invalid/{FILE}", attempts=1)


# --- credentials ---


def test_credentials_go_along_from_a_url_of_the_same_host(fetch: Client, index: Index) -> None:
    index.credentials = "some user:p@ss"

    assert fetch(settings={"index-url": f"http://some%20user:p%40ss@{index.host}/simple"}) == CONTENT


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirections_are_followed_when_a_download_goes_on_too(
    fetch: Client, index: Index, code: int
) -> None:
    """As those of releases and of storage behind signed URLs."""
    again = Status(code, {"Location": f"/files/{FILE}"})
    index.fail("latest.whl", again, again)
    index.fail(FILE, Cut(1_200_000))

    assert fetch(url=f"http://{index.host}/latest.whl") == CONTENT
    assert index.requests == ["latest.whl", FILE] * 2
    assert any("at 1,200,000 of 3,000,000 bytes" in note for note in fetch.notes)


@pytest.mark.parametrize("target", ["http://[::1/foo.whl", "file:///etc/passwd", "ftp://example.org/foo.whl"])
def test_a_redirection_to_what_is_no_address_is_told(fetch: Client, index: Index, target: str) -> None:
    index.fail(FILE, Status(302, {"Location": target}))
    with pytest.raises(PackhorseError, match=r"leads to .*, which is no address to download from"):
        fetch()
    assert not fetch.notes


def test_redirections_without_end_are_told(fetch: Client, index: Index) -> None:
    index.fail(FILE, *[Status(302, {"Location": f"/files/{FILE}"})] * 20)

    with pytest.raises(PackhorseError, match="was reached by more than 10 redirections"):
        fetch()
    assert fetch.waits == []


def test_credentials_do_not_go_along_with_a_redirection(fetch: Client, index: Index) -> None:
    """localhost is another name than 127.0.0.1, where they are for."""
    index.credentials = "me:hunter2"
    away = f"http://localhost:{index.host.rpartition(':')[2]}/files/{FILE}"
    index.fail(FILE, Status(302, {"Location": away}))

    with pytest.raises(RefusedError, match="401"):
        fetch(settings={"index-url": f"http://me:hunter2@{index.host}/simple"})
    assert index.requests == [FILE]


def test_credentials_are_found_in_netrc(fetch: Client, index: Index, tmp_path: Path) -> None:
    index.credentials = "me:hunter2"
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)

    assert fetch(environ={"HOME": str(tmp_path)}) == CONTENT


def test_credentials_do_not_go_to_another_host(fetch: Client, index: Index) -> None:
    index.credentials = "me:hunter2"

    with pytest.raises(RefusedError, match="401"):
        fetch(settings={"index-url": "http://me:hunter2@example.org/simple"})
    assert len(index.requests) == 0


def test_certificates_that_cannot_be_read_are_told(fetch: Client, tmp_path: Path) -> None:
    with pytest.raises(PackhorseError, match=r"The certificates in .*gone\.pem cannot be read"):
        fetch(settings={"cert": str(tmp_path / "gone.pem")})


def test_a_proxy_is_used_but_not_for_hosts_without_one(fetch: Client, index: Index) -> None:
    away = f"http://example.invalid/files/{FILE}"
    # An index answers requests for other hosts as a proxy does: it looks at the end of the path only.
    assert fetch(url=away, environ={"http_proxy": f"http://{index.host}"}) == CONTENT
    assert fetch(url=away, environ={"http_proxy": index.host}) == CONTENT
    assert fetch(url=away, settings={"proxy": index.host}) == CONTENT
    with pytest.raises(NetworkError):
        fetch(
            url=away,
            environ={"http_proxy": f"http://{index.host}", "no_proxy": ".invalid"},
            attempts=1,
        )


@pytest.mark.parametrize("spared", ["127.0.0.0/8", "example.org, 127.0.0.1", "{host}"])
def test_hosts_without_a_proxy_are_named_by_their_network_too(
    spared: str, fetch: Client, index: Index
) -> None:
    nobody = {"http_proxy": "http://example.invalid", "no_proxy": spared.format(host=index.host)}
    assert fetch(environ=nobody, attempts=1) == CONTENT
    with pytest.raises(NetworkError):
        fetch(environ={**nobody, "no_proxy": "10.0.0.0/8,127.0.0.1:1"}, attempts=1)


def test_a_proxy_of_another_kind_is_left_to_pip(fetch: Client) -> None:
    with pytest.raises(RefusedError, match="proxy"):
        fetch(environ={"http_proxy": "socks5://127.0.0.1:1"})
