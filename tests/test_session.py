"""What sessions promise: a living invocation keeps its directories, a dead one's are removed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from packhorse import session
from packhorse.root import Root
from packhorse.session import Session


@pytest.fixture
def root(root_path: Path) -> Root:
    return Root.open(root_path)


def _ephemeral(root: Root) -> list[str]:
    return sorted({*os.listdir(root.tmp), *os.listdir(root.build)})


def _rewrite(root: Root, name: str, *, silent: float = 0, **changed: object) -> None:
    """Give a session's record other contents, as another host or boot would have written it."""
    file = root.sessions / name
    record = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**record, **changed}))
    os.utime(file, (time.time() - silent,) * 2)


@contextmanager
def _another_process(root: Root) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a session of its own, and the session's name."""
    program = """
        import sys
        from pathlib import Path
        from packhorse.root import Root
        from packhorse.session import Session
        session = Session(Root.open(Path(sys.argv[1])))
        (session.tmp / "file").touch()
        print(session.id, flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), root.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def test_a_session_has_directories_of_its_own_and_removes_them(root: Root) -> None:
    with Session(root) as one, Session(root) as other:
        assert one.tmp != other.tmp
        (one.tmp / "file").touch()
        (one.build / "directory").mkdir()
    assert _ephemeral(root) == []
    assert os.listdir(root.sessions) == []


def test_tmpdir_is_short_enough_for_a_unix_socket(root: Root) -> None:
    with Session(root) as one:
        assert len(str(one.tmp.relative_to(root.path))) <= len("tmp/") + 6


def test_a_living_session_is_kept_and_one_killed_with_9_is_cleaned(root: Root) -> None:
    with _another_process(root) as (process, name):
        assert session.clean(root) == []
        assert (root.tmp / name / "file").exists()
        process.kill()
        process.wait()
        session.clean(root)
    assert _ephemeral(root) == []
    assert os.listdir(root.sessions) == []


def test_a_session_lives_while_a_child_holds_its_lock(root: Root) -> None:
    one = Session(root)
    inherited = os.dup(one.descriptor)
    one.close()
    assert _ephemeral(root) == [one.id]
    os.close(inherited)
    session.clean(root)
    assert _ephemeral(root) == []


def test_what_no_session_made_is_cleaned(root: Root) -> None:
    (root.tmp / "left-behind" / "deep").mkdir(parents=True)
    (root.build / "file").touch()
    session.clean(root)
    assert _ephemeral(root) == []


def test_directories_without_write_permission_are_cleaned(root: Root) -> None:
    locked = root.tmp / "left-behind" / "locked"
    locked.mkdir(parents=True)
    (locked / "file").touch()
    locked.chmod(0o500)
    assert session.clean(root) == []
    assert _ephemeral(root) == []


@pytest.mark.parametrize(("depth", "most_open"), [(3000, 0), (300, 100)], ids=["stack", "descriptors"])
def test_what_lies_deeper_than_python_goes_is_cleaned(
    root: Root, monkeypatch: pytest.MonkeyPatch, depth: int, most_open: int
) -> None:
    monkeypatch.chdir(root.tmp)
    for _ in range(depth):
        os.mkdir("d", 0o700)
        os.chdir("d")
    os.chmod(".", 0o500)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_open or limits[0], limits[1]))
    try:
        assert session.clean(root) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert _ephemeral(root) == []


def test_a_session_given_to_an_owner_lives_as_long_as_that_process(root: Root) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    one = Session(root, owner=owner.pid)
    one.release()
    session.clean(root)
    assert _ephemeral(root) == [one.id]
    owner.kill()
    owner.wait()
    session.clean(root)
    assert _ephemeral(root) == []


def test_another_process_with_the_owners_number_does_not_keep_its_session(root: Root) -> None:
    one = Session(root, owner=os.getpid())
    one.release()
    _rewrite(root, one.id, owner_started="1")
    session.clean(root)
    assert _ephemeral(root) == []


def test_an_owner_that_was_gone_before_keeps_nothing(root: Root) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    Session(root, owner=process.pid).release()
    session.clean(root)
    assert _ephemeral(root) == []


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "another"}])
def test_a_session_of_another_host_or_boot_lives_until_it_is_silent_for_an_hour(
    root: Root, elsewhere: dict[str, str]
) -> None:
    one = Session(root)
    os.close(one.descriptor)  # its lock means nothing here
    _rewrite(root, one.id, silent=session.SILENCE - 60, **elsewhere)
    session.clean(root)
    assert _ephemeral(root) == [one.id]
    _rewrite(root, one.id, silent=session.SILENCE + 60)
    session.clean(root)
    assert _ephemeral(root) == []


def test_an_owner_in_another_pid_namespace_is_not_looked_up_here(root: Root) -> None:
    one = Session(root, owner=os.getpid())
    one.release()
    _rewrite(root, one.id, namespace="pid:[1]", owner_started="1")
    session.clean(root)
    assert _ephemeral(root) == [one.id]


def test_a_heartbeat_breaks_the_silence(root: Root) -> None:
    with Session(root) as one:
        _rewrite(root, one.id, silent=session.SILENCE + 60, host="elsewhere")
        one.heartbeat()
        session.clean(root)
        assert one.tmp.exists()
        _rewrite(root, one.id, host=os.uname().nodename)


@pytest.mark.parametrize("content", [b"", b'{"host":"\xff","boot":""}'], ids=["being written", "damaged"])
def test_a_record_that_cannot_be_read_counts_as_living_for_a_minute(root: Root, content: bytes) -> None:
    (root.sessions / "abcdef").write_bytes(content)
    (root.tmp / "abcdef").mkdir()
    session.clean(root)
    assert _ephemeral(root) == ["abcdef"]
    os.utime(root.sessions / "abcdef", (time.time() - 61,) * 2)
    session.clean(root)
    assert _ephemeral(root) == []


@pytest.mark.namespaces
def test_what_cannot_be_removed_is_reported_and_left_for_the_next_time(root: Root) -> None:
    mounted = root.tmp / "left-behind"
    mounted.mkdir()
    program = (
        "import subprocess, sys; from pathlib import Path; from packhorse import session; "
        "from packhorse.root import Root; root = Root(Path(sys.argv[1])); "
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', root.tmp / 'left-behind'], check=True); "
        "(root.build / 'file').touch(); print([p.name for p in session.clean(root)])"
    )
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", program, root.path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['left-behind']\n"
    assert _ephemeral(root) == ["left-behind"]
    assert session.clean(root) == []
    assert _ephemeral(root) == []
