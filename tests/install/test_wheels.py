from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Cut, Index, Status, wheel

from packhorse.errors import IntegrityError, PackhorseError
from packhorse.install.wheels import Override, distributions, merge


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def test_an_extra_wheel_takes_the_place_of_what_the_resolver_chose(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    index.add(
        "flash-attn",
        "2.7",
        {"flash_attn/__init__.py": "", "flash_attn/gone.py": "", "flash_attn/old/x.py": ""},
    )
    index.add("app", "1.0", requires=["flash-attn"])
    path = wheel(tmp_path, "Flash_Attn", "2.8", {"flash_attn/__init__.py": "NEW = True"})

    done = installer(
        dependencies=["app"], wheels=[{"name": "flash-attn", "path": str(path)}], verify=["flash_attn"]
    )

    packages = installer.root.packages
    assert done.wheels == [Override("flash-attn", "2.7", "2.8")]
    assert done.distributions == 2
    assert (packages / "flash_attn" / "__init__.py").read_text() == "NEW = True"
    assert not (packages / "flash_attn" / "gone.py").exists()
    assert not (packages / "flash_attn" / "old").exists()
    assert [found.version for found in distributions(packages) if found.name == "flash-attn"] == ["2.8"]
    assert "flash-attn 2.8 instead of 2.7, from its own wheel" in installer.notes


def test_scripts_and_namespace_packages_of_others_stay(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    def script(name: str, text: str) -> dict[str, str | bytes]:
        return {
            f"google/{name}/__init__.py": text,
            f"{name}-1.data/scripts/{name}": f"#!python\nprint({text!r})\n",
            f"{name}-1.data/scripts/{name}-{text}": f"#!python\nprint({text!r})\n",
            f"{name}-1.data/data/share/{text}": text,
        }

    index.add("one", "1", script("one", "old"))
    index.add("two", "1", script("two", "other"))
    path = wheel(tmp_path, "one", "1", script("one", "new"))

    installer(dependencies=["one", "two"], wheels=[{"name": "one", "path": str(path)}])

    packages = installer.root.packages
    assert {item.name for item in (packages / "bin").iterdir()} == {"one", "one-new", "two", "two-other"}
    assert "new" in (packages / "bin" / "one").read_text()
    assert {item.name for item in (packages / "share").iterdir()} == {"new", "other"}
    assert (packages / "google" / "one" / "__init__.py").read_text() == "new"
    assert (packages / "google" / "two" / "__init__.py").read_text() == "other"


def test_wheels_come_in_their_order_and_without_their_dependencies(
    installer: Installer, tmp_path: Path
) -> None:
    first = wheel(tmp_path, "first", "1", {"shared.py": "first"}, requires=["nowhere-to-be-found"])
    second = wheel(tmp_path, "second", "1", {"shared.py": "second"})

    def install(*paths: Path) -> str:
        installer(wheels=[{"name": path.name.partition("-")[0], "path": str(path)} for path in paths])
        return (installer.root.packages / "shared.py").read_text()

    assert install(first, second) == "second"
    assert install(second, first) == "first"


def test_a_wheel_comes_from_a_url(index: Index, installer: Installer) -> None:
    path = index.add("foo", "1.0")

    done = installer(
        wheels=[{"name": "foo", "url": f"http://{index.host}/files/{path.name}"}], verify=["foo"]
    )

    assert done.wheels == [Override("foo", "", "1.0")]


def test_a_wheel_is_fetched_under_the_network_policy_and_checked(index: Index, installer: Installer) -> None:
    path = index.add("foo", "1.0", {"foo.py": "", "foo.bin": os.urandom(2_000_000)})
    url = f"http://{index.host}/files/{path.name}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index.fail(path.name, Status(503), Cut(after=1_500_000))

    installer(wheels=[{"name": "foo", "url": f"{url}#sha256={digest}"}])
    assert [int(wait) for wait in installer.waits] == [1, 1]
    assert any("the connection broke at 1,500,000 of 2,0" in note for note in installer.notes)
    with pytest.raises(IntegrityError, match="is not the file that was announced"):
        installer(wheels=[{"name": "foo", "url": f"{url}#sha256={'0' * 64}"}])


def test_what_a_wheel_overrides_is_not_fetched(index: Index, installer: Installer, tmp_path: Path) -> None:
    index.add("app", "1.0", requires=["foo"])
    replaced = index.add("foo", "1.0")
    path = wheel(tmp_path, "foo", "1.5")

    installer(dependencies=["app"], wheels=[{"name": "foo", "path": str(path)}])

    assert replaced.name not in index.requests


def test_an_unchanged_wheel_is_linked(index: Index, installer: Installer, tmp_path: Path) -> None:
    """Also one whose name says more than its metadata, as those that were built for one torch."""
    index.add("bar", "1.0")
    made = index.add("foo", "1.0")
    path = made.rename(made.with_name("foo-1.0+cu12torch2.6-py3-none-any.whl"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wheels = [{"name": "foo", "url": f"http://{index.host}/files/{path.name}#sha256={digest}"}]

    installer(wheels=wheels)
    done = installer(dependencies=["bar"], wheels=wheels, verify=["foo", "bar"])

    assert index.requests.count(path.name) == 1
    assert done.wheels == [Override("foo", "", "1.0")]


def test_a_wheel_of_another_name_is_refused(installer: Installer, tmp_path: Path) -> None:
    path = wheel(tmp_path, "foo", "1.0")

    with pytest.raises(PackhorseError, match="is a wheel of foo, not of bar"):
        installer(wheels=[{"name": "bar", "path": str(path)}])


def test_a_wheel_found_by_links_comes_from_nowhere_else(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    index.add("foo", "3.0")
    links = tmp_path / "some wheels"
    links.mkdir()
    wheel(links, "foo", "1.0")
    wheel(links, "foo", "2.0")

    newest = installer(wheels=[{"name": "foo", "find-links": [str(links)]}])
    exact = installer(wheels=[{"name": "foo", "version": "1.0", "find-links": [str(links)]}])

    assert [override.new for override in newest.wheels + exact.wheels] == ["2.0", "1.0"]
    assert index.requests == []


def test_a_file_and_a_directory_of_the_same_name_give_way_to_the_new_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old / "a" / "x", old / "b", new / "a", new / "b" / "y"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    merge(new, old)

    assert _names(old) == {"a", "b/y"}


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    outside, old, new = tmp_path / "outside", tmp_path / "old", tmp_path / "new"
    for directory in (outside, old, new / "package"):
        directory.mkdir(parents=True)
    (old / "package").symlink_to(outside)
    (new / "package" / "x").write_text("")

    merge(new, old)

    assert _names(outside) == set()
    assert _names(old) == {"package/x"}


def test_a_record_that_leads_out_of_the_directory_removes_nothing_there(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for directory, version in ((old, "1"), (new, "2")):
        info = directory / f"foo-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: foo\nVersion: {version}\n")
        (info / "RECORD").write_text(
            f"foo-{version}.dist-info/METADATA,,\nfoo-{version}.dist-info/RECORD,,\n"
            f"../keep,,\na/../../keep,,\n{tmp_path}/keep,,\n"
        )
    (tmp_path / "keep").write_text("")

    assert merge(new, old) == [Override("foo", "1", "2")]
    assert (tmp_path / "keep").exists()
    assert _names(old) == {"foo-2.dist-info/METADATA", "foo-2.dist-info/RECORD"}
