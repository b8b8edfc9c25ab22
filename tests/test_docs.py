"""The documents are true: links lead somewhere, configurations load, commands exist, messages are those printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server

from packhorse import config
from packhorse.cli import COMMANDS
from packhorse.cli import packhorse as group
from packhorse.root import Root, State

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
TROUBLESHOOTING = REPOSITORY / "docs/guides/troubleshooting.md"
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def text_of(document: Path) -> str:
    return (REPOSITORY / document).read_text()


def anchors(document: Path) -> set[str]:
    """What can stand behind a # in a link: the slugs of the headings, as GitHub makes them, and ids."""
    prose = BLOCK.sub("", text_of(document))
    headings = [re.sub(r"<[^>]*>", "", title) for title in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]
    slugs = {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', prose))


def options(command: str) -> set[str]:
    found = group.get_command(click.Context(group), command)
    assert found is not None
    parameters = [each for each in found.params if isinstance(each, click.Option)]
    return {word for each in parameters for word in each.opts} | {"-h", "--help"}


# --- links ---


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_to_something(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text_of(document)))
    broken = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(document.parent / path)) if path else document
        exists = (REPOSITORY / target).exists()
        if not exists or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_leads_to_every_document() -> None:
    index = text_of(Path("docs/README.md")) + text_of(Path("docs/design/README.md"))
    documents = {path.name for path in DOCUMENTS if path.parts[0] == "docs"} - {"README.md"}
    assert {name for name in documents if f"{name})" not in index} == set()


# --- configurations and commands ---


def configurations() -> list[tuple[str, str]]:
    return [
        (f"{document}-{number}", content)
        for document in DOCUMENTS
        for number, (_, language, content) in enumerate(BLOCK.findall(text_of(document)))
        if language == "toml"
    ]


@pytest.mark.parametrize("content", [pytest.param(text, id=name) for name, text in configurations()])
def test_every_configuration_shown_can_be_used(content: str, tmp_path: Path) -> None:
    (tmp_path / "packhorse.toml").write_text(content)
    loaded = config.load({}, tmp_path)
    assert loaded.file == tmp_path / "packhorse.toml"


def command_lines(document: Path) -> list[str]:
    """What follows `packhorse` where it is called in a code block or in backquotes."""
    text = text_of(document)
    shown = [line for _, _, block in BLOCK.findall(text) for line in block.splitlines()]
    shown = [line for line in shown if not line.strip().startswith("packhorse:")]
    shown += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    calls = [re.search(r'(?:^\s*(?:\$ )?|\$\(|")packhorse ([\w-].*)', line) for line in shown]
    return [call[1] for call in calls if call]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_command_shown_exists_with_its_options(document: Path) -> None:
    for line in command_lines(document):
        before_child = line.split(" -- ")[0].split("  ")[0].split(")")[0]
        words = shlex.split(before_child, comments=True)
        if words[0] in ("--version", "--help", "COMMAND"):
            continue
        assert words[0] in COMMANDS, line
        used = {word for word in words[1:] if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert used <= options(words[0]), line


def test_commands_are_found_where_they_are_shown() -> None:
    assert len(command_lines(Path("README.md"))) > 10


# --- messages ---


def general(message: str) -> str:
    """A message without what differs from case to case."""
    message = re.sub(r"\b[0-9a-f]{12}\b", "DIGEST", message)
    return re.sub(r"process \d+|[\d.,]+ MB|user \d+", "NUMBER", message)


QUOTED = {
    general(line)
    for _, _, block in BLOCK.findall(TROUBLESHOOTING.read_text())
    for line in block.splitlines()
    if line.startswith("packhorse: ")
}


@pytest.fixture
def told(packhorse: Packhorse, root_path: Path, tmp_path: Path) -> Callable[..., None]:
    """Runs a command that must fail with a code and with a message that the guide quotes."""

    def check(code: int, *arguments: str, env: dict[str, str] | None = None) -> None:
        where = {"PACKHORSE_ROOT": str(root_path), "PACKHORSE_STORAGE_URL": str(tmp_path / "store")}
        done = packhorse(arguments[0], "--quiet", *arguments[1:], env={**where, **(env or {})})
        message = done.stderr.strip()
        for actual, shown in (
            (str(tmp_path / "packhorse.toml"), "/app/packhorse.toml"),
            ((tmp_path / "store").as_uri(), "s3://my-bucket/envs"),
            (str(root_path), "/tmp/packhorse"),
        ):
            message = message.replace(actual, shown)
        message = re.sub(r"s3://bucket-[\w-]+", "s3://my-bucket", message)
        assert general(message) in QUOTED
        assert done.returncode == code

    return check


Told = Callable[..., None]


@pytest.mark.parametrize(
    "content",
    [
        '[network]\nattempts = "three"',
        "[netwrk]\nattempts = 3",
        '[environment]\nengine = "conda"',
        '[storage]\naccess-key = "x"',
    ],
)
def test_messages_about_the_configuration(told: Told, tmp_path: Path, content: str) -> None:
    (tmp_path / "packhorse.toml").write_text(content)
    told(2, "status")


def test_messages_about_roots_and_commands(told: Told, root_path: Path) -> None:
    told(2, "install")
    told(127, "run", "--", "nosuchcommand")
    told(126, "exec", "--", "/etc/passwd")
    told(126, "exec", "--", "/tmp")
    Root.open(root_path).record(State(state="partial"))
    told(125, "exec", "--", "true")
    root_path.chmod(0o777)
    told(2, "status")


def test_messages_about_a_directory_that_is_no_root(told: Told, root_path: Path) -> None:
    (root_path / "tmp/mine").mkdir(parents=True)
    told(2, "status")


def test_messages_about_snapshots_and_corrupt_data(
    told: Told, packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    told(3, "pull")
    told(3, "pull", "1234567")
    told(3, "pull", "123456789a")
    (root_path / "packages/module.py").write_text("x = 1")
    (root_path / "packages/other.py").write_text("x = 2")
    where = {"PACKHORSE_ROOT": str(root_path), "PACKHORSE_STORAGE_URL": str(store)}
    assert packhorse("push", env=where).returncode == 0
    (root_path / "packages/module.py").write_text("changed")
    (root_path / "packages/other.py").unlink()
    told(4, "verify")
    [pack], [manifest] = (list((store / kind).iterdir()) for kind in ("packs", "manifests"))
    pack.write_bytes(b"\0" * pack.stat().st_size)
    told(4, "pull")
    pack.unlink()
    told(4, "pull")
    manifest.unlink()
    told(4, "pull", "--root", str(tmp_path / "new"))


def test_messages_about_packages_in_use(
    told: Told, packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "packhorse.toml").write_text('[environment]\ndependencies = ["humanize"]')
    env = {**packhorse.environ, "PACKHORSE_ROOT": str(root_path)}
    words = [*packhorse.command, "exec", "-q", "--", "sh", "-c", "echo started; cat"]
    user = subprocess.Popen(words, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"started\n"
        told(1, "install")
        told(125, "run", "--", "true")


def test_messages_about_the_store(told: Told, seaweedfs: S3Server) -> None:
    where = {
        "PACKHORSE_STORAGE_URL": f"s3://{seaweedfs.new_bucket()}/envs",
        "PACKHORSE_STORAGE_ENDPOINT": seaweedfs.endpoint,
    }
    told(6, "pull", env=where)
    where |= seaweedfs.environ()
    told(6, "pull", env={**where, "AWS_SECRET_ACCESS_KEY": "wrong"})
    told(6, "pull", env={**where, "AWS_ACCESS_KEY_ID": "nobody"})
    told(6, "pull", env={**where, "PACKHORSE_STORAGE_URL": "s3://bucket-that-is-not-there/envs"})
    told(6, "pull", env={**where, "PACKHORSE_STORAGE_ENDPOINT": "http://127.0.0.1:9"})
    told(3, "pull", env=where)
