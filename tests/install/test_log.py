from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.install.log import KEEP, Log, without_credentials


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@example.org/simple", "https://example.org/simple"),
        ("https://token@example.org/simple", "https://example.org/simple"),
        ("https://me:p@ss@example.org/a@b", "https://example.org/a@b"),
        ("a https://u:p@x/ and git+ssh://git@y/z", "a https://x/ and git+ssh://y/z"),
        ("https://x/f.whl?X-Amz-Signature=abc&a=b#frag", "https://x/f.whl?X-Amz-Signature=&a=b#frag"),
        ("https://x/f.whl?sv=1&sig=a%3D&access_token=b", "https://x/f.whl?sv=1&sig=&access_token="),
        ("foo @ https://x/f.whl#sha256=abc", "foo @ https://x/f.whl#sha256=abc"),
        ("nobody@example.org", "nobody@example.org"),
    ],
)
def test_credentials_are_taken_out_of_urls(text: str, expected: str) -> None:
    assert without_credentials(text) == expected


def test_what_is_logged_and_handed_back_holds_no_credentials(tmp_path: Path) -> None:
    log = Log(tmp_path, "a")
    log.begin(["pip", "--index-url", "https://me:secret@example.org/"])

    assert log.add("from https://me:secret@example.org/\n") == "from https://example.org/"
    log.close()
    assert "secret" not in log.path.read_text() + log.last_lines


def test_the_newest_ten_logs_stay_and_other_files_too(tmp_path: Path) -> None:
    (tmp_path / "boot.log").touch()
    for number in range(20):
        (tmp_path / f"install-20200101-0000{number:02}-x.log").touch()

    new = Log(tmp_path, "a")
    new.close()

    logs = sorted(path.name for path in tmp_path.glob("install-*"))
    assert len(logs) == KEEP
    assert logs[0] == "install-20200101-000011-x.log"
    assert logs[-1] == new.path.name
    assert (tmp_path / "boot.log").exists()


def test_the_last_lines_are_those_of_the_last_command(tmp_path: Path) -> None:
    log = Log(tmp_path, "a")
    log.begin(["one"])
    log.add("of one")
    log.begin(["two"])
    for number in range(100):
        log.add(f"line {number}")
    log.close()

    assert "of one" not in log.last_lines
    assert log.last_lines.splitlines()[-1] == "    line 99"
    assert len(log.last_lines.splitlines()) < 20
