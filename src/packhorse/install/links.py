"""What a page of links, a directory or the releases of a GitHub repository offer: names of wheels and where they lie.

Promises the certificates, proxies and ~/.netrc that pip would use, and one policy for a network that fails.
Knows nothing of which wheel fits.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

import msgspec

from packhorse.errors import PackhorseError
from packhorse.install.log import without_credentials
from packhorse.install.network import Attempts, Failure, NetworkError

_LARGEST = 64 << 20
"""Bytes: a page that is larger is no list of wheels."""
_RELEASES = re.compile(
    r"https?://(?:www\.)?github\.com/([^/?#]+)/([^/?#]+)/releases(?:/(?:tag|expanded_assets)/([^/?#]+))?/?",
    re.IGNORECASE,
)
_NEXT = re.compile(r'<([^>]+)>\s*;[^,]*rel="next"')
_PASSING = (408, 425, 429)
_PIP_SETTING = re.compile(r"^(global|install)\.(cert|proxy)='(.*)'$", re.MULTILINE)


class Link(NamedTuple):
    """A file that is offered: its name, and its URL with `#sha256=...` where that was told."""

    file: str
    url: str


class Fetcher:
    """Reads pages with the settings of one environment."""

    def __init__(
        self, environ: Mapping[str, str], attempts: Attempts, pip: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """`pip` gives the words that start pip, whose configuration is asked for `cert` and `proxy`."""
        self._environ, self._attempts, self._pip = environ, attempts, pip
        self._opener: urllib.request.OpenerDirector | None = None

    def offered(self, place: str) -> list[Link]:
        """The wheels that `place`, a URL or a directory, offers.

        Raises NetworkError when the attempts are used up, PackhorseError where the place cannot be read.
        """
        if "://" not in place:
            return _in_directory(Path(place))
        if releases := _RELEASES.fullmatch(urldefrag(place)[0]):
            return list(self._released(*releases.groups()))
        address, body, _ = self._read(place, "text/html")
        page = _Page(address)
        page.feed(body.decode("utf-8", errors="replace"))
        return page.links

    def _released(self, owner: str, repository: str, tag: str | None) -> Iterator[Link]:
        """From the interface of GitHub: its pages load their files by a script."""
        base = self._environ.get("GITHUB_API_URL") or "https://api.github.com"
        address = f"{base}/repos/{owner}/{repository}/releases"
        address = f"{address}/tags/{quote(unquote(tag))}" if tag else f"{address}?per_page=50"
        while address:
            _, body, headers = self._read(address, "application/vnd.github+json")
            try:
                releases = [msgspec.json.decode(body, type=_Release)] if tag else _ALL.decode(body)
            except msgspec.DecodeError as error:
                raise PackhorseError(
                    f"{address} does not answer as GitHub does: {error}.", "Check GITHUB_API_URL."
                ) from error
            for release in releases:
                for asset in release.assets:
                    if asset.name.endswith(".whl"):
                        digest = f"#{asset.digest.replace(':', '=')}" if asset.digest else ""
                        yield Link(asset.name, asset.browser_download_url + digest)
            following = _NEXT.search(headers.get("Link", ""))
            address = following[1] if following else ""

    def _read(self, url: str, accept: str) -> tuple[str, bytes, http.client.HTTPMessage]:
        return self._attempts.run(lambda timeout: self._attempt(url, accept, timeout))

    def _attempt(self, url: str, accept: str, timeout: float) -> tuple[str, bytes, http.client.HTTPMessage]:
        """The final address, the body and the headers."""
        shown, what = without_credentials(url), "The list of wheels at {} could not be read: {}."
        if self._opener is None:
            self._opener = _opener(self._environ, self._pip)
        request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "packhorse"})  # noqa: S310
        if credentials := self._authorization(url):
            request.add_unredirected_header("Authorization", credentials)
        name = _base(url)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                body: bytes = answer.read(_LARGEST + 1)
                if len(body) > _LARGEST:
                    raise PackhorseError(
                        what.format(shown, "it has more than 64 MB"),
                        "Correct find-links in the configuration.",
                    )
                return answer.url, body, answer.headers
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code}"
            if error.code in _PASSING or error.code >= 500:
                raise NetworkError(
                    Failure("network", reason, name), what.format(shown, reason), _TRY
                ) from error
            remedy = "Correct find-links in the configuration."
            if error.code in (401, 403, 407):
                remedy = "Put the credentials into ~/.netrc (for GitHub into GITHUB_TOKEN)."
            raise PackhorseError(what.format(shown, reason), remedy) from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise PackhorseError(
                    what.format(shown, f"its certificate is not trusted ({cause.verify_message})"),
                    "Name a file of certificates by PIP_CERT or SSL_CERT_FILE.",
                ) from error
            reason = "no answer in time" if isinstance(cause, TimeoutError) else "the connection broke"
            raise NetworkError(Failure("network", reason, name), what.format(shown, reason), _TRY) from error

    def _authorization(self, url: str) -> str:
        host = urlsplit(url).hostname or ""
        token = self._environ.get("GITHUB_TOKEN") or self._environ.get("GH_TOKEN")
        if (
            token
            and host == urlsplit(self._environ.get("GITHUB_API_URL") or "https://api.github.com").hostname
        ):
            return f"Bearer {token}"
        return _netrc(host, self._environ)


_TRY = "Check the network, and try again."


class _Asset(msgspec.Struct):
    name: str
    browser_download_url: str
    digest: str | None = None


class _Release(msgspec.Struct):
    assets: list[_Asset] = []


_ALL = msgspec.json.Decoder(list[_Release])


class _Page(HTMLParser):
    """Collects the links to wheels of a page of HTML."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._base = address
        self.links: list[Link] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "base" and target:
            self._base = urljoin(self._base, target)
        elif tag == "a" and target:
            url = urljoin(self._base, target.strip())
            name = _base(url)
            if name.endswith(".whl") and url.startswith(("http://", "https://")):
                self.links.append(Link(name, url))


def _in_directory(directory: Path) -> list[Link]:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise PackhorseError(
            f"{directory}, named in find-links, cannot be read: {error.strerror}.",
            "Correct the configuration.",
        ) from error
    return [Link(name, (directory / name).as_uri()) for name in names if name.endswith(".whl")]


def _base(url: str) -> str:
    path = urlsplit(url).path
    return unquote(path.rstrip("/").rsplit("/", 1)[-1]) + ("/" if path.endswith("/") else "")


def _opener(environ: Mapping[str, str], pip: Callable[[], Sequence[str]]) -> urllib.request.OpenerDirector:
    """Certificates and proxy as pip would find them: its variables, its configuration, the system."""
    settings = {"cert": environ.get("PIP_CERT", ""), "proxy": environ.get("PIP_PROXY", "")}
    if not all(settings.values()) and (words := pip()):
        asked = subprocess.run(
            [*words, "config", "list"],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        # In the order of the files, of which the last counts; [install] before [global].
        configured = {(section, key): value for section, key, value in _PIP_SETTING.findall(asked.stdout)}
        for key, value in settings.items():
            settings[key] = value or configured.get(("install", key)) or configured.get(("global", key), "")
    cert = settings["cert"] or environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE") or ""
    try:
        if os.path.isdir(cert):
            context = ssl.create_default_context(capath=cert)
        else:
            context = ssl.create_default_context(cafile=cert or None)
    except (OSError, ssl.SSLError) as error:
        raise PackhorseError(
            f"The certificates in {cert} cannot be read: {error}.",
            "Correct PIP_CERT or pip's `cert` setting.",
        ) from error
    proxies = urllib.request.getproxies()
    if settings["proxy"]:
        proxies |= {"http": settings["proxy"], "https": settings["proxy"]}
    return urllib.request.build_opener(
        urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
    )


def _netrc(host: str, environ: Mapping[str, str]) -> str:
    import base64
    import netrc

    home = environ.get("HOME") or os.path.expanduser("~")
    try:
        found = netrc.netrc(environ.get("NETRC") or os.path.join(home, ".netrc")).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return ""
    if found is None:
        return ""
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
