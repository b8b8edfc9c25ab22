"""How package indexes are reached: the credentials, certificates and proxies that pip would use.

Promises that credentials go to the host they were given for and nowhere else. Knows pip's configuration and
requirements files; what is beyond it (client certificates with passwords) is left to pip.
"""

from __future__ import annotations

import ast
import contextlib
import ipaddress
import itertools
import json
import netrc
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from packhorse.config_values import VARIABLE
from packhorse.errors import PackhorseError

if TYPE_CHECKING:
    import urllib3

_WITH_USER = re.compile(r"https?://([^/?#\s]+)@([^/?#\s'\"]+)([^?#\s'\"@]*)")
"""The path ends where the revision of a repository begins."""
_INDEX = re.compile(r"(https?)://(?:[^/?#\s@]+@)?([^/?#\s'\"@]+)([^?#\s'\"]*)")
_NAMED = re.compile(r"(?:^|\s)([\w.-]+)=https?://([^/?#\s@]+)([^?#\s]*)")
"""An index of uv with a name, by which variables tell its credentials."""
_PATIENCE = 60.0
"""Seconds that a keyring has to answer."""
_CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
_IMPORTED = """\
import json, keyring, sys
found = keyring.get_credential(sys.argv[1], sys.argv[2] if sys.argv[2:] else None)
print(json.dumps({"username": found.username, "password": found.password}))
"""
"""What pip's provider "import" does."""


def pip_settings(words: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What `pip install` takes from pip's configuration files and variables, by the name of the option.

    `words` start pip. Empty where pip does not tell.
    """
    answer = subprocess.run(
        [*words, "config", "list", "--log", os.devnull],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    settings: dict[int, dict[str, str]] = {0: {}, 1: {}, 2: {}}
    for line in answer.stdout.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section)
        if separator and rank is not None:
            with contextlib.suppress(ValueError, SyntaxError):
                settings[rank][name] = str(ast.literal_eval(value))
    return {**settings[0], **settings[1], **settings[2]}


class Access(NamedTuple):
    """What opens connections: made once for an installation."""

    users: Mapping[str, Mapping[str, str]]
    """The user part of URLs, by host and port, and then by the path that it was given for."""
    environ: Mapping[str, str]
    settings: Mapping[str, str]
    indexes: Mapping[str, tuple[str, ...]] = {}
    """The URLs of indexes without their user part, by host and port: the names that keyrings know."""
    keyring: dict[str, str] = {}  # noqa: RUF012 - one for each: access() makes it
    """What a keyring told, as the user part of a URL, by host and port; "" for nothing."""
    python: Sequence[str] = ()
    """The words that start the Python that runs pip."""

    def with_user(self, url: str) -> str:
        """`url` with the user part that was given for its host, for pip."""
        parts = urlsplit(url)
        user = self._user(parts.netloc, parts.path)
        return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc}")) if user else url

    def authorization(self, url: str) -> dict[str, str]:
        """The header for `url`: by its host's user part in a URL, else by ~/.netrc. For GitHub's interface its token."""
        import urllib3

        parts = urlsplit(url)
        token = self.environ.get("GITHUB_TOKEN") or self.environ.get("GH_TOKEN")
        if token and parts.hostname == urlsplit(github(self.environ)).hostname:
            return {"Authorization": f"Bearer {token}"}
        user = self.keyring.get(parts.netloc) or self._user(parts.netloc, parts.path)
        user = user or self._netrc(parts.hostname or "")
        return urllib3.util.make_headers(basic_auth=_decoded(user)) if user else {}

    def ask_keyring(self, url: str) -> bool:
        """Ask the keyring that pip or uv are told to ask, if any, for the host of `url`; whether it knows one.

        Once for each host: from then on `authorization` gives what it told.
        """
        _, netloc, path, *_ = urlsplit(url)
        if netloc in self.keyring:
            return False
        self.keyring[netloc] = ""
        user = unquote(self._user(netloc, path).partition(":")[0])
        for words in self._keyrings():
            for name in (*self.indexes.get(netloc, ()), netloc):
                if found := _of_keyring(words, name, user, self.environ):
                    self.keyring[netloc] = found
                    return True
        return False

    def _keyrings(self) -> Iterator[Sequence[str]]:
        """The commands to ask, without the name of what is asked for."""
        wanted = (self.settings.get("keyring-provider"), self.environ.get("UV_KEYRING_PROVIDER"))
        program = shutil.which("keyring", path=self.environ.get("PATH"))
        if "subprocess" in wanted and program:
            yield program, "--mode=creds", "--output=json", "get"  # from version 25.2 on
        if "import" in wanted and self.python:
            yield *self.python, "-c", _IMPORTED

    def _user(self, netloc: str, path: str) -> str:
        """The user part that was given for what is nearest to `path`: one host may have many projects."""
        known = self.users.get(netloc, {})
        nearest = max(known, key=lambda each: _in_common(each, path), default="")
        return known.get(nearest, "")

    def _netrc(self, host: str) -> str:
        home = self.environ.get("HOME", "")
        path = self.environ.get("NETRC") or os.path.join(home, ".netrc")
        try:
            found = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            return ""
        return f"{_quoted(found[0])}:{_quoted(found[2] or '')}" if found else ""

    def pool(self, url: str) -> urllib3.PoolManager:
        """Connections to the host of `url`: through its proxy, checked by the certificates that pip trusts."""
        import urllib3

        parts = urlsplit(url)
        context = self._context(parts.netloc)
        proxy = self._proxy(parts)
        if not proxy:
            return urllib3.PoolManager(maxsize=16, ssl_context=context)
        user = urlsplit(proxy).netloc.rpartition("@")[0]
        headers = urllib3.util.make_headers(proxy_basic_auth=_decoded(user)) if user else None
        return urllib3.ProxyManager(proxy, proxy_headers=headers, maxsize=16, ssl_context=context)

    def _context(self, netloc: str) -> ssl.SSLContext:
        named = (self.settings.get("cert"), *(self.environ.get(name) for name in _CERTIFICATES))
        file = next((path for path in named if path), None)
        if file is None and not _system_certificates():
            file = _pips_certificates()
        directory = file if file and os.path.isdir(file) else None
        try:
            context = ssl.create_default_context(cafile=None if directory else file, capath=directory)
            if client := self.settings.get("client-cert"):
                context.load_cert_chain(file := client)
        except OSError as error:  # SSLError, too
            raise PackhorseError(
                f"The certificates in {file} cannot be read: {error}.",
                "Correct PIP_CERT, pip's `cert` setting, or whatever names that file.",
            ) from error
        trusted = self.settings.get("trusted-host", "").split()
        if netloc in trusted or netloc.rpartition(":")[0] in trusted:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _proxy(self, url: SplitResult) -> str:
        proxies = {
            name.lower().removesuffix("_proxy"): value
            for name, value in sorted(self.environ.items())  # lower case wins, as everywhere
            if name.lower().endswith("_proxy") and value
        }
        named = self.settings.get("proxy", "")
        if not named and not _without_proxy(url, proxies):
            named = proxies.get(url.scheme) or proxies.get("all", "")
        return f"http://{named}" if named and "://" not in named else named


def _without_proxy(url: SplitResult, proxies: Mapping[str, str]) -> bool:
    """Whether no_proxy has the host: by its name, or by its network as for pip."""
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    host = url.hostname or ""
    if any(proxy_bypass_environment(each, proxies) for each in (host, url.netloc)):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for each in proxies.get("no", "").split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(each.strip(), strict=False):
                    return True
    return False


def without_user(url: str) -> str:
    """`url` without its user part."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def github(environ: Mapping[str, str]) -> str:
    """Where GitHub's interface for programs is."""
    return environ.get("GITHUB_API_URL") or "https://api.github.com"


def _in_common(path: str, other: str) -> int:
    """How many parts two paths of URLs begin with that are the same."""
    pairs = zip(path.split("/"), other.split("/"))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def access(
    settings: Mapping[str, str],
    lines: Iterable[str],
    environ: Mapping[str, str],
    python: Sequence[str] = (),
    lock: str = "",
) -> Access:
    """How to reach what pip's `settings`, the `lines` of requirements files and the variables of uv name.

    `python` are the words that start the Python that runs pip; `lock` is the text of a lock file, which names no
    indexes.
    """
    users: dict[str, dict[str, str]] = {}
    indexes: dict[str, tuple[str, ...]] = {}
    of_uv = [value for name, value in environ.items() if name.startswith("UV_") and "INDEX" in name]
    given = (*settings.values(), *lines, *of_uv)
    texts = [VARIABLE.sub(lambda match: environ.get(match[1], match[0]), text) for text in given]
    for text in (*texts, lock):
        for user, netloc, path in _WITH_USER.findall(text):
            users.setdefault(netloc, {}).setdefault(path, user)
    for text in of_uv:
        for name, netloc, path in _NAMED.findall(text):
            variable = f"UV_INDEX_{re.sub('[^A-Z0-9]', '_', name.upper())}"
            pair = [environ.get(f"{variable}_{part}", "") for part in ("USERNAME", "PASSWORD")]
            if any(pair):
                users.setdefault(netloc, {}).setdefault(path, ":".join(map(_quoted, pair)))
    for text in texts:
        for scheme, netloc, path in _INDEX.findall(text):
            url = f"{scheme}://{netloc}{path}"
            if url not in indexes.get(netloc, ()):
                indexes[netloc] = (*indexes.get(netloc, ()), url)
    return Access(users, environ, settings, indexes, {}, python)


def _of_keyring(words: Sequence[str], name: str, user: str, environ: Mapping[str, str]) -> str:
    """What a keyring has for a name, and for a user where one is known, as the user part of a URL."""
    try:
        answer = subprocess.run(
            [*words, name, *([user] if user else [])],
            env={**environ, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
        found = json.loads(answer.stdout)
        return f"{_quoted(found['username'])}:{_quoted(found['password'])}"
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError, KeyError):
        return ""


def _decoded(user: str) -> str:
    name, _, password = user.partition(":")
    return f"{unquote(name)}:{unquote(password)}"


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _system_certificates() -> bool:
    paths = ssl.get_default_verify_paths()
    with contextlib.suppress(OSError):
        return bool(paths.cafile or (paths.capath and os.listdir(paths.capath)))
    return False


def _pips_certificates() -> str | None:
    """Those that pip brings, for an image that has none."""
    from importlib.util import find_spec

    spec = find_spec("pip")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        file = os.path.join(directory, "_vendor", "certifi", "cacert.pem")
        if os.path.isfile(file):
            return file
    return None
