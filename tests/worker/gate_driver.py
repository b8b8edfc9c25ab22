"""`packhorse run -- CMD` whose restorer is a program of the test: `python gate_driver.py LOOK CMD...`.

In the environment RESTORER names the program, STOPS_WITHIN the seconds in which the command has to stop, LEAVES_WITHIN
those in which what it leaves behind has to end, PARTS_WITHIN those that the restorer has after it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from packhorse import config
from packhorse.errors import PackhorseError
from packhorse.root import Root
from packhorse.worker import gate, run, supervise, tree
from packhorse.worker.supervise import Stopped, Supervisor


class Invocation(run.Invocation):
    """Restores with the test's program, the first time."""

    def own(self, name: str, *arguments: str) -> list[str]:
        """The command line of the restorer, or of a process of packhorse's own."""
        program = Path(os.environ["RESTORER"])
        if name == "boot" and program.exists():
            return [sys.executable, str(program), *arguments]
        return super().own(name, *arguments)


def main() -> int:
    look, *command = sys.argv[1:]
    tree.PATIENCE = float(os.environ.get("STOPS_WITHIN", tree.PATIENCE))
    gate.IMPATIENCE = float(os.environ.get("PARTS_WITHIN", gate.IMPATIENCE))
    supervise.LEFTOVER_PATIENCE = float(os.environ.get("LEAVES_WITHIN", supervise.LEFTOVER_PATIENCE))
    supervisor = Supervisor()
    loaded = config.load(os.environ, Path.cwd())
    supervisor.grace = loaded.run.grace
    loaded = msgspec.structs.replace(loaded, run=msgspec.structs.replace(loaded.run, start="early"))

    def say(line: str) -> None:
        os.write(2, f"{line}\n".encode())

    call = Invocation(
        config=loaded,
        root=Root.open(loaded.root),
        command=command,
        environ=os.environ,
        flags=(),
        speech=run.Speech(say, supervisor.unhurried(say)),
        supervisor=supervisor,
    )
    try:
        return run.run(call, status_file=Path("status.json"), look=float(look))
    except Stopped as stopped:
        return stopped.exit_code
    except PackhorseError as error:
        say(str(error))
        return 125
    finally:
        supervisor.say_the_rest()


if __name__ == "__main__":
    sys.exit(main())
