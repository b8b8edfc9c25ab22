"""Another Python or platform than the one here, to lock for: what it takes, without having it.

Promises the tags and the values of markers that CPython on a Linux of that C library has. Knows no other systems.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from packhorse.errors import ConfigError
from packhorse.install.interpreter import Interpreter
from packhorse.install.lock import Target

_PLATFORM = re.compile(r"manylinux_2_([0-9]+)_(x86_64|aarch64)")
_PYTHON = re.compile(r"3\.[0-9]+")
_LEGACY = {
    17: "manylinux2014",
    12: "manylinux2010",
    5: "manylinux1",
}  # PEP 600, section "Legacy manylinux tags"


class Elsewhere(NamedTuple):
    """A CPython ("3.12") on a platform ("manylinux_2_28_aarch64")."""

    python: str
    platform: str

    @property
    def machine(self) -> str:
        """As `uname -m` says it."""
        return _split(self.platform)[1]

    @property
    def interpreter(self) -> Interpreter:
        """What decides whether an environment fits; there is no path."""
        soabi = f"cpython-{self.python.replace('.', '')}-{self.machine}-linux-gnu"
        return Interpreter("", f"{self.python}.0", soabi, f"linux-{self.machine}")

    @property
    def target(self) -> Target:
        """Markers and tags."""
        from packaging.tags import compatible_tags, cpython_tags

        version = (3, int(self.python.partition(".")[2]))
        platforms = list(self._platforms())
        interpreter = f"cp{version[0]}{version[1]}"
        tags = [*cpython_tags(version, platforms=platforms)]
        tags += compatible_tags(version, interpreter=interpreter, platforms=platforms)
        markers = {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }
        return Target(markers, [str(tag) for tag in tags])

    @property
    def uv_options(self) -> tuple[str, ...]:
        """What tells uv."""
        version, machine = _split(self.platform)
        return (
            *("--python-version", self.python),
            *("--python-platform", f"{machine}-manylinux_2_{version}"),
        )

    def _platforms(self) -> list[str]:
        version, machine = _split(self.platform)
        found = []
        for minor in range(version, 4, -1):
            found.append(f"manylinux_2_{minor}_{machine}")
            if minor in _LEGACY and (machine == "x86_64" or minor == 17):
                found.append(f"{_LEGACY[minor]}_{machine}")
        return [*found, f"linux_{machine}"]


def elsewhere(python: str, platform: str, here: Interpreter) -> Elsewhere | None:
    """What the flags name; what they leave out is as `here`. None where they name nothing.

    Raises ConfigError for what cannot be locked for.
    """
    if not python and not platform:
        return None
    if python and not _PYTHON.fullmatch(python):
        raise ConfigError(f"--python-version: {python} is no version of Python.", 'Write it as "3.12".')
    machine = here.platform.rpartition("-")[2]
    platform = platform or f"manylinux_2_28_{machine}"
    if not _PLATFORM.fullmatch(platform):
        raise ConfigError(
            f"--platform: {platform} is not a platform that can be locked for.",
            "Write it as the tags of wheels do: manylinux_2_28_x86_64 or manylinux_2_28_aarch64.",
        )
    return Elsewhere(python or here.minor, platform)


def _split(platform: str) -> tuple[int, str]:
    found = _PLATFORM.fullmatch(platform)
    assert found is not None
    return int(found[1]), found[2]
