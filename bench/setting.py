"""Where peers.py and starts.py measure: a prepared environment, a server that keeps it, new disks, and perhaps a line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import servers
from tests.servers import S3Server

import disks
import networks
from contenders import compile_packhorse
from environments import Environment, Prepared
from networks import Network
from results import ran_on


class Setting(NamedTuple):
    """`work` is removed at the end; `network` is None on loopback."""

    prepared: Prepared
    work: Path
    space: disks.Disks
    server: S3Server
    network: Network | None

    def described(self) -> str:
        """A note below the tables."""
        network = self.network.title if self.network else "loopback"
        return f"Network: {network}. {ran_on(f'a new {self.space.kind} for each run')}"


def add_arguments(parser: argparse.ArgumentParser, lines: Sequence[str]) -> None:
    """The options that `setting` reads; `lines` are names of networks."""
    add = parser.add_argument
    add("--small", action="store_true", help="a small environment: for the harness, not for figures")
    add("--network", choices=("loopback", *lines), default="loopback", help="%(default)s by default")
    add("--directory", type=Path, help="where to work; what was prepared there before is used again")
    add("--wheels", type=Path, help="a directory of wheels, so that these need not be downloaded")
    add(
        "--disk",
        choices=disks.KINDS,
        default=disks.best_kind(),
        help="what each run writes to: %(default)s here",
    )


@contextlib.contextmanager
def setting(arguments: argparse.Namespace, environment: Environment) -> Iterator[Setting]:
    """Prepare it. Temporary files of this process go there, too. Ends the program where a line is not to be had."""
    if arguments.network != "loopback" and (lacks := networks.lacking()):
        sys.exit(
            f"A shaped line needs {', '.join(lacks)} (Debian: apt-get install iproute2 util-linux; as root)."
        )
    disks.enter()
    compile_packhorse()
    with contextlib.ExitStack() as stack:
        if arguments.directory:
            work = arguments.directory.resolve()
            work.mkdir(parents=True, exist_ok=True)
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="packhorse-bench-")))
        prepared = Prepared(environment, work, arguments.wheels)
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=work)))
        tempfile.tempdir = str(run)
        network = networks.NETWORKS.get(arguments.network)
        if network:
            networks.enter()
        everywhere = network is not None
        server = stack.enter_context(servers.seaweedfs(directory=run, metrics=True, everywhere=everywhere))
        yield Setting(prepared, run, disks.Disks(arguments.disk, run), server, network)
