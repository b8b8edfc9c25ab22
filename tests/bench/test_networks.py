"""The lines of the benchmark: bytes come through whole, and on a faulty one the first connections break and stall."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.namespaces

BENCH = Path(__file__).parent.parent.parent / "bench"
SIZE = 8 << 20

# In a process of its own, since it goes into a network namespace: a server sends SIZE bytes to each client, and clients
# at the other end of the line tell one after another how many they got and how that ended.
SCRIPT = """
import json, socket, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
import networks
name, number, clients, size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
if lacks := networks.lacking():
    sys.exit("SKIP " + ", ".join(lacks))
networks.enter()
listener = socket.create_server(("0.0.0.0", 9000))

def send():
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=send_to, args=(connection,), daemon=True).start()

def send_to(connection):
    try:
        connection.sendall(bytes(range(256)) * (size // 256))
        connection.close()
    except OSError:
        pass

threading.Thread(target=send, daemon=True).start()
client = '''
import json, socket, sys
got, ended = bytearray(), "whole"
connection = socket.create_connection((sys.argv[1], 9000), timeout=3)
try:
    while content := connection.recv(1 << 16):
        got += content
except TimeoutError:
    ended = "stalled"
except ConnectionResetError:
    ended = "broke"
assert bytes(got) == (bytes(range(256)) * (len(got) // 256 + 1))[:len(got)]
print(json.dumps([ended, len(got)]))
'''
with networks.line(networks.NETWORKS[name], number) as line:
    command = line.worker([sys.executable, "-c", client, networks.SERVER])
    print(json.dumps([json.loads(subprocess.check_output(command)) for _ in range(clients)]))
"""


def outcomes(name: str, number: int, clients: int) -> list[tuple[str, int]]:
    """How the clients' connections ended, one after another, and the bytes that each got."""
    words = [str(BENCH), name, str(number), str(clients), str(SIZE)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False)
    if done.stderr.startswith("SKIP "):
        pytest.skip(f"A line needs what is not here: {done.stderr[5:].strip()}.")
    assert done.returncode == 0, done.stderr
    return [(ended, got) for ended, got in json.loads(done.stdout)]


@pytest.mark.parametrize("name", ["1g", "200m"])
def test_every_byte_comes_through_a_line(name: str) -> None:
    assert outcomes(name, 0, 2) == [("whole", SIZE)] * 2


@pytest.mark.parametrize(("number", "first", "eleventh"), [(0, "broke", "stalled"), (1, "stalled", "broke")])
def test_on_a_faulty_line_the_first_of_every_ten_connections_breaks_or_stalls(
    number: int, first: str, eleventh: str
) -> None:
    ended = outcomes("faulty", number, 11)
    assert [how for how, _ in ended] == [first, *["whole"] * 9, eleventh]
    assert 0 < ended[0][1] < SIZE
