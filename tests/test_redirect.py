"""What the environment table promises: everything that writes, writes into the root, and nothing leaks out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from packhorse import redirect
from packhorse.errors import ConfigError
from packhorse.root import Root
from packhorse.session import Session


@pytest.fixture
def root(root_path: Path) -> Root:
    root = Root.open(root_path)
    redirect.prepare(root)
    return root


def _changes(root: Root, inherited: Mapping[str, str], **options: object) -> dict[str, str | None]:
    return redirect.changes(
        root,
        inherited,
        tmp=root.tmp / "abcdef",
        build=root.build / "abcdef",
        **options,  # type: ignore[arg-type]
    )


def _python(root: Root, environ: Mapping[str, str], program: str, **options: object) -> object:
    """What `program` leaves in `answer`, in an interpreter under the table."""
    env = redirect.environment(environ, _changes(root, environ, **options))
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{program}\nprint(json.dumps(answer))"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_every_value_lies_in_the_root(root: Root, environ: dict[str, str]) -> None:
    changed = _changes(root, environ)
    for row in redirect.TABLE:
        assert str(changed[row.variable]).startswith(str(root.path)), row.variable
    for variable in ("TMPDIR", "TEMP", "TMP"):
        assert changed[variable] == str(root.tmp / "abcdef")


def test_every_variable_has_a_reason(root: Root, environ: dict[str, str]) -> None:
    inherited = {**environ, "PYTHONHOME": "/usr", "PYTHONPYCACHEPREFIX": "/x"}
    for keep in (False, True):
        assert set(_changes(root, inherited, keep_downloads=keep)) <= set(
            redirect.reasons(keep_downloads=keep)
        )


def test_caches_of_downloads_go_with_the_invocation_unless_they_are_to_be_kept(
    root: Root, environ: dict[str, str]
) -> None:
    assert _changes(root, environ)["PIP_CACHE_DIR"] == str(root.tmp / "abcdef" / "pip")
    assert _changes(root, environ, keep_downloads=True)["PIP_CACHE_DIR"] == str(root.pip)


def test_commands_that_uv_installs_are_found_and_lie_in_the_root(root: Root, environ: dict[str, str]) -> None:
    env = redirect.environment(environ, _changes(root, environ))
    for words in (["tool", "dir", "--bin"], ["python", "dir", "--bin"]):
        done = subprocess.run(["uv", *words], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{root.deps}/uv/bin"
    assert f"{root.deps}/uv/bin" in env["PATH"].split(":")


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("MODELSCOPE_CACHE", "models"),
        ("KAGGLEHUB_CACHE", "models"),
        ("KERAS_HOME", "models"),
        ("TFHUB_CACHE_DIR", "models"),
        ("TFDS_DATA_DIR", "models"),
        ("FASTEMBED_CACHE_PATH", "models"),
        ("EASYOCR_MODULE_PATH", "models"),
        ("PADDLE_PDX_CACHE_HOME", "models"),
        ("TVM_FFI_CACHE_DIR", "deps"),
        ("CUTE_DSL_CACHE_DIR", "deps"),
        ("WANDB_DATA_DIR", "deps"),
    ],
)
def test_what_follows_no_common_variable_is_kept_too(
    root: Root, environ: dict[str, str], variable: str, place: str
) -> None:
    """These libraries write into the home directory, or lose it with TMPDIR, whatever XDG_CACHE_HOME says."""
    assert Path(str(_changes(root, environ)[variable])).parent == root.path / place


def test_app_path_and_packages_come_first_and_what_was_there_stays_behind(root: Root) -> None:
    inherited = {"PYTHONPATH": "/mine::/other", "PATH": "/usr/bin:/bin"}
    changed = _changes(root, inherited, app_path="/app")
    assert str(changed["PYTHONPATH"]).split(":") == [
        "/app",
        str(root.packages),
        str(root.site),
        "/mine",
        "",
        "/other",
    ]
    assert changed["PATH"] == f"{root.packages}/bin:/usr/bin:/bin:{root.deps}/uv/bin"


def test_a_nested_invocation_repeats_nothing(root: Root, environ: dict[str, str]) -> None:
    outer = redirect.environment(environ, _changes(root, environ, app_path="/app"))
    inner = redirect.environment(outer, _changes(root, outer, app_path="/app"))
    assert inner == outer


def test_an_empty_entry_that_was_inherited_stays(root: Root) -> None:
    """It stands for the working directory."""
    assert str(_changes(root, {"PYTHONPATH": "/mine:"})["PYTHONPATH"]).endswith("/mine:")


def test_no_empty_entry_appears_where_nothing_was_inherited(root: Root) -> None:
    for inherited in ({}, {"PYTHONPATH": ""}):
        assert "" not in str(_changes(root, inherited)["PYTHONPATH"]).split(":")


def test_what_would_hide_shipped_bytecode_is_unset(root: Root) -> None:
    inherited = {"PYTHONPYCACHEPREFIX": "/cache", "PYTHONHOME": "/usr"}
    changed = _changes(root, inherited)
    assert changed["PYTHONPYCACHEPREFIX"] is None
    assert redirect.environment(inherited, changed).keys().isdisjoint(inherited)


@pytest.mark.parametrize(
    "variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE"]
)
def test_what_an_image_sets_does_not_lead_past_the_home_of_hugging_face(
    root: Root, environ: dict[str, str], variable: str
) -> None:
    inherited = {**environ, variable: "/runpod-volume/huggingface-cache/hub"}
    env = redirect.environment(inherited, _changes(root, inherited))
    assert variable not in env
    assert redirect.outside(root, {**env, variable: inherited[variable]}) == {variable: inherited[variable]}


def test_the_hugging_face_token_stays_out_of_the_directories_that_are_saved(
    root: Root, environ: dict[str, str]
) -> None:
    changed = _changes(root, environ)
    assert changed["HF_TOKEN_PATH"] == f"{environ['HOME']}/.cache/huggingface/token"
    assert _changes(root, {**environ, "HF_TOKEN_PATH": "/t"})["HF_TOKEN_PATH"] == "/t"
    outer = redirect.environment(environ, changed)
    assert _changes(root, outer)["HF_TOKEN_PATH"] == changed["HF_TOKEN_PATH"]


def test_a_path_that_cannot_stand_in_a_path_list_is_refused(tmp_path: Path) -> None:
    root = Root.open(tmp_path / "a:b")
    with pytest.raises(ConfigError, match="colon"):
        _changes(root, {})


def test_pth_files_of_packages_are_processed(root: Root, environ: dict[str, str]) -> None:
    (root.packages / "lib").mkdir()
    (root.packages / "lib" / "found_by_pth.py").write_text("value = 7")
    (root.packages / "it.pth").write_text("lib\nimport sys; sys.pth_ran = True\n")
    program = (
        "import found_by_pth; answer = [found_by_pth.value, sys.pth_ran, 'sitecustomize' in sys.modules]"
    )
    assert _python(root, environ, program) == [7, True, True]


@pytest.mark.parametrize("place", ["app", "packages", "inherited"])
def test_somebody_elses_sitecustomize_runs_too(
    root: Root, environ: dict[str, str], tmp_path: Path, place: str
) -> None:
    app, inherited = tmp_path / "app", tmp_path / "inherited"
    app.mkdir()
    inherited.mkdir()
    theirs = {"app": app, "packages": root.packages, "inherited": inherited}[place] / "sitecustomize.py"
    theirs.write_text("import sys; sys.theirs = __file__")
    (root.packages / "it.pth").write_text("import sys; sys.pth_ran = True\n")
    program = "import sitecustomize; answer = [sys.theirs, sitecustomize.__file__, sys.pth_ran]"
    environ["PYTHONPATH"] = str(inherited)
    assert _python(root, environ, program, app_path=str(app)) == [str(theirs), str(theirs), True]


def test_an_invocation_inside_that_of_another_root_starts_python(
    root: Root, environ: dict[str, str], tmp_path: Path
) -> None:
    other = Root.open(tmp_path / "other")
    redirect.prepare(other)
    (root.packages / "it.pth").write_text("import sys; sys.inner = True\n")
    outer = redirect.environment(environ, _changes(other, environ))
    assert _python(root, outer, "answer = sys.inner") is True


def test_the_packages_of_a_generation_not_yet_in_force_can_be_tried(
    root: Root, environ: dict[str, str]
) -> None:
    root.staging.mkdir()
    (root.staging / "it.pth").write_text("import sys; sys.staged = True\n")
    environ["PACKHORSE_PACKAGES"] = "/elsewhere"
    program = "answer = [sys.staged, sys.path[1]]"
    assert _python(root, environ, program, packages=root.staging) == [True, str(root.staging)]
    assert _changes(root, environ)["PACKHORSE_PACKAGES"] is None


def test_packhorses_own_processes_do_not_see_the_packages_they_are_started_under(
    root: Root, environ: dict[str, str]
) -> None:
    outer = redirect.environment(environ, _changes(root, {**environ, "PYTHONPATH": "/mine"}))
    assert redirect.own(outer)["PYTHONPATH"] == "/mine"
    assert redirect.own(environ) == environ


def test_nltk_finds_a_directory_to_download_to(root: Root) -> None:
    assert not (root.models / "nltk").exists()
    (root.packages / "nltk").mkdir()
    redirect.prepare(root)
    assert (root.models / "nltk").is_dir()


def test_a_temporary_file_of_a_child_lies_in_its_session(root: Root, environ: dict[str, str]) -> None:
    with Session(root) as session:
        changed = redirect.changes(root, environ, tmp=session.tmp, build=session.build)
        done = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"],
            env=redirect.environment(environ, changed),
            capture_output=True,
            text=True,
            check=True,
        )
        assert os.path.dirname(done.stdout) == str(session.tmp)
