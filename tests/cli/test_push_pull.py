"""`packhorse push` and `packhorse pull` as a person or a script meets them: results, exit codes, words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server

KEYS = {"snapshot", "tag", "files", "bytes", "transferred_bytes", "seconds", "peak_rss_bytes"}


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


@pytest.fixture
def filled(root_path: Path) -> Path:
    """A root with something to save."""
    root_path.mkdir(mode=0o700)
    for name in ("packages", "models"):
        (root_path / name).mkdir(mode=0o700)
        (root_path / name / "file").write_bytes(os.urandom(2_000_000))
    return root_path


def _json(packhorse: Packhorse, *words: str | Path, code: int = 0, **options: Any) -> dict[str, Any]:
    done = packhorse(*words, "--json", **options)
    assert done.returncode == code, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _secretless(text: str, *secrets: str) -> None:
    assert "Traceback" not in text
    assert not any(secret in text for secret in secrets)


def test_the_best_level_stores_less_and_a_level_that_is_none_is_refused(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    text = "\n".join(f"def function_{n}(a, b={n * n}): return a + {n % 97} * b" for n in range(60_000))
    (filled / "packages/module.py").write_text(text)
    sent = [
        _json(packhorse, "push", "--level", level, "--store", tmp_path / level)["transferred_bytes"]
        for level in ("1", "best")
    ]
    assert sent[1] < sent[0]
    assert packhorse("push", "--level", "worst").returncode == 2
    assert packhorse("push", "--level", "20").returncode == 2


def test_both_tell_what_they_did(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    pushed = _json(packhorse, "push")
    assert pushed.keys() >= KEYS
    assert (pushed["tag"], pushed["files"], pushed["bytes"]) == ("main", 2, 4_000_000)
    assert pushed["transferred_bytes"] == 4_000_000
    pulled = _json(packhorse, "pull", "--root", tmp_path / "other")
    assert pulled.keys() >= KEYS
    for key in ("snapshot", "tag", "files", "bytes", "transferred_bytes"):
        assert pulled[key] == pushed[key]
    assert (tmp_path / "other/models/file").read_bytes() == (filled / "models/file").read_bytes()
    assert 0 < pulled["peak_rss_bytes"] < 256 << 20


def test_the_result_is_on_stdout_and_the_rest_on_stderr(packhorse: Packhorse, filled: Path) -> None:
    first, second = packhorse("push"), packhorse("push")
    assert first.stdout.startswith("Pushed packages and shared to main: 2 files, 4 MB, 4 MB sent in ")
    assert "saving packages (2 MB)" in first.stderr
    assert second.stdout.startswith("Nothing has changed: main already holds this.\nSnapshot ")
    assert packhorse("push", "-q").stderr == ""
    assert packhorse("pull").stdout.startswith("The root already holds this.\nSnapshot ")


def _ids(store: Path) -> list[str]:
    return sorted(file.name for file in (store / "snapshots").iterdir())


def test_an_empty_root_changes_nothing_and_names_no_snapshot(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    pushed = _json(packhorse, "push")["snapshot"]
    other = tmp_path / "other"
    done = packhorse("push", "--root", other)
    assert done.returncode == 0
    assert done.stdout == f"There is nothing to save: {other} is empty. The tag main keeps what it holds.\n"
    facts = _json(packhorse, "push", "--root", other)
    assert (facts["snapshot"], facts["pushed"], facts["files"]) == ("", [], 0)
    assert json.loads((other / ".packhorse/state.json").read_text()).get("snapshot", "") == ""
    assert _json(packhorse, "pull", "--root", other)["snapshot"] == pushed
    for name in ("packages", "models"):
        (other / name / "file").unlink()
    assert "There is nothing to save" in packhorse("push", "--root", other).stdout
    assert _ids(tmp_path / "store") == [pushed]


def test_a_push_of_nothing_names_only_what_the_store_has(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    first = _json(packhorse, "push")["snapshot"]
    (tmp_path / "other/models").mkdir(parents=True)
    shutil.copytree(filled / "packages", tmp_path / "other/packages")
    for directory in ("", "models", "packages"):
        (tmp_path / "other" / directory).chmod(0o700)
    assert _json(packhorse, "push", "--root", tmp_path / "other")["snapshot"] == first
    assert _json(packhorse, "push")["snapshot"] == first
    (filled / "models/more").write_bytes(b"more")
    second = _json(packhorse, "push")["snapshot"]
    assert _json(packhorse, "push")["snapshot"] == second
    assert sorted(_ids(tmp_path / "store")) == sorted([first, second])


def test_an_older_snapshot_is_pulled_by_the_beginning_of_its_id(packhorse: Packhorse, filled: Path) -> None:
    old = _json(packhorse, "push")["snapshot"]
    before = (filled / "packages/file").read_bytes()
    (filled / "packages/file").write_bytes(b"new")
    packhorse("push")
    assert _json(packhorse, "pull", old[:10])["snapshot"] == old
    assert (filled / "packages/file").read_bytes() == before
    packhorse("pull")
    assert (filled / "packages/file").read_bytes() == b"new"


def test_what_was_kept_is_named(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    packhorse("push")
    packhorse("pull", "--root", tmp_path / "other")
    (filled / "models/file").write_bytes(b"changed elsewhere")
    packhorse("push")
    (tmp_path / "other/models/file").write_bytes(b"changed here")
    done = packhorse("pull", "--root", tmp_path / "other", "--json")
    assert json.loads(done.stdout)["kept"] == ["models/file"]
    assert "warning: models/file changed here and was left alone" in done.stderr


def test_tags_are_apart(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    packhorse("push", "--tag", "v1")
    facts = _json(packhorse, "pull", "--root", tmp_path / "other", code=3)
    assert facts["exit_code"] == 3
    assert facts["error"].startswith("The tag main has no snapshot in file://")
    assert "packhorse push" in facts["remedy"]
    assert packhorse("pull", "--root", tmp_path / "other", "--tag", "v1").returncode == 0


@pytest.mark.parametrize("snapshot", ["0123456789abcdef", "nonsense", "../../etc", "12"])
def test_an_unknown_snapshot_ends_with_3(packhorse: Packhorse, filled: Path, snapshot: str) -> None:
    packhorse("push")
    assert _json(packhorse, "pull", snapshot, code=3)["exit_code"] == 3


def test_a_tag_in_the_place_of_a_snapshot_is_told_how_tags_are_named(
    packhorse: Packhorse, filled: Path
) -> None:
    packhorse("push", "--tag", "V2")
    assert _json(packhorse, "pull", "V2", code=3)["remedy"].endswith(" A tag is named with --tag V2.")
    assert packhorse("pull", "--tag", "V2").returncode == 0
    assert "--tag" not in packhorse("pull", "../../etc").stderr


@pytest.mark.parametrize("command", ["push", "pull"])
def test_no_credentials_end_with_6_and_say_what_to_set(packhorse: Packhorse, command: str) -> None:
    env = {"PACKHORSE_STORAGE_URL": "s3://bucket", "PACKHORSE_STORAGE_ENDPOINT": "http://127.0.0.1:9"}
    done = packhorse(command, env=env)
    assert done.returncode == 6
    assert "There are no credentials for s3://bucket." in done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr
    _secretless(done.stderr)


@pytest.mark.parametrize("kind", ["seaweedfs", "rclone_s3"])
@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_store_that_refuses_ends_with_6_and_prints_no_secret(
    packhorse: Packhorse, filled: Path, kind: str, command: str, request: pytest.FixtureRequest
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    env = {**server.environ(), "PACKHORSE_STORAGE_ENDPOINT": server.endpoint}
    wrong = {
        "AWS_SECRET_ACCESS_KEY": "not-the-secret-0123456789",
        "PACKHORSE_STORAGE_URL": f"s3://{server.new_bucket()}",
    }
    for changed, said in (
        (wrong, "refuses the credentials"),
        ({"PACKHORSE_STORAGE_URL": "s3://no-such-bucket"}, "does not exist"),
    ):
        done = packhorse(command, "-v", env={**env, **changed})
        assert done.returncode == 6, done.stderr
        assert said in done.stderr.splitlines()[-1]
        told = packhorse(command, "--json", env={**env, **changed})
        assert json.loads(told.stdout)["exit_code"] == 6
        _secretless(told.stderr + told.stdout, server.secret_key, "not-the-secret-0123456789", "AWS4-HMAC")
        assert server.secret_key not in done.stderr
        assert "not-the-secret-0123456789" not in done.stderr


def test_a_store_that_is_down_ends_with_6_and_changes_nothing(packhorse: Packhorse, filled: Path) -> None:
    before = (filled / "packages/file").read_bytes()
    env = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-key",
        "PACKHORSE_STORAGE_URL": "s3://bucket", "PACKHORSE_STORAGE_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip
    done = packhorse("pull", "--json", env=env)
    assert done.returncode == 6
    facts = json.loads(done.stdout)
    assert "cannot be reached" in facts["error"]
    assert "network" in facts["remedy"]
    _secretless(done.stderr + done.stdout, "the-secret-of-the-key")
    assert (filled / "packages/file").read_bytes() == before


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_store_that_is_a_file_is_told(
    packhorse: Packhorse, filled: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "store").write_text("a file")
    done = packhorse(command)
    assert done.returncode in (2, 6)
    _secretless(done.stderr)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("pull",), 3),
        (("pull", "0123456789ab"), 3),
        (("snapshots",), 0),
        (("snapshots", "--tag", "main"), 0),
        (("diff", "main"), 3),
        (("verify",), 3),
        (("status",), 0),
        (("doctor",), 0),
        (("prune", "--dry-run"), 0),
        (("run", "--", "true"), 0),
    ],
)
def test_a_slip_in_the_name_of_a_directory_makes_no_store(
    packhorse: Packhorse, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    done = packhorse(words[0], "--store", tmp_path / "stroe", *words[1:])
    assert done.returncode == code, done.stderr
    if words == ("pull",):
        assert f"The tag main has no snapshot in {(tmp_path / 'stroe').as_uri()}." in done.stderr
    assert not (tmp_path / "stroe").exists()


def test_the_first_backup_of_a_command_makes_the_store(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    done = packhorse("run", "--", "sh", "-c", f"echo model > {root_path}/models/model")
    assert done.returncode == 0, done.stderr
    assert packhorse("pull", "--root", tmp_path / "other").returncode == 0
    assert (tmp_path / "other/models/model").read_text() == "model\n"


def test_the_embedded_store_beside_the_root_is_there_without_any_configuration(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    env = {"PACKHORSE_STORAGE_URL": ""}
    assert packhorse("push", env=env).returncode == 0
    assert (tmp_path / "root-store/tags/main").is_dir()
    shutil.rmtree(filled)
    assert packhorse("pull", env=env).returncode == 0
    assert (filled / "models/file").stat().st_size == 2_000_000


def test_what_is_excluded_by_the_configuration_is_not_pushed(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    (filled / "models/half.incomplete").write_text("half")
    (filled / "packages/x.tmp").write_text("part of a package")
    assert packhorse("push").returncode == 0
    assert packhorse("pull", "--root", tmp_path / "other").returncode == 0
    assert sorted(os.listdir(tmp_path / "other/models")) == ["file"]
    assert sorted(os.listdir(tmp_path / "other/packages")) == ["file", "x.tmp"]
