"""The uv engine: asks uv which files the requirements mean, and tells why it could not say.

Promises that uv resolves for the worker's Python, writes inside the root alone, and that its tries at the network
are those of the one policy. Knows nothing of what is done with the files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from packhorse import atomic
from packhorse.config import Network
from packhorse.errors import ConfigError, NoSpaceError, PackhorseError
from packhorse.install import lock, network, process, requirements
from packhorse.install.chosen import Chosen
from packhorse.install.log import without_credentials
from packhorse.install.network import Failure, NetworkError
from packhorse.install.pip import NEARLY_FULL, Engine
from packhorse.install.requirements import Line

AS_PIP = ("--index-strategy", "unsafe-best-match")
"""Options by which the best version of all indexes is taken, as pip does; uv by itself takes the first that has any."""
OLDEST = Version("0.7")
"""From this version on uv writes what it chose as pylock.toml."""

_SILENT = re.compile(r"timed? ?out", re.IGNORECASE)
_BROKEN = re.compile(
    r"error sending request|connection (?:reset|refused|closed|error)|dns error|error decoding response body"
    r"|unexpected eof|incomplete message|\b(?:408|425|429|5\d\d)\b[^\n]* for url|status code (?:408|425|429|5\d\d)",
    re.IGNORECASE,
)
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_PLATFORM = re.compile(r"invalid value '[^']*' for '--python-platform")
_CERTIFICATE = re.compile(r"invalid peer certificate|certificate verify failed", re.IGNORECASE)
# Settings of pip that say nothing of which files are taken.
_HARMLESS = frozenset(
    [
        "build-dir",
        "cache-dir",
        "config-file",
        "debug",
        "default-timeout",
        "disable-pip-version-check",
        "dry-run",
        "log",
        "no-cache-dir",
        "no-clean",
        "no-color",
        "no-input",
        "no-warn-script-location",
        "prefix",
        "progress-bar",
        "quiet",
        "report",
        "require-virtualenv",
        "retries",
        "root",
        "root-user-action",
        "src",
        "target",
        "timeout",
        "upgrade",
        "user",
        "verbose",
    ]
)
# What pip does in its own way, or uv only when it is told by options of its own.
_PIPS_OWN = re.compile(
    r"-e\b|--editable\b|[.~/]|git\+|hg\+|svn\+|bzr\+|file:|--(?!index-url|extra-index-url)|-f\b"
)


def find(engine: Engine, wanted: str, lines: Iterable[Line], settings: Mapping[str, str]) -> str:
    """The path of the uv to ask, "" where pip is asked: what `environment.engine` says. The log tells which and why.

    "auto" takes uv where it would choose what pip does: `settings` are pip's own, `lines` those of requirements
    files. "uv" fetches it into deps/bin of the root where it is not there. Raises PackhorseError where that fails.
    """
    if wanted == "pip":
        return ""
    search = os.pathsep.join([str(engine.session.root.deps / "bin"), engine.environ.get("PATH", os.defpath)])
    path = shutil.which("uv", path=search) or ""
    version = _version(path, engine) if path else ""
    fits = bool(version) and Version(version) >= OLDEST
    if wanted == "uv":
        if not fits:
            from packhorse.install import uv_fetch

            path = uv_fetch.fetch(engine, requirements.sources(lines))
            version = _version(path, engine)
        engine.log.add(f"engine: uv {version} ({path}), as configured")
        return path
    if reason := _against(path, version, lines, settings):
        engine.log.add(f"engine: pip, since {reason}")
        return ""
    engine.log.add(f"engine: uv {version} ({path})")
    return path


def _against(path: str, version: str, lines: Iterable[Line], settings: Mapping[str, str]) -> str:
    """Why uv is not asked; "" where it would choose as pip does."""
    if not path:
        return "there is no uv on PATH or in deps/bin of the root"
    if not version or Version(version) < OLDEST:
        return f"{path} is uv {version or 'of an unknown version'}, and {OLDEST} is needed"
    if configured := sorted(set(settings) - _HARMLESS):
        return f"pip's configuration has {', '.join(configured)}, which uv does not read"
    if line := next((line for line in lines if _PIPS_OWN.match(line.text)), None):
        return f"the requirements say {without_credentials(line.text)}, which uv may read otherwise"
    return ""


def _version(path: str, engine: Engine) -> str:
    """ "0.13.9"; "" where it does not answer as uv does."""
    try:
        answer = subprocess.run(
            [path, "--version"],
            env=engine.pip_environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    found = re.match(r"uv (\d+(?:\.\d+)+)", answer.stdout)
    return found[1] if found else ""


def resolve(
    uv: str,
    engine: Engine,
    requirements: Sequence[str],
    lines: Sequence[str],
    settings: Network,
    target: lock.Target,
    allowed: Mapping[str, Mapping[str, frozenset[str]]],
    options: Sequence[str],
) -> list[Chosen]:
    """What the files `requirements` and the `lines` of another such file mean, for the Python that `target` is.

    Of several files of a distribution the best that `allowed` (by name and algorithm) does not exclude. `options`
    tell uv for which Python. Raises PackhorseError with uv's last lines, ConfigError where it knows no such platform.
    """
    engine.progress.stage("resolving")
    files = list(requirements)
    if lines:
        path = engine.session.tmp / "dependencies.in"
        path.touch(mode=0o600)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files.append(str(path))
    chosen = engine.session.tmp / "pylock.chosen.toml"
    written = ("--format", "pylock.toml", "--output-file", str(chosen))
    cache = engine.session.tmp / "resolving"
    command = [
        uv,
        "pip",
        "compile",
        "--no-header",
        "--no-progress",
        "--color",
        "never",
        "--cache-dir",
        str(cache),
    ]
    command += [*written, *options, *files]
    attempts = network.Attempts(settings, engine.note, engine.sleep)
    try:
        attempts.run(lambda timeout: _attempt(command, engine, timeout))
    finally:
        # To read the metadata of a wheel of this machine uv unpacks the whole wheel (seen with 0.13.9): that would
        # lie beside what is installed, and with keep-downloads in snapshots.
        atomic.remove_tree(cache)
    return lock.chosen_by(str(chosen), target, allowed)


def _attempt(command: Sequence[str], engine: Engine, timeout: float) -> None:
    environ = {**engine.pip_environ, "UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": f"{max(timeout, 1):.0f}"}
    environ |= {"UV_PYTHON_DOWNLOADS": "never"}
    engine.log.begin(command)
    engine.watch.reset_lowest()
    output: list[str] = []

    def on_line(line: str) -> None:
        engine.session.heartbeat()
        engine.watch.look()  # at errors: before uv removes what filled the disk
        output.append(engine.log.add(line))

    ended = process.run(
        command, environ=environ, directory=Path(engine.directory), on_line=on_line, holding=engine.holding
    )
    if ended.code == 0:
        return
    said = f"uv's last lines were:\n{engine.log.last_lines}"
    whole = f"Its whole output is in {engine.log.path}."
    text = "\n".join(output)
    engine.watch.look()
    if _FULL.search(text) or engine.watch.lowest_free < NEARLY_FULL:
        raise NoSpaceError(
            f"The disk of {engine.session.root.path} was full while uv worked. {said}",
            f"Free some space, or choose a root on a larger disk with --root. {whole}",
        )
    if not _CERTIFICATE.search(text) and (_BROKEN.search(text) or _SILENT.search(text)):
        reason = "no answer in time" if _SILENT.search(text) else "the connection broke"
        raise NetworkError(
            Failure("network", reason, "uv"),
            f"uv could not read what it needs: {reason}. {said}",
            f"Check the network, and try again. {whole}",
        )
    if _PLATFORM.search(text):
        raise ConfigError(
            f"uv does not resolve for the version of manylinux that --platform names. {said}",
            "Name an older one that it knows, such as manylinux_2_17 or manylinux_2_28: those wheels fit there as well.",
        )
    how = f"exit code {ended.code}" if ended.code >= 0 else process.signal_name(-ended.code)
    raise PackhorseError(
        f"uv could not resolve the requirements ({how}). {said}",
        f"Correct the requirements, or what uv complains about, and try again. {whole}",
    )
