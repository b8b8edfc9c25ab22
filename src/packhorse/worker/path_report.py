"""The path report: what a worker's Python will look through, told before the worker starts.

Reads directories only; starts no interpreter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from packhorse.config import Config
from packhorse.config_values import printable
from packhorse.errors import CannotStartError
from packhorse.root import Root
from packhorse.worker.executable import find_executable


def lines(root: Root, environ: Mapping[str, str], app_path: str) -> Iterator[str]:
    """The report on the environment `environ` of a child."""
    yield "sys.path begins with"
    for entry in environ.get("PYTHONPATH", "").split(os.pathsep):
        yield f"  {entry or os.curdir} ({_description(root, entry, app_path)})"
    yield f"TMPDIR is {environ['TMPDIR']}"
    try:
        yield f"python is {os.path.abspath(find_executable('python', environ))}"
    except CannotStartError:
        yield "there is no python on the PATH"


def nothing(config: Config, root: Root) -> str:
    """Why the packages are empty where nothing is configured and nothing stored; "" where they are not."""
    if os.listdir(root.packages):
        return ""
    why = f"{printable(config.file)} names nothing to install under [environment]"
    if config.file is None:
        why = f"no packhorse.toml was found from {printable(os.getcwd())} upwards"
    return f"{why} and nothing is stored, so the environment is empty"


def other_python(command: str, environ: Mapping[str, str], soabi: str, right: str) -> str:
    """What is wrong with a command that is another Python than packages of `soabi` were made for; "" where nothing is, or
    the names of files do not tell it. `right` is the Python to start."""
    if not re.fullmatch(r"python[0-9.]*t?", os.path.basename(command)):
        return ""
    try:
        found = find_executable(command, environ)
    except CannotStartError:
        return ""
    started = re.fullmatch(r"python([0-9]+\.[0-9]+t?)", os.path.basename(os.path.realpath(found)))
    made_for = re.match(r"cpython-([0-9])([0-9]+t?)-", soabi)
    if started is None or made_for is None or started[1] == f"{made_for[1]}.{made_for[2]}":
        return ""
    return (
        f"{printable(found)} is Python {started[1]}, and the packages were made for {made_for[1]}.{made_for[2]}: those with "
        f"compiled modules do not work there. Start {printable(right)}, or name the other by environment.python"
    )


def _description(root: Root, entry: str, app_path: str) -> str:
    if not os.path.exists(entry or os.curdir):
        origin = "app-path" if entry == app_path else "inherited PYTHONPATH"
        return f"{origin}, does not exist"
    if entry == str(root.packages):
        count = sum(1 for _ in _importable(entry))
        return f"{count} top-level package{'' if count == 1 else 's'}"
    if entry == str(root.site):
        return "processes the .pth files of packages"
    return "app-path" if entry == app_path else "inherited PYTHONPATH"


def _importable(directory: str) -> Iterator[str]:
    """The names that `import` finds in a directory."""
    with os.scandir(directory) as entries:
        for entry in entries:
            name, _, rest = entry.name.partition(".")
            if not name.isidentifier() or name in ("bin", "__pycache__"):
                continue
            # Not entry.is_dir(), which raises where a link leads nowhere that could be told: in a circle, to the forbidden.
            if os.path.isdir(entry) if not rest else rest == "py" or rest.endswith("so"):
                yield name
