"""The hashes that requirements give (`--hash`): what a file must have to be installed, as pip's hash-checking mode.

Promises to be as strict as `pip install --require-hashes`: once one requirement has a hash each needs one and an exact
version. Knows nothing of how files are chosen or fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from packhorse.errors import ConfigError
from packhorse.install import requirements
from packhorse.install.chosen import Chosen
from packhorse.install.requirements import Line, split_options

_HASH = re.compile(r"--hash[= ](sha256|sha384|sha512):([0-9a-fA-F]+)")
_FRAGMENT = re.compile(r"[#&](sha256|sha384|sha512)=([0-9a-fA-F]+)")
_ANY = re.compile(r"--(hash|require-hashes)\b")
_TRUE = ("1", "true", "yes", "on", "t", "y")  # as pip reads a setting

Hashes = dict[str, frozenset[str]]
"""What is allowed, by algorithm, in lower case. Whoever has one of them fits."""


class Demands(NamedTuple):
    """What the requirements demand, by the normalised name of a distribution."""

    allowed: Mapping[str, Hashes]
    exact: frozenset[str]
    """The names that are asked for by an exact version or a URL."""

    def of(self, name: str) -> Hashes:
        """What is allowed for a distribution; empty where nothing was given."""
        return self.allowed.get(name, {})


def demanded(
    lines: Iterable[Line], settings: Mapping[str, str], environment: Callable[[], Mapping[str, str]]
) -> Demands | None:
    """What the lines demand, for the worker whose markers have the values of `environment`; None without any hash.

    `settings` are those of pip. Raises ConfigError for a hash that pip would refuse.
    """
    found = list(lines)
    by_setting = settings.get("require-hashes", "").lower() in _TRUE
    if not by_setting and not any(_ANY.search(line.parts[1]) for line in found):
        return None
    values = environment()
    allowed: dict[str, Hashes] = {}
    exact: set[str] = set()
    for line in found:
        named = requirements.named(line, values)
        if named is None:
            continue
        hashes = _given(line)
        if named.exact:
            exact.add(named.name)
        if hashes:
            allowed[named.name] = _both(allowed[named.name], hashes) if named.name in allowed else hashes
    return Demands(allowed, frozenset(exact))


def held(chosen: Iterable[Chosen], demands: Demands) -> Iterator[Chosen]:
    """Each of `chosen` with what is allowed for it. Raises ConfigError for one that no hash can be held against."""
    missing = []
    for each in chosen:
        direct = each.direct or {}
        if "vcs_info" in direct or "dir_info" in direct:
            what = "a repository" if "vcs_info" in direct else "a directory"
            raise ConfigError(
                f"{each.name} comes from {what}, which has no hash, but other requirements have one (--hash).",
                "Name an archive of it, or take the hashes out of the requirements.",
            )
        hashes = demands.of(each.name)
        if not hashes:
            missing.append(each)
        elif each.name not in demands.exact:
            raise ConfigError(
                f"{each.name} has a hash in the requirements, but no exact version.",
                f"Write {each.name}=={each.version}, as hash checking needs it.",
            )
        else:
            yield msgspec.structs.replace(each, allowed={name: sorted(each) for name, each in hashes.items()})
    if missing:
        listed = ", ".join(f"{each.name}=={each.version}" for each in missing)
        raise ConfigError(
            f"Some requirements have hashes, so all need one, and these have none: {listed}.",
            "Add them with their hashes (--hash=sha256:...), as `pip-compile --generate-hashes` does.",
        )


def fits(chosen: Chosen) -> bool:
    """Whether what is known of a file's hashes does not speak against it."""
    common = chosen.allowed.keys() & chosen.hashes.keys()
    return not common or any(chosen.hashes[name].lower() in chosen.allowed[name] for name in common)


def is_proven(chosen: Chosen) -> bool:
    """Whether the hashes that the index tells say already that the file is one of those allowed."""
    return bool(chosen.hashes) and allowed_by(chosen.allowed, chosen.hashes)


def pinned(chosen: Chosen) -> str:
    """The line of a requirements file that asks for any allowed file of this version."""
    given = (f"--hash={name}:{each}" for name, digests in chosen.allowed.items() for each in digests)
    return f"{chosen.name}=={chosen.version} {' '.join(given)}"


def _given(line: Line) -> Hashes:
    text, options = line.parts
    pairs: list[tuple[str, str]] = _FRAGMENT.findall(text)
    for option in split_options(options):
        if option.startswith("--hash"):
            found = _HASH.fullmatch(option)
            if found is None:
                raise ConfigError(
                    f"{line.file} has a hash that is none: {option}.",
                    "Write --hash=sha256:..., or with sha384 or sha512, in hexadecimal digits.",
                )
            pairs.append((found[1], found[2]))
    return {name: frozenset(value.lower() for key, value in pairs if key == name) for name, _ in pairs}


def _both(one: Hashes, other: Hashes) -> Hashes:
    """What both allow, as where a requirement and a constraint have hashes."""
    return {name: one[name] & other[name] for name in one.keys() & other.keys()}


def allowed_by(hashes: Mapping[str, Sequence[str]], found: Mapping[str, str]) -> bool:
    """Whether a file with the digests `found` is one of those allowed; everything is where nothing is said."""
    return not hashes or any(found.get(name, "").lower() in digests for name, digests in hashes.items())
