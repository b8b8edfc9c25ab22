"""`packhorse record` (hidden): the process in which `profile` watches files and stores what it saw."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from packhorse.cli import console, context

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST = 5
"""Files shown: those that were opened last."""


@click.command("record", hidden=True)
@click.option("--result", "result_file", type=click.Path(path_type=Path), required=True)
@click.option(
    "--ready", type=int, required=True, help="A descriptor that is written to when the files are watched."
)
@click.option("--name", required=True)
@click.option("--command", "program", default="")
@click.option("--for", "seconds", type=float, default=0.0)
@console.shared_options
def command(result_file: Path, ready: int, name: str, program: str, seconds: float) -> None:
    """Watch the files until SIGTERM, then store the profile; write what was seen to --result."""
    import ctypes

    import msgspec

    from packhorse import atomic
    from packhorse.errors import PackhorseError
    from packhorse.root import PERSISTENT
    from packhorse.snapshot.frames import LARGE_FILE
    from packhorse.snapshot.order import MOST_FILES
    from packhorse.snapshot.scan import readable, scan
    from packhorse.worker import write_leases
    from packhorse.worker.profile import Recorded
    from packhorse.worker.supervise import LONGEST_ALARM
    from packhorse.worker.watch_opens import OpenWatch

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with the supervisor
    loaded = context.load()
    root = context.open_root(loaded)
    if reason := write_leases.probe(root.private):
        raise PackhorseError(
            f"What is opened in {root.path} cannot be recorded: {reason}.",
            "Record on a root on a local disk; the profile serves every worker.",
        )
    base = os.fsencode(root.path)
    watch = OpenWatch(
        base, scan(base, [os.fsencode(part) for part in PERSISTENT], exclude=loaded.run.exclude)
    )
    watch.begin()
    os.write(ready, b"1")
    os.close(ready)
    # Not sigtimedwait: when this process is stopped until the time is over, Python's gives a signal that never came.
    signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST_ALARM))  # never, for 0
    if signal.sigwait([signal.SIGTERM, signal.SIGALRM]) == signal.SIGALRM:
        watch.end()
        signal.sigwait([signal.SIGTERM])
    opened = watch.end()
    # A profile has room for so many, and small ones come early without it.
    named = sorted(opened, key=lambda each: watch.sizes[each.path] < LARGE_FILE)[:MOST_FILES]
    named.sort(key=lambda each: each.seconds)

    tag = loaded.storage.tag
    facts = Recorded(
        name,
        tag,
        files=len(opened),
        bytes=sum(watch.sizes[each.path] for each in opened),
        large_files=len(watch.sizes),
        large_bytes=sum(watch.sizes.values()),
        skipped=watch.skipped,
    )
    if not opened:
        facts.error = "The command opened no file of 64 KiB or more in the root."
    else:
        from packhorse.store import profiles
        from packhorse.transfer.setup import Setup

        try:
            profiles.write(
                Setup(loaded, os.environ).store, tag, profiles.Profile(name, program, tuple(named))
            )
        except PackhorseError as error:
            facts.error = str(error)
    atomic.write_file(result_file, msgspec.json.encode(facts))
    if facts.skipped:
        console.warn(f"{console.counted(facts.skipped, 'file')} could not be watched: open, or not yours")
    if facts.error:
        return
    console.note(
        f"profile {name} of {tag}: {facts.files:,} of {console.counted(facts.large_files, 'file')}, "
        f"{console.megabytes(facts.bytes)} of {console.megabytes(facts.large_bytes)}; the last ones:"
    )
    for each in opened[-_LAST:]:
        size = console.megabytes(watch.sizes[each.path])
        console.note(f"{each.seconds:>9.2f} s {size:>9}  {readable(each.path)}")
