"""The uv engine: asks uv which files the requirements mean, and tells why it could not say.

Promises that uv resolves for the worker's Python, writes inside the root alone, and that its tries at the network
are those of the one policy. Knows nothing of what is done with the files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packhorse.errors import ConfigError, PackhorseError
from packhorse.install import lock, network, process
from packhorse.install.chosen import Chosen
from packhorse.install.network import Failure, NetworkError
from packhorse.install.pip import Engine
from packhorse.install.requirements import Line

_SILENT = re.compile(r"timed? ?out", re.IGNORECASE)
_BROKEN = re.compile(
    r"error sending request|connection (?:reset|refused|closed|error)|dns error|error decoding response body"
    r"|unexpected eof|incomplete message|\b(?:408|425|429|5\d\d)\b[^\n]* for url|status code (?:408|425|429|5\d\d)",
    re.IGNORECASE,
)
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
    """The path of the uv to ask, "" where pip is asked: what `environment.engine` says.

    "auto" takes uv where it would choose what pip does: `settings` are pip's own, `lines` those of requirements
    files. Raises ConfigError where "uv" is wanted and there is none.
    """
    if wanted == "pip":
        return ""
    search = os.pathsep.join([str(engine.session.root.deps / "bin"), engine.environ.get("PATH", os.defpath)])
    found = shutil.which("uv", path=search) or ""
    if wanted == "uv":
        if not found:
            raise ConfigError(
                'environment.engine is "uv", but there is no uv on PATH or in deps/bin of the root.',
                'Install uv (`pip install uv`), or take engine = "auto".',
            )
        return found
    simple = not set(settings) - _HARMLESS and not any(_PIPS_OWN.match(line.text) for line in lines)
    return found if simple else ""


def resolve(uv: str, engine: Engine, requirements: Sequence[str], lines: Sequence[str]) -> list[Chosen]:
    """What the files `requirements` and the `lines` of another such file mean, for the worker's Python.

    Raises PackhorseError with uv's last lines.
    """
    engine.progress.stage("resolving")
    files = list(requirements)
    if lines:
        path = engine.session.tmp / "dependencies.in"
        path.touch(mode=0o600)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files.append(str(path))
    chosen = engine.session.tmp / "pylock.chosen.toml"
    options = ("--format", "pylock.toml", "--output-file", str(chosen), "--python", engine.interpreter.path)
    command = [uv, "pip", "compile", "--no-header", "--no-progress", "--color", "never", *options, *files]
    attempts = network.Attempts(engine.settings, engine.note, engine.sleep)
    attempts.run(lambda timeout: _attempt(command, engine, timeout))
    return lock.chosen_by(str(chosen), lock.target(engine.interpreter, engine.environ))


def _attempt(command: Sequence[str], engine: Engine, timeout: float) -> None:
    environ = {**engine.pip_environ, "UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": f"{max(timeout, 1):.0f}"}
    environ |= {"UV_PYTHON_DOWNLOADS": "never"}
    engine.log.begin(command)
    output: list[str] = []

    def on_line(line: str) -> None:
        engine.session.heartbeat()
        output.append(engine.log.add(line))

    ended = process.run(
        command, environ=environ, directory=Path(engine.directory), on_line=on_line, holding=engine.holding
    )
    if ended.code == 0:
        return
    said = f"uv's last lines were:\n{engine.log.last_lines}"
    whole = f"Its whole output is in {engine.log.path}."
    text = "\n".join(output)
    if not _CERTIFICATE.search(text) and (_BROKEN.search(text) or _SILENT.search(text)):
        reason = "no answer in time" if _SILENT.search(text) else "the connection broke"
        raise NetworkError(
            Failure("network", reason, "uv"),
            f"uv could not read what it needs: {reason}. {said}",
            f"Check the network, and try again. {whole}",
        )
    how = f"exit code {ended.code}" if ended.code >= 0 else process.signal_name(-ended.code)
    raise PackhorseError(
        f"uv could not resolve the requirements ({how}). {said}",
        f"Correct the requirements, or what uv complains about, and try again. {whole}",
    )
