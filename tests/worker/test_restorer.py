"""What a restorer tells of the command beside it. It blocks signals in all its threads, so it has a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """\
import json, subprocess, sys
from pathlib import Path
from packhorse.worker.link import Child, Link
from packhorse.worker.restorer import Restorer

root = Path(sys.argv[1])
mapping = '''
import mmap, sys
kept = []
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
print("mapped", flush=True)
sys.stdin.read()
'''
here, there = Link.pair()
restorer = Restorer(here, sys.exit)
names = [str(root / name) for name in sys.argv[2:]]
with subprocess.Popen([sys.executable, "-c", mapping, *names], stdin=-1, stdout=-1) as child:
    child.stdout.readline()
    there.send(Child(child.pid))
    while not (used := restorer.used(root, {b"packages/known"})):
        pass
    print(json.dumps([path.decode() for path, _ in used]))
    child.stdin.close()
restorer.finish()
"""


@pytest.mark.parametrize("linked", [False, True])
def test_large_files_that_were_there_at_the_start_count_where_they_are_mapped(
    tmp_path: Path, linked: bool
) -> None:
    root = tmp_path / "link" if linked else tmp_path
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["packages/second", "models/first", "packages/known", "packages/small", "tmp/scratch"]
    for name in [*names, "packages/other"]:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(1000 if "small" in name else 1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root, *names], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout == '["packages/second", "models/first"]\n'
