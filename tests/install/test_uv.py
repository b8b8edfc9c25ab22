from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, Status, serve, wheel

from packhorse.errors import IntegrityError, PackhorseError


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

    assert by_uv == by_pip
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


@pytest.mark.parametrize("engine", ["auto", "pip"])
def test_the_best_version_of_all_indexes_is_taken(
    index: Index, of_uv: Installer, tmp_path: Path, engine: str
) -> None:
    """As pip does: of what both have the newest, whichever has it."""
    (tmp_path / "other").mkdir()
    for name, version in (("foo", "2.0"), ("bar", "1.0")):
        index.add(name, version)
    del of_uv.environ["PIP_INDEX_URL"], of_uv.environ["UV_DEFAULT_INDEX"]
    (tmp_path / "requirements.txt").write_text(f"foo\nbar\nbaz\n--index-url {index.url}\n")
    with serve(tmp_path / "other") as other:
        for name, version in (("foo", "1.0"), ("bar", "2.0"), ("baz", "1.0")):
            other.add(name, version)
        with (tmp_path / "requirements.txt").open("a") as file:
            file.write(f"--extra-index-url {other.url}\n")
        of_uv(requirements=[str(tmp_path / "requirements.txt")], engine=engine)

    assert ("engine: uv" in of_uv.log) is (engine == "auto")
    assert {path.name for path in of_uv.root.packages.glob("*.dist-info")} == {
        "foo-2.0.dist-info",
        "bar-2.0.dist-info",
        "baz-1.0.dist-info",
    }


def test_auto_takes_pip_where_there_is_no_uv(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0")
    (tmp_path / "bin").mkdir()
    of_uv.environ |= {"PATH": str(tmp_path / "bin")}
    of_uv(dependencies=["foo"])

    assert "uv pip compile" not in of_uv.log
    assert "engine: pip, since there is no uv on PATH or in deps/bin of the root" in of_uv.log


def test_auto_tells_what_only_pip_reads(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0")
    of_uv(dependencies=["foo"])
    assert "engine: pip, since pip's configuration has index-url, which uv does not read" in of_uv.log

    del of_uv.environ["PIP_INDEX_URL"]
    (tmp_path / "r.txt").write_text(f"--index-url {index.url}\n--find-links {index.directory}\nfoo\n")
    of_uv(requirements=[str(tmp_path / "r.txt")], reinstall=True)
    assert f"engine: pip, since the requirements say --find-links {index.directory}" in of_uv.log


def test_auto_asks_pip_where_an_old_uv_is_all_there_is(
    index: Index, of_uv: Installer, tmp_path: Path
) -> None:
    index.add("foo", "1.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").write_text("#!/bin/sh\necho uv 0.4.30\n")
    (tmp_path / "bin/uv").chmod(0o755)
    of_uv.environ["PATH"] = f"{tmp_path / 'bin'}:{of_uv.environ['PATH']}"
    of_uv(dependencies=["foo"])

    assert "uv is uv 0.4.30, and 0.7 is needed" in of_uv.log


def test_auto_asks_pip_where_uv_finds_no_answer(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    """uv reaches another index than pip does."""
    index.add("foo", "1.0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pip.conf").write_text(f"[install]\nindex-url = {index.url}\n")
    del of_uv.environ["PIP_INDEX_URL"]
    of_uv.environ["UV_DEFAULT_INDEX"] = f"http://{index.host}/other/"
    index.add("bar", "1.0")
    index.fail("bar/", Status(404))  # the first who asks is uv
    (tmp_path / "r.txt").write_text(f"--index-url {index.url}\nfoo\nbar\n")

    done = of_uv(requirements=[str(tmp_path / "r.txt")], verify=["foo", "bar"])

    assert done.distributions == 2
    assert "uv did not find an answer, so pip is asked" in of_uv.notes
    assert of_uv.waits == []


@pytest.fixture
def uv_wheel(index: Index) -> Path:
    """The index has the uv that the tests use."""
    program = (Path(sys.executable).parent / "uv").read_bytes()
    return index.add("uv", "9.0", {"uv-9.0.data/scripts/uv": program})


def test_the_python_is_the_workers_whatever_a_project_tells_uv(
    index: Index, of_uv: Installer, tmp_path: Path
) -> None:
    index.add("foo", "1.0")
    (tmp_path / "packhorse.toml").touch()
    (tmp_path / "pyproject.toml").write_text('[tool.uv.pip]\npython-version = "3.8"\n')
    needed = "foo ; python_version >= '3.9'"
    result = of_uv(dependencies=[needed], engine="uv", file=tmp_path / "packhorse.toml")
    assert result.distributions == 1


def test_uv_is_fetched_into_the_root_where_it_is_wanted_and_not_there(
    index: Index, of_uv: Installer, uv_wheel: Path, tmp_path: Path
) -> None:
    index.add("foo", "1.0")
    index.fail(uv_wheel.name, Status(503))
    (tmp_path / "bin").mkdir()
    of_uv.environ |= {"PATH": str(tmp_path / "bin")}

    of_uv(dependencies=["foo"], engine="uv", verify=["foo"])
    assert (of_uv.root.deps / "bin/uv").stat().st_mode & 0o777 == 0o755
    assert "uv pip compile" in of_uv.log
    assert [int(wait) for wait in of_uv.waits] == [1]
    index.requests.clear()

    of_uv(dependencies=["foo"], engine="uv", reinstall=True)
    assert uv_wheel.name not in index.requests  # it is there


def test_a_uv_that_is_not_the_one_announced_is_not_used(
    index: Index, of_uv: Installer, uv_wheel: Path, tmp_path: Path
) -> None:
    index.hashes[uv_wheel.name] = "0" * 64
    (tmp_path / "bin").mkdir()
    of_uv.environ |= {"PATH": str(tmp_path / "bin")}

    with pytest.raises(IntegrityError, match="is not the file that was announced"):
        of_uv(dependencies=["foo"], engine="uv")
    assert not (of_uv.root.deps / "bin/uv").exists()


def test_an_index_without_uv_is_told(index: Index, of_uv: Installer, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    of_uv.environ |= {"PATH": str(tmp_path / "bin")}

    with pytest.raises(PackhorseError, match=r'environment\.engine is "uv", which is not there') as raised:
        of_uv(dependencies=["foo"], engine="uv")
    assert "pip install uv" in raised.value.remedy


def test_everything_of_uv_is_written_inside_the_root(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    before = set(Path(of_uv.environ["HOME"]).rglob("*"))
    of_uv(dependencies=["foo"], engine="uv")

    assert set(Path(of_uv.environ["HOME"]).rglob("*")) == before
    assert list(of_uv.root.tmp.iterdir()) == []


def test_what_uv_unpacks_to_read_its_metadata_is_not_kept(of_uv: Installer, tmp_path: Path) -> None:
    wheel(tmp_path, "local", "1.0")
    (tmp_path / "requirements.txt").write_text(f"--no-index\n--find-links {tmp_path}\nlocal\n")
    of_uv(
        requirements=[str(tmp_path / "requirements.txt")], engine="uv", keep_downloads=True, verify=["local"]
    )

    assert list(of_uv.root.path.rglob("local.py")) == [of_uv.root.packages / "local.py"]


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


def test_credentials_of_an_index_with_a_name_work(index: Index, of_uv: Installer) -> None:
    index.add("foo", "1.0")
    index.credentials = "me:SEC/RET"
    del of_uv.environ["UV_DEFAULT_INDEX"], of_uv.environ["PIP_INDEX_URL"]
    of_uv.environ["UV_DEFAULT_INDEX"] = f"our-own={index.url}"
    of_uv.environ |= {"UV_INDEX_OUR_OWN_USERNAME": "me", "UV_INDEX_OUR_OWN_PASSWORD": "SEC/RET"}
    of_uv(dependencies=["foo"], engine="uv")
    assert not any("pip fetches it" in note for note in of_uv.notes)
    assert "SEC/RET" not in of_uv.log
