"""Runs a command and then writes down how many bytes of the large files below a root are on disk by its end.

Run as a script inside `packhorse run`, in an interpreter of its own that opens nothing of the root. What was not asked
for takes no space: its placeholder is empty.
"""

from __future__ import annotations

import os
import subprocess
import sys

LARGE = 1 << 20


def on_disk(root: str) -> int:
    """Bytes on disk of the files of at least 1 MiB in the persistent directories of a root."""
    total = 0
    for directory in ("packages", "models", "deps"):
        for folder, _, names in os.walk(os.path.join(root, directory)):
            for name in names:
                status = os.lstat(os.path.join(folder, name))
                if status.st_size >= LARGE:
                    total += min(status.st_blocks * 512, status.st_size)
    return total


if __name__ == "__main__":
    note, root, *command = sys.argv[1:]
    code = subprocess.call(command)
    with open(note, "w", encoding="ascii") as file:
        file.write(str(on_disk(root)))
    sys.exit(code if code >= 0 else 128 - code)
