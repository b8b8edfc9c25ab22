"""Mending a store: a push that trusts nothing it finds there; and pushes with nothing to say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.conftest import Packhorse

from packhorse.store import tags
from packhorse.store.tags import SnapshotFacts


@pytest.fixture
def filled(packhorse: Packhorse, root_path: Path, tmp_path: Path) -> list[str]:
    """The flags of a root that is pushed: packages and a model."""
    flags = ["--root", str(root_path), "--store", (tmp_path / "store").as_uri()]
    packhorse("status", *flags)
    (root_path / "packages" / "module.py").write_text("VALUE = 1\n")
    (root_path / "models" / "weights").write_bytes(bytes(range(256)) * 100)
    assert packhorse("push", *flags).returncode == 0
    return flags


@pytest.mark.parametrize("damage", ["corrupt", "lost"])
@pytest.mark.parametrize("kind", ["packs", "manifests", "placements"])
def test_a_push_with_repair_mends_what_is_corrupt_or_lost(
    kind: str, damage: str, packhorse: Packhorse, filled: list[str], tmp_path: Path
) -> None:
    for file in [file for file in (tmp_path / "store" / kind).rglob("*") if file.is_file()]:
        if damage == "corrupt":
            file.write_bytes(bytes(reversed(file.read_bytes())))
        else:
            file.unlink()
    elsewhere = ["--root", str(tmp_path / "another"), *filled[2:]]
    assert packhorse("pull", *elsewhere).returncode == 4
    assert packhorse("push", *filled).returncode == 0
    assert packhorse("pull", *elsewhere).returncode == 4  # a plain push believes the store
    mended = packhorse("push", "--repair", *filled)
    assert mended.returncode == 0, mended.stderr
    pulled = packhorse("pull", *elsewhere)
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "another" / "packages" / "module.py").read_text() == "VALUE = 1\n"
    assert (tmp_path / "another" / "models" / "weights").read_bytes() == bytes(range(256)) * 100


def test_an_empty_root_has_nothing_to_save_and_names_no_snapshot(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    flags = ["--root", str(root_path), "--store", (tmp_path / "store").as_uri()]
    assert json.loads(packhorse("push", "--json", *flags).stdout)["snapshot"] == ""
    assert "nothing to save" in packhorse("push", *flags).stdout
    assert json.loads(packhorse("snapshots", "--json", *flags).stdout) == {"snapshots": []}


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_corrupt_documents_that_nothing_hangs_on_stop_no_listing_and_no_prune(
    packhorse: Packhorse, filled: list[str], root_path: Path, tmp_path: Path, content: bytes
) -> None:
    (root_path / "models" / "more").write_text("more")
    assert packhorse("push", *filled).returncode == 0
    entries = [file for file in (tmp_path / "store" / "tags").rglob("*") if file.is_file()]
    snapshots = list((tmp_path / "store" / "snapshots").iterdir())
    assert (len(entries), len(snapshots)) == (3, 2)
    for file in (*entries, *snapshots):
        file.write_bytes(content)
    listed = packhorse("snapshots", "--json", *filled)
    assert listed.returncode == 0, listed.stderr
    assert [each["snapshot"] for each in json.loads(listed.stdout)["snapshots"]] == ["", "", ""]
    assert packhorse("snapshots", *filled).stdout.count("(entry is corrupt)") == 3
    pruned = packhorse("prune", "--json", *filled)
    assert pruned.returncode == 0, pruned.stderr
    assert json.loads(pruned.stdout)["kept"] == 3
    pulled = packhorse("pull", "--root", str(tmp_path / "another"), *filled[2:])
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "another" / "models" / "more").read_text() == "more"


@pytest.mark.parametrize("damage", ["corrupt", "lost"])
def test_a_repair_mends_every_addition_to_the_shared_directories(
    packhorse: Packhorse, filled: list[str], root_path: Path, tmp_path: Path, damage: str
) -> None:
    (root_path / "models" / "more").write_bytes(bytes(range(256)) * 8000)
    assert packhorse("push", *filled).returncode == 0
    listed = json.loads(packhorse("snapshots", "--json", *filled).stdout)
    for file in [
        file
        for kind in ("packs", "placements")
        for file in (tmp_path / "store" / kind).rglob("*")
        if file.is_file()
    ]:
        file.write_bytes(b"") if damage == "corrupt" else file.unlink()
    assert packhorse("prune", *filled).returncode == 4
    mended = packhorse("push", "--repair", *filled)
    assert mended.returncode == 0, mended.stderr
    assert (
        json.loads(packhorse("snapshots", "--json", *filled).stdout)["snapshots"][-3:] == listed["snapshots"]
    )
    pruned = packhorse("prune", *filled)
    assert pruned.returncode == 0, pruned.stderr
    for number, each in enumerate(listed["snapshots"]):
        pulled = packhorse("pull", each["snapshot"], "--root", str(tmp_path / str(number)), *filled[2:])
        assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "0" / "models" / "more").read_bytes() == (root_path / "models" / "more").read_bytes()


def test_a_repair_counts_though_the_clock_of_who_pushed_first_ran_ahead(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    flags = ["--root", str(root_path), "--store", (tmp_path / "store").as_uri()]
    packhorse("status", *flags)
    text = "".join(f"VALUE_{number} = {number * number}\n" for number in range(9000))
    (root_path / "packages" / "module.py").write_text(text)
    (root_path / "models" / "vocabulary").write_text(text.lower())
    assert packhorse("push", *flags).returncode == 0
    ahead = tags.stamp_after(int(time.time() * 1000) + 7 * 24 * 3600 * 1000, "")
    placements = [file for file in (tmp_path / "store" / "placements").rglob("*") if file.is_file()]
    assert len(placements) == 2
    for file in placements:
        file.rename(file.with_name(ahead + file.name[14:]))
    packs = list((tmp_path / "store" / "packs").iterdir())
    for file in packs:
        file.unlink()
    mended = packhorse("push", "--repair", "--level", "19", *flags)
    assert mended.returncode == 0, mended.stderr
    assert not [file for file in packs if file.exists()], "the level does not change the names of the packs"
    pulled = packhorse("pull", "--root", str(tmp_path / "another"), *flags[2:])
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "another" / "packages" / "module.py").read_text() == text
    assert (tmp_path / "another" / "models" / "vocabulary").read_text() == text.lower()


@pytest.mark.parametrize("name", ["../../../../../etc", "../" + "a" * 61])
def test_a_snapshot_whose_document_leads_elsewhere_is_refused_with_4(
    packhorse: Packhorse, filled: list[str], tmp_path: Path, name: str
) -> None:
    document = SnapshotFacts(packages=name, shared=())
    (tmp_path / "store" / "snapshots" / document.id).write_bytes(document.encode())
    pulled = packhorse("pull", document.id, "--root", str(tmp_path / "another"), *filled[2:])
    assert pulled.returncode == 4, pulled.stderr
    assert "is corrupt" in pulled.stderr
    assert "fault of its own" not in pulled.stderr


def test_a_repair_of_shared_files_alone_says_what_it_sent(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    flags = ["--root", str(root_path), "--store", (tmp_path / "store").as_uri()]
    packhorse("status", *flags)
    (root_path / "models" / "weights").write_bytes(bytes(range(256)) * 100)
    assert packhorse("push", *flags).returncode == 0
    assert packhorse("push", *flags).stdout.startswith("Nothing has changed")
    assert packhorse("push", "--repair", *flags).stdout.startswith("Sent again what main holds: ")
