"""What the allocator keeps, and gives back when it is told to; when the garbage collector waits; what may be held."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest

from packhorse.watch import memory, processors
from packhorse.watch.memory import Memory, allowance, uncollected

MIB = 1 << 20
glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim(3)"
)
RESIDENT = """
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
"""
PROGRAM = f"""
from packhorse.watch.memory import give_back, keep_freed
{RESIDENT}
keep_freed()
before = resident()
buffers = [bytearray(b"x" * (1 << 20)) for _ in range(64)]
full = resident()
del buffers[::2]
kept = resident()
give_back()
print(full - before, kept - before, resident() - before)
"""


@glibc
def test_what_was_kept_for_the_next_buffers_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    full, kept, after = map(int, done.stdout.split())
    assert kept > full - MIB, "nothing is given back by itself"
    assert after < full - 30 * MIB


THREADS = f"""
import sys
import threading
from packhorse.watch.memory import few_arenas, keep_freed
{RESIDENT}
if sys.argv[1:]:
    few_arenas()
keep_freed()
before, ending = resident(), threading.Event()
for _ in range(12):
    used = threading.Event()
    def use(used=used):
        bytearray(b"x" * (8 << 20))
        used.set()
        ending.wait()
    threading.Thread(target=use).start()
    used.wait()
print(resident() - before)
ending.set()
"""


@glibc
def test_what_one_thread_frees_another_one_takes() -> None:
    def kept(*words: str) -> int:
        program = [sys.executable, "-c", THREADS, *words]
        return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)

    assert kept() > 150 * MIB, "by itself each keeps its own"
    assert kept("few") < 100 * MIB


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


@pytest.mark.parametrize(
    ("usable", "free", "held"),
    [
        (1, 1 << 40, 32),
        (2, 1 << 40, 32),
        (4, 1 << 40, 40),
        (16, 1 << 40, 64),
        (16, 16 * 50 * MIB, 50),
        (16, MIB, 32),
        (16, -MIB, 32),
    ],
)
def test_more_processors_may_hold_more_as_far_as_nobody_uses_the_memory(
    monkeypatch: pytest.MonkeyPatch, usable: int, free: int, held: int
) -> None:
    monkeypatch.setattr(processors, "usable", lambda: usable)
    monkeypatch.setattr(memory, "memory", lambda: Memory(used=1 << 30, limit=(1 << 30) + free))
    assert allowance(32 * MIB, 4 * MIB, 64 * MIB) == held * MIB
