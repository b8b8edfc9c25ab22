"""All programs of the table in a large real environment: `make torture`. Prints who gave what, as Markdown.

Each program is run with everything there, and then in each mode, each time restored into a new file system.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))
from tests import servers
from tests.torture import harness
from tests.torture.harness import COMPLETE, HERE, MODES, Environment, Mode
from tests.torture.programs import ON_GPU, PROGRAMS, Program

import disks
from packhorse.snapshot import gpu


def main() -> None:
    """Run the programs; exits with 1 where one gave something else than it should."""
    arguments = _arguments()
    disks.enter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was run is printed
    programs, modes = PROGRAMS, arguments.modes
    if arguments.gpu:
        if not (capabilities := gpu.detect()):
            sys.exit("There is no GPU here whose driver answers.")
        programs, modes = ON_GPU, harness.gpu_modes(capabilities)
    rows: dict[str, dict[str, str]] = {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="torture-", dir=arguments.directory) as name:
        work = Path(name)
        origin = work / "origin"
        if arguments.packages:
            harness.link(arguments.packages, origin / "packages")
        else:
            harness.install([f"--requirement={HERE / 'requirements.txt'}"], origin / "packages")
        space, size = disks.Disks(arguments.disk, work), disks.bytes_of(origin)
        with servers.seaweedfs(directory=work) as server, space.fresh(2 * size + (1 << 30)) as complete:
            environment = Environment(server, work)
            environment.save(origin)
            shutil.rmtree(origin)
            try:
                for program in programs:
                    if not arguments.only or any(word in program.name for word in arguments.only):
                        failed += _torture(
                            program, modes, environment, complete / "root", space, 2 * size, rows
                        )
            except KeyboardInterrupt:
                failed += 1
                print("Ended early: what is missing below was not run.", file=sys.stderr)
    print(harness.table(rows, ["complete", *(mode.name for mode in modes)]))
    print(
        f"\n- {len(rows)} programs, {failed} failures. Behind the outcome: MB of large files on disk when the program ended; "
        "in the modes `asked` that is what it asked for."
    )
    sys.exit(1 if failed else 0)


def _torture(
    program: Program,
    modes: Sequence[Mode],
    environment: Environment,
    root: Path,
    space: disks.Disks,
    size: int,
    rows: dict[str, dict[str, str]],
) -> int:
    """Run one program in all modes and fill its row; returns how often it failed. `root` is the complete one."""
    expected = environment.run(program, COMPLETE, root)
    row = rows.setdefault(program.name, {"complete": "ok" if expected.code == 0 else "FAILED"})
    if expected.code or not expected.output.strip():
        print(f"{program.name}, complete: {expected.code}\n{expected.errors[-3000:]}", file=sys.stderr)
        return 1
    failed = 0
    for mode in modes:
        if program.whole and mode.gpu != "all":
            row[mode.name] = "not asked of it"
            continue
        with space.fresh(size + (1 << 30)) as disk:
            began = time.monotonic()
            outcome = environment.run(program, mode, disk / "root")
            seconds = time.monotonic() - began
        same = outcome.same(expected) and outcome.early
        right = same is not mode.wrong
        said = "ok" if same else "fails, as it has to"
        row[mode.name] = f"{said if right else 'FAILED'}, {outcome.arrived / 1e6:,.0f}"
        print(
            f"{program.name}: {mode.name}: {row[mode.name]} MB, {seconds:.1f} s", file=sys.stderr, flush=True
        )
        if not right:
            failed += 1
            print(outcome.difference(expected), file=sys.stderr, flush=True)
    return failed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make torture TORTURE_ARGS=...", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--gpu", action="store_true", help="instead, programs that compute on the GPU of this machine")
    add("--packages", type=Path, help="an environment that was installed before from requirements.txt")
    add("--directory", type=Path, help="where to work; needs 40 GB")
    add(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="programs with one of these words in their names",
    )
    add(
        "--modes",
        type=lambda text: [harness.mode(name) for name in text.split("+")],
        default=MODES,
        help=f"modes; random may have any number: {'+'.join(mode.name for mode in MODES)}",
    )
    add(
        "--disk",
        choices=disks.KINDS,
        default=disks.best_kind(),
        help="what each root lies on: %(default)s here",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
