"""`packhorse init`: write a commented packhorse.toml, or a whole example, into a directory."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from packhorse import atomic
from packhorse.cli import console, context
from packhorse.errors import ConfigError

_TEMPLATES = Path(__file__).parent.parent / "templates"
_NEXT = {
    "default": """\
Say under [environment] what to install and under [storage] where to keep it, then:
  packhorse install                     install it and check that it imports
  packhorse push                        save it in the store
  packhorse run -- python handler.py    what a worker starts: restore, then run""",
    "runpod": """\
Try the worker here (README.md says how to deploy it):
  packhorse run -- python -u handler.py --rp_serve_api""",
    "quickstart": """\
README.md takes it step by step; all at once:
  packhorse run -- python app.py""",
}


@console.without_places
@click.command(name="init")
@click.option(
    "--template",
    type=click.Choice(list(_NEXT)),
    default="default",
    show_default=True,
    help="What to write: the configuration alone, a RunPod worker, or an example for any machine.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to write; the working directory if left out.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@console.shared_options
@click.pass_obj
def command(flags: dict[str, object], template: str, directory: Path, force: bool) -> None:
    """Write a commented packhorse.toml."""
    given = [name for name in ("config_file", "root", "store", "tag") if flags.get(name)]
    if given:
        raise ConfigError(
            f"init takes no --{given[0].removesuffix('_file')}.", "Write it into the file that init makes."
        )
    if not directory.is_absolute():
        context.working_directory()
    sources = sorted(file for file in (_TEMPLATES / template).iterdir() if file.is_file())
    targets = [directory / source.name for source in sources]
    present = [str(target) for target in targets if os.path.lexists(target)]
    if present and not force:
        raise ConfigError(
            f"Nothing was written, since these are there already: {', '.join(present)}.",
            "Replace it with --force, or choose another place with --directory.",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for source, target in zip(sources, targets):
            # Less the umask: it is the user's file.
            atomic.write_file(target, source.read_bytes(), mode=0o666)
    except OSError as error:
        raise ConfigError(
            f"Nothing can be written into {os.path.abspath(directory)}: {error.strerror}.",
            "Choose another place with --directory.",
        ) from error
    written = [str(target) for target in targets]
    where = "" if directory == Path() else f"  cd {shlex.quote(str(directory))}\n"
    console.result(
        {"template": template, "files": written}, f"Wrote {', '.join(written)}.\n{where}{_NEXT[template]}"
    )
