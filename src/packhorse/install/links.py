"""What a page of links, a directory or the releases of a GitHub repository offer: names of wheels and where they lie.

Promises the certificates, proxies and credentials of any download, and one policy for a network that fails.
Knows nothing of which wheel fits.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

import msgspec

from packhorse.errors import UNREADABLE, PackhorseError
from packhorse.install.access import github, without_user
from packhorse.install.downloads import Downloads, RefusedError, may_pass, retry_after, why
from packhorse.install.log import without_credentials
from packhorse.install.network import Attempts, Failure, NetworkError

_LARGEST = 64 << 20
"""Bytes: a page that is larger is no list of wheels."""
_RELEASES = re.compile(
    r"https?://(?:www\.)?github\.com/([^/?#]+)/([^/?#]+)/releases(?:/(?:tag|expanded_assets)/([^/?#]+))?/?",
    re.IGNORECASE,
)
_NEXT = re.compile(r'<([^>]+)>\s*;[^,]*rel="next"')


class Link(NamedTuple):
    """A file that is offered: its name, and its URL with `#sha256=...` where that was told."""

    file: str
    url: str


class Fetcher:
    """Reads pages for one installation."""

    def __init__(self, downloads: Downloads, attempts: Attempts, environ: Mapping[str, str]) -> None:
        """`environ` tells where GitHub's interface is."""
        self._downloads, self._attempts, self._environ = downloads, attempts, environ

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
        address = f"{github(self._environ)}/repos/{owner}/{repository}/releases"
        address = f"{address}/tags/{quote(unquote(tag))}" if tag else f"{address}?per_page=50"
        while address:
            _, body, headers = self._read(address, "application/vnd.github+json")
            try:
                releases = [msgspec.json.decode(body, type=_Release)] if tag else _ALL.decode(body)
            except UNREADABLE as error:
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

    def _read(self, url: str, accept: str) -> tuple[str, bytes, Mapping[str, str]]:
        """The final address, the body and the headers."""
        return self._attempts.run(lambda timeout: self._attempt(without_user(url), accept, timeout))

    def _attempt(self, url: str, accept: str, timeout: float) -> tuple[str, bytes, Mapping[str, str]]:
        import urllib3

        headers = {"Accept": accept, "User-Agent": "packhorse"}
        parts = urlsplit(url)
        name = _base(url) if parts.path.strip("/") else parts.netloc
        try:
            response, address = self._downloads.open(url, timeout, headers)
            with contextlib.closing(response):
                status = response.status
                if status == 200:
                    body = response.read(_LARGEST + 1, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            try:
                reason = why(error)
            except RefusedError as refused:
                remedy = "Name a file of certificates by PIP_CERT or SSL_CERT_FILE, or a proxy by http://."
                raise PackhorseError(_unread(url, str(refused)), remedy) from error
            raise NetworkError(Failure("network", reason, name), _unread(url, reason), _TRY) from error
        if status != 200:
            reason = f"the server answered {status}"
            if may_pass(status):
                failure = Failure("network", reason, name, retry_after=retry_after(response))
                raise NetworkError(failure, _unread(url, reason), _TRY)
            raise PackhorseError(
                _unread(url, reason), _CREDENTIALS if status in (401, 403, 407) else _CORRECT
            )
        if len(body) > _LARGEST:
            raise PackhorseError(_unread(url, "it has more than 64 MB"), _CORRECT)
        return address, body, response.headers


def _unread(url: str, reason: str) -> str:
    return f"The list of wheels at {without_credentials(url)} could not be read: {reason}."


_TRY = "Check the network, and try again."
_CORRECT = "Correct find-links in the configuration."
_CREDENTIALS = "Put the credentials into ~/.netrc (for GitHub into GITHUB_TOKEN)."


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
        if tag not in ("a", "base") or not target:
            return
        try:
            url = urljoin(self._base, target.strip())
        except ValueError:  # no URL
            return
        if tag == "base":
            self._base = url
        else:
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
