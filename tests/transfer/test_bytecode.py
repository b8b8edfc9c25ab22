from __future__ import annotations

import os
import re
from pathlib import Path

from tests.conftest import Packhorse

_IMPORTS = "import attrs, click, humanize, msgspec"
_MATCHES = re.compile(r"^# (\S+\.pyc) matches (\S+\.py)$", re.MULTILINE)
_COMPILED = re.compile(r"^# (?:code object from (/\S+\.py)|wrote '(\S+)')$", re.MULTILINE)


def _tree(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of everything below a directory."""
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _times(directory: Path) -> dict[str, int]:
    return {name: time for name, (_, _, time) in _tree(directory).items()}


def test_bytecode_is_shipped_and_valid_after_a_pull(packhorse: Packhorse, tmp_path: Path) -> None:
    """The first import in a restored root compiles nothing and writes nothing."""
    (tmp_path / "packhorse.toml").write_text(
        '[environment]\ndependencies = ["attrs", "click", "humanize", "msgspec"]\n[storage]\nurl = "store"\n'
    )
    built, restored = tmp_path / "built", tmp_path / "restored"
    for arguments in (["install", "--root", built], ["push", "--root", built], ["pull", "--root", restored]):
        done = packhorse(*arguments)
        assert done.returncode == 0, done.stderr

    before = _tree(restored / "packages")
    assert _times(restored / "packages") == _times(built / "packages")
    done = packhorse("exec", "--root", restored, "--", "python", "-v", "-c", _IMPORTS)
    assert done.returncode == 0, done.stderr

    packages = f"{restored / 'packages'}{os.sep}"
    valid = {source for _, source in _MATCHES.findall(done.stderr) if source.startswith(packages)}
    assert len(valid) > 20
    assert {f"{packages}{name}/__init__.py" for name in ("attrs", "click", "humanize", "msgspec")} <= valid
    assert not [name for pair in _COMPILED.findall(done.stderr) for name in pair if name.startswith(packages)]
    assert _tree(restored / "packages") == before
