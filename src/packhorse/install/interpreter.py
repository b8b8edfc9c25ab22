"""The worker's Python: which one it is, and what of it decides whether an environment fits.

Promises an answer without starting a process where packhorse itself runs on that Python.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping

import msgspec

from packhorse.errors import UNREADABLE, ConfigError

_FACTS = """\
import json, sys, sysconfig
print(json.dumps({
    "path": sys.executable,
    "version": ".".join(map(str, sys.version_info[:3])),
    "soabi": sysconfig.get_config_var("SOABI") or "",
    "platform": sysconfig.get_platform(),
}))
"""
_REMEDY = "Name the worker's Python by environment.python in the configuration."


class Interpreter(msgspec.Struct, frozen=True):
    """A Python: `soabi` as in PEP 3149 ("cpython-311-x86_64-linux-gnu"), `platform` as sysconfig.get_platform."""

    path: str
    version: str
    soabi: str
    platform: str

    @property
    def minor(self) -> str:
        """Major and minor version: "3.11"."""
        return ".".join(self.version.split(".")[:2])


def worker_interpreter(configured: str, environ: Mapping[str, str]) -> Interpreter:
    """The Python of the worker: `configured` (a path or a name), else `python3`, else `python` on the PATH of
    `environ`, else the one that runs packhorse. Raises ConfigError where it cannot be found or started."""
    path = _find(configured, environ)
    if os.path.realpath(path) == os.path.realpath(sys.executable):
        import sysconfig

        return Interpreter(
            path=path,
            version=".".join(map(str, sys.version_info[:3])),
            soabi=sysconfig.get_config_var("SOABI") or "",
            platform=sysconfig.get_platform(),
        )
    return _ask(path, environ)


def _find(configured: str, environ: Mapping[str, str]) -> str:
    search = environ.get("PATH", os.defpath)
    for name in (configured,) if configured else ("python3", "python"):
        found = shutil.which(name, path=search)
        if found is not None:
            return os.path.abspath(found)
    if configured:
        raise ConfigError(f"The Python {configured} is not there, or cannot be executed.", _REMEDY)
    return sys.executable


def _ask(path: str, environ: Mapping[str, str]) -> Interpreter:
    import subprocess

    try:
        answer = subprocess.run(
            [path, "-I", "-S", "-c", _FACTS],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        interpreter = msgspec.json.decode(answer.stdout, type=Interpreter)
    except (OSError, subprocess.TimeoutExpired, *UNREADABLE) as error:
        raise ConfigError(f"{path} does not answer as a Python 3 does.", _REMEDY) from error
    # What a shim stands for, so that later starts do not depend on the directory or variables it looks at.
    return interpreter if interpreter.path else msgspec.structs.replace(interpreter, path=path)
