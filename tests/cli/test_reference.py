"""docs/reference/cli.md names every command, option and JSON key that there is, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from tests.conftest import Packhorse

from packhorse import errors
from packhorse.cli import COMMANDS
from packhorse.cli import packhorse as group
from packhorse.doctor import Diagnosis
from packhorse.install.environment import InstallResult
from packhorse.install.locking import LockResult
from packhorse.transfer.compare import Verification
from packhorse.transfer.diff import Difference
from packhorse.transfer.opening import PullResult
from packhorse.transfer.prune import PruneResult
from packhorse.transfer.push import PushResult
from packhorse.worker.bench import BenchResult

DOCUMENT = (Path(__file__).parent.parent.parent / "docs/reference/cli.md").read_text()
SHARED = "Options of every command"


def sections() -> dict[str, str]:
    titles, texts = DOCUMENT.split("\n## ")[1:], {}
    for text in titles:
        title, _, body = text.partition("\n")
        texts[title] = body
    return texts


def table(section: str, column: str) -> list[str]:
    """What stands in backquotes in the first cells of the section's tables with this heading."""
    rows = re.findall(rf"^\| {column} \|.*\n\| ---.*\n((?:\|.*\n?)+)", sections()[section], re.MULTILINE)
    cells = [row.split("|")[1] for rows_of_one in rows for row in rows_of_one.splitlines()]
    return [quoted for cell in cells for quoted in re.findall(r"`([^`]+)`", cell)]


def options(name: str) -> set[str]:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    with click.Context(command, info_name=name, help_option_names=["-h", "--help"]) as context:
        parameters = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    return {word for each in parameters for word in each.opts}


def words(text: str) -> Iterator[str]:
    """Every option named in a text."""
    yield from re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)


def test_every_command_has_a_section_and_a_line_in_the_overview() -> None:
    documented = [title.split()[1] for title in sections() if title.startswith("packhorse ")]
    assert documented == list(COMMANDS)
    overview = re.findall(r"^\| \[`(\w+)`\]\(#packhorse-(\w+)\)", DOCUMENT, re.MULTILINE)
    assert overview == [(name, name) for name in COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_its_options_are_all_there_and_no_other(name: str) -> None:
    shared = {option.split()[0] for option in table(SHARED, "option")}
    own = {option.split()[0] for option in table(f"packhorse {name}", "option")}
    assert own | shared == options(name)
    assert own & shared == set()


def test_no_option_is_named_that_does_not_exist() -> None:
    known = {option for name in COMMANDS for option in options(name)} | {"--version"}
    assert set(words(DOCUMENT)) - known == set()


def test_the_exit_codes_are_those_of_the_errors() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    codes = {each.exit_code for each in classes if issubclass(each, errors.PackhorseError)}
    codes |= {0, errors.EXIT_SUPERVISOR, errors.EXIT_NOT_FOUND, errors.EXIT_CANNOT_EXECUTE}
    rows = re.findall(r"^\| (\d+)[^|]*\|", sections()["Exit codes"], re.MULTILINE)
    assert {int(code) for code in rows} == codes | {130}


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("install", InstallResult),
        ("lock", LockResult),
        ("push", PushResult),
        ("pull", PullResult),
        ("diff", Difference),
        ("verify", Verification),
        ("prune", PruneResult),
        ("bench", BenchResult),
        ("doctor", Diagnosis),
    ],
)
def test_the_json_keys_are_those_of_the_result(name: str, result: type[msgspec.Struct]) -> None:
    assert table(f"packhorse {name}", "JSON key") == list(result.__struct_encode_fields__)


def test_the_json_keys_of_the_others_are_those_printed(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    def printed(*arguments: str) -> dict[str, Any]:
        done = packhorse(*arguments, "--json", env=where)
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def named(text: str) -> set[str]:
        return set(re.findall(r"`(\w+)`", text))

    where = {"PACKHORSE_ROOT": str(root_path), "PACKHORSE_STORAGE_URL": str(tmp_path / "store")}
    assert list(printed("pull")) == table("JSON", "key")
    assert list(printed("init", "--directory", "new")) == table("packhorse init", "JSON key")
    (root_path / "models/weights").touch()
    printed("push")
    status = printed("status")
    assert list(status) == table("packhorse status", "JSON key")
    told = named(sections()["packhorse status"])
    assert {*status["store"], *status["store"]["tag"], *status["memory"], *status["os_disk"]} <= told
    listed = printed("snapshots")
    assert list(listed) == table("packhorse snapshots", "JSON key")
    assert set(listed["snapshots"][0]) <= named(sections()["packhorse snapshots"])


def test_the_keys_of_the_status_file_are_those_written(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    done = packhorse("run", "--root", root_path, "--status-file", file, "--", "true")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(file.read_bytes())) == table("packhorse run", "key")
    done = packhorse("profile", "--root", root_path, "--status-file", file, "--", "true")
    assert done.returncode == 0, done.stderr
    facts = json.loads(file.read_bytes())
    assert list(facts) == table("packhorse profile", "key")
    row = next(
        line for line in sections()["packhorse profile"].splitlines() if line.startswith("| `profile`")
    )
    assert list(facts["profile"]) == re.findall(r"`(\w+)`", row)[1:]
