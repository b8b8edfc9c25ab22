"""What an engine chose: each distribution with its exact file, by URL and hash, or the source it is built from.

Reads pip's installation report. Knows nothing of how files are fetched or installed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import msgspec
from packaging.utils import canonicalize_name

from packhorse.install.log import without_credentials

_URL = "%/:?@!$&'()*+,;=~"
"""What stays as it is in a URL whose path may hold spaces: pip reports those of repositories unquoted."""


class Chosen(msgspec.Struct, frozen=True):
    """One distribution. `hashes` is by algorithm, in hexadecimal digits; `size` in bytes, 0 where unknown."""

    name: str
    version: str
    url: str
    """Without its user part; of a wheel, a source archive, a directory or a repository."""
    hashes: Mapping[str, str] = {}
    size: int = 0
    requested: bool = False
    """Whether the requirements name it, not only what they depend on."""
    direct: Mapping[str, Any] | None = None
    """For direct_url.json (PEP 610), where the requirements give the URL themselves."""
    allowed: Mapping[str, Sequence[str]] = {}
    """What the requirements allow, by algorithm: the file must have one of these hashes, where there are any."""
    build_options: str = ""
    """What the requirements say of how pip builds it (`--config-settings=...`)."""

    @property
    def file(self) -> str:
        """The name of the file."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel, which needs no building."""
        return self.file.endswith(".whl") and "vcs_info" not in (self.direct or {})

    @property
    def local(self) -> Path | None:
        """The file on this machine, where it is one."""
        parts = urlsplit(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def requirement(self, with_user: Callable[[str], str] = lambda url: url) -> str:
        """The line of a requirements file that says the same, for pip; `with_user` adds credentials to a URL."""
        direct = self.direct or {}
        subdirectory = f"subdirectory={direct['subdirectory']}" if direct.get("subdirectory") else ""
        if vcs := direct.get("vcs_info"):
            url = f"{vcs['vcs']}+{quote(with_user(self.url), safe=_URL)}@{vcs['commit_id']}"
        else:
            url = with_user(self.url)
        editable = direct.get("dir_info", {}).get("editable")
        if editable and self.local is not None:
            return f"--editable {shlex.quote(os.fspath(self.local))} {self.build_options}".strip()
        fragment = [subdirectory, *(f"{name}={value}" for name, value in list(self.hashes.items())[:1])]
        joined = "&".join(part for part in fragment if part)
        hashes = [f"--hash={name}:{each}" for name, digests in self.allowed.items() for each in digests]
        options = [self.build_options, *hashes]
        return f"{self.name} @ {url}{'#' if joined else ''}{joined} {' '.join(filter(None, options))}".strip()


def without_secret(url: str) -> str:
    """`url` without its user part; of one for SSH the name of the account stays, which is part of where it leads."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    account = user.partition(":")[0] if parts.scheme.endswith("ssh") else ""
    return urlunsplit(parts._replace(netloc=f"{account}@{host}" if account else host))


def from_report(report: Mapping[str, Any]) -> Iterator[Chosen]:
    """What is in a report of `pip install --report` (version 1, "Installation report" in pip's manual)."""
    for item in report["install"]:
        download, metadata = item["download_info"], item["metadata"]
        archive = download.get("archive_info", {})
        hashes = dict(archive.get("hashes") or {})
        if not hashes and archive.get("hash"):  # before pip 23.0
            name, _, value = archive["hash"].partition("=")
            hashes = {name: value}
        parts = urlsplit(download["url"])
        url = without_secret(urlunsplit(parts._replace(fragment="")))
        yield Chosen(
            canonicalize_name(metadata["name"]),
            metadata["version"],
            url,
            hashes,
            requested=item.get("requested", False),
            direct={**download, "url": without_credentials(url)} if item.get("is_direct") else None,
        )
