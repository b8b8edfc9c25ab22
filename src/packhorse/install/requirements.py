"""Requirements files, read as pip reads them: their lines, with those of the files they include.

Promises to leave the lines as they are, credentials included, but for variables in what is asked for. Knows of their
meaning only which distribution each is about.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from packhorse.config_values import VARIABLE
from packhorse.errors import ConfigError

_COMMENT = re.compile(r"(^|\s+)#.*$")
_INCLUDE = re.compile(r"(?:(-r|-c)\s*|(--requirement|--constraint)(?:\s+|\s*=\s*))(\S.*)")
_SOURCES = re.compile(
    r"(-i|-f|--(index-url|extra-index-url|find-links|no-index|trusted-host|no-binary|only-binary|pre|prefer-binary)\b)"
)
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_LINKS = re.compile(r"(-f\s*|--find-links(?:\s+|\s*=\s*))(\S.*)")


class Line(NamedTuple):
    """A line with its spaces made single; `kind` is "requirement" or "constraint", `file` where it stands."""

    kind: str
    text: str
    file: str
    remote: bool = False
    """Whether it includes a file by URL, whose lines are not known here."""

    @property
    def parts(self) -> tuple[str, str]:
        """The requirement, and the options behind it (pip's manual, "Per-requirement options")."""
        words = self.text.split(" ")
        if words[0].startswith("-"):
            return "", self.text
        first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
        return " ".join(words[:first]), " ".join(words[first:])


def lines(paths: Iterable[str]) -> Iterator[Line]:
    """The lines that count, of all these files. Raises ConfigError where one cannot be read."""
    seen: set[tuple[str, str]] = set()
    for path in paths:
        yield from _lines(path, "requirement", seen)


def asked(texts: Iterable[str]) -> list[Line]:
    """Requirements that stand in no file, as lines."""
    return [Line("requirement", _with_variables(text), "") for text in texts]


def sources(found: Iterable[Line]) -> list[str]:
    """The lines that say where packages come from, with paths that hold from any file."""
    return [_from_anywhere(line) for line in found if _SOURCES.match(line.text)]


class Named(NamedTuple):
    """Which distribution a line is about, by its normalised name, and whether it says an exact version or a URL."""

    name: str
    exact: bool


def named(line: Line, environment: Mapping[str, str]) -> Named | None:
    """What a line is about; None where it is no requirement, or its marker does not hold under `environment`."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    text, _ = line.parts
    if not text or line.remote:
        return None
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        name = _of_file(text.partition(" ; ")[0])
        return Named(name, True) if name else None
    if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": ""}):
        return None
    operators = [each.operator for each in requirement.specifier]
    exact = requirement.url is not None or (len(operators) == 1 and operators[0] in ("==", "==="))
    return Named(canonicalize_name(requirement.name), exact)


def _of_file(path: str) -> str:
    """The distribution that the name of a wheel or a source archive tells."""
    from packaging import utils

    file = unquote(urlsplit(path).path).rsplit("/", 1)[-1].partition("[")[0]
    with contextlib.suppress(utils.InvalidWheelFilename):
        return utils.parse_wheel_filename(file)[0]
    with contextlib.suppress(utils.InvalidSdistFilename):
        return utils.parse_sdist_filename(file)[0]
    return ""


def flat(found: Iterable[Line], directory: Path, keep: Callable[[str], bool]) -> Path:
    """One requirements file in `directory` that says what the lines say, of the options behind requirements only
    those that `keep` says. What is included by URL cannot be among them."""
    texts: dict[str, list[str]] = {"requirement": [], "constraint": []}
    for line in found:
        requirement, options = line.parts
        if requirement:
            kept = " ".join(option for option in split_options(options) if keep(option))
            texts[line.kind].append(f"{requirement} {kept}".strip())
        else:
            texts[line.kind].append(_from_anywhere(line).replace("--require-hashes", "").strip())
    path, constraints = directory / "flat.txt", directory / "flat-constraints.txt"
    _write(constraints, texts["constraint"])
    _write(path, [*texts["requirement"], f"-c {constraints}"])
    return path


def split_options(text: str) -> list[str]:
    """Each option of a line with its value, quoted as it was."""
    found: list[str] = []
    for word in text.split(" ") if text else ():
        if word.startswith("-") or not found:
            found.append(word)
        else:
            found[-1] += f" {word}"
    return found


def _write(path: Path, texts: Iterable[str]) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def _from_anywhere(line: Line) -> str:
    links = _LINKS.fullmatch(line.text)
    beside = os.path.join(os.path.dirname(line.file), _unquoted(links[2])) if links else ""
    return f"--find-links {shlex.quote(beside)}" if links and os.path.exists(beside) else line.text


def _lines(path: str, kind: str, seen: set[tuple[str, str]]) -> Iterator[Line]:
    if (path, kind) in seen:
        return
    seen.add((path, kind))
    yield from _parsed(_read(path), path, kind, seen)


def included(line: Line, content: bytes) -> Iterator[Line]:
    """The lines of the file that a `remote` line includes; what that includes lies beside it."""
    return _parsed(_text(content), line.text, line.kind, set())


def _parsed(content: str, path: str, kind: str, seen: set[tuple[str, str]]) -> Iterator[Line]:
    for line in _joined(content):
        text = " ".join(_COMMENT.sub("", line).split())
        include = _INCLUDE.fullmatch(text)
        if include is None:
            if text:
                yield Line(kind, _with_variables(text), path)
            continue
        target = _put_in(_unquoted(include[3]))
        if "://" in path:
            target = urljoin(path, target)
        elif "://" not in target:
            target = os.path.join(os.path.dirname(path), target)
        wanted = "constraint" if (include[1] or include[2]) in ("-c", "--constraint") else kind
        if "://" in target:
            yield Line(wanted, target, path, remote=True)
        else:
            yield from _lines(target, wanted, seen)


def _with_variables(text: str) -> str:
    """A requirement with the values of its variables; in options and URLs they may be credentials, which pip puts in."""
    return text if text.startswith("-") or "://" in text else _put_in(text)


def _put_in(text: str) -> str:
    return VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[0], text)


def _joined(content: str) -> Iterator[str]:
    """The lines, those joined that end in a backslash; a comment never goes on."""
    before = ""
    for line in content.splitlines():
        comment = _COMMENT.match(line)
        if line.endswith("\\") and not comment:
            before += line.rstrip("\\")
            continue
        yield f"{before} {line}" if comment else before + line
        before = ""
    yield before


def _unquoted(text: str) -> str:
    try:
        return shlex.split(text)[0]
    except (ValueError, IndexError):
        return text


def _read(path: str) -> str:
    return _text(read_bytes(path))


def _text(content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_bytes(path: str, make: str = "Create it") -> bytes:
    """A file that the configuration or a requirements file names. Raises ConfigError where that fails; `make` says how to
    come by one."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error, make) from error


def unreadable(path: str, error: OSError, make: str = "Create it") -> ConfigError:
    """For what is named but cannot be read."""
    remedies = {
        errno.EISDIR: "Name a file",
        errno.EACCES: "Let this user read it",
        errno.ENOTDIR: "Name a directory",
    }
    return ConfigError(
        f"{path} cannot be read: {error.strerror}.",
        f"{remedies.get(error.errno or 0, make)}, or correct what names it: [environment] in the configuration or a "
        "requirements file.",
    )
