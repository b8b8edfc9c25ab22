from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse, unprivileged

from packhorse.root import Root, State

Facts = dict[str, Any]


@pytest.fixture
def where(root_path: Path, tmp_path: Path) -> dict[str, str]:
    return {"PACKHORSE_ROOT": str(root_path), "PACKHORSE_STORAGE_URL": str(tmp_path / "store")}


def _asked(packhorse: Packhorse, where: dict[str, str], code: int, *options: str) -> dict[str, list[Facts]]:
    """The findings by what was looked at, less those of the machine that runs the tests (its disks)."""
    done = packhorse("doctor", "--json", *options, env=where)
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(done.stdout)
    levels = [finding["level"] for finding in found["findings"]]
    assert (found["problems"], found["warnings"]) == (levels.count("problem"), levels.count("warning"))
    sorted_out: dict[str, list[Facts]] = {}
    for finding in found["findings"]:
        if finding["check"] != "disks" and "characters" not in finding["what"]:
            sorted_out.setdefault(finding["check"], []).append(finding)
    return sorted_out


def test_an_empty_root_has_no_problem(packhorse: Packhorse, where: dict[str, str]) -> None:
    assert _asked(packhorse, where, 0) == {}


def test_a_problem_ends_with_1_and_is_told_with_its_remedy(
    packhorse: Packhorse, where: dict[str, str], root_path: Path
) -> None:
    leftover = root_path / "packages" / "foo-1.0.dist-info"
    leftover.mkdir(parents=True)

    [finding] = _asked(packhorse, where, 1)["leftovers"]
    shown = packhorse("doctor", "-q", env=where)

    assert (
        finding["paths"] == ["foo-1.0.dist-info"]
        and finding["remedy"] == "Run `packhorse install --reinstall`."
    )
    assert shown.returncode == 1
    assert "problem  leftovers  foo 1.0 has no RECORD" in shown.stdout
    assert "→ Run `packhorse install --reinstall`." in shown.stdout
    assert "1 problem," in shown.stdout.splitlines()[-1]


def test_a_warning_alone_is_no_failure(packhorse: Packhorse, where: dict[str, str], root_path: Path) -> None:
    (root_path / "packages").mkdir(parents=True)
    (root_path / "packages" / "by_hand.py").touch()
    assert [finding["level"] for finding in _asked(packhorse, where, 0)["unowned"]] == ["warning"]


def test_digests_are_compared_where_that_is_asked_for(
    packhorse: Packhorse, where: dict[str, str], root_path: Path
) -> None:
    info = root_path / "packages" / "foo-1.0.dist-info"
    info.mkdir(parents=True)
    (root_path / "packages" / "foo.py").write_text("x")
    (info / "RECORD").write_text(f"foo.py,sha256={'A' * 43},1\nfoo-1.0.dist-info/RECORD,,\n")
    assert _asked(packhorse, where, 0) == {}
    assert [finding["paths"] for finding in _asked(packhorse, where, 1, "--digests")["records"]] == [
        ["foo.py"]
    ]


def test_an_unfinished_pull_and_another_python_are_problems(
    packhorse: Packhorse, where: dict[str, str], root_path: Path
) -> None:
    Root.open(root_path).record(State(state="partial", soabi="cpython-27", platform="linux-x86_64"))
    unfinished, python = _asked(packhorse, where, 1)["state"]
    assert unfinished["remedy"] == "Run `packhorse pull`: it goes on where it was."
    assert "was made for cpython-27 on linux-x86_64, but" in python["what"]


def test_a_python_that_is_not_there_is_a_problem(packhorse: Packhorse, where: dict[str, str]) -> None:
    [finding] = _asked(packhorse, {**where, "PACKHORSE_ENVIRONMENT_PYTHON": "/gone/python3"}, 1)["state"]
    assert "The Python /gone/python3 is not there" in finding["what"]


def test_changed_requirements_are_a_warning(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "packhorse.toml").write_text('[environment]\ndependencies = ["foo"]')
    Root.open(root_path).record(State(state="complete", fingerprint="other"))
    [finding] = _asked(packhorse, where, 0)["state"]
    assert "other requirements" in finding["what"]


def test_a_requirements_file_that_is_not_there_is_a_problem_among_the_others(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "packhorse.toml").write_text(
        '[environment]\nrequirements = ["gone.txt"]\n[run]\napp-path = "gone"'
    )
    found = _asked(packhorse, where, 1)
    [finding] = found["state"]
    assert finding["what"] == f"{tmp_path / 'gone.txt'} cannot be read: No such file or directory."
    assert finding["remedy"].startswith("Create it, or correct what names it")
    assert found["variables"]


def test_variables_that_lead_out_of_the_root_are_a_problem_inside_its_environment(
    packhorse: Packhorse, where: dict[str, str], root_path: Path
) -> None:
    inside = packhorse("exec", "-q", "--", *packhorse.command, "doctor", "--json", env=where)
    assert inside.returncode == 0, inside.stdout
    script = 'HF_HOME=/elsewhere/hf; export HF_HOME; exec "$@"'
    outside = packhorse(
        "exec", "-q", "--", "sh", "-c", script, "sh", *packhorse.command, "doctor", "--json", env=where
    )
    assert outside.returncode == 1
    [finding] = [each for each in json.loads(outside.stdout)["findings"] if each["level"] == "problem"]
    assert finding["what"] == "Variables lead out of the root: HF_HOME=/elsewhere/hf."


def test_variables_of_a_shell_of_its_own_are_nobodys_business(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    named = {"PACKHORSE_STORAGE_URL": where["PACKHORSE_STORAGE_URL"], "HF_HOME": "/elsewhere"}
    assert _asked(packhorse, named, 0, "--root", str(root_path)) == {}


def test_an_app_path_that_is_not_there_is_a_problem(packhorse: Packhorse, where: dict[str, str]) -> None:
    [finding] = _asked(packhorse, {**where, "PACKHORSE_RUN_APP_PATH": "/gone/app"}, 1)["variables"]
    assert finding["what"] == "run.app-path is /gone/app, which is no directory."


def test_a_root_and_a_store_on_the_os_disk_are_told(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    done = packhorse("doctor", "--json", env=where)
    told = [each["what"] for each in json.loads(done.stdout)["findings"] if each["check"] == "disks"]
    same = root_path.stat().st_dev == Path("/").stat().st_dev
    assert (f"The root {root_path} lies on the OS disk." in told) == same
    assert any(f"The store {tmp_path / 'store'} lies on the OS disk" in what for what in told) == same


def test_a_store_behind_a_directory_that_may_not_be_entered_is_a_problem_among_the_others(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    (root_path / "packages" / "foo-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "closed").mkdir(mode=0)
    done = subprocess.run(
        [*unprivileged(), *packhorse.command, "doctor", "--json"],
        env={**packhorse.environ, **where, "PACKHORSE_STORAGE_URL": str(tmp_path / "closed/below/store")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    problems = {each["check"] for each in json.loads(done.stdout)["findings"] if each["level"] == "problem"}
    assert problems - {"disks"} == {"leftovers", "store"}


def test_what_may_not_be_read_is_a_problem_among_the_others(
    packhorse: Packhorse, where: dict[str, str], root_path: Path
) -> None:
    (root_path / "packages" / "foo-1.0.dist-info").mkdir(parents=True)
    for name, closed in (
        ("file", "file/module.py"),
        ("tree", "tree"),
        ("record", "record-1.0.dist-info/RECORD"),
    ):
        info = root_path / "packages" / f"{name}-1.0.dist-info"
        info.mkdir()
        (root_path / "packages" / name).mkdir()
        (root_path / "packages" / name / "module.py").touch()
        (info / "RECORD").write_text(f"{name}/module.py,sha256=AAAA,0\n{info.name}/RECORD,,\n")
        (root_path / "packages" / closed).chmod(0)
    done = subprocess.run(
        [*unprivileged(), *packhorse.command, "doctor", "--json", "--digests"],
        env={**packhorse.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    findings = json.loads(done.stdout)["findings"]
    assert [(each["check"], each["paths"]) for each in findings if each["paths"]] == [
        ("leftovers", ["foo-1.0.dist-info"]),
        ("records", ["file/module.py", "record-1.0.dist-info/RECORD", "tree"]),
    ]
    assert done.returncode == 1


@pytest.mark.namespaces
@pytest.mark.parametrize("command", ["doctor", "verify", "status"])
def test_a_root_that_is_mounted_read_only_can_be_looked_at(
    packhorse: Packhorse, where: dict[str, str], root_path: Path, command: str
) -> None:
    Root.open(root_path)
    (root_path / "models/file").write_text("a model")
    assert packhorse("push", env=where).returncode == 0
    mount = 'mount --bind "$PACKHORSE_ROOT" "$PACKHORSE_ROOT" && mount -o remount,ro,bind "$PACKHORSE_ROOT" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *packhorse.command, command, "--json"],
        env={**packhorse.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error" not in json.loads(done.stdout), done.stderr


def test_a_store_that_cannot_be_reached_is_a_problem(packhorse: Packhorse, where: dict[str, str]) -> None:
    gone = {
        "PACKHORSE_STORAGE_URL": "s3://bucket/envs",
        "PACKHORSE_STORAGE_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    [finding] = _asked(packhorse, {**where, **gone}, 1)["store"]
    assert "cannot be reached" in finding["what"]
    without = {**where, **gone, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    [finding] = _asked(packhorse, without, 1)["store"]
    assert "There are no credentials" in finding["what"]
