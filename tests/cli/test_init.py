"""What `packhorse init` promises, and that the examples of the repository are what it writes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.conftest import Packhorse, unprivileged

from packhorse import config
from packhorse.config import Environment, Network, Run, Storage, Wheel

REPOSITORY = Path(__file__).parent.parent.parent
TEMPLATES = REPOSITORY / "src/packhorse/templates"
EXAMPLES = {"runpod": "runpod-worker", "quickstart": "quickstart"}


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def uncommented(text: str) -> str:
    """The text with its commented-out keys and tables in force; prose has a space behind its #."""
    return re.sub(r"^#(?=[a-z\[])", "", text, flags=re.MULTILINE)


def test_init_writes_a_file_that_changes_nothing_yet(packhorse: Packhorse, tmp_path: Path) -> None:
    done = packhorse("init")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Wrote packhorse.toml.\n")
    assert "packhorse install" in done.stdout, "it says what to do next"
    written = config.load({}, tmp_path)
    assert written.file == tmp_path / "packhorse.toml"
    assert (written.root, written.environment, written.network) == (
        Path("/tmp/packhorse"),
        Environment(),
        Network(),
    )
    assert (written.run, written.storage.tag, written.store_is_default) == (Run(), "main", True)


def test_every_key_of_the_written_file_is_accepted_and_shows_its_default(tmp_path: Path) -> None:
    (tmp_path / "packhorse.toml").write_text(uncommented((TEMPLATES / "default/packhorse.toml").read_text()))
    whole = config.load({}, tmp_path)
    assert whole.root == Path("/runpod-volume/packhorse")
    assert whole.environment == Environment(
        requirements=(f"{tmp_path}/requirements.txt",),
        dependencies=("torch==2.6.*", "transformers"),
        lock=f"{tmp_path}/pylock.toml",
        verify=("torch", "transformers"),
        python="python3.12",
        slim_keep=("numpy/_core/include/*",),
        slim_remove=("torch/include/*",),
        wheels=(Wheel("flash-attn", "2.8.0.post2", find_links=("https://example.org/wheels/",)),),
    )
    assert whole.network == Network()
    assert whole.storage == Storage(
        "s3://my-bucket/envs", "https://s3.us-west-004.backblazeb2.com", "us-west-004"
    )
    assert whole.run == Run(app_path="/app")


def test_the_written_file_names_every_key() -> None:
    lines = (TEMPLATES / "default/packhorse.toml").read_text().splitlines()
    named = [line.split(" =")[0] for line in lines if " = " in line]
    structs = (Environment, Network, Storage, Run)
    keys = {f"#{key}" for struct in structs for key in struct.__struct_encode_fields__} - {"#wheels"}
    keys |= {"#root", "#name", "#version", "#find-links"}
    assert sorted(named) == sorted(keys)
    assert "#[[environment.wheels]]" in lines


def test_a_file_that_is_there_stays_unless_forced(packhorse: Packhorse, tmp_path: Path) -> None:
    mine = tmp_path / "handler.py"
    mine.write_text("mine")
    refused = packhorse("init", "--template", "runpod", "--json")
    assert refused.returncode == 2
    facts = json.loads(refused.stdout)
    assert facts["error"] == "Nothing was written, since these are there already: handler.py."
    assert "--force" in facts["remedy"]
    assert contents(tmp_path) == {"handler.py": b"mine"}, "and the other files are not written either"
    assert packhorse("init", "--template", "runpod", "--force").returncode == 0
    assert contents(tmp_path) == contents(TEMPLATES / "runpod")


def test_a_place_where_nothing_can_be_written_is_told(packhorse: Packhorse, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = packhorse("init", "--directory", tmp_path / "file" / "below")
    assert done.returncode == 2
    assert "Nothing can be written into" in done.stderr
    assert "Choose another place with --directory." in done.stderr


def test_a_working_directory_where_nothing_may_be_written_is_named(
    packhorse: Packhorse, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o500)
    done = subprocess.run(
        [*unprivileged(), *packhorse.command, "init"],
        env=packhorse.environ,
        cwd=mine,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"Nothing can be written into {mine}: Permission denied." in done.stderr


def test_the_way_into_a_directory_can_be_pasted_into_a_shell(packhorse: Packhorse) -> None:
    assert "\n  cd 'new place'\n" in packhorse("init", "--directory", "new place").stdout


def test_a_link_to_nowhere_is_a_file_that_is_there(packhorse: Packhorse, tmp_path: Path) -> None:
    (tmp_path / "packhorse.toml").symlink_to("/nonexistent")
    assert packhorse("init").returncode == 2


@pytest.mark.parametrize("template", ["default", "runpod", "quickstart"])
def test_a_template_is_written_whole_into_the_directory_asked_for(
    packhorse: Packhorse, tmp_path: Path, template: str
) -> None:
    done = packhorse("init", "--template", template, "--directory", "new/place", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    target = tmp_path / "new/place"
    assert contents(target) == contents(TEMPLATES / template)
    facts = json.loads(done.stdout)
    assert facts == {
        "template": template,
        "files": [f"new/place/{name}" for name in sorted(contents(target))],
    }
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in target.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert config.load({}, target).file == target / "packhorse.toml"


def test_settings_are_written_into_the_file_not_given_to_init(packhorse: Packhorse, tmp_path: Path) -> None:
    refused = packhorse("init", "--store", "s3://b")
    assert refused.returncode == 2
    assert "init takes no --store. Write it into the file" in refused.stderr
    assert not contents(tmp_path)


@pytest.mark.parametrize(("template", "example"), EXAMPLES.items())
def test_the_examples_are_what_init_writes(template: str, example: str) -> None:
    assert contents(REPOSITORY / "examples" / example) == contents(TEMPLATES / template)


def test_there_is_no_example_that_init_does_not_write() -> None:
    assert {each.name for each in (REPOSITORY / "examples").iterdir()} == set(EXAMPLES.values())


def test_the_variables_that_templates_and_reference_name_exist() -> None:
    tables = {"environment": Environment, "network": Network, "storage": Storage, "run": Run}
    known = {f"{table}.{key}" for table, struct in tables.items() for key in struct.__struct_encode_fields__}
    variables = {config.variable(key) for key in ("root", *known)} | {"PACKHORSE_CONFIG"}
    texts = [file.read_text() for file in TEMPLATES.glob("*/*") if file.is_file()]
    texts.append((REPOSITORY / "docs/reference/configuration.md").read_text())
    named = {name for text in texts for name in re.findall(r"PACKHORSE_[A-Z]\w*", text)}
    assert named - variables == set()
    assert "PACKHORSE_STORAGE_URL" in named


def test_the_image_of_the_runpod_worker_holds_what_it_starts() -> None:
    files = contents(TEMPLATES / "runpod")
    dockerfile = files["Dockerfile"].decode()
    copied = re.search(r"^COPY (.+) \./$", dockerfile, re.MULTILINE)
    assert copied is not None
    assert set(copied.group(1).split()) == set(files) - {"Dockerfile", "README.md"}
    entry = re.search(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)
    assert entry is not None
    assert json.loads(entry.group(1)) == ["packhorse", "run", "--", "python", "-u", "handler.py"]
