from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, Status, wheel

from packhorse.errors import ConfigError, IntegrityError, PackhorseError

FOO = "foo-1.0-py3-none-any.whl"
WRONG = "0" * 64


def _digest(path: Path, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


class Hashed:
    """Installs a requirements file with one engine."""

    def __init__(self, installer: Installer, engine: str, directory: Path) -> None:
        self.installer, self.engine, self._directory = installer, engine, directory

    def __call__(self, *lines: str, **environment: object) -> int:
        """The number of distributions that came of the lines."""
        path = self._directory / "hashed.txt"
        path.write_text("\n".join(lines))
        done = self.installer(
            requirements=[str(path)],
            engine=self.engine,
            reinstall=True,
            **environment,  # type: ignore[arg-type]
        )
        return done.distributions


@pytest.fixture(params=["pip", "uv"])
def hashed(request: pytest.FixtureRequest, installer: Installer, index: Index, tmp_path: Path) -> Hashed:
    installer.environ["UV_DEFAULT_INDEX"] = index.url
    return Hashed(installer, request.param, tmp_path)


def test_files_with_the_hashes_of_the_requirements_come_wheel_by_wheel(index: Index, hashed: Hashed) -> None:
    foo, bar = index.add("foo", "1.0", requires=["bar"]), index.add("bar", "1.0")
    index.fail(FOO, Status(503))

    count = hashed(
        f"foo==1.0 --hash=sha256:{WRONG} \\",
        f"    --hash=sha256:{_digest(foo)}",
        f"bar==1.0 --hash sha512:{_digest(bar, 'sha512')}",
        verify=["foo", "bar"],
    )

    assert count == 2
    assert index.requests.count(FOO) == 2  # no download to resolve, and one that failed
    assert any(
        note.startswith(f"{FOO}: the server answered 503; attempt 2") for note in hashed.installer.notes
    )


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_another_file_than_the_requirements_allow_is_refused(
    index: Index, hashed: Hashed, algorithm: str
) -> None:
    """By the hash that the index tells, or by the file where the index tells another kind."""
    index.add("foo", "1.0")

    with pytest.raises(IntegrityError):
        hashed(f"foo==1.0 --hash={algorithm}:{WRONG}")
    assert index.requests.count(FOO) <= 1
    assert list(hashed.installer.root.packages.iterdir()) == []


def test_what_the_server_changed_after_it_was_announced_is_refused(index: Index, hashed: Hashed) -> None:
    digest = _digest(index.add("foo", "1.0"))
    index.hashes[FOO] = digest
    index.add("foo", "1.0", {"foo.py": "changed = True"})

    with pytest.raises(IntegrityError, match="is not the file that was announced"):
        hashed(f"foo==1.0 --hash=sha256:{digest}")
    assert index.requests.count(FOO) == 1


def test_of_several_files_the_one_that_is_allowed_is_taken(index: Index, hashed: Hashed) -> None:
    """Not the one that fits the worker best."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    index.add("foo", "1.0", {"foo.py": "best = True"}, tag=f"{python}-none-any")
    allowed = index.add("foo", "1.0", {"foo.py": "allowed = True"})

    hashed(f"foo==1.0 --hash=sha256:{_digest(allowed)}", verify=["foo"])

    assert (hashed.installer.root.packages / "foo.py").read_text() == "allowed = True"


def test_once_one_has_a_hash_all_need_one(index: Index, hashed: Hashed) -> None:
    foo = index.add("foo", "1.0", requires=["bar"])
    index.add("bar", "1.0")
    index.add("baz", "1.0")

    with pytest.raises(ConfigError, match=r"these have none: .*bar==1\.0") as raised:
        hashed(f"foo==1.0 --hash=sha256:{_digest(foo)}", "baz")
    assert "baz==1.0" in raised.value.what
    with pytest.raises(ConfigError, match=r"these have none: baz==1\.0"):
        hashed("--require-hashes", "baz==1.0")


def test_a_hash_needs_an_exact_version(index: Index, hashed: Hashed) -> None:
    digest = _digest(index.add("foo", "1.0"))

    with pytest.raises(ConfigError, match="has a hash in the requirements, but no exact version"):
        hashed(f"foo>=1.0 --hash=sha256:{digest}")


@pytest.mark.parametrize("text", ["md5:0123", "sha256:nonsense", "sha256"])
def test_a_hash_that_proves_nothing_is_refused(index: Index, hashed: Hashed, text: str) -> None:
    index.add("foo", "1.0")

    with pytest.raises(ConfigError, match="has a hash that is none"):
        hashed(f"foo==1.0 --hash={text}")


def test_lines_for_another_platform_do_not_count(index: Index, hashed: Hashed) -> None:
    index.add("foo", "0.9")
    digest = _digest(index.add("foo", "1.0"))

    assert (
        hashed(
            f"foo==0.9 ; sys_platform == 'win32' --hash=sha256:{WRONG}",
            f"foo==1.0 ; sys_platform != 'win32' --hash=sha256:{digest}",
            f"gone==1.0 ; python_version < '3' --hash=sha256:{WRONG}",
        )
        == 1
    )


def test_hashes_of_a_constraint_count_too(index: Index, installer: Installer, tmp_path: Path) -> None:
    foo = index.add("foo", "1.0")
    hashed = Hashed(installer, "pip", tmp_path)
    (tmp_path / "c.txt").write_text(f"foo==1.0 --hash=sha256:{_digest(foo)} --hash=sha256:{WRONG}")
    assert hashed("-c c.txt", "foo") == 1

    (tmp_path / "c.txt").write_text(f"foo==1.0 --hash=sha256:{WRONG}")
    with pytest.raises(PackhorseError):
        hashed("-c c.txt", f"foo==1.0 --hash=sha256:{_digest(foo)}")


def test_files_that_are_included_by_url_count_too(index: Index, hashed: Hashed) -> None:
    """With what they include themselves, which lies beside them."""
    foo, bar = index.add("foo", "1.0"), index.add("bar", "1.0")
    index.add("bar", "2.0")
    (index.directory / "more.txt").write_text(f"foo==1.0 --hash=sha256:{_digest(foo)}\n-c deep.txt\nbar")
    deep = index.directory / "deep.txt"
    deep.write_text(f"bar==1.0 --hash=sha256:{_digest(bar)}")
    include = f"-r http://{index.host}/files/more.txt"
    index.fail("more.txt", Status(503))

    assert hashed(include) == 2
    deep.write_text(f"bar==1.0 --hash=sha256:{WRONG}")
    with pytest.raises(IntegrityError):
        hashed(include)


def test_files_of_a_directory_and_of_a_url_are_held_against_them(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    hashed = Hashed(installer, "pip", tmp_path)
    links = tmp_path / "links"
    links.mkdir()
    local, remote = wheel(links, "local", "1.0"), index.add("remote", "1.0")
    url = f"http://{index.host}/files/{remote.name}"

    def lines(one: str, other: str) -> tuple[str, ...]:
        return f"--find-links {links}", f"local==1.0 --hash=sha256:{one}", f"remote @ {url}#sha256={other}"

    assert hashed(*lines(_digest(local), _digest(remote))) == 2
    with pytest.raises(PackhorseError):
        hashed(*lines(WRONG, _digest(remote)))
    with pytest.raises(PackhorseError):
        hashed(*lines(_digest(local), WRONG))


def test_what_was_installed_from_an_allowed_file_is_linked(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    foo = index.add("foo", "1.0")
    path = tmp_path / "r.txt"
    path.write_text(f"foo==1.0 --hash=sha256:{_digest(foo)}")
    installer(requirements=[str(path)])
    path.write_text(f"foo==1.0 --hash=sha256:{_digest(foo)} --hash=sha256:{WRONG}")
    installer(requirements=[str(path)])
    assert index.requests.count(FOO) == 1


# --- build options ---

_BACKEND = """
import os, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    info = "built-1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(directory, "built-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("built.py", f"settings = {config_settings!r}")
        names = ["built.py", info + "METADATA", info + "WHEEL", info + "RECORD"]
        archive.writestr(info + "RECORD", "".join(f"{name},,\\n" for name in names))
    return "built-1.0-py3-none-any.whl"
"""


def test_build_options_of_one_requirement_reach_its_build_alone(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    (source / "backend.py").write_text(_BACKEND)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "built"\nversion = "1.0"\n'
    )
    archive = shutil.make_archive(str(tmp_path / "built-1.0"), "gztar", tmp_path, "source")
    index.add("foo", "1.0")
    index.fail(FOO, Status(503))
    path = tmp_path / "r.txt"
    path.write_text(f'built @ {Path(archive).as_uri()} --config-settings="with=two words"\nfoo\n')

    installer(requirements=[str(path)], verify=["built", "foo"])

    assert "{'with': 'two words'}" in (installer.root.packages / "built.py").read_text()
    assert any(note.startswith(f"{FOO}: the server answered 503") for note in installer.notes)
