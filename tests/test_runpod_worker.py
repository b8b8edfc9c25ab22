"""The RunPod example, as a platform would run it: install, serve, stop, lose everything, restore, serve."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server

EXAMPLE = Path(__file__).parent.parent / "examples" / "runpod-worker"


@pytest.fixture
def settings(seaweedfs: S3Server, root_path: Path) -> dict[str, str]:
    return {
        **seaweedfs.storing(f"s3://{seaweedfs.new_bucket()}/numbers-worker"),
        "PACKHORSE_ROOT": str(root_path),
    }


@contextlib.contextmanager
def worker(
    packhorse: Packhorse, settings: Mapping[str, str], status: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The handler behind the local API server of the runpod package, started through packhorse."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = status.with_suffix(".log")
    served = ["python", "-u", "handler.py", "--rp_serve_api", "--rp_api_port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*packhorse.command, "run", "--status-file", str(status), "--", *served],
            cwd=EXAMPLE,
            env={**packhorse.environ, **settings},
            stdout=output,
            stderr=output,
        )
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()
            process.wait()


def job(address: str, process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The answer to one job, sent as soon as the server takes it."""
    request = urllib.request.Request(
        f"{address}/runsync",
        data=json.dumps({"input": {"values": [1, 2, 3, 4]}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_a_worker_that_lost_everything_serves_again_from_the_snapshot(
    packhorse: Packhorse, settings: dict[str, str], root_path: Path, tmp_path: Path
) -> None:
    actions = []
    for name in ("first", "second"):
        status = tmp_path / f"{name}.json"
        with worker(packhorse, settings, status) as (address, process):
            answer = job(address, process, status.with_suffix(".log"))
            assert answer["output"] == {
                "count": 4,
                "mean": 2.5,
                "std": pytest.approx(1.118, abs=1e-3),
                "min": 1,
                "max": 4,
            }
            running = json.loads(status.read_bytes())
            assert running["phase"] == "running"
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
            assert time.monotonic() - sent < 10
        ended = json.loads(status.read_bytes())
        assert ended["phase"] == "ended"
        assert not (ended["backup"] or {}).get("error"), ended["backup"]
        actions.append(ended["boot"]["action"])
        assert list((root_path / "tmp").iterdir()) == []
        assert list((root_path / "build").iterdir()) == []
        shutil.rmtree(root_path)
    assert actions == ["installed", "pulled"]
