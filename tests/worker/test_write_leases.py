"""Whether and how many files can be held back is known beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.worker import without

from packhorse.worker.write_leases import probe


def _printed(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MOST = """
import os, resource
from packhorse.worker.write_leases import most_open_files
{before}
print(most_open_files())
"""


@pytest.mark.parametrize("limit", ["100:300", "300:300"])
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(limit: str) -> None:
    program = MOST.format(before="")
    assert _printed("prlimit", f"--nofile={limit}", sys.executable, "-c", program) == "300"


def test_no_limit_counts_for_more_than_the_kernel_opens() -> None:
    """Infinite where that is allowed, which Linux does not; else the highest that there can be."""
    highest = int(Path("/proc/sys/fs/nr_open").read_text())
    before = f"""
for most in (resource.RLIM_INFINITY, {highest}):
    try: resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
    except (OSError, ValueError): continue
    break
else: print(min({highest}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), end=" ")
"""
    *others, most = map(int, _printed(sys.executable, "-c", MOST.format(before=before)).split())
    assert [most] == (others or [highest])


PROBE = "import sys; from pathlib import Path; from packhorse.worker.write_leases import probe; print(probe(Path(sys.argv[1])))"


def test_a_directory_with_leases_is_found_out_and_left_as_it_was(tmp_path: Path) -> None:
    assert probe(tmp_path) == ""
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path: Path) -> None:
    leaves = "import os; os.chdir(sys.argv[1]); open(f'.lease-{os.getpid()}', 'x').close()"
    assert _printed(sys.executable, "-c", PROBE.replace("; print", f"; {leaves}; print"), str(tmp_path)) == ""


def test_a_file_system_without_leases_is_found_out_and_left_as_it_was(tmp_path: Path) -> None:
    why = _printed(sys.executable, without.__file__, "leases", sys.executable, "-c", PROBE, str(tmp_path))
    assert why == "the file system has no leases: Invalid argument"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("directory", ["/proc/self", "/nowhere"])
def test_where_no_file_can_be_made_that_is_told(directory: str) -> None:
    assert probe(Path(directory)).startswith(f"a file cannot be made in {directory}: ")


@pytest.mark.namespaces
def test_a_kernel_that_ends_leases_too_soon_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "seconds").write_text("5\n")
    script = 'mount --bind "$1" /proc/sys/fs/lease-break-time && shift && exec "$@"'
    words = ("sh", "-c", script, "sh", str(tmp_path / "seconds"), sys.executable, "-c", PROBE, str(tmp_path))
    why = _printed("unshare", "--mount", *words)
    assert why == "the kernel ends leases after 5 s (fs.lease-break-time)"
