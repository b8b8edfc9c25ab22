from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, Status

from packhorse.errors import ConfigError, PackhorseError


@pytest.fixture
def of_uv(index: Index, installer: Installer) -> Installer:
    """uv knows this index, and so does pip."""
    installer.environ |= {"UV_DEFAULT_INDEX": index.url}
    return installer


def _tree(installer: Installer) -> dict[str, bytes]:
    files = (path for path in installer.root.packages.rglob("*") if path.is_file())
    return {path.relative_to(installer.root.packages).as_posix(): path.read_bytes() for path in files}


def test_both_engines_give_the_same_environment(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0", requires=["bar<2"])
    index.add("bar", "1.0", {"bar/__init__.py": "x = 1\n"})
    index.add("bar", "2.0")
    index.add("baz", "1.0")
    (tmp_path / "constraints.txt").write_text("baz<2\n")
    (tmp_path / "requirements.txt").write_text("foo\nbaz\n-c constraints.txt\n")
    index.add("baz", "2.0")
    wanted = {
        "requirements": [str(tmp_path / "requirements.txt")],
        "verify": ["foo", "bar"],
        "reinstall": True,
    }

    of_uv(engine="uv", **wanted)  # type: ignore[arg-type]
    by_uv = _tree(of_uv)
    assert "uv pip compile" in of_uv.log
    of_uv(engine="pip", **wanted)  # type: ignore[arg-type]
    by_pip = _tree(of_uv)

    def same(name: str) -> bool:
        return not name.endswith(("REQUESTED", "RECORD"))  # uv does not tell what was asked for

    assert {name: content for name, content in by_uv.items() if same(name)} == {
        name: content for name, content in by_pip.items() if same(name)
    }
    assert {name.partition("/")[0] for name in by_uv if "dist-info" in name} == {
        "foo-1.0.dist-info",
        "bar-1.0.dist-info",
        "baz-1.0.dist-info",
    }


def test_auto_takes_uv_where_pip_is_not_configured(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    of_uv(dependencies=["foo"])
    assert "uv pip compile" not in of_uv.log  # pip has an index of its own

    del of_uv.environ["PIP_INDEX_URL"]
    of_uv(dependencies=["foo"], reinstall=True)
    assert "uv pip compile" in of_uv.log


def test_auto_takes_pip_where_there_is_no_uv(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0")
    (tmp_path / "bin").mkdir()
    of_uv.environ |= {"PATH": str(tmp_path / "bin")}
    of_uv(dependencies=["foo"])
    assert "uv pip compile" not in of_uv.log

    with pytest.raises(ConfigError, match=r"there is no uv on PATH or in deps/bin"):
        of_uv(dependencies=["foo"], engine="uv", reinstall=True)
    (of_uv.root.deps / "bin").mkdir()
    os.symlink(Path(sys.executable).parent / "uv", of_uv.root.deps / "bin/uv")
    of_uv(dependencies=["foo"], engine="uv", reinstall=True)
    assert "uv pip compile" in of_uv.log


def test_everything_of_uv_is_written_inside_the_root(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    before = set(Path(of_uv.environ["HOME"]).rglob("*"))
    of_uv(dependencies=["foo"], engine="uv")

    assert set(Path(of_uv.environ["HOME"]).rglob("*")) == before
    assert list(of_uv.root.tmp.iterdir()) == []


def test_what_does_not_fit_together_is_told_and_not_tried_again(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0", requires=["bar<2"])
    index.add("bar", "1.0")

    with pytest.raises(PackhorseError, match="uv could not resolve the requirements") as raised:
        of_uv(dependencies=["foo", "bar>=2"], engine="uv")
    assert "bar" in raised.value.what
    assert of_uv.waits == []


def test_an_index_that_fails_is_asked_again(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    index.fail("foo/", Status(503), Status(503))

    of_uv(dependencies=["foo"], engine="uv", verify=["foo"])

    assert [int(wait) for wait in of_uv.waits] == [1, 2]


def test_credentials_of_an_index_work_and_are_never_told(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    index.credentials = "me:hunter2"
    of_uv.environ["UV_DEFAULT_INDEX"] = index.url.replace("://", "://me:hunter2@")

    of_uv(dependencies=["foo"], engine="uv", verify=["foo"])

    assert "hunter2" not in of_uv.log + "".join(of_uv.notes)
    assert not any(b"hunter2" in content for content in _tree(of_uv).values())
