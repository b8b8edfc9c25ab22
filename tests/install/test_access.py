"""Indexes that want credentials: by URL, by ~/.netrc and by a keyring, with either engine; never told to anybody."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, Status

from packhorse.errors import PackhorseError
from packhorse.install.access import Access, access

FOO = "foo-1.0-py3-none-any.whl"
SECRET = "hunter2"

_KEYRING = f"""#!/bin/sh
# As the program of the package keyring: pip and packhorse want JSON, uv the password of a user.
case "$*" in
*--output=json*) echo '{{"username": "me", "password": "{SECRET}"}}' ;;
*) echo {SECRET} ;;
esac
"""


def _by_url(index: Index, installer: Installer, directory: Path) -> None:
    url = index.url.replace("://", f"://me:{SECRET}@")
    installer.environ |= {"PIP_INDEX_URL": url, "UV_DEFAULT_INDEX": url}


def _by_netrc(index: Index, installer: Installer, directory: Path) -> None:
    path = directory / "netrc"
    path.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    path.chmod(0o600)
    installer.environ |= {"NETRC": str(path), "UV_DEFAULT_INDEX": index.url}


def _by_keyring(index: Index, installer: Installer, directory: Path) -> None:
    program = directory / "bin" / "keyring"
    program.parent.mkdir()
    program.write_text(_KEYRING)
    program.chmod(0o755)
    url = index.url.replace("://", "://me@")
    installer.environ |= {
        "PATH": f"{program.parent}:{installer.environ['PATH']}",
        "PIP_INDEX_URL": url,
        "UV_DEFAULT_INDEX": url,
        "PIP_KEYRING_PROVIDER": "subprocess",
        "UV_KEYRING_PROVIDER": "subprocess",
    }


@pytest.mark.parametrize("engine", ["pip", "uv"])
@pytest.mark.parametrize("way", [_by_url, _by_netrc, _by_keyring])
def test_credentials_work_and_reach_neither_log_nor_messages_nor_files(
    index: Index, installer: Installer, tmp_path: Path, engine: str, way: object
) -> None:
    index.add("foo", "1.0")
    index.credentials = f"me:{SECRET}"
    assert callable(way)
    way(index, installer, tmp_path)
    index.fail(FOO, Status(503))

    installer(dependencies=["foo"], engine=engine, verify=["foo"])
    with pytest.raises(PackhorseError) as raised:
        installer(dependencies=["foo", "not-to-be-found"], engine=engine)

    assert any(note.startswith(f"{FOO}: the server answered 503; attempt 2") for note in installer.notes)
    assert SECRET not in installer.log + str(raised.value) + "".join(installer.notes)
    files = (path for path in installer.root.path.rglob("*") if path.is_file())
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_a_keyring_that_pip_imports_is_asked(index: Index, installer: Installer, tmp_path: Path) -> None:
    """The package `keyring` in the environment that pip runs in; the wheel is not handed to pip."""
    venv.create(tmp_path / "worker", symlinks=True, with_pip=True)
    [packages] = (tmp_path / "worker" / "lib").glob("python*/site-packages")
    (packages / "keyring.py").write_text(
        f"import collections\nknown = {{{index.url!r}: collections.namedtuple('_', 'username password')"
        f"('me', {SECRET!r})}}\n"
        "def get_credential(service, username):\n    return known.get(service)\n"
    )
    index.add("foo", "1.0")
    index.credentials = f"me:{SECRET}"
    installer.environ["PIP_KEYRING_PROVIDER"] = "import"

    installer(dependencies=["foo"], python=str(tmp_path / "worker/bin/python"), engine="pip", verify=["foo"])

    assert not any("pip fetches it" in note for note in installer.notes)
    assert SECRET not in installer.log + "".join(installer.notes)


def test_credentials_of_a_page_of_links_bring_its_wheels_and_are_never_told(
    index: Index, installer: Installer
) -> None:
    index.add("foo", "1.0")
    index.credentials = f"me:{SECRET}"
    index.fail("foo/", Status(503))
    page = f"{index.url.replace('://', f'://me:{SECRET}@')}foo/"

    installer(wheels=[{"name": "foo", "find-links": [page]}], verify=["foo"])

    assert any(note.startswith("foo/: the server answered 503; attempt 2") for note in installer.notes)
    files = (path for path in installer.root.path.rglob("*") if path.is_file())
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert SECRET not in "".join(installer.notes)


def test_a_wrong_password_is_not_tried_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    index.credentials = "me:other"
    installer.environ["PIP_INDEX_URL"] = index.url.replace("://", f"://me:{SECRET}@")

    with pytest.raises(PackhorseError) as raised:
        installer(dependencies=["foo"])
    assert installer.waits == []
    assert SECRET not in installer.log + str(raised.value)


def _known(environ: dict[str, str], *lines: str) -> Access:
    return access({}, lines, environ)


def test_credentials_go_to_their_host_alone(tmp_path: Path) -> None:
    found = _known({"HOME": str(tmp_path)}, f"--index-url https://me:{SECRET}@one.example/simple/")

    assert found.authorization("https://one.example/files/x.whl")
    assert not found.authorization("https://two.example/files/x.whl")
    assert not found.authorization("https://one.example:8443/files/x.whl")


def test_each_project_of_a_host_has_its_own_credentials(tmp_path: Path) -> None:
    found = _known(
        {"HOME": str(tmp_path)},
        "one @ git+https://me:first@host.example/group/one.git@v1",
        "two @ git+https://me:second@host.example/group/two.git@v1",
    )

    assert (
        found.with_user("https://host.example/group/one.git") == "https://me:first@host.example/group/one.git"
    )
    assert (
        found.with_user("https://host.example/group/two.git")
        == "https://me:second@host.example/group/two.git"
    )
    assert found.with_user("https://host.example/another") == "https://me:first@host.example/another"


def test_a_keyring_is_not_asked_for_each_file_of_a_lock(tmp_path: Path) -> None:
    program = tmp_path / "keyring"
    program.write_text('#!/bin/sh\necho "$@" >> "$HOME/asked"\nexit 1\n')
    program.chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "UV_KEYRING_PROVIDER": "subprocess",
    }
    files = [f"https://one.example/{number}.whl" for number in range(3)]
    lock = "".join(f"url = {url!r}\n" for url in files)

    assert not access({}, (), environ, lock=lock).ask_keyring(files[0])
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


def test_a_keyring_is_asked_only_where_pip_or_uv_are_told_to(tmp_path: Path) -> None:
    program = tmp_path / "keyring"
    program.write_text(_KEYRING)
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    url = "https://one.example/files/x.whl"

    assert not _known(environ).ask_keyring(url)
    told = _known({**environ, "UV_KEYRING_PROVIDER": "subprocess"})
    assert told.ask_keyring(url) and told.authorization(url)
    assert not told.ask_keyring(url)  # once for each host


def test_a_keyring_without_an_answer_is_none(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "UV_KEYRING_PROVIDER": "subprocess", "PATH": str(tmp_path)}
    assert not _known(environ).ask_keyring("https://one.example/x.whl")
    program = tmp_path / "keyring"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    assert not _known(environ).ask_keyring("https://one.example/x.whl")
