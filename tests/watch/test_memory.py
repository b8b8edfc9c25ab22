"""What the allocator keeps, and gives back when it is told to; when the garbage collector waits."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest

from packhorse.watch.memory import uncollected

MIB = 1 << 20
PROGRAM = """
from packhorse.watch.memory import give_back, keep_freed

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))

keep_freed()
before = resident()
buffers = [bytearray(b"x" * (1 << 20)) for _ in range(64)]
full = resident()
del buffers[::2]
kept = resident()
give_back()
print(full - before, kept - before, resident() - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim(3)"
)
def test_what_was_kept_for_the_next_buffers_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    full, kept, after = map(int, done.stdout.split())
    assert kept > full - MIB, "nothing is given back by itself"
    assert after < full - 30 * MIB


def test_the_garbage_collector_waits_and_goes_on_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="within"), uncollected():
        assert not gc.isenabled()
        raise ValueError("within")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
