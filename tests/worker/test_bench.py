"""`packhorse bench` tells what a start costs here, and leaves the root, the store and the disk as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.install.index import Index, source, wheel
from tests.servers import S3Server
from tests.transfer.workers import persistent
from tests.worker.conftest import alive, until

from packhorse.config import Storage
from packhorse.root import Root
from packhorse.store.objects import Store


@pytest.fixture
def index(index: Index) -> Index:
    """A package index with one module."""
    index.add("module", "1", {"module.py": "print('imported')\n", "module-data": os.urandom(3_000_000)})
    return index


@pytest.fixture
def store(seaweedfs: S3Server) -> Store:
    """A prefix of a real server."""
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}/envs", endpoint=seaweedfs.endpoint)
    return Store(storage, seaweedfs.environ())


@pytest.fixture
def environ(
    environ: dict[str, str], root_path: Path, index: Index, store: Store, seaweedfs: S3Server, tmp_path: Path
) -> dict[str, str]:
    """One configuration for all commands of a test."""
    (tmp_path / "packhorse.toml").write_text(
        '[environment]\ndependencies = ["module"]\nverify = ["module"]\n'
        '[run]\non-restore-failure = "install"\nbackup-every = "1s"\n'
    )
    return {
        **index.environ(environ),
        **seaweedfs.storing(store.url),
        "PACKHORSE_ROOT": str(root_path),
    }


@pytest.fixture
def pushed(packhorse: Packhorse, root_path: Path) -> Path:
    """A root that was installed and pushed, with a model of two million bytes."""
    assert packhorse("install").returncode == 0
    (root_path / "models/weights").write_bytes(os.urandom(2_000_000))
    assert packhorse("push").returncode == 0
    return root_path


Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(packhorse: Packhorse) -> Bench:
    """Runs it and returns its JSON; `steps` by their names."""

    def run(*words: str) -> dict[str, Any]:
        done = packhorse("bench", "--json", *words)
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return {**facts, "steps": {step["step"]: step for step in facts["steps"]}}

    return run


def test_each_step_begins_with_an_empty_root_and_is_told(
    bench: Bench, pushed: Path, packhorse: Packhorse
) -> None:
    steps = bench("--rounds", "2")["steps"]
    assert list(steps) == ["pull", "start", "install", "pip"]
    assert [list(step["phases"]) for step in steps.values()] == [
        ["restore"],
        ["restore", "command"],
        ["install", "command"],
        ["install", "command"],
    ]
    for step in steps.values():
        assert len(step["rounds"]) == 2
        assert min(step["rounds"]) <= step["seconds"] <= max(step["rounds"])
        assert all(seconds > 0 for seconds in step["phases"].values())
        assert (step["dollars"], step["last"]) == (None, None)
    for name in ("pull", "start"):
        assert 5_000_000 < steps[name]["fetched_bytes"] < 5_100_000
        assert 5_000_000 < steps[name]["disk_bytes"] < 5_500_000
    for name in ("install", "pip"):
        assert steps[name]["fetched_bytes"] is None
        assert 3_000_000 < steps[name]["disk_bytes"] < 3_500_000, "an installation brings no models"
    table = packhorse("bench", "--no-install").stdout
    assert "restore, then the command" in table
    assert "import module" in table
    assert "A plain pip takes" in packhorse("bench").stdout


def test_the_root_and_the_store_stay_as_they_are(
    bench: Bench, pushed: Path, store: Store, index: Index
) -> None:
    (pushed / "packages/module.py").write_text("raise ImportError('of the root itself')")
    (pushed / "models/unsaved").write_text("not pushed yet")
    before, listing, state = persistent(pushed), store.list(""), Root.open(pushed).state()
    writes = 'import module, os; open(os.environ["PACKHORSE_ROOT"] + "/models/new", "w").write("x")'
    bench("--", "python3", "-c", writes)
    assert persistent(pushed) == before
    assert Root.open(pushed).state() == state
    assert store.list("") == listing, "what a command writes into models/ is not saved"
    assert (os.listdir(pushed / "tmp"), os.listdir(pushed / "build")) == ([], [])


def test_the_command_runs_in_the_restored_environment_and_in_the_installed_ones(
    bench: Bench, pushed: Path, tmp_path: Path
) -> None:
    says = f'import module, sys; open({str(tmp_path / "said")!r}, "a").write(module.__file__ + "\\n")'
    facts = bench("--", "python3", "-c", says)
    assert facts["command"] == ["python3", "-c", says]
    files = (tmp_path / "said").read_text().splitlines()
    assert [Path(file).parts[-2:] for file in files] == [("packages", "module.py")] * 3
    assert all(file.startswith(str(pushed / "tmp")) for file in files)


def test_a_locked_environment_is_installed_as_it_was_locked(
    bench: Bench, packhorse: Packhorse, index: Index, tmp_path: Path, root_path: Path
) -> None:
    with (tmp_path / "packhorse.toml").open("r+") as file:
        text = file.read().replace("[environment]", '[environment]\nlock = "pylock.toml"')
        file.seek(0)
        file.write(text)
    for command in ("lock", "install", "push"):
        assert packhorse(command).returncode == 0
    index.add("module", "2")
    index.requests.clear()

    bench()

    assert index.requests == ["module-1-py3-none-any.whl"] * 2


def test_pip_has_the_same_requirements_and_works_inside_the_root(
    bench: Bench, packhorse: Packhorse, index: Index, tmp_path: Path, root_path: Path
) -> None:
    index.add("module", "2", {"module.py": ""})
    project = source(tmp_path / "project")
    with (project / "backend.py").open("a") as backend:
        backend.write(
            f"import tempfile; open({str(tmp_path / 'said')!r}, 'a').write(tempfile.mkdtemp() + '\\n')\n"
        )
    (tmp_path / "requirements.txt").write_text("-c constraints.txt\nmodule\n./project\n")
    (tmp_path / "constraints.txt").write_text("module < 2\n")
    (tmp_path / "packhorse.toml").write_text(
        '[environment]\nrequirements = ["requirements.txt"]\nverify = ["module", "source"]\n'
    )
    for command in ("install", "push"):
        assert packhorse(command).returncode == 0
    index.requests.clear()
    (tmp_path / "said").unlink()

    steps = bench("--", "python3", "-c", "import module, source")["steps"]

    assert list(steps) == ["pull", "start", "install", "pip"]
    fetched = [file for file in index.requests if file.endswith(".whl")]
    assert fetched == ["module-1-py3-none-any.whl"] * 2
    places = (tmp_path / "said").read_text().splitlines()
    by_pip = [place for place in places if "/0-pip/tmp/" in place]
    assert by_pip
    assert all(place.startswith(f"{root_path}/tmp/") for place in places)
    assert ".cache" not in os.listdir(tmp_path / "home")


def test_where_pip_alone_cannot_do_it_the_rest_is_told(
    packhorse: Packhorse, pushed: Path, index: Index, tmp_path: Path
) -> None:
    fails = 'case "$PACKHORSE_ROOT" in *-pip) echo of pip alone; exit 3;; esac'
    done = packhorse("bench", "--json", "--rounds", "2", "--", "sh", "-c", fails)
    assert done.returncode == 0, done.stderr
    assert [step["step"] for step in json.loads(done.stdout)["steps"]] == ["pull", "start", "install"]
    assert "the plain pip is left out: " in done.stderr
    assert "of pip alone" in done.stderr
    extra = wheel(tmp_path, "extra", "1")
    with (tmp_path / "packhorse.toml").open("a") as file:
        file.write(f'[[environment.wheels]]\nname = "extra"\npath = "{extra.name}"\n')
    for command in ("install", "push"):
        assert packhorse(command).returncode == 0
    done = packhorse("bench", "--json")
    assert [step["step"] for step in json.loads(done.stdout)["steps"]] == ["pull", "start", "install"]
    assert "`packhorse lock`" in done.stderr


def test_the_last_run_is_shown_beside(bench: Bench, pushed: Path, packhorse: Packhorse) -> None:
    first = bench("--no-install")["steps"]
    second = bench("--no-install")["steps"]
    assert list(second) == ["pull", "start"]
    for name, step in second.items():
        assert step["last"]["seconds"] == first[name]["seconds"]
    (pushed / ".packhorse/bench.jsonl").open("ab").write(b"cut sho")
    other = bench("--no-install", "--", "true")["steps"]
    assert other["pull"]["last"]["seconds"] == second["pull"]["seconds"]
    assert other["start"]["last"] is None, "another command takes another time"
    assert "an earlier run" in packhorse("bench", "--no-install").stdout


def test_money_is_time_and_traffic_as_far_as_prices_are_given(
    bench: Bench, pushed: Path, packhorse: Packhorse
) -> None:
    steps = bench("--gpu-price", "3600", "--egress-price", "1000")["steps"]
    for step in steps.values():
        traffic = (step["fetched_bytes"] or 0) / 1e6
        assert step["dollars"] == pytest.approx(step["seconds"] + traffic, abs=1e-4)
    free = bench("--gpu-price", "3600", "--no-install")["steps"]["pull"]
    assert free["dollars"] == pytest.approx(free["seconds"], abs=1e-4)
    assert "DOLLARS" in packhorse("bench", "--no-install", "--gpu-price", "2.5").stdout


def test_what_a_command_did_not_wait_for_is_not_counted_as_nothing(
    bench: Bench, pushed: Path, packhorse: Packhorse
) -> None:
    (pushed / "models/large").write_bytes(os.urandom(50_000_000))
    assert packhorse("push").returncode == 0
    with (packhorse.directory / "packhorse.toml").open("a") as file:
        file.write('start = "early"\n')
    steps = bench("--no-install", "--gpu-price", "2.5", "--", "true")["steps"]
    assert (steps["pull"]["fetched_bytes"] > 50_000_000, steps["start"]["fetched_bytes"]) == (True, None)
    assert steps["start"]["dollars"] > 0
    steps = bench("--no-install", "--egress-price", "1", "--", "true")["steps"]
    assert (steps["pull"]["dollars"] > 0.05, steps["start"]["dollars"]) == (True, None)


def test_where_nothing_was_pushed_it_ends_with_3_and_installs_nothing(
    packhorse: Packhorse, index: Index, root_path: Path
) -> None:
    done = packhorse("bench", "--json")
    assert done.returncode == 3
    assert "packhorse push" in json.loads(done.stdout)["remedy"]
    assert index.requests == []
    assert not root_path.exists()


def test_a_command_that_fails_ends_it_with_its_last_words(packhorse: Packhorse, pushed: Path) -> None:
    done = packhorse("bench", "--", "sh", "-c", "echo what is wrong; exit 3")
    assert done.returncode == 1
    assert "exit code 3" in done.stderr
    assert "Its last lines were:\n    what is wrong\nMake" in done.stderr
    assert os.listdir(pushed / "tmp") == []
    assert not (pushed / ".packhorse/bench.jsonl").exists()


def test_a_command_that_fails_without_a_word_is_told_in_one_line(packhorse: Packhorse, pushed: Path) -> None:
    done = packhorse("bench", "-q", "--no-install", "--", "false")
    assert done.stderr.startswith(
        "packhorse: `packhorse run -- false` ended with exit code 1. It said nothing. Make"
    )


def test_a_store_that_lost_a_pack_is_not_hidden_by_an_installation(
    packhorse: Packhorse, pushed: Path, store: Store
) -> None:
    store.delete([item.key for item in store.list("packs/")])
    listing = store.list("")
    done = packhorse("bench", "--no-install")
    assert done.returncode == 1
    assert "is missing from the store" in done.stderr
    assert store.list("") == listing


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_one_that_is_interrupted_leaves_nothing(
    packhorse: Packhorse, pushed: Path, tmp_path: Path, number: int, code: int
) -> None:
    waits = f"import os, sys; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + ' '); sys.stdin.read(); os.read(os.pipe()[0], 1)"
    process = subprocess.Popen(
        [*packhorse.command, "bench", "-q", "--no-install", "--", sys.executable, "-c", waits],
        cwd=packhorse.directory,
        env=dict(packhorse.environ),
        stderr=subprocess.DEVNULL,
    )
    started = tmp_path / "pid"
    child = int(until(lambda: started.exists() and started.read_text().endswith(" ") and started.read_text()))
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    if number == signal.SIGKILL:
        assert os.listdir(pushed / "tmp") != [], "the command still works there"
        assert packhorse("pull").returncode == 0
        assert alive(child)
        assert os.listdir(pushed / "tmp") != []
        os.kill(child, signal.SIGKILL)
        until(
            lambda: (
                packhorse("status").returncode == 0
                and packhorse("pull").returncode == 0
                and not os.listdir(pushed / "tmp")
            )
        )
    assert not alive(child)
    assert (os.listdir(pushed / "tmp"), os.listdir(pushed / "build")) == ([], [])


@pytest.mark.namespaces
def test_too_little_space_is_found_before_anything_is_fetched(packhorse: Packhorse, pushed: Path) -> None:
    other = pushed.parent / "small"
    other.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o mode=0700,size=60m none {other} && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *packhorse.command, "bench", "--root", str(other)],
        cwd=packhorse.directory, env=dict(packhorse.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert "the largest step of the benchmark needs" in done.stderr
