"""What the tests share: real object stores, a package index, and the real command line in an environment of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from tests import servers, small_os_disk
from tests.install.index import Index, serve
from tests.servers import S3Server

# What a network needs that is not reached directly: certificates and proxies.
_NETWORK = (
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure() -> None:
    """No account or store of whoever runs the tests is used by them, and no signal is ignored that they ignore:
    a shell starts what it puts into the background with SIGINT and SIGQUIT ignored, nohup with SIGHUP."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    for name in [name for name in os.environ if name.startswith(("PACKHORSE_", "AWS_"))]:
        del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need namespaces fail in CI where they cannot run, and are skipped elsewhere."""
    if item.get_closest_marker("namespaces") is None or not (reason := small_os_disk.refusal()):
        return
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[S3Server]:
    """A store that keeps all that S3 promises."""
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3() -> Iterator[S3Server]:
    """A store that ignores conditional writes and ranges."""
    with servers.rclone_s3() as server:
        yield server


@pytest.fixture
def root_path(tmp_path: Path) -> Path:
    """Where a test's root can be created."""
    return tmp_path / "root"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The whole environment of the commands of one test.

    Nothing of packhorse or of a cloud leaks in. pip's own settings, certificates and proxies stay, and so does
    PATH, behind the interpreter that runs the tests: it is the workers' python3 too.
    """
    home = tmp_path / "home"
    home.mkdir()
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in _NETWORK}
    for user_file in (".config/pip/pip.conf", ".pip/pip.conf"):  # found by HOME, which is another one here
        if (path := Path.home() / user_file).is_file():
            kept.setdefault("PIP_CONFIG_FILE", str(path))
    return {**kept, "HOME": str(home), "PATH": search, "LANG": "C.UTF-8"}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """A package index that offers nothing yet."""
    directory = tmp_path / "index"
    directory.mkdir()
    with serve(directory) as index:
        yield index


def unprivileged() -> list[str]:
    """What is put in front of a command for which permissions count even where it is root's."""
    if os.geteuid():
        return []
    assert shutil.which("setpriv")
    powers = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", "--"]


@dataclass(frozen=True)
class Packhorse:
    """Runs the real command line and hands back what it printed and how it ended."""

    environ: Mapping[str, str]
    directory: Path

    def __call__(
        self,
        *arguments: str | os.PathLike[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """`packhorse *arguments` in `cwd`, or else the test's directory, with `env` on top of `environ`."""
        return subprocess.run(
            [*self.command, *arguments],
            cwd=cwd or self.directory,
            env={**self.environ, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout,
            check=False,
        )

    @property
    def command(self) -> list[str]:
        """The words before the arguments, for a test that starts it by itself."""
        return [sys.executable, "-m", "packhorse"]


@pytest.fixture
def packhorse(environ: dict[str, str], tmp_path: Path) -> Packhorse:
    """The command line, in the test's directory and environment."""
    return Packhorse(environ, tmp_path)
