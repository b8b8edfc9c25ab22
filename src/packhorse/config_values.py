"""One check for each kind of value in the configuration: counts, durations, sizes, paths, URLs, names.

A check takes a raw value and its place, and returns the typed value or raises ConfigError, which names the
place and what is allowed, and never repeats what may be a credential. Knows no key and no file.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import msgspec

from packhorse.errors import ConfigError

_SECRET_NAME = re.compile(
    r"secret|passw|token|credential|(access|application|api|account)[-_]?key", re.IGNORECASE
)
_ENDPOINT = re.compile(
    r"https?://([A-Za-z0-9._-]+|\[(?P<six>[0-9A-Fa-f:.]+)\])(:(?P<port>[0-9]{1,5}))?"
    r"(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?"  # RFC 3986, section 3.3
)


class Place(NamedTuple):
    """Where a value stands: its name for messages, and what relative paths and `~` in it refer to."""

    name: str
    """Such as `/app/packhorse.toml: network.attempts`, `PACKHORSE_NETWORK_ATTEMPTS` or `--root`."""
    directory: Path
    environ: Mapping[str, str]
    text: bool = False
    """Whether it is a variable or a flag, where numbers, truth and lists are written as text too."""

    def below(self, key: str) -> Place:
        """The place of `key` in a table here, or of `[0]` in a list."""
        joint = "" if self.name.endswith(": ") or key.startswith("[") else "."
        return self._replace(name=f"{self.name}{joint}{printable(key)}", text=False)

    def refuse(self, expected: str, value: object, remedy: str = "") -> NoReturn:
        """Raise ConfigError: not `expected` but `value` stands here."""
        remedy = remedy or "Correct it, or leave it out for the default."
        raise ConfigError(f"{self.name}: expected {expected}, got {_shown(value)}.", remedy)

    def refuse_secret(self) -> NoReturn:
        """Raise ConfigError without the value, since the message may end in a log."""
        raise ConfigError(
            f"{self.name}: credentials do not belong here.",
            "Take them out (and renew them if others could read them). For a store set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY; for packages use ~/.netrc.",
        )

    def refuse_unknown(self, kind: str, hint: str, allowed: Iterable[str]) -> NoReturn:
        """Raise ConfigError: there is no `kind` (key, variable) of the name that stands here."""
        if _SECRET_NAME.search(self.name.split(": ")[-1]):
            self.refuse_secret()
        listed = ", ".join(allowed)
        raise ConfigError(
            f"{self.name}: there is no such {kind}.",
            f"{hint}{f'Allowed here: {listed}.' if listed else ''}".strip(),
        )


Check = Callable[[object, Place], Any]


def printable(value: object) -> str:
    """`value` as text that any terminal takes, whatever bytes a path or variable held."""
    return str(value).encode(errors="backslashreplace").decode()


def did_you_mean(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """A sentence that names the known word most like `word`; "" where none is like it."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f"Did you mean {close[0]}? " if close else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return msgspec.json.encode(value).decode() if abs(value) < 1e15 else "a number out of range"
    if isinstance(value, str):
        masked = re.sub(r"://\S*@", "://***@", value)
        masked = re.sub(r"\?\S+", "?***", masked)
        masked = masked if len(masked) <= 80 else f"{masked[:77]}..."
        return msgspec.json.encode(printable(masked)).decode()
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "a date or time"


def toml(
    text: str, name: str, remedy: str = "Correct it; `packhorse init` writes a file to start from."
) -> dict[str, Any]:
    """The tables of a TOML document called `name`, which editors may begin with a byte order mark.

    Raises ConfigError with the `remedy`.
    """
    parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        parsed: dict[str, Any] = parser.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid TOML: {printable(error)}.", remedy) from error
    return parsed


# --- tables, lists and plain values ---

_NOWHERE: Mapping[str, str] = {}


def table(
    value: object, place: Place, checks: Mapping[str, Check], homes: Mapping[str, str] = _NOWHERE
) -> dict[str, Any]:
    """A table whose keys are those of `checks`; `homes` tells of keys of other tables where they belong."""
    if not isinstance(value, dict):
        place.refuse("a table", value)
    for key in value:
        if key not in checks:
            home = f"It belongs under [{homes[key]}]. " if key in homes else ""
            place.below(key).refuse_unknown("key", home or did_you_mean(key, checks), checks)
    return {key: checks[key](each, place.below(key)) for key, each in value.items()}


def list_of(item: Check) -> Check:
    """A list without repetitions; as text a TOML array, or parts between commas.

    A comma inside brackets, or before a version operator, belongs to its part: `a[b,c]>=2,<3, d` has two parts.
    """

    def check(value: object, place: Place) -> tuple[object, ...]:
        if place.text and isinstance(value, str):
            if value.startswith("["):
                value = toml(f"list = {value}", place.name)["list"]
            else:
                parts = re.split(r",(?![^\[(]*[\])])(?!\s*[<>=!~])", value)
                value = [part.strip() for part in parts if part.strip()]
        if not isinstance(value, list):
            place.refuse("a list", value, _as_list(value, item, place))
        checked = [item(each, place.below(f"[{index}]")) for index, each in enumerate(value)]
        return tuple(dict.fromkeys(checked))

    return check


def _as_list(value: object, item: Check, place: Place) -> str:
    """How text that could be the only entry of a list is to be written; "" for anything else."""
    shown = _shown(value)
    if not isinstance(value, str) or shown != msgspec.json.encode(printable(value)).decode():  # masked or cut
        return ""
    try:
        item(value, place.below("[0]"))
    except ConfigError:
        return ""
    return f"Write [{shown}]."


def gpu(value: object, place: Place) -> object:
    """Whose code comes first, as `snapshot.gpu.choice` reads it."""
    expected = '"auto", "all", "only", architectures such as "sm_90" or "sm_86,sm_90", or "only:sm_90"'
    if not isinstance(value, str) or not re.fullmatch(
        r"auto|all|only|(only:)?sm_[1-9][0-9]{1,2}[af]?( *, *sm_[1-9][0-9]{1,2}[af]?)*", value, re.ASCII
    ):
        place.refuse(expected, value)
    return value


def one_of(literal: object) -> Check:
    """One of the words of a typing.Literal."""
    words = get_args(literal)
    expected = " or ".join(f'"{word}"' for word in words)

    def check(value: object, place: Place) -> object:
        if value not in words:
            place.refuse(expected, value, "This version of packhorse takes nothing else.")
        return value

    return check


def pattern(regular: str, expected: str) -> Check:
    """Text that matches a regular expression as a whole."""

    def check(value: object, place: Place) -> str:
        text = _text(value, place, expected)
        if not re.fullmatch(regular, text):
            place.refuse(expected, value)
        return text

    return check


def _text(value: object, place: Place, expected: str) -> str:
    """Text on one line: no kind of value here may hold control characters."""
    if not isinstance(value, str) or not value or any(ord(each) < 32 or ord(each) == 127 for each in value):
        place.refuse(expected, value)
    return value


def boolean(value: object, place: Place) -> bool:
    """True or false; as text also 1 and 0."""
    if place.text and str(value).lower() in ("true", "1", "false", "0"):
        return str(value).lower() in ("true", "1")
    if not isinstance(value, bool):
        place.refuse("true or false", value)
    return value


def count(value: object, place: Place) -> int:
    """An integer of at least 1."""
    if place.text and re.fullmatch(r"[0-9]{1,9}", str(value)):
        value = int(str(value))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 10**9:
        place.refuse("an integer >= 1", value)
    return value


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def _amount(value: object, units: Mapping[str, int]) -> float:
    """A number, or text of a number and a unit, in the smallest unit; 0 for what is neither."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-z]*)", value.lower())
        if match is None or match.group(2) not in units:
            return 0
        value = float(match.group(1)) * units[match.group(2)]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        return 0
    return value if math.isfinite(value) else 0


def seconds(value: object, place: Place) -> float:
    """A duration over 0."""
    return _amount(value, _SECONDS) or place.refuse(
        'a duration over 0, such as 90 (seconds), "90s", "10m" or "1h"', value
    )


def interval(value: object, place: Place) -> float:
    """A duration over 0, or 0 for "off"."""
    if value == "off":
        return 0
    return _amount(value, _SECONDS) or place.refuse('"off" or a duration over 0, such as "10m"', value)


def size(value: object, place: Place) -> int:
    """A number of bytes, at least 1."""
    return int(_amount(value, _BYTES)) or place.refuse(
        'a size such as 100000000 (bytes), "100MB" or "1GiB"', value
    )


# --- paths ---


def path(value: object, place: Place) -> str:
    """An absolute path, with `~` expanded; symbolic links stay."""
    text = _text(value, place, "a path")
    if text == "~" or text.startswith("~/"):
        home = place.environ.get("HOME") or os.path.expanduser("~")
        if not os.path.isabs(home):  # HOME is not set, and /etc/passwd does not know this user
            place.refuse("a path", value, "There is no home directory: write the whole path, or set HOME.")
        text = home + text[1:]
    return os.path.abspath(os.path.join(place.directory, text))


def file(value: object, place: Place) -> str:
    """The path of a file on this machine."""
    if isinstance(value, str) and "://" in value:
        place.refuse("the path of a file", value, "Download it beside the configuration and name it here.")
    return path(value, place)


def search_directory(value: object, place: Place) -> str:
    """A directory that will stand in PATH or PYTHONPATH, where a colon would cut it in two."""
    directory = path(value, place)
    if os.pathsep in directory:
        place.refuse('a directory without ":" in its path', value)
    return directory


def root(value: object, place: Place) -> str:
    """The root's directory."""
    directory = search_directory(value, place)
    if directory == "/":
        place.refuse("a directory for packhorse alone", value)
    return directory


def interpreter(value: object, place: Place) -> str:
    """The path of an interpreter, or its name on PATH."""
    text = _text(value, place, "an interpreter's path or name")
    return path(text, place) if "/" in text else text


# --- packages ---


VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
"""Stands in a requirement for the value of an environment variable, as pip puts it in."""
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_RELEASE = r"[0-9]+(?:\.[0-9]+)*"
_CLAUSE = rf" ?(?:(?:[<>]=?|[=!]=) ?{_RELEASE}|== ?{_RELEASE}\+[a-z0-9]+)"
_PLAIN = rf"{_NAME}(?: ?\[ ?{_NAME}(?: ?, ?{_NAME})* ?\])?(?:{_CLAUSE}(?: ?,{_CLAUSE})*)?"
"""Requirements as most are, blanks made single. They need no look by `packaging`, which takes as long to import as all of
the rest."""


def requirement(value: object, place: Place) -> str:
    """A requirement (PEP 508). What pip would read behind it stays: options, a comment; and what it would put in."""
    expected = 'a requirement such as "torch>=2,<3"'
    text = _text(value, place, expected).strip()
    _refuse_credentials(text, place)
    if not re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\]\s*)?([<>=!~(@;]|$)", text):
        place.refuse(expected, value, "Options and paths belong in a requirements file.")
    if not re.fullmatch(_PLAIN, re.sub(" +", " ", text)) and not VARIABLE.search(text):
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            Requirement(re.split(r"\s(?:#|--[a-z])", text)[0])
        except InvalidRequirement:
            place.refuse(expected, value, "Correct it: PEP 508 says how requirements are written.")
    return text


def module(value: object, place: Place) -> str:
    """The dotted name of a module."""
    expected = 'the name of a module, such as "torch" or "PIL.Image"'
    text = _text(value, place, expected)
    if not all(part.isidentifier() for part in text.split(".")):
        remedy = "A module may be called otherwise than its package: flash-attn is imported as flash_attn."
        place.refuse(expected, value, remedy)
    return text


def wheel_url(value: object, place: Place) -> str:
    """The address of a wheel."""
    expected = "the http(s) URL of a .whl file"
    text = _web(value, place, expected)
    if not re.split(r"[?#]", text)[0].endswith(".whl"):
        place.refuse(expected, value)
    return text


def wheel_path(value: object, place: Place) -> str:
    """The path of a wheel."""
    wheel = file(value, place)
    if not wheel.endswith(".whl"):
        place.refuse("the path of a .whl file", value)
    return wheel


def links(value: object, place: Place) -> str:
    """A page that links to wheels, or a directory of them."""
    expected = "an http(s) URL or a directory"
    text = _text(value, place, expected)
    return _web(text, place, expected) if "://" in text else path(text, place)


# --- addresses ---


def _refuse_credentials(text: str, place: Place) -> None:
    if re.search(r"://[^/?#\s]*@", text):  # the user part of RFC 3986, section 3.2
        place.refuse_secret()


def _web(value: object, place: Place, expected: str) -> str:
    text = _text(value, place, expected)
    _refuse_credentials(text, place)
    if not re.match(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?([/?#]|$)", text, re.IGNORECASE):
        place.refuse(expected, value)
    return text


def endpoint(value: object, place: Place) -> str:
    """The address of a storage service."""
    expected = 'an http(s) URL such as "https://s3.us-west-004.backblazeb2.com"'
    text = _web(value, place, expected)
    if not is_endpoint(text):
        place.refuse(expected, value)
    return text.rstrip("/")


def is_endpoint(text: str) -> bool:
    """Whether `text` is the address of a storage service: obstore panics over many that are none."""
    found = _ENDPOINT.fullmatch(text)
    if found is None:
        return False
    try:
        if found["six"]:
            from ipaddress import IPv6Address

            IPv6Address(found["six"])
    except ValueError:
        return False
    return int(found["port"] or 0) < 1 << 16


def store(value: object, place: Place) -> str:
    """The URL of a store; a path becomes a file:// URL."""
    expected = "s3://BUCKET/PREFIX, gs://, az://, file:///DIRECTORY or a directory"
    text = _text(value, place, expected)
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator and not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        return _directory_url(path(text, place), place)
    if scheme == "file" and rest.startswith("/"):
        from urllib.parse import unquote

        return _directory_url(os.path.abspath(unquote(rest)), place)
    if scheme not in ("s3", "gs", "az"):
        place.refuse(
            expected,
            re.split("[:/]", text)[0] + ":...",  # what follows may hold credentials
            "Services that speak S3, as B2 and R2 do, are s3:// with storage.endpoint; file:/// has three slashes.",
        )
    bucket, _, prefix = rest.partition("/")
    # A secret may hold slashes, and a SAS token is a query: nothing that could be one is repeated.
    if re.search("[@?#]", rest) or ":" in bucket:
        place.refuse_secret()
    parts = [part for part in prefix.split("/") if part]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or {".", ".."} & set(parts):
        place.refuse(expected, value)
    return "/".join([f"{scheme}://{bucket}", *parts])


def as_bucket(text: str) -> str:
    """The s3:// URL that was meant, where only its beginning seems to be missing from `text`; else ""."""
    return f"s3://{text}" if re.fullmatch(r"[a-z0-9][a-z0-9.-]{2,62}(/[A-Za-z0-9._-]+)*/?", text) else ""


def _directory_url(directory: str, place: Place) -> str:
    if directory == "/":
        place.refuse("a directory for the store alone", directory)
    return Path(directory).as_uri()
