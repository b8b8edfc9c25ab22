"""What `run` does before the child: restore, or install and push; and what it saves afterwards."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.install.index import Index, Stall
from tests.servers import S3Server
from tests.transfer.workers import another_boot
from tests.worker.conftest import Start, python, until

from packhorse.snapshot.index import flush

PRINT_VERSION = ["python3", "-c", "import tiny; print(tiny.VERSION)"]


@pytest.fixture
def index(index: Index) -> Index:
    """A package index with two versions of a small package."""
    for version in ("1.0", "2.0"):
        index.add("tiny", version, {"tiny.py": f"VERSION = {version!r}\n"})
    return index


@pytest.fixture
def configured(environ: dict[str, str], index: Index, tmp_path: Path) -> Callable[..., None]:
    """Writes packhorse.toml; pip knows our index only."""
    for name in [name for name in environ if name.startswith(("PIP_", "PACKHORSE_"))]:
        del environ[name]
    environ |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": index.url}
    environ["PACKHORSE_STORAGE_URL"] = (tmp_path / "store").as_uri()

    def write(requirement: str = "tiny==1.0", run: str = "") -> None:
        (tmp_path / "packhorse.toml").write_text(
            f'[environment]\ndependencies = ["{requirement}"]\nverify = ["tiny"]\n[run]\n{run}\n'
        )

    write()
    return write


class Outcome:
    """How a `run` went."""

    def __init__(self, done: subprocess.CompletedProcess[str], status: Path) -> None:
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.status: dict[str, Any] = json.loads(status.read_bytes())

    @property
    def action(self) -> str:
        """How the root came to hold the environment."""
        return str(self.status["boot"]["action"])


@pytest.fixture
def run(packhorse: Packhorse, configured: Callable[..., None], tmp_path: Path) -> Callable[..., Outcome]:
    """`packhorse run` of a command in a root of the test."""

    def start(*command: str, root: str = "root", env: dict[str, str] | None = None) -> Outcome:
        status = tmp_path / f"{root}.json"
        words = ("run", "--root", str(tmp_path / root), "--status-file", str(status), "--", *command)
        return Outcome(packhorse(*words, env=env), status)

    return start


def test_the_first_run_installs_and_pushes_and_a_worker_that_lost_everything_restores(
    run: Callable[..., Outcome], root_path: Path
) -> None:
    first = run(*PRINT_VERSION)
    assert (first.code, first.output, first.action) == (0, "1.0\n", "installed"), first.errors
    assert "main has no snapshot of this environment: making one\n" in first.errors
    shutil.rmtree(root_path)
    second = run(*PRINT_VERSION)
    assert (second.code, second.output, second.action) == (0, "1.0\n", "pulled"), second.errors
    assert second.status["boot"]["snapshot"] == first.status["boot"]["snapshot"]
    third = run(*PRINT_VERSION)
    assert (third.code, third.output, third.action) == (0, "1.0\n", "unchanged")


def test_changed_requirements_are_installed_and_the_old_ones_stay_in_the_tag(
    run: Callable[..., Outcome], configured: Callable[..., None]
) -> None:
    run(*PRINT_VERSION)
    configured("tiny==2.0")
    changed = run(*PRINT_VERSION)
    assert (changed.output, changed.action) == ("2.0\n", "installed"), changed.errors
    configured("tiny==1.0")
    back = run(*PRINT_VERSION)
    assert (back.output, back.action) == ("1.0\n", "pulled"), back.errors
    other = run(*PRINT_VERSION, root="another")
    assert (other.output, other.action) == ("1.0\n", "pulled"), other.errors


@pytest.mark.parametrize("kind", ["file", "seaweedfs"])
def test_of_workers_that_boot_at_once_one_builds(
    kind: str,
    request: pytest.FixtureRequest,
    packhorse: Packhorse,
    configured: Callable[..., None],
    tmp_path: Path,
) -> None:
    env = dict(packhorse.environ)
    if kind == "seaweedfs":
        server: S3Server = request.getfixturevalue("seaweedfs")
        env |= server.environ()
        env["PACKHORSE_STORAGE_URL"] = f"s3://{server.new_bucket()}/envs"
        env["PACKHORSE_STORAGE_ENDPOINT"] = server.endpoint
    processes = []
    for number in range(3):
        words = [
            "run",
            "--root",
            str(tmp_path / f"root{number}"),
            "--status-file",
            str(tmp_path / f"{number}.json"),
        ]
        processes.append(
            subprocess.Popen(
                [*packhorse.command, *words, "--", *PRINT_VERSION],
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "1.0\n"), errors
    actions = [json.loads((tmp_path / f"{n}.json").read_bytes())["boot"]["action"] for n in range(3)]
    assert sorted(actions) == ["installed", "pulled", "pulled"]


def test_workers_that_waited_for_the_one_that_builds_wait_for_no_other_restore(
    start: Start, configured: Callable[..., None], index: Index, tmp_path: Path
) -> None:
    index.add("tiny", "1.0", {"tiny.py": "VERSION = '1.0'\n", "large": random.Random(3).randbytes(1 << 20)})
    index.fail("tiny-1.0-py3-none-any.whl", Stall(after=10))
    builder = start("run", "--root", tmp_path / "builder", "--", "true")
    leases = tmp_path / "store" / "leases"
    until(lambda: list(leases.rglob("*.held")) and index.requests)
    early = {"PACKHORSE_RUN_START": "early", "PACKHORSE_ARRIVALS": "asked"}  # so no restore comes to its end
    others = [
        start("run", "--root", tmp_path / name, *python('taking(15); say("up"); say(take(15))'), env=early)
        for name in ("one", "other")
    ]
    until(lambda: all("another worker is building" in each.errors() for each in others), "them to wait")
    index.closing.set()
    assert builder.wait() == 0, builder.errors()
    assert [each.line() for each in others] == ["up", "up"]
    assert [path for path in leases.rglob("*") if path.is_file()] == []
    for each in others:
        each.send(signal.SIGTERM)
        assert each.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_is_told_to_end_while_it_installs_lets_go_of_the_lease(
    packhorse: Packhorse,
    configured: Callable[..., None],
    index: Index,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    index.fail("tiny-1.0-py3-none-any.whl", Stall(after=10))
    process = subprocess.Popen(
        [*packhorse.command, "run", "--root", str(tmp_path / "root"), "--", "true"],
        env={**packhorse.environ},
        cwd=packhorse.directory,
        stderr=subprocess.DEVNULL,
    )
    leases = tmp_path / "store" / "leases"
    until(lambda: list(leases.rglob("*.held")) and index.requests)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert [path for path in leases.rglob("*") if path.is_file()] == []


def test_a_tag_without_a_snapshot_fails_where_the_configuration_says_so(
    run: Callable[..., Outcome], configured: Callable[..., None], root_path: Path
) -> None:
    configured(run='on-missing = "fail"')
    refused = run(*PRINT_VERSION)
    assert refused.code == 125
    assert "has no snapshot" in refused.errors
    assert "Traceback" not in refused.errors
    assert not any((root_path / "packages").iterdir())


def test_an_environment_that_is_empty_although_the_store_was_asked_is_told(
    packhorse: Packhorse, seaweedfs: S3Server, tmp_path: Path
) -> None:
    done = packhorse("run", "--", "true", env=seaweedfs.storing(f"s3://{seaweedfs.new_bucket()}"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("so the environment is empty") == 1


def test_a_snapshot_of_other_requirements_is_refused_with_the_reason(
    run: Callable[..., Outcome], configured: Callable[..., None]
) -> None:
    run(*PRINT_VERSION)
    configured("tiny==2.0", run='on-missing = "fail"')
    refused = run(*PRINT_VERSION, root="another")
    assert refused.code == 125
    assert "no snapshot made of these requirements" in refused.errors


NOWHERE = {
    "PACKHORSE_STORAGE_URL": "s3://bucket/envs",
    "PACKHORSE_STORAGE_ENDPOINT": "http://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "never-printed",
}


def test_a_restarted_worker_that_holds_its_environment_starts_without_its_store(
    run: Callable[..., Outcome],
) -> None:
    run(*PRINT_VERSION)
    alone = run(*PRINT_VERSION, env=NOWHERE)
    assert (alone.code, alone.output, alone.action) == (0, "1.0\n", "unchanged"), alone.errors
    assert "already holds this environment" in alone.errors
    assert "never-printed" not in alone.errors


@pytest.mark.parametrize("flushed", [True, False])
def test_after_a_restart_of_the_machine_a_worker_starts_without_its_store_on_what_is_still_whole(
    run: Callable[..., Outcome], root_path: Path, flushed: bool
) -> None:
    run(*PRINT_VERSION)
    shutil.rmtree(root_path)
    assert run(*PRINT_VERSION).action == "pulled"
    if flushed:
        flush(root_path / ".packhorse/index")
    another_boot(root_path)
    alone = run(*PRINT_VERSION, env=NOWHERE)
    assert (alone.code, alone.output, alone.action) == (0, "1.0\n", "unchanged"), alone.errors


def test_after_a_restart_of_the_machine_what_a_crash_took_is_missed_without_the_store(
    run: Callable[..., Outcome], root_path: Path
) -> None:
    run(*PRINT_VERSION)
    shutil.rmtree(root_path)
    assert run(*PRINT_VERSION).action == "pulled"
    another_boot(root_path)
    module = root_path / "packages/tiny.py"
    before = module.stat()
    module.write_bytes(bytes(before.st_size))
    os.utime(module, ns=(before.st_mtime_ns,) * 2)
    refused = run(*PRINT_VERSION, env=NOWHERE)
    assert refused.code == 125
    assert "cannot be reached" in refused.errors


def test_an_empty_worker_without_its_store_fails_or_installs_as_configured(
    run: Callable[..., Outcome], configured: Callable[..., None]
) -> None:
    failed = run(*PRINT_VERSION, env=NOWHERE)
    assert failed.code == 125
    assert "cannot be reached" in failed.errors
    configured(run='on-restore-failure = "install"')
    installed = run(*PRINT_VERSION, env=NOWHERE)
    assert (installed.code, installed.output, installed.action) == (0, "1.0\n", "installed"), installed.errors
    assert "not saved" in installed.errors
    assert "has no snapshot" not in installed.errors  # nobody knows


def test_a_corrupt_snapshot_fails_or_is_installed_anew_as_configured(
    run: Callable[..., Outcome], configured: Callable[..., None], root_path: Path, tmp_path: Path
) -> None:
    run(*PRINT_VERSION)
    shutil.rmtree(root_path)
    [pack] = (tmp_path / "store" / "packs").iterdir()
    pack.write_bytes(bytes(reversed(pack.read_bytes())))
    failed = run(*PRINT_VERSION)
    assert failed.code == 125
    assert "corrupt" in failed.errors
    assert not any((root_path / "packages").iterdir())
    configured(run='on-restore-failure = "install"')
    installed = run(*PRINT_VERSION)
    assert (installed.code, installed.output, installed.action) == (0, "1.0\n", "installed"), installed.errors
    another = run(*PRINT_VERSION, root="another")
    assert (another.code, another.output, another.action) == (0, "1.0\n", "pulled"), another.errors


def test_a_tag_with_shared_files_only_has_no_packages_to_restore(
    run: Callable[..., Outcome], configured: Callable[..., None], tmp_path: Path
) -> None:
    run("sh", "-c", 'echo x > "$PACKHORSE_ROOT/models/x"')
    shutil.rmtree(tmp_path / "store" / "tags" / "main" / "packages")
    configured(run='on-missing = "fail"')
    refused = run(*PRINT_VERSION, root="another")
    assert refused.code == 125
    assert "no packages" in refused.errors
    configured()
    assert run(*PRINT_VERSION, root="another").action == "installed"


def test_what_a_child_adds_to_models_is_saved_when_it_ends(
    run: Callable[..., Outcome], root_path: Path
) -> None:
    saved = run(
        "sh", "-c", 'mkdir "$HF_HOME" && echo weights > "$HF_HOME/model" && echo half > "$HF_HOME/x.tmp"'
    )
    assert saved.code == 0
    assert saved.status["backup"]["pushed"] == ["shared"], saved.errors
    shutil.rmtree(root_path)
    restored = run("sh", "-c", 'cat "$HF_HOME/model"; ls "$HF_HOME"')
    assert restored.output == "weights\nmodel\n"
    assert restored.status["backup"]["pushed"] == []


def test_a_failed_backup_is_told_and_the_childs_code_wins(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    run("true")
    store = tmp_path / "store"
    lost = run("sh", "-c", f'echo x > "$PACKHORSE_ROOT/models/x"; rm -rf {store}; touch {store}; exit 7')
    assert lost.code == 7
    assert "not everything is saved" in lost.errors
    assert lost.status["backup"]["error"]


def test_a_worker_without_backup_directories_saves_nothing(
    run: Callable[..., Outcome], configured: Callable[..., None], root_path: Path
) -> None:
    configured(run="backup = []")
    run("sh", "-c", 'echo x > "$PACKHORSE_ROOT/models/x"')
    shutil.rmtree(root_path)
    assert run("sh", "-c", 'ls "$PACKHORSE_ROOT/models"').output == ""


def test_a_running_worker_saves_every_now_and_then(
    packhorse: Packhorse, configured: Callable[..., None], root_path: Path, tmp_path: Path
) -> None:
    configured(run='backup-every = "1s"')
    script = 'echo x > "$PACKHORSE_ROOT/models/x"; echo ready; exec sleep 60'
    process = subprocess.Popen(
        [*packhorse.command, "run", "--root", str(root_path), "--", "sh", "-c", script],
        cwd=tmp_path,
        env=dict(packhorse.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        shared = tmp_path / "store" / "tags" / "main" / "shared"
        deadline = time.monotonic() + 30
        while not shared.is_dir():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143


def test_after_sigterm_all_ends_within_the_grace_and_what_was_stored_is_tagged(
    packhorse: Packhorse, configured: Callable[..., None], root_path: Path, tmp_path: Path
) -> None:
    configured(run="grace = 6\nstop-timeout = 1")
    script = (
        'trap "" TERM; echo small > "$PACKHORSE_ROOT/models/small"; echo ready; while :; do sleep 1; done'
    )
    status = tmp_path / "status.json"
    process = subprocess.Popen(
        [
            *packhorse.command,
            "run",
            "--root",
            str(root_path),
            "--status-file",
            str(status),
            "--",
            "sh",
            "-c",
            script,
        ],
        cwd=tmp_path,
        env=dict(packhorse.environ),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 137
    assert time.monotonic() - sent < 6.5
    assert json.loads(status.read_bytes())["backup"]["pushed"] == ["shared"]


def test_a_second_run_joins_the_first_on_one_root_and_another_configuration_is_refused(
    packhorse: Packhorse,
    run: Callable[..., Outcome],
    configured: Callable[..., None],
    root_path: Path,
    tmp_path: Path,
) -> None:
    first = subprocess.Popen(
        [*packhorse.command, "run", "--root", str(root_path), "--", "sh", "-c", "echo ready; exec cat"],
        cwd=tmp_path,
        env=dict(packhorse.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == b"ready\n"
        joined = run(*PRINT_VERSION)
        assert (joined.code, joined.output, joined.action) == (0, "1.0\n", "unchanged"), joined.errors
        configured("tiny==2.0")
        refused = run(*PRINT_VERSION)
        assert refused.code == 125
        assert "in use by a running command" in refused.errors
        assert (root_path / "packages" / "tiny.py").read_text() == "VERSION = '1.0'\n"
    finally:
        first.stdin.close()
        assert first.wait(timeout=30) == 0


# --- the GPUs of this machine ---


NVML = """
#include <stdio.h>
int nvmlInit_v2(void) {
    FILE *asked = fopen(ASKED, "a");
    fputs("asked\\n", asked);
    return fclose(asked);
}
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &nvmlShutdown; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
"""


@pytest.fixture
def asked(environ: dict[str, str], tmp_path: Path) -> Path:
    """Has a line for each time that the driver of this machine was asked for its GPUs."""
    asked, library = tmp_path / "asked", tmp_path / "driver" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    command = ["cc", "-shared", "-fPIC", f'-DASKED="{asked}"', "-o", library, "-x", "c", "-"]
    subprocess.run(command, input=NVML, text=True, check=True)
    environ["LD_LIBRARY_PATH"] = str(library.parent)
    return asked


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ("", 0),
        ('gpu = "only"', 1),
        ('start = "ready"', 1),
        ('start = "early"', 1),
        ('start = "early"\ngpu = "all"', 0),
        ('start = "ready"\ngpu = "only:sm_90"', 0),
    ],
)
def test_the_driver_is_asked_for_gpus_once_and_only_where_their_code_comes_first(
    run: Callable[..., Outcome],
    configured: Callable[..., None],
    asked: Path,
    root_path: Path,
    settings: str,
    times: int,
) -> None:
    configured(run=settings)
    assert run(*PRINT_VERSION).action == "installed"
    asked.unlink(missing_ok=True)
    shutil.rmtree(root_path)
    assert run(*PRINT_VERSION).action in ("pulled", "pulling")
    assert (asked.read_text() if asked.exists() else "") == "asked\n" * times


@pytest.mark.parametrize(("jit", "told"), [("0", 0), ("1", 1)])
def test_that_no_code_is_left_out_after_all_is_told(
    run: Callable[..., Outcome],
    configured: Callable[..., None],
    asked: Path,
    root_path: Path,
    jit: str,
    told: int,
) -> None:
    configured(run='gpu = "only"')
    run(*PRINT_VERSION)
    shutil.rmtree(root_path)
    done = run(*PRINT_VERSION, env={"CUDA_FORCE_PTX_JIT": jit})
    assert (done.code, done.action) == (0, "pulled"), done.errors
    assert asked.exists()
    assert done.errors.count('run.gpu = "only" leaves nothing out here') == told


def test_without_its_store_the_driver_is_asked_only_of_a_sparse_root(
    run: Callable[..., Outcome], asked: Path, root_path: Path
) -> None:
    run(*PRINT_VERSION)
    assert run(*PRINT_VERSION, env=NOWHERE).action == "unchanged"
    assert not asked.exists()
    state = root_path / ".packhorse" / "state.json"
    facts = json.loads(state.read_bytes())
    state.write_text(json.dumps({**facts, "state": "sparse", "gpus": [90]}))
    assert run(*PRINT_VERSION, env=NOWHERE).action == "unchanged"
    assert asked.read_text() == "asked\n"
