"""`packhorse status` tells the facts, also those that are in nobody's favour, and ends with 0."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


@pytest.fixture
def filled(root_path: Path) -> Path:
    """A root with something to save."""
    root_path.mkdir(mode=0o700)
    for name in ("packages", "models"):
        (root_path / name).mkdir(mode=0o700)
        (root_path / name / "file").write_bytes(os.urandom(2_000_000))
    return root_path


def _status(packhorse: Packhorse, *words: str, **options: Any) -> dict[str, Any]:
    done = packhorse("status", "--json", *words, **options)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_an_empty_root_and_store_are_facts(packhorse: Packhorse, root_path: Path) -> None:
    facts = _status(packhorse)
    assert facts["state"] == "empty"
    assert facts["root"] == str(root_path)
    assert list(facts["directories"]) == ["packages", "pip", "models", "deps", "tmp", "build"]
    assert (facts["store"]["objects"], facts["store"]["bytes"], facts["store"]["tag"]) == (0, 0, None)
    assert "has no snapshot" in facts["store"]["reason"]
    assert "has no snapshot" in packhorse("status").stdout


def test_usage_is_told_by_directory_and_for_the_disks(packhorse: Packhorse, filled: Path) -> None:
    facts = _status(packhorse)
    assert facts["directories"]["packages"]["files"] == 1
    assert 2_000_000 <= facts["directories"]["packages"]["bytes"] < 2_100_000
    assert 4_000_000 <= facts["root_bytes"] < 4_200_000
    real = shutil.disk_usage("/")
    assert facts["os_disk"]["total"] == real.total
    assert 0 < facts["os_disk"]["free"] < facts["os_disk"]["total"]
    assert facts["root_on_os_disk"] is (filled.stat().st_dev == Path("/").stat().st_dev)
    assert 0 < facts["memory"]["used"] < facts["memory"]["limit"]


def test_whether_the_root_equals_the_tag_is_told(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    pushed = json.loads(packhorse("push", "--json").stdout)
    facts = _status(packhorse)
    assert facts["state"] == "complete"
    tag = facts["store"]["tag"]
    assert (tag["snapshot"], tag["equal"]) == (pushed["snapshot"], True)
    assert "The root equals it." in packhorse("status").stdout

    (filled / "models/new").write_text("new")
    tag = _status(packhorse)["store"]["tag"]
    assert (tag["equal"], tag["packages_equal"], tag["unsaved"], tag["missing"]) == (False, True, 1, 0)

    (filled / "packages/file").write_text("changed")
    tag = _status(packhorse)["store"]["tag"]
    assert (tag["equal"], tag["packages_equal"]) == (False, False)
    assert "packages/ differs, 1 shared entr" in packhorse("status").stdout

    other = {"PACKHORSE_ROOT": str(tmp_path / "other")}
    packhorse("pull", env=other)
    packhorse("push")
    tag = _status(packhorse, env=other)["store"]["tag"]
    assert (tag["equal"], tag["packages_equal"], tag["unsaved"], tag["missing"]) == (False, False, 0, 1)
    packhorse("pull", env=other)
    assert _status(packhorse, env=other)["store"]["tag"]["equal"]


def test_what_the_store_costs_is_told(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    packhorse("push")
    store = _status(packhorse)["store"]
    held = [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
    assert (store["objects"], store["bytes"]) == (len(held), sum(file.stat().st_size for file in held))
    assert (store["provider"], store["dollars_month"]) == (None, None)
    assert "price unknown" in packhorse("status").stdout
    priced = _status(packhorse, "--price", "100")["store"]
    assert priced["dollars_gb_month"] == 100
    assert priced["dollars_month"] == pytest.approx(store["bytes"] / 1e9 * 100, abs=1e-4)
    assert "$0.40 a month" in packhorse("status", "--price", "100").stdout


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(packhorse: Packhorse, price: str) -> None:
    refused = packhorse("status", "--price", price)
    assert refused.returncode == 2
    assert "--price" in refused.stderr


def test_the_price_is_that_of_the_endpoint_which_is_asked(
    packhorse: Packhorse, filled: Path, seaweedfs: S3Server
) -> None:
    assert filled
    provider = "https://s3.us-west-004.backblazeb2.com"
    assert _status(packhorse, env={"AWS_ENDPOINT_URL": provider})["store"]["provider"] is None
    env = {**seaweedfs.environ(), "PACKHORSE_STORAGE_URL": f"s3://{seaweedfs.new_bucket()}"}
    env |= {"AWS_ENDPOINT_URL_S3": seaweedfs.endpoint, "AWS_ENDPOINT_URL": provider}
    store = _status(packhorse, env=env)["store"]
    assert (store["objects"], store["provider"]) == (0, None)


def test_packages_that_the_tag_has_none_of_make_the_root_differ(
    packhorse: Packhorse, root_path: Path
) -> None:
    packhorse("status")
    (root_path / "models/file").write_text("a model")
    packhorse("push")
    env = {"PACKHORSE_ROOT": str(root_path.with_name("other"))}
    packhorse("pull", env=env)
    assert _status(packhorse, env=env)["store"]["tag"]["equal"]
    (root_path.with_name("other") / "packages/module.py").write_text("x = 1")
    tag = _status(packhorse, env=env)["store"]["tag"]
    assert (tag["equal"], tag["packages_equal"]) == (False, False)
    packhorse("push", env=env)
    assert _status(packhorse, env=env)["store"]["tag"]["equal"]


def test_a_store_out_of_reach_is_a_fact_too(packhorse: Packhorse, filled: Path, seaweedfs: S3Server) -> None:
    env = {"PACKHORSE_STORAGE_URL": "s3://no-such-bucket", "PACKHORSE_STORAGE_ENDPOINT": seaweedfs.endpoint}
    for credentials, said in (({}, "no credentials"), (seaweedfs.environ(), "does not exist")):
        facts = _status(packhorse, env={**env, **credentials})
        assert said in facts["store"]["error"]
        assert facts["directories"]["packages"]["files"] == 1
    text = packhorse("status", env=env)
    assert (text.returncode, "no credentials" in text.stdout) == (0, True)


def test_a_requirements_file_that_is_not_there_is_a_fact_too(
    packhorse: Packhorse, filled: Path, tmp_path: Path
) -> None:
    packhorse("push")
    (tmp_path / "packhorse.toml").write_text('[environment]\nrequirements = ["requirements.txt"]')
    said = f"{tmp_path / 'requirements.txt'} cannot be read: No such file or directory."
    facts = _status(packhorse)
    assert facts["environment"]["error"].startswith(f"{said} Create it, ")
    assert facts["store"]["objects"] > 0
    assert f"Packages  {said}" in packhorse("status").stdout
    (tmp_path / "requirements.txt").mkdir()
    assert "Is a directory. Name a file, " in _status(packhorse)["environment"]["error"]
    (tmp_path / "requirements.txt").rmdir()
    (tmp_path / "requirements.txt").touch()
    assert len(_status(packhorse)["environment"]["fingerprint"]) == 64


def test_a_corrupt_store_is_a_fact_too(packhorse: Packhorse, filled: Path, tmp_path: Path) -> None:
    packhorse("push")
    shutil.rmtree(filled / ".packhorse")
    for manifest in (tmp_path / "store/manifests").iterdir():
        manifest.write_bytes(b"garbage")
    assert "malformed" in _status(packhorse)["store"]["error"]
