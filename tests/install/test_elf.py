from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.install import native

from packhorse.install import elf
from packhorse.install.elf import Wanted


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extension module that was compiled against the library that plays torch's part."""
    directory = tmp_path_factory.mktemp("native")
    path = directory / f"fast{native.SUFFIX}"
    path.write_bytes(native.extension(directory, "fast"))
    return path


def _nm(path: Path, *options: str) -> dict[str, str]:
    """The dynamic symbols as binutils tell them: type by name, without versions."""
    listed = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^[0-9a-f ]{16} (\w) (\S+)$", listed, re.MULTILINE)
    return {name.partition("@")[0]: kind for kind, name in found}


def _libstdcxx() -> Path:
    named = subprocess.run(
        ["g++", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True
    )
    return Path(named.stdout.strip()).resolve()


def test_symbols_are_those_that_nm_lists(module: Path) -> None:
    for path in (module, _libstdcxx()):
        with elf.open_library(path) or pytest.fail() as library:
            assert {name for name in library.defined if name} == set(_nm(path, "--defined-only"))
            wanted = {symbol.name: symbol.weak for symbol in library.wanted()}
        listed = _nm(path, "--undefined-only")
        assert wanted == {name: kind in "wv" for name, kind in listed.items()}


def test_weak_symbols_and_needs_are_told(module: Path) -> None:
    with elf.open_library(module) or pytest.fail() as library:
        assert Wanted("optional_part", True) in library.wanted()
        assert Wanted("_ZN3c106answerEv", False) in library.wanted()
        assert library.needed[0] == "libc10.so"
        assert library.soname == module.name and library.runpath == library.rpath == []


def test_search_paths_and_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("")
    target = tmp_path / "libempty.so"
    options = ["-Wl,-soname,libother.so.1", "-Wl,-rpath,$ORIGIN/a:/b"]
    for tags in ("--enable-new-dtags", "--disable-new-dtags"):
        command = ["gcc", "-shared", tmp_path / "empty.c", *options, f"-Wl,{tags}", "-o", target]
        subprocess.run(command, check=True)
        with elf.open_library(target) or pytest.fail() as library:
            assert library.soname == "libother.so.1"
            assert {tuple(library.runpath), tuple(library.rpath)} == {("$ORIGIN/a", "/b"), ()}
            assert bool(library.runpath) == (tags == "--enable-new-dtags")


def test_both_kinds_of_hash_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "source.c").write_text(
        "int one(void) { return 1; } int two(void); int three(void) { return two(); }"
    )
    for style in ("gnu", "sysv", "both"):
        target = tmp_path / f"{style}.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", tmp_path / "source.c", f"-Wl,--hash-style={style}", "-o", target],
            check=True,
        )
        with elf.open_library(target) or pytest.fail() as library:
            assert [name in library.defined for name in ("one", "two", "three", "four")] == [
                True,
                False,
                True,
                False,
            ]
            assert Wanted("two", False) in library.wanted()


def test_versions_are_read(module: Path) -> None:
    with elf.open_library(_libstdcxx()) or pytest.fail() as library:
        assert "GLIBCXX_3.4" in library.versions and "CXXABI_1.3" in library.versions
        assert any(wanted.file == "libc.so.6" for wanted in library.wanted_versions())


def test_what_is_no_library_is_none(module: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "cut").write_bytes(module.read_bytes()[:100])
    (tmp_path / "script.so").write_text("INPUT(libc10.so)")
    for name in ("text", "cut", "script.so", "gone", "."):
        assert elf.open_library(tmp_path / name) is None
