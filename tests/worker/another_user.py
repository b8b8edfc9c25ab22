"""`unshare --mount python another_user.py USER SCRATCH CMD...`: runs a command as another user, without privileges.

What Python and the tests need may lie below directories that only root may look into (/root): an overlay, in this mount
namespace alone, lets everybody. SCRATCH is an empty directory for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(user: int, scratch: Path, *command: str) -> None:
    """Open the way, change the user, become the command."""
    needed = {parent for path in (sys.base_prefix, sys.prefix, __file__) for parent in Path(path).parents}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", scratch], check=True)
    for path in sorted(needed):
        if not path.stat().st_mode & 0o001:
            upper, work = (scratch / f"{kind}{path.name}" for kind in ("upper-", "work-"))
            upper.mkdir(mode=0o755)
            work.mkdir()
            layers = f"lowerdir={path},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", path], check=True)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
