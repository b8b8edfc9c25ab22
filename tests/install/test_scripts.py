from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.install.conftest import Installer
from tests.install.index import Index

from packhorse.install.scripts import make_relocatable

FILES: dict[str, str | bytes] = {
    "tool.py": "import sys\n\ndef main():\n    print(sys.prefix, sys.argv[1:])\n",
    "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main\n",
    "tool-1.0.data/scripts/tool-script": "#!python\nimport sys\nprint(sys.prefix)\n",
    "tool-1.0.data/scripts/tool-shell": "#!/bin/sh\necho shell\n",
}


def _interpreter(directory: Path) -> Path:
    """A Python of its own, by whose prefix it is known."""
    venv.create(directory, with_pip=False)
    return directory / "bin" / "python3"


def _run(packhorse: Packhorse, root: Path, interpreter: Path, *command: str) -> str:
    """What a command prints on a worker whose python3 is `interpreter`."""
    path = f"{interpreter.parent}{os.pathsep}{packhorse.environ['PATH']}"
    done = packhorse("exec", "-q", "--root", root, "--", *command, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["plain", "with a space", "long-" + "x" * 150])
def test_commands_start_after_the_root_and_the_interpreter_have_moved(
    name: str, index: Index, installer: Installer, packhorse: Packhorse, tmp_path: Path
) -> None:
    before, after = _interpreter(tmp_path / name / "before"), _interpreter(tmp_path / name / "after here")
    index.add("tool", "1.0", FILES)
    installer.environ["PATH"] = f"{before.parent}{os.pathsep}{installer.environ['PATH']}"
    installer(dependencies=["tool"], python="python3")
    moved = tmp_path / "another place" / "root"
    moved.parent.mkdir()
    installer.root.path.rename(moved)
    (tmp_path / name / "before").rename(tmp_path / name / "gone")

    assert _run(packhorse, moved, after, "tool", "a b", "c") == f"{after.parent.parent} ['a b', 'c']"
    assert _run(packhorse, moved, after, "tool-script") == str(after.parent.parent)
    assert _run(packhorse, moved, after, "tool-shell") == "shell"


def test_a_configured_interpreter_is_the_one_that_starts(
    index: Index, installer: Installer, packhorse: Packhorse, tmp_path: Path
) -> None:
    configured, other = _interpreter(tmp_path / "it's $HOME"), _interpreter(tmp_path / "other")
    index.add("tool", "1.0", FILES)
    installer(dependencies=["tool"], python=str(configured))

    assert _run(packhorse, installer.root.path, other, "tool") == f"{configured.parent.parent} []"


def test_an_interpreter_inside_the_root_moves_with_it(
    index: Index, installer: Installer, packhorse: Packhorse, tmp_path: Path
) -> None:
    inside = _interpreter(installer.root.deps / "python")
    index.add("tool", "1.0", FILES)
    installer(dependencies=["tool"], python=str(inside))
    moved = installer.root.path.rename(tmp_path / "moved root")

    assert _run(packhorse, moved, Path(sys.executable), "tool") == f"{moved / 'deps' / 'python'} []"


def test_records_tell_the_new_content(index: Index, installer: Installer) -> None:
    index.add("tool", "1.0", FILES)
    installer(dependencies=["tool"])

    packages = installer.root.packages
    with open(packages / "tool-1.0.dist-info" / "RECORD", newline="") as file:
        rows = {row[0].rpartition("/")[2]: row[1:] for row in csv.reader(file) if "bin/" in row[0]}
    assert rows.keys() == {"tool", "tool-script", "tool-shell"}
    for name, (digest, size) in rows.items():
        content = (packages / "bin" / name).read_bytes()
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(content)))


def test_only_what_a_python_runs_is_rewritten_and_once(tmp_path: Path) -> None:
    contents = {
        "absolute": b"#!/opt/python3.12\nprint()\n",
        "spaces": b"#!/my python tools/bin/python3\nprint()\n",
        "named": b"#!/usr/bin/env python3\nprint()\n",
        "windows": b"#!/opt/python\r\nprint()\r\n",
        "shell": b"#!/bin/sh\nexec python3\n",
        "perl": b"#!/usr/bin/perl\n",
        "binary": b"\x7fELF\0\0",
        "empty": b"",
    }
    (tmp_path / "bin").mkdir()
    for name, content in contents.items():
        (tmp_path / "bin" / name).write_bytes(content)
        (tmp_path / "bin" / name).chmod(0o751)
        os.utime(tmp_path / "bin" / name, (1_000_000, 1_000_000))
        os.link(tmp_path / "bin" / name, tmp_path / name)
    (tmp_path / "bin" / "link").symlink_to("absolute")

    assert make_relocatable(tmp_path, "", tmp_path / "root") == 4
    assert make_relocatable(tmp_path, "", tmp_path / "root") == 0

    for name, content in contents.items():
        path = tmp_path / "bin" / name
        head = b"#!/bin/sh\n'''exec' python3 \"$0\" \"$@\"\n' '''  # packhorse\n"
        rewritten = name in ("absolute", "spaces", "named", "windows")
        assert path.read_bytes() == (head + content.partition(b"\n")[2] if rewritten else content)
        assert (tmp_path / name).read_bytes() == content
        assert (path.stat().st_mode & 0o777, path.stat().st_mtime) == (0o751, 1_000_000)
    assert (tmp_path / "bin" / "link").is_symlink()
    assert make_relocatable(tmp_path / "gone", "", tmp_path) == 0


def test_scripts_of_the_generation_before_follow_another_interpreter(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tool"
    script.write_text("#!/opt/python3 -E\nprint('works')\n")
    inside = str(tmp_path / "root" / "deps" / "py")
    for configured in ('/it\'s a "place"/python3', "python3.99", inside, ""):
        assert make_relocatable(tmp_path, configured, tmp_path / "root") == 1

    expected = "#!/bin/sh\n'''exec' python3 -E \"$0\" \"$@\"\n' '''  # packhorse -E\nprint('works')\n"
    assert script.read_text() == expected


def test_scripts_can_still_be_read_by_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tool"
    script.write_text("#!/opt/python3\nfrom __future__ import annotations\nprint('works')\n")
    make_relocatable(tmp_path, '/it\'s a "place"/python3', tmp_path / "root")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "works\n"


def test_scripts_keep_their_docstring_and_their_encoding(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tool"
    text = (
        '#!/opt/python3\n# coding: latin-1\n"""Usage:\n  töl"""\nfrom __future__ import (\n    annotations,\n)\n'
        "import sys\nsys.stdout.buffer.write(__doc__.encode())\n"
    )
    script.write_text(text, encoding="latin-1")
    for configured in (sys.executable, ""):
        make_relocatable(tmp_path, configured, tmp_path / "root")
        done = subprocess.run([sys.executable, script], capture_output=True, encoding="utf-8", check=True)
        assert done.stdout == "Usage:\n  töl"


def test_a_script_for_another_python_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tool"
    script.write_bytes(b"#!/opt/python2\nprint 'works'\n")
    make_relocatable(tmp_path, "", tmp_path / "root")
    assert script.read_bytes().endswith(b"# packhorse\nprint 'works'\n")
