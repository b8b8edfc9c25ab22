"""`packhorse verify`: are the files of the root still what was pushed?"""

from __future__ import annotations

import os

import click

from packhorse.cli import console, context


@click.command("verify")
@click.option(
    "--imports",
    is_flag=True,
    help="Also import the modules of environment.verify, each in a fresh interpreter.",
)
@console.shared_options
def command(imports: bool) -> None:
    """Read every file of the root and compare it with its digest in the manifest.

    Ends with 4 where files are corrupt, changed or missing.
    """
    from packhorse.cli import import_table
    from packhorse.errors import IntegrityError
    from packhorse.transfer.compare import verify
    from packhorse.transfer.setup import Setup

    setup = Setup(context.load(), os.environ)
    with console.progress() as progress:
        found = verify(setup, progress)
    what = f"snapshot {found.snapshot[:12]}" if found.snapshot else "the manifest"
    if not found.sound:
        kinds = {"corrupt": found.corrupt, "changed": found.changed, "missing": found.missing}
        for kind, paths in kinds.items():
            for path in paths[:10]:
                console.note(f"{kind}: {path}")
        counts = ", ".join(f"{len(paths):,} {kind}" for kind, paths in kinds.items() if paths)
        yours = any(not path.startswith("packages") for path in found.changed)
        raise IntegrityError(
            f"{setup.root.path} is not what {what} says: {counts}.",
            "`packhorse pull` brings back what the snapshot holds."
            + (
                " Changed files of models/, deps/ and pip/ stay: save them with `packhorse push`, or remove them first."
                if yours
                else ""
            ),
        )
    if imports and not setup.config.environment.verify:
        console.note("environment.verify names no modules, so none is imported")
    elif imports:
        from packhorse.install.environment import check_imports

        with console.progress() as progress:
            found.imports = check_imports(setup.root, setup.config, setup.environ, progress)
    added = (
        f" Not part of it: {console.counted(len(found.added), 'file')} in packages/." if found.added else ""
    )
    holes = (
        f" Without code for other GPUs ({console.megabytes(found.hole_bytes)}): {', '.join(found.holes)}."
        if found.holes
        else ""
    )
    console.result(
        found,
        f"All as {what} says: {console.counted(found.files, 'file')} ({console.megabytes(found.bytes)}).{holes}{added}"
        + "".join(f"\n{line}" for line in import_table.lines(found.imports)),
    )
