"""The texts are what pip 26.3 and 23.0 print."""

from __future__ import annotations

import pytest

from packhorse.config import Network
from packhorse.errors import PackhorseError
from packhorse.install.network import LONGEST_WAIT, Attempts, Failure, NetworkError, download, judge, progress

SETTINGS = Network()
LARGE = "  Downloading torch-2.6.0-cp311-cp311-linux_x86_64.whl (858.1 MB)"
TORCH = "torch-2.6.0-cp311-cp311-linux_x86_64.whl"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            [
                "Collecting foo",
                "  ERROR: HTTP error 504 while getting https://example.org/p/foo-1.0.whl (from https://example.org/foo/)",
                "ERROR: Could not install requirement foo from https://example.org/p/foo-1.0.whl because of HTTP error 504 "
                "Server Error: Gateway Timeout for url: https://example.org/p/foo-1.0.whl",
            ],
            Failure("network", "the server answered 504", "foo-1.0.whl"),
        ),
        (
            [
                "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(host='example.org', port=443): Max "
                "retries exceeded with url: /p/foo-1.0.whl (Caused by ResponseError('too many 503 error responses'))"
            ],
            Failure("network", "the server answered 503", "foo-1.0.whl"),
        ),
        (
            [
                LARGE,
                "error: incomplete-download",
                "Download failed after 6 attempts because not enough bytes were received (1000 kB/858.1 MB)",
                f"╰─> URL: https://example.org/whl/{TORCH}",
                "note: This is an issue with network connectivity, not pip.",
            ],
            Failure("network", "the connection broke", TORCH, 858_100_000),
        ),
        (
            [
                LARGE,
                "ERROR: Exception:",
                "pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='example.org', port=443): "
                "Read timed out.",
            ],
            Failure("network", "no answer in time", TORCH, 858_100_000),
        ),
        (
            ["error: connection-timeout", "Unable to fetch https://example.org/p/foo-1.0.whl?X-Amz-Signature="],
            Failure("network", "no answer in time", "foo-1.0.whl"),
        ),
        (
            [
                "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(host='example.org', port=443): Max "
                "retries exceeded with url: /foo-1.0.whl (Caused by NewConnectionError('<...>: Failed to establish a new "
                "connection: [Errno -3] Temporary failure in name resolution'))"
            ],
            Failure("network", "the connection broke", "foo-1.0.whl"),
        ),
        (["ERROR: HTTP error 429 while getting https://example.org/f.whl"], Failure("network", "the server answered 429", "f.whl")),
    ],
)  # fmt: skip
def test_a_network_that_fails_is_worth_another_attempt(output: list[str], expected: Failure) -> None:
    assert judge(output, []) == expected


@pytest.mark.parametrize(
    "output",
    [
        ["ERROR: HTTP error 404 while getting https://example.org/f.whl"],
        ["ERROR: HTTP error 403 while getting https://example.org/f.whl"],
        ["ERROR: HTTP error 401 while getting https://example.org/f.whl"],
        ["ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated ..."],
        [
            "WARNING: Connection interrupted while downloading.",
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES",
        ],
        ["ERROR: ResolutionImpossible: for help visit https://example.org/dependency-resolution"],
        ["ERROR: No matching distribution found for nonsense==9"],
        ["ERROR: foo-1.0-cp39-cp39-linux_x86_64.whl is not a supported wheel on this platform."],
        [
            "error: ssl-verification-failed",
            "Failed to establish a secure connection to example.org",
            "(Caused by SSLError(SSLCertVerificationError(1, 'certificate verify failed: self-signed certificate')))",
        ],
        ["ERROR: Failed building wheel for foo"],
        [],
    ],
)
def test_what_would_fail_again_is_not_tried_again(output: list[str]) -> None:
    assert judge(output, []).kind in ("hash", "other")


@pytest.mark.parametrize("text", ["[Errno 28] No space left on device", "[Errno 122] Disk quota exceeded"])
def test_a_full_disk_is_told_apart(text: str) -> None:
    assert judge([LARGE, f"ERROR: Could not install packages due to an OSError: {text}"], []).kind == "space"


@pytest.mark.parametrize(
    ("page", "retried"),
    [
        ("503 Server Error: Service Unavailable for url: https://example.org/simple/foo/", True),
        ("HTTPConnectionPool(host='a', port=1): Max retries exceeded with url: /foo/ (Caused by ResponseError('too "
         "many 503 error responses'))", True),
        ("connection error: [Errno 111] Connection refused", True),
        ("example.org didn't respond within 15.0 seconds", True),
        ("404 Client Error: Not Found for url: https://example.org/simple/foo/", False),
        ("401 Client Error: Unauthorized for url: https://example.org/simple/foo/", False),
    ],
)  # fmt: skip
def test_nothing_found_counts_as_the_networks_fault_only_where_an_index_did_not_answer(
    page: str, retried: bool
) -> None:
    output = ["ERROR: Could not find a version that satisfies the requirement foo", "ERROR: No matching distribution found for foo"]  # fmt: skip
    details = [
        f"2026-01-02T03:04:05,678 Could not fetch URL https://example.org/simple/foo/: {page} - skipping"
    ]

    failure = judge(output, details)

    assert (failure.kind == "network") is retried
    assert failure.file == ("foo/" if retried else "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (LARGE, (TORCH, 858_100_000)),
        ("Downloading six-1.17.0.whl.metadata (1.7 kB)", ("six-1.17.0.whl.metadata", 1_700)),
        ("  Downloading https://example.org/a/foo-1.0.whl (12 kB)", ("foo-1.0.whl", 12_000)),
        ("  Resuming download foo-1.0.whl (1000 kB/3.0 MB)", ("foo-1.0.whl", 3_000_000)),
        ("  Using cached foo-1.0.whl (500 bytes)", ("foo-1.0.whl", 500)),
        ("Downloading the internet", None),
    ],
)
def test_the_size_of_a_download_is_read_from_pips_words(line: str, expected: tuple[str, int] | None) -> None:
    assert download(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Progress 262144 of 3000000", (262144, 3000000)),
        ("     ━━━━━━━━━━━╸         50.0/101.0 kB 479.5 MB/s eta 0:00:01", (50, 101)),
        ("     ━━━━━━━━━━━━━━━━━━━━ 101.0/101.0 KB 379.0 MB/s eta 0:00:00", (101, 101)),
        ("  Resuming download foo-1.0.whl (1000 kB/3.0 MB)", None),
        ("Progress is made", None),
    ],
)
def test_how_much_has_arrived_is_read_from_both_kinds_of_bars(
    line: str, expected: tuple[float, float] | None
) -> None:
    assert progress(line) == expected


def test_a_wrong_hash_of_a_file_that_did_not_arrive_whole_is_the_networks_fault() -> None:
    output = [LARGE, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."]

    failure = judge(output, [], download(LARGE))

    assert failure == Failure("network", "the connection broke", TORCH, 858_100_000)


class _Network:
    """Fails with the failures given, one an attempt, then succeeds."""

    def __init__(self, *failures: Failure) -> None:
        self.failures = list(failures)
        self.timeouts: list[float] = []
        self.waits: list[float] = []
        self.notes: list[str] = []

    def attempt(self, timeout: float) -> str:
        self.timeouts.append(timeout)
        if self.failures:
            raise NetworkError(self.failures.pop(0), "It failed.", "Try again.")
        return "done"

    def run(self, settings: Network = SETTINGS) -> str:
        return Attempts(settings, self.notes.append, self.waits.append).run(self.attempt)


SMALL_FAILED = Failure("network", "the server answered 503", "foo.whl", 5_000)
LARGE_FAILED = Failure("network", "the connection broke", TORCH, 858_100_000)


def test_a_small_file_has_three_attempts() -> None:
    works = _Network(*[SMALL_FAILED] * 2)
    fails = _Network(*[SMALL_FAILED] * 3)

    assert works.run() == "done"
    with pytest.raises(NetworkError):
        fails.run()
    assert works.timeouts == fails.timeouts == [120, 120, 120]


def test_waits_double_from_one_second_with_jitter() -> None:
    flaky = _Network(*[SMALL_FAILED] * 9)

    flaky.run(Network(attempts=10))

    for expected, waited in zip([1, 2, 4, 8, 16, 32, LONGEST_WAIT, LONGEST_WAIT, LONGEST_WAIT], flaky.waits):
        assert expected <= waited <= 1.25 * expected
    assert len({wait % 1 for wait in flaky.waits}) > 1


def test_a_large_file_has_ten_attempts_with_the_long_timeout() -> None:
    works = _Network(*[LARGE_FAILED] * 9)
    fails = _Network(*[LARGE_FAILED] * 10)

    assert works.run() == "done"
    with pytest.raises(NetworkError):
        fails.run()
    assert works.timeouts == fails.timeouts == [120, *[600] * 9]


def test_a_file_is_large_from_the_configured_size_on() -> None:
    exactly = _Network(*[LARGE_FAILED._replace(size=100_000_000)] * 9)
    below = _Network(*[LARGE_FAILED._replace(size=99_999_999)] * 9)

    assert exactly.run() == "done"
    with pytest.raises(NetworkError):
        below.run()


def test_each_file_has_its_own_count() -> None:
    flaky = _Network(*(SMALL_FAILED._replace(file=f"{name}.whl") for name in "ababcc"))

    assert flaky.run() == "done"
    assert [round(wait) for wait in flaky.waits] == [1, 1, 2, 2, 1, 2]


def test_each_wait_is_told_with_file_reason_attempt_and_time() -> None:
    flaky = _Network(SMALL_FAILED, LARGE_FAILED)

    flaky.run()

    assert flaky.notes[0].startswith("foo.whl: the server answered 503; attempt 2 of 3 in 1.")
    assert flaky.notes[1].startswith(f"{TORCH}: the connection broke; attempt 2 of 10 in 1.")


def test_other_failures_end_it_at_once() -> None:
    def attempt(timeout: float) -> None:
        raise PackhorseError("No.", "Stop.")

    waits: list[float] = []
    with pytest.raises(PackhorseError, match="No"):
        Attempts(SETTINGS, lambda text: None, waits.append).run(attempt)
    assert waits == []
