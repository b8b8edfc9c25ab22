from __future__ import annotations

import os

from tests.conftest import Packhorse
from tests.transfer.conftest import NewWorker

from packhorse.snapshot.index import Index
from packhorse.snapshot.scan import signature_of


def test_a_push_after_an_install_need_not_read_what_was_linked(
    packhorse: Packhorse, new_worker: NewWorker
) -> None:
    """Linking changes a file's ctime; the index follows it."""
    first, second = new_worker("first"), new_worker("second")
    environ = {"PACKHORSE_ENVIRONMENT_DEPENDENCIES": "humanize"}
    done = packhorse("install", "--root", first.path, env=environ)
    assert done.returncode == 0, done.stderr
    first.push()
    second.pull()
    environ = {"PACKHORSE_ENVIRONMENT_DEPENDENCIES": "humanize, click"}
    done = packhorse("install", "--root", second.path, env=environ)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 distributions are unchanged" in done.stderr

    index = Index(second.root.private / "index")

    def known(path: str) -> bool:
        status = os.lstat(second.path / path)
        return index.digests(os.fsencode(path), signature_of(status)) is not None

    sources = [f"packages/humanize/{name}" for name in ("__init__.py", "time.py", "number.py")]
    assert all(map(known, sources))
    assert not known("packages/click/__init__.py")
