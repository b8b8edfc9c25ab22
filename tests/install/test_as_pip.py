"""What others made: wheels, repositories, requirements and lock files that pip takes are taken, and what it refuses is not."""

from __future__ import annotations

import base64
import hashlib
import http.server
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, source, wheel

from packhorse.errors import ConfigError, PackhorseError
from packhorse.install.requirements import included, lines


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lock(directory: Path, wheels: Sequence[Path]) -> str:
    text = 'lock-version = "1.0"\ncreated-by = "another tool"\n'
    for each in wheels:
        name, version, *_ = each.name.split("-")
        text += (
            f'[[packages]]\nname = "{name}"\nversion = "{version}"\n'
            f'[[packages.wheels]]\nname = "{each.name}"\npath = "{each.relative_to(directory)}"\n'
            f'hashes = {{sha256 = "{_sha256(each)}"}}\n'
        )
    lock = directory / "pylock.toml"
    lock.write_text(text)
    return str(lock)


def _text(installer: Installer, path: str) -> str:
    return (installer.root.packages / path).read_text()


# --- wheels ---


def test_of_a_file_that_many_wheels_bring_at_once_the_last_by_name_stays(
    installer: Installer, tmp_path: Path
) -> None:
    names = [f"p{number:02}" for number in range(12)]
    wheels = [
        wheel(
            tmp_path,
            name,
            "1.0",
            {"ns/__init__.py": f"by = {name!r}\n", f"bin/{name}": "", f"ns/{name}.py": ""},
        )
        for name in names
    ]
    lock = _lock(tmp_path, wheels[::-1])  # the last by name is unpacked first
    for _ in range(5):
        installer(lock=lock, reinstall=True)
        assert _text(installer, "ns/__init__.py") == "by = 'p11'\n"


def test_what_another_distribution_overwrote_is_installed_anew(index: Index, installer: Installer) -> None:
    index.add("one", "1.0", {"shared/__init__.py": "by = 'one'\n"})
    index.add("two", "1.0", {"shared/__init__.py": "by = 'two'\n"})
    installer(dependencies=["one", "two"])
    installer(dependencies=["one"])
    assert _text(installer, "shared/__init__.py") == "by = 'one'\n"


def test_what_a_distribution_brings_of_others_is_not_taken_for_its_own_record(
    index: Index, installer: Installer
) -> None:
    """As setuptools did, in pkg_resources: its RECORD names those of others first."""
    brought = {"a_part/other-1.0.dist-info/RECORD": "other.py,,\n"}
    index.add("one", "1.0", {**brought, "shared/__init__.py": "by = 'one'\n"})
    index.add("two", "1.0", {"shared/__init__.py": "by = 'two'\n"})
    installer(dependencies=["one", "two"])
    installer(dependencies=["one"])
    assert _text(installer, "shared/__init__.py") == "by = 'one'\n"


@pytest.mark.parametrize(
    ("name", "inside"),
    [("foo-1.0+cu12torch2.6-py3-none-any.whl", "foo"), ("foo_bar-1.0-py3-none-any.whl", "Foo.Bar")],
)
def test_the_data_of_a_wheel_with_another_name_goes_where_it_belongs(
    installer: Installer, tmp_path: Path, name: str, inside: str
) -> None:
    made = wheel(
        tmp_path,
        inside,
        "1.0",
        {
            f"{inside}-1.0.data/scripts/tool": "#!python\n",
            f"{inside}-1.0.data/purelib/extra.py": "there = True\n",
            "a.data": "",
        },
    )
    renamed = made.rename(tmp_path / name)
    installer(wheels=[{"name": name.partition("-")[0].replace("_", "-"), "path": str(renamed)}])
    assert _text(installer, "extra.py") == "there = True\n"
    assert (installer.root.packages / "bin/tool").exists()


def test_a_wheel_whose_data_is_a_file_is_refused(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo-1.0.data": ""})
    with pytest.raises(PackhorseError, match=r"not a whole wheel: foo-1\.0\.data is a file"):
        installer(dependencies=["foo"])


def test_a_wheel_with_data_of_no_known_kind_is_refused(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo.py": "", "foo-1.0.data/etc/foo.conf": ""})
    with pytest.raises(PackhorseError, match=r"is not a whole wheel: foo-1\.0\.data/etc/foo\.conf is not"):
        installer(dependencies=["foo"])


@pytest.mark.parametrize("first", ["bar", "foo"])
def test_a_file_where_another_wheel_has_a_directory_is_told(
    first: str, index: Index, installer: Installer
) -> None:
    index.add("foo", "1.0", {"both": ""})
    index.add("bar", "1.0", {"both/deep/bar.py": ""})
    installer(dependencies=[first])
    with pytest.raises(PackhorseError, match=r"cannot be installed beside the others: both is a directory"):
        installer(dependencies=["foo", "bar"])


def test_a_wheel_without_dates_is_installed(index: Index, installer: Installer) -> None:
    whole = index.add("foo", "1.0")
    with zipfile.ZipFile(whole) as archive:
        files = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.date_time = (1980, 0, 0, 0, 0, 0)
            archive.writestr(entry, content)
    installer(dependencies=["foo"])
    assert (installer.root.packages / "foo.py").exists()


def test_a_script_that_is_named_twice_is_left_to_pip(index: Index, installer: Installer) -> None:
    script = "[console_scripts]\nfoo = foo:main\nfoo = foo:main\n"
    index.add("foo", "1.0", {"foo-1.0.dist-info/entry_points.txt": script})
    installer(dependencies=["foo"])
    assert (installer.root.packages / "bin/foo").exists()


def test_a_script_that_names_no_function_is_told(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo-1.0.dist-info/entry_points.txt": "[console_scripts]\nfoo = foo\n"})
    with pytest.raises(PackhorseError, match="an entry point names no function"):
        installer(dependencies=["foo"])


def test_a_damaged_wheel_is_refused(installer: Installer, tmp_path: Path) -> None:
    made = wheel(tmp_path, "foo", "1.0", {"foo.py": "x = 1\n" * 1000})
    with zipfile.ZipFile(made) as archive:
        files = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        offset = archive.getinfo("foo.py").header_offset + 30 + len("foo.py")
    content = bytearray(made.read_bytes())
    content[offset : offset + 10] = b"\xff" * 10
    made.write_bytes(content)
    with pytest.raises(PackhorseError, match="not a whole wheel"):
        installer(wheels=[{"name": "foo", "path": str(made)}])


def test_a_wheel_whose_record_has_a_quote_that_does_not_end_is_refused(
    installer: Installer, tmp_path: Path
) -> None:
    made = wheel(tmp_path, "foo", "1.0")
    with zipfile.ZipFile(made) as archive:
        files = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if not name.endswith("/RECORD") else b'"' + b"foo.py,,\n" * 20_000)
    with pytest.raises(PackhorseError, match=r"not a whole wheel: .*field"):
        installer(wheels=[{"name": "foo", "path": str(made)}])


def test_a_wheel_that_wants_a_password_is_refused(installer: Installer, tmp_path: Path) -> None:
    made = wheel(tmp_path, "foo", "1.0")
    content = bytearray(made.read_bytes())
    content[content.rfind(b"foo.py") - 46 + 8] |= 1  # the flags, of 46 bytes before the name in the directory
    made.write_bytes(content)
    with pytest.raises(PackhorseError, match=r"not a whole wheel: .*encrypted"):
        installer(wheels=[{"name": "foo", "path": str(made)}])


def test_the_record_has_the_digest_of_a_script_from_the_data(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo-1.0.data/data/bin/tool": "#!/usr/bin/python3\nprint(1)\n"})
    installer(dependencies=["foo"])
    content = (installer.root.packages / "bin/tool").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert digest in _text(installer, "foo-1.0.dist-info/RECORD")


# --- sources ---


def _git(directory: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=directory,
        check=True,
        capture_output=True,
    )


def _committed(repository: Path) -> None:
    _git(repository, "init", "-q")
    _git(repository, "add", ".")
    _git(repository, "commit", "-qm", "all")


def _project(directory: Path, name: str) -> None:
    """A project like that of `source`, with another name."""
    directory.parent.mkdir(exist_ok=True)
    source(directory)
    for file in directory.iterdir():
        file.write_text(file.read_text().replace("foo", name).replace("source.py", f"{name}.py"))
    (directory / "source.py").rename(directory / f"{name}.py")


def test_one_repository_may_hold_several_distributions(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    for name in ("aaa", "bbb"):
        _project(tmp_path / "repository" / name, name)
    _committed(tmp_path / "repository")
    index.add("foo", "1.0")
    both = [f"{name} @ git+file://{tmp_path}/repository#subdirectory={name}" for name in ("aaa", "bbb")]
    installer(dependencies=both)
    installer(dependencies=[*both, "foo"])
    assert {"aaa.py", "bbb.py", "foo.py"} <= {path.name for path in installer.root.packages.iterdir()}


def test_the_subdirectory_of_an_archive_tells_what_is_installed(installer: Installer, tmp_path: Path) -> None:
    for place in ("one", "two"):
        _project(tmp_path / "all" / place, "foo")
        (tmp_path / "all" / place / "foo.py").write_text(f"place = {place!r}\n")
    archive = Path(shutil.make_archive(str(tmp_path / "all"), "gztar", tmp_path, "all"))
    for place in ("one", "two"):
        installer(dependencies=[f"foo @ {archive.as_uri()}#subdirectory={place}"])
        assert _text(installer, "foo.py") == f"place = {place!r}\n"


@pytest.mark.parametrize("engine", ["pip", "uv"])
def test_the_account_of_a_repository_over_ssh_is_kept(
    index: Index, installer: Installer, tmp_path: Path, engine: str
) -> None:
    _project(tmp_path / "repository", "aaa")
    _committed(tmp_path / "repository")
    ssh = tmp_path / "commands" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        '#!/bin/sh\ncase "$*" in *git@*) ;; *) exit 255;; esac\nshift $(($# - 1))\nexec sh -c "$1"\n'
    )
    ssh.chmod(0o755)
    installer.environ |= {
        "PATH": f"{ssh.parent}:{installer.environ['PATH']}",
        "UV_DEFAULT_INDEX": index.url,
    }
    index.add("foo", "1.0")
    repository = f"aaa @ git+ssh://git@example.org{tmp_path}/repository"
    installer(dependencies=[repository], engine=engine)
    assert (installer.root.packages / "aaa.py").exists()
    installer(dependencies=[repository, "foo"], engine=engine)
    assert any("1 of 2 distributions are unchanged" in note for note in installer.notes)


def test_a_token_in_the_address_of_a_source_is_not_kept(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    source(tmp_path / "foo-1.0")
    shutil.make_archive(str(index.directory / "foo-1.0"), "gztar", tmp_path, "foo-1.0")
    installer(dependencies=[f"foo @ http://{index.host}/files/foo-1.0.tar.gz?token=SECRET"], engine="pip")
    info = installer.root.packages / "foo-1.0.dist-info"
    told = (info / "direct_url.json").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(told).digest()).rstrip(b"=").decode()
    assert b"SECRET" not in told
    assert f"{info.name}/direct_url.json,sha256={digest},{len(told)}\n" in (info / "RECORD").read_text()


# --- requirements ---


def test_a_comment_does_not_go_on_in_the_next_line(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    first, second = index.add("foo", "1.0"), index.add("bar", "1.0")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        f"bar==1.0 --hash=sha256:{_sha256(second)}\n# baz==2.0 \\\nfoo==1.0 --hash=sha256:{_sha256(first)}\n"
    )
    installer(requirements=[str(requirements)])
    assert (installer.root.packages / "foo.py").exists()
    requirements.write_text("# baz==2.0 \\\nbar==1.0\n")
    assert installer(requirements=[str(requirements)]).installed
    assert not (installer.root.packages / "foo.py").exists()


def test_a_file_of_utf_16_is_read_as_pip_does(index: Index, installer: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0")
    index.add("foo", "2.0")
    (tmp_path / "constraints.txt").write_text("foo<2")
    (tmp_path / "requirements.txt").write_bytes("foo\r\n-c constraints.txt\r\n".encode("utf-16"))
    installer(requirements=[str(tmp_path / "requirements.txt")])
    (tmp_path / "constraints.txt").write_text("foo<3")
    assert installer(requirements=[str(tmp_path / "requirements.txt")]).installed


def test_a_variable_may_say_where_another_file_lies(
    index: Index, installer: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add("foo", "1.0")
    (tmp_path / "more.txt").write_text("foo")
    (tmp_path / "requirements.txt").write_text("-r ${MORE}/more.txt\n")
    monkeypatch.setenv("MORE", str(tmp_path))
    installer.environ["MORE"] = str(tmp_path)
    installer(requirements=[str(tmp_path / "requirements.txt")])
    assert (installer.root.packages / "foo.py").exists()


@pytest.mark.parametrize(
    ("first", "more", "found"),
    [
        ("a/b/first.txt", "/c/more.txt", "c/more.txt"),
        ("a/b/first.txt?at=x/y", "more.txt", "a/b/more.txt"),
        ("a/b/", "../more.txt", "a/more.txt"),
        ("a/b/first.txt", "http://example.org/more.txt?at=x/y", ""),
    ],
)
def test_what_a_file_from_a_server_includes_lies_on_the_server(
    tmp_path: Path, first: str, more: str, found: str
) -> None:
    (tmp_path / "requirements.txt").write_text(f"-r http://me@example.org/{first}")
    [line] = lines([str(tmp_path / "requirements.txt")])
    [beside] = included(line, f"-r {more}".encode())
    assert beside.text == (f"http://me@example.org/{found}" if found else more)


def test_a_file_from_a_server_may_need_credentials(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    index.add("foo", "1.0")
    (index.directory / "first.txt").write_text("-r more.txt\n")
    (index.directory / "more.txt").write_text("foo\n")
    index.credentials = "me:SECRET"
    installer.environ["PIP_INDEX_URL"] = f"http://me:SECRET@{index.host}/simple/"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"-r http://me:SECRET@{index.host}/files/first.txt\n")
    installer(requirements=[str(requirements)])
    assert (installer.root.packages / "foo.py").exists()
    assert "SECRET" not in installer.log


def test_another_value_of_a_variable_asks_for_something_else(
    index: Index, installer: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.0", "2.0"):
        index.add("foo", version)
        index.add("bar", version)
    (tmp_path / "requirements.txt").write_text("foo==${VERSION}\n")
    for version in ("1.0", "2.0"):
        monkeypatch.setenv("VERSION", version)
        installer.environ["VERSION"] = version
        assert installer(
            requirements=[str(tmp_path / "requirements.txt")], dependencies=["bar==${VERSION}"]
        ).installed
        assert {path.name for path in installer.root.packages.glob("*.dist-info")} == {
            f"foo-{version}.dist-info",
            f"bar-{version}.dist-info",
        }
        assert (installer.root.packages / f"foo-{version}.dist-info" / "REQUESTED").exists()


# --- servers ---


class _Projects(http.server.BaseHTTPRequestHandler):
    """Two projects, each with a wheel and a token of its own."""

    wheels: dict[str, Path]

    def do_GET(self) -> None:
        project = self.path.split("/")[1]
        file = self.wheels[project]
        token = base64.b64encode(f"token{project}:password{project}".encode()).decode()
        code, content = 200, b""
        if self.headers.get("Authorization") != f"Basic {token}":
            code = 403 if self.headers.get("Authorization") else 401
        elif self.path.endswith(".whl"):
            content = file.read_bytes()
        elif self.path.rstrip("/").endswith(f"/{file.name.split('-')[0]}"):
            content = f'<a href="/{project}/{file.name}#sha256={_sha256(file)}">{file.name}</a>'.encode()
        else:
            code = 404
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        if code == 401:
            self.send_header("WWW-Authenticate", "Basic")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def projects(tmp_path: Path) -> Iterator[str]:
    """The host of two projects."""
    wheels = {"1": wheel(tmp_path, "aaa", "1.0"), "2": wheel(tmp_path, "bbb", "1.0")}
    handler = type("_Both", (_Projects,), {"wheels": wheels})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_two_projects_of_one_host_have_their_own_credentials(installer: Installer, projects: str) -> None:
    installer.environ["PIP_INDEX_URL"] = f"http://token1:password1@{projects}/1/simple/"
    installer.environ["PIP_EXTRA_INDEX_URL"] = f"http://token2:password2@{projects}/2/simple/"
    installer(dependencies=["aaa", "bbb"], engine="pip")
    assert {"aaa.py", "bbb.py"} <= {path.name for path in installer.root.packages.iterdir()}
    assert "password" not in installer.log


def test_a_link_that_is_no_address_is_passed_over(index: Index, installer: Installer, tmp_path: Path) -> None:
    made = wheel(index.directory, "foo", "1.0")
    page = tmp_path / "page.html"
    page.write_text(
        f'<base href="http://[x"><a href="http://[x">broken</a> <a href="http://{index.host}/files/{made.name}">foo</a>'
    )
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *words: http.server.SimpleHTTPRequestHandler(*words, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        links = f"http://127.0.0.1:{server.server_port}/{page.name}"
        installer(wheels=[{"name": "foo", "find-links": [links]}])
        server.shutdown()
    assert (installer.root.packages / "foo.py").exists()


# --- lock files ---


def test_credentials_in_a_lock_file_are_used_and_not_kept(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    made = index.add("foo", "1.0")
    index.credentials = "user:secret"
    lock = tmp_path / "pylock.toml"
    lock.write_text(
        'lock-version = "1.0"\ncreated-by = "another tool"\n[[packages]]\nname = "foo"\nversion = "1.0"\n'
        f'[[packages.wheels]]\nname = "{made.name}"\nurl = "http://user:secret@{index.host}/files/{made.name}"\n'
        f'hashes = {{sha256 = "{_sha256(made)}"}}\n'
    )
    installer(lock=str(lock))
    assert not any("pip fetches it" in note for note in installer.notes)
    assert "secret" not in installer.log
    for file in (installer.root.packages / "foo-1.0.dist-info").iterdir():
        assert "secret" not in file.read_text()


def test_an_archive_that_is_a_wheel_for_another_platform_is_refused(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    made = index.add("foo", "1.0", tag="cp39-cp39-win_amd64")
    lock = tmp_path / "pylock.toml"
    lock.write_text(
        'lock-version = "1.0"\ncreated-by = "another tool"\n[[packages]]\nname = "foo"\nversion = "1.0"\n'
        f'[packages.archive]\nurl = "http://{index.host}/files/{made.name}"\nhashes = {{sha256 = "{_sha256(made)}"}}\n'
    )
    with pytest.raises(ConfigError, match="does not fit the worker's Python"):
        installer(lock=str(lock))
