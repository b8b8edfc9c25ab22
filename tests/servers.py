"""Real S3 servers for the tests: SeaweedFS and `rclone serve s3`, from their PyPI packages.

Each is a context manager that yields an `S3Server` once it answers, and leaves neither processes nor files.
SeaweedFS keeps what S3 promises; rclone ignores conditional writes and ranges, as some stores do.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

READY_WITHIN = 60.0
"""Seconds a server has to answer; SeaweedFS takes three on an idle machine."""


@dataclass(frozen=True)
class S3Server:
    """Where a server answers and who may talk to it."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    pid: int = 0
    """The server's process, the only one it has."""
    metrics: str = ""
    """Where SeaweedFS tells in Prometheus' format what it did, if it was asked to."""

    def environ(self) -> dict[str, str]:
        """The credentials in the variables that every S3 client reads; the endpoint is not among them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
        }

    def storing(self, url: str) -> dict[str, str]:
        """What has packhorse keep its snapshots at `url` of this server."""
        return {
            **self.environ(),
            "PACKHORSE_STORAGE_URL": url,
            "PACKHORSE_STORAGE_ENDPOINT": self.endpoint,
        }

    def new_bucket(self) -> str:
        """The name of a bucket that this call created."""
        bucket = f"bucket-{secrets.token_hex(4)}"
        # obstore creates no buckets, but signs any request.
        status, answer = _put(obstore.sign(self.store(bucket), "PUT", "", timedelta(minutes=1)))
        if status != 200:
            raise RuntimeError(f"{self.endpoint} created no bucket: {status} {answer!r}")
        return bucket

    def store(self, bucket: str, prefix: str | None = None) -> S3Store:
        """A client of one bucket that does not hide failures behind retries."""
        return S3Store(
            bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            region=self.region,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )


@contextlib.contextmanager
def seaweedfs(
    *, directory: Path | None = None, metrics: bool = False, everywhere: bool = False
) -> Iterator[S3Server]:
    """A SeaweedFS master, volume server, filer and S3 gateway in one process.

    Keeps its files inside `directory`, by default where temporary files lie. Answers on loopback, or on
    every address.
    """
    ports: list[int] = []
    describe = functools.partial(_seaweedfs, ports, metrics, everywhere)
    environ = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    try:
        with _serving("weed server", describe, environ, directory) as server:
            yield replace(server, metrics=f"http://127.0.0.1:{ports[-1]}/metrics") if metrics else server
    finally:
        for port in ports:  # it puts a socket into /tmp for each, wherever TMPDIR is
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


def _seaweedfs(
    ports: list[int], metrics: bool, everywhere: bool, directory: Path, access_key: str, secret_key: str
) -> tuple[list[str], int]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3, told = _free_ports(5, also_above=10_000)  # gRPC listens 10,000 above each
    ports += [port + above for port in (master, volume, filer, s3) for above in (0, 10_000)]
    ports.append(told)
    options = (
        f"-dir={directory / 'data'} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false"
        f" -master.port={master} -volume.port={volume} -filer.port={filer}"
        f" -s3 -s3.config={directory / 's3.json'} -s3.port={s3} -s3.port.iceberg=0 -s3.port.lance=0"
        # Volumes are files that grow; every bucket takes one of its own (volume growth of 1 instead of 7).
        " -volume.max=1000 -volume.minFreeSpace=0 -master.volumeSizeLimitMB=1024"
        f" -metricsPort={told if metrics else 0} -s3.ip.bind={'0.0.0.0' if everywhere else '127.0.0.1'}"
    )
    return [_program("weed"), f"-logdir={directory}", "server", *options.split()], s3


def rclone_s3() -> contextlib.AbstractContextManager[S3Server]:
    """`rclone serve s3` over a directory."""
    return _serving("rclone serve s3", _rclone, {"RCLONE_CONFIG": os.devnull})


def _rclone(directory: Path, access_key: str, secret_key: str) -> tuple[list[str], int]:
    (port,) = _free_ports(1)
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{access_key},{secret_key}"]
    return [_program("rclone"), "serve", "s3", *options, str(directory / "data")], port


@contextlib.contextmanager
def _serving(
    name: str,
    describe: Callable[[Path, str, str], tuple[list[str], int]],
    environ: dict[str, str],
    parent: Path | None = None,
) -> Iterator[S3Server]:
    """Run the server whose command line and port `describe` gives for a directory and two keys."""
    access_key, secret_key = secrets.token_hex(8).upper(), secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="packhorse-server-", dir=parent))
        )
        (directory / "data").mkdir()
        for attempts_left in (2, 1, 0):
            arguments, port = describe(directory, access_key, secret_key)
            server = S3Server(f"http://127.0.0.1:{port}", access_key, secret_key)
            process = stack.enter_context(_process(arguments, directory, environ))
            try:
                _wait_until_ready(name, process, server, directory / "log")
                server = replace(server, pid=process.pid)
                break
            except ChildProcessError:  # another program may have taken one of the ports meanwhile
                if not attempts_left:
                    raise
        yield server


@contextlib.contextmanager
def _process(
    arguments: list[str], directory: Path, environ: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    if setpriv := shutil.which("setpriv"):  # no server survives tests that are killed
        arguments = [setpriv, "--pdeathsig", "KILL", *arguments]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            env={"HOME": str(directory), "PATH": os.environ.get("PATH", os.defpath), **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # SeaweedFS would take 15 seconds to end by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Return when the server knows its keys and takes buckets.

    Raises ChildProcessError if it ends, TimeoutError if it does not answer.
    """
    deadline = time.monotonic() + READY_WITHIN
    while process.poll() is None:
        try:
            server.new_bucket()
            return
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: {error} after {READY_WITHIN:.0f} s:\n{_tail(log)}") from error
            time.sleep(0.02)
    raise ChildProcessError(f"{name} ended with code {process.returncode}:\n{_tail(log)}")


def _put(url: str) -> tuple[int, bytes]:
    """Past any proxy, which does not reach this machine's loopback."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    with contextlib.closing(connection):
        connection.request("PUT", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        return response.status, response.read()


def _free_ports(count: int, also_above: int = 0) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, nor on those `also_above` higher.

    Below the range from which the kernel takes the ports of outgoing connections (ip(7), 32768 on).
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_100, 22_700)
        if port not in ports and all(_is_free(number) for number in {port, port + also_above}):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _program(name: str) -> str:
    """A program installed with the tests, or else one on PATH."""
    found = shutil.which(
        name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    )
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: `make test` installs what the tests need")
    return found


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
