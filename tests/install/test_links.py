from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.install.index import Index, Status

from packhorse.config import Network
from packhorse.errors import PackhorseError
from packhorse.install import access
from packhorse.install.downloads import Downloads, RefusedError
from packhorse.install.links import Fetcher, Link
from packhorse.install.network import Attempts, NetworkError

NAME = "foo-1.0+cu12torch2.6-py3-none-any.whl"


class Site:
    """Pages by path, each with the headers of its answer; what was asked for, with its Authorization."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: dict[str, tuple[str, dict[str, str]]] = {}
        self.asked: list[tuple[str, str]] = []


@pytest.fixture
def site() -> Iterator[Site]:
    with _serve() as made:
        yield made


@contextlib.contextmanager
def _serve(certificate: Path | None = None) -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, self.headers.get("Authorization", "")))
            body, headers = made.pages.get(self.path, ("", {}))
            self.send_response(302 if "Location" in headers else 200 if self.path in made.pages else 404)
            for header in headers.items():
                self.send_header(*header)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    made = Site(f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def notes() -> list[str]:
    return []


def _downloads(notes: list[str], environ: dict[str, str], *texts: str) -> Downloads:
    """`texts` are what the configuration says."""
    of_pip = access.pip_settings([sys.executable, "-m", "pip"], environ)
    return Downloads(
        access.access(of_pip, texts, environ), Network(), notes.append, sleep=lambda seconds: None
    )


def _fetcher(
    notes: list[str], environ: dict[str, str] | None = None, *texts: str, **network: float
) -> Fetcher:
    environ = environ or {"HOME": "/nowhere"}
    attempts = Attempts(Network(**network), notes.append, lambda seconds: None)  # type: ignore[arg-type]
    return Fetcher(_downloads(notes, environ, *texts), attempts, environ)


# --- pages and directories ---


def test_links_of_a_page_are_made_absolute_and_keep_their_hash(site: Site, notes: list[str]) -> None:
    site.pages["/wheels/"] = (
        f"<a href='{NAME}#sha256=abc'>one</a> <A HREF=\"../other/{NAME.replace('+', '%2B')}\"> two </A>"
        "<a href='notes.txt'>no</a> <a>none</a> <a href='ftp://host/foo-1.0-py3-none-any.whl'>no</a>",
        {},
    )

    assert _fetcher(notes).offered(f"{site.url}/wheels/") == [
        Link(NAME, f"{site.url}/wheels/{NAME}#sha256=abc"),
        Link(NAME, f"{site.url}/other/{NAME.replace('+', '%2B')}"),
    ]


def test_a_base_and_a_redirection_count(site: Site, notes: list[str]) -> None:
    site.pages["/old"] = ("", {"Location": "/new/page.html"})
    site.pages["/new/page.html"] = (f"<base href='files/'><a href='{NAME}'>x</a>", {})

    assert _fetcher(notes).offered(f"{site.url}/old") == [Link(NAME, f"{site.url}/new/files/{NAME}")]


def test_a_directory_offers_its_wheels(tmp_path: Path, notes: list[str]) -> None:
    for name in (NAME, "notes.txt"):
        (tmp_path / name).touch()

    assert _fetcher(notes).offered(str(tmp_path)) == [Link(NAME, (tmp_path / NAME).as_uri())]


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path, notes: list[str]) -> None:
    with pytest.raises(PackhorseError, match=r"gone, named in find-links, cannot be read: No such file"):
        _fetcher(notes).offered(str(tmp_path / "gone"))


# --- releases of GitHub ---


def _release(*names: str, digest: str | None = None) -> dict[str, object]:
    return {
        "tag_name": "v1",
        "assets": [
            {"name": name, "browser_download_url": f"https://host/{name}", "digest": digest, "size": 1}
            for name in names
        ],
    }


def test_all_pages_of_the_releases_of_a_repository_are_read(site: Site, notes: list[str]) -> None:
    first = "/repos/some/thing/releases?per_page=50"
    following = {"Link": f'<{site.url}/second>; rel="next", <{site.url}/second>; rel="last"'}
    site.pages[first] = (json.dumps([_release("a-1-py3-none-any.whl", "a-1.tar.gz")]), following)
    site.pages["/second"] = (json.dumps([_release("a-2-py3-none-any.whl", digest="sha256:abc")]), {})
    fetcher = _fetcher(notes, {"GITHUB_API_URL": site.url, "HOME": "/nowhere"})

    assert fetcher.offered("https://github.com/some/thing/releases") == [
        Link("a-1-py3-none-any.whl", "https://host/a-1-py3-none-any.whl"),
        Link("a-2-py3-none-any.whl", "https://host/a-2-py3-none-any.whl#sha256=abc"),
    ]


@pytest.mark.parametrize("kind", ["tag", "expanded_assets"])
def test_one_release_is_enough(site: Site, notes: list[str], kind: str) -> None:
    site.pages["/repos/some/thing/releases/tags/v1.0"] = (json.dumps(_release("a-1-py3-none-any.whl")), {})
    environ = {"GITHUB_API_URL": site.url, "GITHUB_TOKEN": "secret", "HOME": "/nowhere"}

    found = _fetcher(notes, environ).offered(f"https://github.com/some/thing/releases/{kind}/v1.0")

    assert [link.file for link in found] == ["a-1-py3-none-any.whl"]
    assert site.asked == [("/repos/some/thing/releases/tags/v1.0", "Bearer secret")]


def test_an_answer_that_is_not_githubs_is_an_error(site: Site, notes: list[str]) -> None:
    site.pages["/repos/some/thing/releases?per_page=50"] = ("<html>", {})
    with pytest.raises(PackhorseError, match="does not answer as GitHub does"):
        _fetcher(notes, {"GITHUB_API_URL": site.url}).offered("https://github.com/some/thing/releases")


# --- credentials and failures ---


def test_credentials_come_from_netrc_and_stay_with_their_host(
    site: Site, index: Index, tmp_path: Path, notes: list[str]
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pass\n")
    index.credentials = "me:pass"
    index.add("foo", "1.0")
    site.pages["/away"] = ("", {"Location": f"http://localhost:{site.url.rpartition(':')[2]}/page"})
    site.pages["/page"] = ("", {})
    fetcher = _fetcher(notes, {"HOME": str(tmp_path)})

    assert [link.file for link in fetcher.offered(f"{index.url}foo/")] == ["foo-1.0-py3-none-any.whl"]
    fetcher.offered(f"{site.url}/away")

    assert [bool(credentials) for _, credentials in site.asked] == [True, False]


def test_credentials_come_from_the_url_of_a_page_and_are_not_told(index: Index, notes: list[str]) -> None:
    index.credentials = "me:pass"
    index.add("foo", "1.0")
    index.fail("foo/", Status(503))
    page = f"{index.url.replace('://', '://me:pass@')}foo/"

    [link] = _fetcher(notes, None, page).offered(page)

    assert link.url.startswith(f"http://{index.host}/files/foo-1.0-py3-none-any.whl#sha256=")
    assert len(notes) == 1 and "pass" not in notes[0]


@pytest.mark.parametrize("fault", [Status(503), Status(429)])
def test_what_may_pass_is_tried_again(index: Index, notes: list[str], fault: Status) -> None:
    index.add("foo", "1.0")
    index.fail("foo/", fault, fault)

    assert len(_fetcher(notes, attempts=3).offered(f"{index.url}foo/")) == 1
    assert len(index.requests) == 3
    assert f"foo/: the server answered {fault.code}; attempt 3 of 3" in notes[1]


def test_attempts_end(index: Index, notes: list[str]) -> None:
    index.fail("foo/", Status(500), Status(500), Status(500))
    with pytest.raises(
        NetworkError, match=r"The list of wheels at http\S+foo/ could not be read: the server answered 500"
    ):
        _fetcher(notes, attempts=2).offered(f"{index.url}foo/")
    assert len(index.requests) == 2


def test_a_page_that_does_not_come_is_given_up(notes: list[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(NetworkError, match="no answer in time"):
            _fetcher(notes, attempts=1, timeout_small=0.2).offered(f"http://127.0.0.1:{port}/")
    with pytest.raises(NetworkError, match="no connection to its server"):
        _fetcher(notes, attempts=2).offered(f"http://127.0.0.1:{port}/")
    assert notes[0].startswith(f"127.0.0.1:{port}: no connection to its server; attempt 2 of 2")


@pytest.mark.parametrize(("code", "remedy"), [(404, "Correct find-links"), (401, "~/.netrc")])
def test_what_does_not_pass_is_told_at_once(index: Index, notes: list[str], code: int, remedy: str) -> None:
    index.fail("foo/", Status(code))
    with pytest.raises(PackhorseError, match=f"the server answered {code}") as caught:
        _fetcher(notes).offered(f"http://{index.host}/foo/?token=secret")
    assert remedy in caught.value.remedy
    assert "secret" not in str(caught.value)
    assert len(index.requests) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of 127.0.0.1 that nobody trusts, with its key."""
    directory = tmp_path_factory.mktemp("certificate")
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(["openssl", "req", "-x509", *options], cwd=directory, check=True, capture_output=True)
    both = directory / "both.pem"
    both.write_text((directory / "key.pem").read_text() + (directory / "certificate.pem").read_text())
    return both


def test_credentials_do_not_leave_https(
    site: Site, certificate: Path, tmp_path: Path, notes: list[str]
) -> None:
    """Not to the host they are for, where a redirection leads to it in clear."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pass\n")
    site.pages["/page"] = ("", {})
    environ = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null", "PIP_CERT": str(certificate)}
    with _serve(certificate) as secure:
        secure.pages["/"] = ("", {"Location": f"{site.url}/page"})
        _fetcher(notes, environ).offered(f"{secure.url}/")

    assert [bool(credentials) for _, credentials in (*secure.asked, *site.asked)] == [True, False]


def test_certificates_are_those_that_pip_was_given(
    certificate: Path, tmp_path: Path, notes: list[str]
) -> None:
    (tmp_path / "pip.conf").write_text(f"[global]\ncert = {certificate}\n")
    home = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
    with _serve(certificate) as site:
        site.pages["/"] = (f"<a href='{NAME}'>x</a>", {})
        for environ in (
            {**home, "PIP_CERT": str(certificate)},
            {**home, "REQUESTS_CA_BUNDLE": str(certificate)},
            {**home, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")},
        ):
            assert [link.file for link in _fetcher(notes, environ).offered(f"{site.url}/")] == [NAME]
        with pytest.raises(PackhorseError, match="its certificate is not trusted") as caught:
            _fetcher(notes, home).offered(f"{site.url}/")
        with pytest.raises(RefusedError, match="its certificate is not trusted"):
            _downloads(notes, home).fetch(f"{site.url}/", tmp_path / NAME, {})
    assert "PIP_CERT" in caught.value.remedy
    assert notes == []


def test_the_proxy_is_the_one_that_pip_was_given(site: Site, tmp_path: Path, notes: list[str]) -> None:
    site.pages["http://wheels.invalid/page"] = (f"<a href='{NAME}'>x</a>", {})
    (tmp_path / "pip.conf").write_text(f"[global]\nproxy = {site.url}\n")
    for environ in ({"PIP_PROXY": site.url}, {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}):
        fetcher = _fetcher(notes, {"HOME": str(tmp_path), **environ})
        assert fetcher.offered("http://wheels.invalid/page") == [Link(NAME, f"http://wheels.invalid/{NAME}")]


def test_certificates_that_pip_was_given_must_be_there(tmp_path: Path, notes: list[str]) -> None:
    environ = {"PIP_CERT": str(tmp_path / "gone.pem"), "HOME": str(tmp_path)}
    with pytest.raises(PackhorseError, match=r"The certificates in .*gone\.pem cannot be read"):
        _fetcher(notes, environ).offered("https://127.0.0.1:9/")
