from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.install.index import wheel

from packhorse.config import Environment, Wheel
from packhorse.errors import ConfigError
from packhorse.install.fingerprint import fingerprint
from packhorse.install.interpreter import Interpreter

PYTHON = Interpreter("/usr/bin/python3", "3.11.7", "cpython-311-x86_64-linux-gnu", "linux-x86_64")


def _of(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return fingerprint(Environment(requirements=(str(path),)), PYTHON)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "requirements.txt"


def test_nothing_configured_has_no_fingerprint() -> None:
    assert fingerprint(Environment(verify=("torch",)), PYTHON) == ""


def test_it_is_64_hexadecimal_digits(file: Path) -> None:
    digits = _of(file, "torch==2.6.0")

    assert len(digits) == 64
    int(digits, 16)


def test_comments_blank_lines_spaces_and_the_order_of_lines_do_not_matter(file: Path) -> None:
    plain = _of(file, "torch==2.6.0\nnumpy<2\n")

    assert _of(file, "# ours\n\n  numpy<2   # old\r\n\ntorch==2.6.0\n\n") == plain
    assert _of(file, "numpy<2 \\\n\ntorch==2.6.0\n") == plain


def test_where_the_files_lie_does_not_matter(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "base.txt").write_text("numpy")

    assert _of(tmp_path / "one" / "a.txt", "-r base.txt") == _of(tmp_path / "two" / "b.txt", "-r base.txt")


@pytest.mark.parametrize(
    "changed",
    [
        "torch==2.6.1\n",
        "torch==2.6.0\nnumpy\n",
        "torch==2.6.0 --hash=sha256:abc\n",
        "torch==2.6.0 ; python_version > '3'\n",
        "--index-url https://example.org/simple\ntorch==2.6.0\n",
        "--extra-index-url https://example.org/simple\ntorch==2.6.0\n",
        "torch @ https://example.org/torch.whl#sha256=abc\n",
    ],
)
def test_versions_hashes_markers_and_indexes_matter(file: Path, changed: str) -> None:
    plain = _of(file, "torch==2.6.0\n")

    assert _of(file, changed) != plain


@pytest.mark.parametrize(
    "include",
    [
        "-r base.txt",
        "-rbase.txt",
        "--requirement base.txt",
        "--requirement=base.txt",
        "-c base.txt",
        '-r "base.txt"',
    ],
)
def test_a_change_in_an_included_file_is_noticed(tmp_path: Path, file: Path, include: str) -> None:
    base = tmp_path / "base.txt"
    (tmp_path / "deepest.txt").write_text("six")
    base.write_text("numpy==1\n-r deepest.txt")
    before = _of(file, include)
    base.write_text("numpy==2\n-r deepest.txt")
    between = _of(file, include)
    (tmp_path / "deepest.txt").write_text("six==1")

    assert len({before, between, _of(file, include)}) == 3


def test_a_constraint_is_not_a_requirement(tmp_path: Path, file: Path) -> None:
    (tmp_path / "base.txt").write_text("numpy==1")

    assert _of(file, "-r base.txt") != _of(file, "-c base.txt")


def test_files_that_include_each_other_come_to_an_end(tmp_path: Path, file: Path) -> None:
    (tmp_path / "base.txt").write_text(f"-r {file.name}\nnumpy")

    assert _of(file, "-r base.txt\nsix") == _of(file, "six\nnumpy")


def test_an_included_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read: No such file"):
        _of(file, "-r missing.txt")


def test_credentials_do_not_matter(file: Path) -> None:
    index = "--extra-index-url https://{}example.org/simple\nfoo @ https://{}example.org/f.whl{}\n"
    plain = _of(file, index.format("", "", "?X-Amz-Signature=&a=b"))

    assert _of(file, index.format("me:secret@", "tok%40en@", "?X-Amz-Signature=0123&a=b")) == plain
    assert _of(file, index.format("me:p@ss@", "${TOKEN}@", "?X-Amz-Signature=4567&a=b")) == plain
    assert _of(file, index.format("", "", "?X-Amz-Signature=&a=c")) != plain


def test_dependencies_count_whatever_their_order() -> None:
    one = fingerprint(Environment(dependencies=("torch", "numpy  <2")), PYTHON)

    assert fingerprint(Environment(dependencies=("numpy <2", "torch")), PYTHON) == one
    assert fingerprint(Environment(dependencies=("numpy", "torch")), PYTHON) != one


def test_extra_wheels_count_in_their_order(tmp_path: Path) -> None:
    one = Wheel("flash-attn", "2.8.0", find_links=("https://example.org/wheels/",))
    two = Wheel("other", url="https://example.org/other.whl")

    def of(*wheels: Wheel) -> str:
        return fingerprint(Environment(wheels=wheels), PYTHON)

    assert of(one, two) != of(two, one)
    assert of(msgspec.structs.replace(one, name="Flash_Attn"), two) == of(one, two)
    assert of(msgspec.structs.replace(one, version="2.8.1"), two) != of(one, two)
    assert of(one, msgspec.structs.replace(two, url="https://me:secret@example.org/other.whl")) == of(
        one, two
    )


def test_the_content_of_a_wheel_counts_not_its_path(tmp_path: Path) -> None:
    def of(path: Path) -> str:
        return fingerprint(Environment(wheels=(Wheel("foo", path=str(path)),)), PYTHON)

    before = of(wheel(tmp_path, "foo", "1.0"))
    (tmp_path / "elsewhere").mkdir()

    assert of((tmp_path / "foo-1.0-py3-none-any.whl").rename(tmp_path / "elsewhere" / "foo.whl")) == before
    assert of(wheel(tmp_path, "foo", "1.0", {"foo.py": "other"})) != before
    with pytest.raises(ConfigError, match="nothing"):
        of(tmp_path / "nothing")


def test_a_new_wheel_in_a_directory_of_links_is_noticed(tmp_path: Path) -> None:
    def now() -> str:
        return fingerprint(Environment(wheels=(Wheel("foo", find_links=(str(tmp_path),)),)), PYTHON)

    wheel(tmp_path, "foo", "1.0")
    before = now()
    wheel(tmp_path, "bar", "1.0")
    assert now() == before
    wheel(tmp_path, "foo", "1.1")
    assert now() != before


def test_python_and_platform_count_but_not_the_patch_release_or_the_path(file: Path) -> None:
    environment = Environment(dependencies=("torch",))
    before = fingerprint(environment, PYTHON)

    def other(**changes: str) -> str:
        return fingerprint(environment, msgspec.structs.replace(PYTHON, **changes))

    assert other(version="3.11.9", path="/opt/python") == before
    assert other(version="3.12.0") != before
    assert other(soabi="cpython-311t-x86_64-linux-gnu") != before
    assert other(platform="linux-aarch64") != before


def test_what_does_not_change_the_files_does_not_matter() -> None:
    plain = fingerprint(Environment(dependencies=("torch",)), PYTHON)

    other = Environment(dependencies=("torch",), verify=("torch",), keep_downloads=True, python="python3.11")
    assert fingerprint(other, PYTHON) == plain


def test_the_profile_and_its_patterns_matter_and_patterns_without_the_profile_do_not() -> None:
    def of(**environment: object) -> str:
        return fingerprint(msgspec.convert({"dependencies": ["six"], **environment}, Environment), PYTHON)

    slim = of(profile="slim")
    others = {of(profile="slim", **{key: ["*.h"]}) for key in ("slim-keep", "slim-remove")}
    assert len({of(), slim, *others}) == 4
    assert of(**{"slim-keep": ["*.h"]}) == of()
    assert of(profile="slim", **{"slim-keep": ["a", "b"]}) == of(profile="slim", **{"slim-keep": ["b", "a"]})


def test_a_variable_counts_in_a_requirement_but_not_where_it_may_be_a_secret(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "--index-url https://example.org/${TOKEN}/simple\nfoo @ https://example.org/${TOKEN}/foo.zip\n"
    monkeypatch.setenv("VERSION", "1.0")
    plain = _of(file, f"{secret}torch==${{VERSION}}\n")
    monkeypatch.setenv("TOKEN", "SECRET")
    assert _of(file, f"{secret}torch==1.0\n") == plain
    assert _of(file, f"{secret}torch==2.0\n") != plain
