"""What `packhorse env` promises: a shell that evaluates it has the environment of the root."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.conftest import Packhorse


def _shell(packhorse: Packhorse, program: str, root: Path, shell: str = "sh") -> str:
    """What a shell, the leader of a session, prints; `$PH` is packhorse."""
    done = subprocess.run(
        [shell, "-euc", program],
        env={**packhorse.environ, "PH": " ".join(packhorse.command), "PACKHORSE_ROOT": str(root)},
        cwd=packhorse.directory,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("name", ["plain", "with space", 'quote\'s "end"', "$HOME `id` \\ *", "ünï"])
def test_a_shell_evaluates_it_whatever_the_roots_name(packhorse: Packhorse, shell: str, name: str) -> None:
    root = packhorse.directory / name
    printed = _shell(packhorse, 'eval "$($PH env)"; printf %s "$HF_HOME"', root, shell)
    assert printed == str(root / "models" / "huggingface")


def test_a_root_whose_name_is_no_text_works_too(packhorse: Packhorse) -> None:
    root = packhorse.directory / os.fsdecode(b"\xff")
    done = subprocess.run(
        ["sh", "-c", f'eval "$({" ".join(packhorse.command)} env)"; printf %s "$HF_HOME"'],
        env={**packhorse.environ, "PACKHORSE_ROOT": str(root)},
        capture_output=True,
        check=True,
    )
    assert done.stdout == os.fsencode(root / "models" / "huggingface")


def test_what_was_there_is_quoted_too(packhorse: Packhorse, root_path: Path) -> None:
    program = 'export PYTHONPATH="/line\nbreak/\\$(id) \'"; eval "$($PH env)"; printf %s "$PYTHONPATH"'
    printed = _shell(packhorse, program, root_path)
    assert printed == f"{root_path}/packages:{root_path}/.packhorse/site:/line\nbreak/$(id) '"


def test_what_has_to_go_is_unset(packhorse: Packhorse, root_path: Path) -> None:
    program = 'export PYTHONPYCACHEPREFIX=/x; eval "$($PH env)"; echo "${PYTHONPYCACHEPREFIX-unset}"'
    assert _shell(packhorse, program, root_path) == "unset\n"


def test_python_finds_the_packages(packhorse: Packhorse, root_path: Path) -> None:
    program = 'eval "$($PH env)"; echo "value = 7" > "$PACKHORSE_ROOT/packages/it.py"; python -c "import it; print(it.value)"'
    assert _shell(packhorse, program, root_path) == "7\n"


def test_tmpdir_stays_until_the_shell_ends(packhorse: Packhorse, root_path: Path) -> None:
    """Other commands clean up in between, and another shell comes after."""
    program = 'eval "$($PH env)"; $PH exec true; test -d "$TMPDIR" && echo "$TMPDIR"'
    tmp = Path(_shell(packhorse, program, root_path).strip())
    assert tmp.parent == root_path / "tmp"
    packhorse("exec", "true", env={"PACKHORSE_ROOT": str(root_path)})
    assert os.listdir(root_path / "tmp") == []


def test_verbose_gives_the_reasons(packhorse: Packhorse, root_path: Path) -> None:
    lines = packhorse("env", "-v", "--root", root_path).stdout.splitlines()
    assert all(line.startswith("# ") for line in lines[::2])
    assert all(line.startswith(("export ", "unset ")) for line in lines[1::2])
    assert not [line for line in packhorse("env", "--root", root_path).stdout.splitlines() if line[0] == "#"]


def test_json_is_one_object_with_null_for_what_is_unset(packhorse: Packhorse, root_path: Path) -> None:
    done = packhorse("env", "--json", "--root", root_path, env={"PYTHONHOME": ""})
    table = json.loads(done.stdout)
    assert table["PACKHORSE_ROOT"] == str(root_path)
    assert table["PYTHONHOME"] is None
