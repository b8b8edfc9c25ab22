"""`packhorse env`: the environment table, for `eval "$(packhorse env)"`."""

from __future__ import annotations

import os
import shlex

import click

from packhorse.cli import console, context


@click.command("env")
@console.shared_options
def command() -> None:
    """Print the environment of the root for `eval "$(packhorse env)"`.

    Its TMPDIR stays until the shell (the session's first process) ends. With -v each line has its reason.
    """
    from packhorse import redirect, session

    loaded = context.load()
    root = context.open_root(loaded)
    session.clean(root)
    opened = session.Session(root, owner=session.shell())
    changed = redirect.changes(
        root,
        os.environ,
        tmp=opened.tmp,
        build=opened.build,
        app_path=loaded.run.app_path,
        keep_downloads=loaded.environment.keep_downloads,
    )
    redirect.prepare(root)
    opened.release()
    reasons = redirect.reasons(keep_downloads=loaded.environment.keep_downloads)
    lines = []
    for name, value in changed.items():
        if console.verbose() and name in reasons:
            lines.append(f"# {reasons[name]}")
        lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    if console.wants_json():
        console.result(changed, "")
    else:
        click.echo(os.fsencode("\n".join(lines)))  # paths are bytes, not always text
