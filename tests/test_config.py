"""What the configuration promises: layers, kinds of values, and errors that say where and what is allowed."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from packhorse import config
from packhorse.config import Config, Environment, Network, Run, Storage, Wheel
from packhorse.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent
TABLES = {"environment": Environment, "network": Network, "storage": Storage, "run": Run}
Load = Callable[..., Config]


def keys() -> dict[str, str]:
    """Every key by its dotted name, with its name in the file."""
    found = {"root": "root"}
    for table, struct in TABLES.items():
        found |= {f"{table}.{name}": name for name in struct.__struct_encode_fields__}
    return found


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load in an application's directory, where `text` is the packhorse.toml."""

    def load(text: str = "", environ: dict[str, str] | None = None, **flags: Any) -> Config:
        app = tmp_path / "app"
        app.mkdir(exist_ok=True)
        (app / "packhorse.toml").write_text(text)
        return config.load(environ or {}, app, **flags)

    return load


@pytest.fixture
def refused(load: Load, tmp_path: Path) -> Callable[..., str]:
    """The message of a configuration that is refused, with the application's directory as APP."""

    def refused(text: str = "", environ: dict[str, str] | None = None, **flags: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, environ, **flags)
        assert caught.value.remedy.endswith((".", "?"))
        return str(caught.value).replace(str(tmp_path / "app"), "APP")

    return refused


# --- layers ---


def test_nothing_needs_to_be_configured(tmp_path: Path) -> None:
    loaded = config.load({}, tmp_path)
    assert loaded.root == Path("/tmp/packhorse")
    assert loaded.storage == Storage(url="file:///tmp/packhorse-store")
    assert loaded.store_is_default
    assert loaded.file is None
    assert (loaded.environment, loaded.network, loaded.run) == (Environment(), Network(), Run())
    assert not loaded.environment.configured


@pytest.mark.parametrize("name", ["RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID"])
def test_on_runpod_the_root_is_the_cache_of_the_worker(tmp_path: Path, name: str) -> None:
    loaded = config.load({name: "abc"}, tmp_path)
    assert loaded.root == Path("/tmp/runpod-cache")
    assert loaded.storage.url == "file:///tmp/runpod-cache-store"


def test_flags_win_over_variables_over_the_file_over_defaults(load: Load) -> None:
    text = 'root = "/file"\n[storage]\nurl = "s3://file"\ntag = "file"\nregion = "file"\n'
    environ = {
        "PACKHORSE_ROOT": "/variable",
        "PACKHORSE_STORAGE_URL": "s3://variable",
        "PACKHORSE_STORAGE_TAG": "v",
    }
    assert load(text).storage == Storage(url="s3://file", tag="file", region="file")
    both = load(text, environ)
    assert (both.root, both.storage) == (Path("/variable"), Storage("s3://variable", region="file", tag="v"))
    all_three = load(text, environ, root="/flag", store="s3://flag", tag="flag")
    assert (all_three.root, all_three.storage) == (
        Path("/flag"),
        Storage("s3://flag", region="file", tag="flag"),
    )
    assert not all_three.store_is_default


def test_every_key_can_be_a_variable(tmp_path: Path) -> None:
    values = {
        "root": "/r",
        "environment.requirements": "a.txt, b.txt",
        "environment.dependencies": "torch>=2,<3, numpy, uvicorn[standard,extra]==1.*, old (>=1,<2); extra == 'x'",
        "environment.lock": "pylock.toml",
        "environment.verify": "torch,PIL.Image",
        "environment.engine": "pip",
        "environment.python": "python3.12",
        "environment.profile": "slim",
        "environment.slim-keep": "*.h, a/*",
        "environment.slim-remove": "torch/include/*",
        "environment.keep-downloads": "1",
        "environment.wheels": '[{name = "flash-attn", path = "w/flash.whl"}]',
        "network.attempts": "4",
        "network.timeout-small": "90s",
        "network.timeout-large": "10m",
        "network.large-size": "1GiB",
        "network.large-attempts": "5",
        "storage.url": "gs://b/p",
        "storage.endpoint": "https://s3.example.org/",
        "storage.region": "eu-1",
        "storage.tag": "t",
        "run.start": "complete",
        "run.gpu": "auto",
        "run.on-missing": "fail",
        "run.on-restore-failure": "install",
        "run.backup": "pip",
        "run.stop-timeout": "1",
        "run.exclude": "*.log",
        "run.backup-every": "1h",
        "run.grace": "2.5",
        "run.app-path": "src",
    }
    assert values.keys() == keys().keys()
    loaded = config.load({config.variable(key): value for key, value in values.items()}, tmp_path)
    requirements = (
        "torch>=2,<3",
        "numpy",
        "uvicorn[standard,extra]==1.*",
        "old (>=1,<2); extra == 'x'",
    )
    assert loaded.root == Path("/r")
    assert loaded.environment == Environment(
        requirements=(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"),
        dependencies=requirements,
        lock=f"{tmp_path}/pylock.toml",
        verify=("torch", "PIL.Image"),
        engine="pip",
        python="python3.12",
        profile="slim",
        slim_keep=("*.h", "a/*"),
        slim_remove=("torch/include/*",),
        keep_downloads=True,
        wheels=(Wheel("flash-attn", path=f"{tmp_path}/w/flash.whl"),),
    )
    assert loaded.network == Network(4, 90, 600, 1 << 30, 5)
    assert loaded.storage == Storage("gs://b/p", "https://s3.example.org", "eu-1", "t")
    assert loaded.run == Run(
        on_missing="fail",
        on_restore_failure="install",
        backup=("pip",),
        stop_timeout=1,
        exclude=("*.log",),
        backup_every=3600,
        grace=2.5,
        app_path=f"{tmp_path}/src",
    )


def test_space_around_a_variable_does_not_count(load: Load) -> None:
    assert load("", {"PACKHORSE_NETWORK_ATTEMPTS": " 4\n"}).network.attempts == 4


def test_an_empty_variable_counts_as_not_set_and_brackets_as_an_empty_list(load: Load) -> None:
    text = '[run]\nbackup = ["pip"]\n'
    assert load(text, {"PACKHORSE_RUN_BACKUP": ""}).run.backup == ("pip",)
    assert load(text, {"PACKHORSE_RUN_BACKUP": "[]"}).run.backup == ()


# --- the file ---


def test_the_file_is_found_upwards_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    file = tmp_path / "packhorse.toml"
    file.write_text(
        'root = "cache"\n[environment]\nrequirements = ["r.txt", "~/h.txt", "/abs.txt"]\npython = "bin/python"\n'
        '[[environment.wheels]]\nname = "x"\nfind-links = ["wheels", "https://example.org/w/"]\n'
        '[storage]\nurl = "./my store"\n[run]\napp-path = "."\n'
    )
    loaded = config.load({"HOME": "/home/u", "PACKHORSE_ENVIRONMENT_PYTHON": "./py"}, below)
    assert loaded.file == file
    assert loaded.root == tmp_path / "cache"
    assert loaded.environment.requirements == (f"{tmp_path}/r.txt", "/home/u/h.txt", "/abs.txt")
    assert loaded.environment.wheels[0].find_links == (f"{tmp_path}/wheels", "https://example.org/w/")
    assert loaded.environment.python == f"{below}/py", (
        "a variable's path is relative to the working directory"
    )
    assert loaded.storage.url == f"file://{tmp_path}/my%20store"
    assert loaded.storage.directory == tmp_path / "my store"
    assert loaded.run.app_path == str(tmp_path)
    assert config.load({}, below, root="here").root == below / "here"


def test_packhorse_toml_stands_before_pyproject_and_the_nearest_directory_before_those_above(
    tmp_path: Path,
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "packhorse.toml").write_text('[storage]\ntag = "outer"\n')
    pyproject = inner / "pyproject.toml"
    pyproject.write_text('[project]\nname = "packhorse-user"\n')
    assert config.load({}, inner).storage.tag == "outer", "a pyproject.toml without our table is passed over"
    pyproject.write_text("[project")
    assert config.load({}, inner).storage.tag == "outer", "and so is a broken one that does not speak of us"
    pyproject.write_text('[tool.packhorse.storage]\ntag = "pyproject"\n')
    assert config.load({}, inner).storage.tag == "pyproject"
    (inner / "packhorse.toml").write_text('[storage]\ntag = "inner"\n')
    assert config.load({}, inner).storage.tag == "inner"


def test_a_file_can_be_named_by_flag_or_variable(
    load: Load, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "one.toml").write_text('[storage]\ntag = "one"\n')
    (tmp_path / "two.toml").write_text('[storage]\ntag = "two"\n')
    environ = {"PACKHORSE_CONFIG": "../one.toml"}
    assert load("", environ).storage.tag == "one"
    assert load("", environ, config_file=tmp_path / "two.toml").storage.tag == "two"
    assert refused("", {"PACKHORSE_CONFIG": "none.toml"}).startswith(
        "APP/none.toml cannot be read: No such file or directory."
    )
    (tmp_path / "pyproject.toml").write_text("")
    assert "has no [tool.packhorse]" in refused(config_file=tmp_path / "pyproject.toml")


def test_errors_of_a_pyproject_name_the_whole_key(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.packhorse.network]\nattempts = 0\n")
    with pytest.raises(ConfigError) as caught:
        config.load({}, tmp_path)
    assert (
        caught.value.what
        == f"{tmp_path}/pyproject.toml: tool.packhorse.network.attempts: expected an integer >= 1, got 0."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"root = ", "is not valid TOML: Invalid value"),
        (b'root = "a"\nroot = "b"', "is not valid TOML: Cannot overwrite a value"),
        (b'root = "\xff"', "cannot be read: it is not UTF-8"),
        (b"root = " + b"[" * 100_000, "is not valid TOML: "),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "packhorse.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load({}, tmp_path)
    assert caught.value.what.startswith(f"{tmp_path}/packhorse.toml {message}")


@pytest.mark.parametrize(
    ("name", "table"), [("packhorse.toml", "storage"), ("pyproject.toml", "tool.packhorse.storage")]
)
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path, name: str, table: str) -> None:
    (tmp_path / name).write_text(f'[{table}]\r\ntag = "dev"\r\n', encoding="utf-8-sig")
    assert config.load({}, tmp_path).storage.tag == "dev"


@pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="only root can give a file to another user"
)
def test_a_file_that_another_user_put_above_is_used_only_when_named(tmp_path: Path) -> None:
    file = tmp_path / "packhorse.toml"
    file.write_text('[storage]\ntag = "theirs"\n')
    os.chown(file, 12345, 12345)
    below = tmp_path / "mine"
    below.mkdir()
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        config.load({}, below)
    assert config.load({}, below, config_file=file).storage.tag == "theirs"


# --- kinds of values ---


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ('"90"', 90),
        ('"90s"', 90),
        ('"10m"', 600),
        ('"1.5h"', 5400),
        ('"1 d"', 86400),
    ],
)
def test_a_duration_has_a_unit_or_is_in_seconds(load: Load, written: str, seconds: float) -> None:
    assert load(f"[network]\ntimeout-small = {written}\n").network.timeout_small == seconds
    assert load(f"[run]\nbackup-every = {written}\n").run.backup_every == seconds


def test_backup_every_can_be_off(load: Load) -> None:
    assert load('[run]\nbackup-every = "off"\n').run.backup_every == 0


@pytest.mark.parametrize(
    ("written", "size"),
    [("5", 5), ('"5B"', 5), ('"100MB"', 10**8), ('"1.5 kB"', 1500), ('"1GiB"', 1 << 30), ('"2tib"', 2 << 40)],
)
def test_a_size_has_a_decimal_or_binary_unit_or_is_in_bytes(load: Load, written: str, size: int) -> None:
    assert load(f"[network]\nlarge-size = {written}\n").network.large_size == size


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("S3://my.bucket/a/b//c/", "s3://my.bucket/a/b/c"),
        ("gs://b/p", "gs://b/p"),
        ("az://container/p", "az://container/p"),
        ("file:///a/../b%20c", "file:///b%20c"),
        ("/a b/ü", "file:///a%20b/%C3%BC"),
        ("~/store", "file:///home/u/store"),
    ],
)
def test_a_store_is_a_url_or_a_directory(load: Load, written: str, url: str) -> None:
    assert load("", {"HOME": "/home/u"}, store=written).storage.url == url


def test_a_store_in_a_directory_with_odd_characters_opens_there(tmp_path: Path) -> None:
    from packhorse.store.objects import Store

    directory = tmp_path / "a b%20c#d?ü"
    storage = config.load({}, tmp_path, store=str(directory)).storage
    assert storage.directory == directory
    Store(storage, {}).put("key", b"content")
    assert (directory / "key").read_bytes() == b"content"


def test_a_short_grace_shortens_the_stop_timeout(load: Load) -> None:
    assert load("[run]\ngrace = 3\n").run.stop_timeout == 1.5
    assert load("[run]\ngrace = 60\n").run.stop_timeout == 4
    assert load("[run]\ngrace = 3\nstop-timeout = 3\n").run.stop_timeout == 3


def test_what_a_list_repeats_counts_once(load: Load) -> None:
    assert load('[run]\nbackup = ["pip", "models", "pip"]\n').run.backup == ("pip", "models")


def test_wheels_keep_their_order(load: Load) -> None:
    text = (
        '[[environment.wheels]]\nname = "b"\nurl = "https://example.org/b-1-py3-none-any.whl#sha256=0"\n'
        '[[environment.wheels]]\nname = "a"\nversion = "2.8.0.post2"\nfind-links = ["/w"]\n'
    )
    first, second = load(text).environment.wheels
    assert first == Wheel("b", url="https://example.org/b-1-py3-none-any.whl#sha256=0")
    assert second == Wheel("a", version="2.8.0.post2", find_links=("/w",))
    assert load(text).environment.configured


def test_missing_files_matter_when_they_are_needed_not_before(load: Load, tmp_path: Path) -> None:
    text = '[environment]\nrequirements = ["r.txt"]\n'
    wheels = '[[environment.wheels]]\nname = "x"\nfind-links = ["https://example.org/", "wheels"]\n'
    with pytest.raises(ConfigError, match=r"app/r\.txt, named in environment\.requirements, does not exist"):
        load(text).environment.check_files()
    (tmp_path / "app" / "r.txt").touch()
    with pytest.raises(ConfigError, match=r"app/wheels, named in environment\.wheels, does not exist"):
        load(text + wheels).environment.check_files()
    (tmp_path / "app" / "wheels").mkdir()
    load(text + wheels).environment.check_files()


# --- errors ---


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("root = 1", 'root: expected a path, got 1'),
        ('root = "/"', 'root: expected a directory for packhorse alone, got "/"'),
        ('root = "/a:b"', 'root: expected a directory without ":" in its path, got "/a:b"'),
        ('root = "/a\\u0000"', 'root: expected a path, got "/a\\u0000"'),
        ("network = 3", "network: expected a table, got 3"),
        ('[network]\nattempts = "three"', 'network.attempts: expected an integer >= 1, got "three"'),
        ('[network]\nattempts = "3"', 'network.attempts: expected an integer >= 1, got "3"'),
        ("[network]\nattempts = 0", "network.attempts: expected an integer >= 1, got 0"),
        ("[network]\nattempts = 1.5", "network.attempts: expected an integer >= 1, got 1.5"),
        ("[network]\nlarge-attempts = true", "network.large-attempts: expected an integer >= 1, got true"),
        ("[network]\ntimeout-small = 0", "network.timeout-small: expected a duration over 0, such as 90 (seconds)"),
        ("[network]\ntimeout-small = -1", "network.timeout-small: expected a duration over 0"),
        ("[network]\ntimeout-large = inf", "network.timeout-large: expected a duration over 0"),
        ("[network]\ntimeout-large = nan", "network.timeout-large: expected a duration over 0"),
        ('[network]\ntimeout-large = "soon"', "network.timeout-large: expected a duration over 0"),
        ("[network]\ntimeout-large = 2026-01-01", "network.timeout-large: expected a duration over 0"),
        ('[network]\nlarge-size = "1XB"', 'network.large-size: expected a size such as 100000000 (bytes), "100MB"'),
        ("[network]\nlarge-size = 0", "network.large-size: expected a size"),
        ('[environment]\nverify = "torch"', 'environment.verify: expected a list, got "torch"'),
        ("[environment]\nverify = [1]", "environment.verify[0]: expected the name of a module"),
        ('[environment]\nverify = ["a", "flash-attn"]', "environment.verify[1]: expected the name of a module"),
        ('[environment]\nrequirements = [""]', "environment.requirements[0]: expected a path"),
        ('[environment]\nrequirements = ["https://e.org/r"]', "environment.requirements[0]: expected the path of a file"),
        ('[environment]\ndependencies = ["-r r.txt"]', "environment.dependencies[0]: expected a requirement"),
        ('[environment]\ndependencies = ["./a"]', "environment.dependencies[0]: expected a requirement"),
        ('[environment]\ndependencies = ["a", "b >> 2"]', "environment.dependencies[1]: expected a requirement such as"),
        ('[environment]\ndependencies = ["a==1+"]', "environment.dependencies[0]: expected a requirement"),
        ('[environment]\ndependencies = ["a-"]', "environment.dependencies[0]: expected a requirement"),
        ('[environment]\ndependencies = ["a; python > 3"]', "environment.dependencies[0]: expected a requirement"),
        ('[environment]\ndependencies = ["a = 1"]', 'environment.dependencies[0]: expected a requirement such as'),
        ('[environment]\nkeep-downloads = "yes"', "environment.keep-downloads: expected true or false"),
        ('[environment]\nengine = "conda"', 'environment.engine: expected "auto" or "uv" or "pip", got "conda"'),
        ('[environment]\nprofile = "thin"', 'environment.profile: expected "full" or "slim", got "thin"'),
        ('[run]\nstart = "late"', 'run.start: expected "complete" or "ready" or "early", got "late"'),
        ('[run]\ngpu = "H100"', 'run.gpu: expected "auto", "all", "only", architectures such as "sm_90"'),
        ('[run]\ngpu = "only:"', 'run.gpu: expected "auto", "all", "only", architectures such as "sm_90"'),
        ("[run]\ngpu = 90", 'run.gpu: expected "auto", "all", "only", architectures such as "sm_90"'),
        ('[run]\non-missing = "wait"', 'run.on-missing: expected "install" or "fail", got "wait"'),
        ('[run]\nbackup = ["packages"]', 'run.backup[0]: expected "models" or "deps" or "pip", got "packages"'),
        ("[run]\nbackup-every = 0", 'run.backup-every: expected "off" or a duration over 0'),
        ("[run]\ngrace = 2\nstop-timeout = 3", "run.stop-timeout: expected at most run.grace, which is 2 seconds, got 3"),
        ('[run]\napp-path = "/a:/b"', 'run.app-path: expected a directory without ":"'),
        ('[storage]\ntag = "-x"', "storage.tag: expected at most 64 letters"),
        ('[storage]\ntag = "a/b"', "storage.tag: expected at most 64 letters"),
        (f'[storage]\ntag = "{"x" * 65}"', "storage.tag: expected at most 64 letters"),
        ('[storage]\nregion = "eu west"', "storage.region: expected the name of a region"),
        ('[storage]\nendpoint = "s3.example.org"', "storage.endpoint: expected an http(s) URL"),
        ('[storage]\nendpoint = "https://h/?x=1"', "storage.endpoint: expected an http(s) URL"),
        ('[storage]\nendpoint = "https://h:65536"', "storage.endpoint: expected an http(s) URL"),
        ('[storage]\nendpoint = "https://h/a b"', "storage.endpoint: expected an http(s) URL"),
        ('[storage]\nendpoint = "https://[::::]:1"', "storage.endpoint: expected an http(s) URL"),
        ('[storage]\nendpoint = "HTTP://h"', "storage.endpoint: expected an http(s) URL"),
        ('dependencies = ["a"]', "dependencies: there is no such key. It belongs under [environment]."),
        ('[environment]\nstart = "early"', "environment.start: there is no such key. It belongs under [run]."),
        ('[storage]\nurl = "bucket/envs"\nendpoint = "https://h"', "storage.url: this is a directory, but storage.endpoint"),
        ('[storage]\nurl = "memory://"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "https://h/b"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "s3:/b"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "s3://"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "s3://b/../c"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "file://relative"', "storage.url: expected s3://BUCKET/PREFIX"),
        ('[storage]\nurl = "file:///"', "storage.url: expected a directory for the store alone"),
        ('root = "/r"\n[storage]\nurl = "/r/deps/s"', "storage.url: the store /r/deps/s lies inside the root /r"),
        ("environment.wheels = [1]", "environment.wheels[0]: expected a table, got 1"),
        ('environment.wheels = [{url = "https://e.org/a.whl"}]', "environment.wheels[0]: the name is missing"),
        ('environment.wheels = [{name = "a"}]', "environment.wheels[0]: expected exactly one of url, path and find-links"),
        ('environment.wheels = [{name = "a", find-links = []}]', "environment.wheels[0]: expected exactly one of"),
        (
            'environment.wheels = [{name = "a", path = "a.whl", url = "https://e.org/a.whl"}]',
            "environment.wheels[0]: expected exactly one of url, path and find-links, got url and path",
        ),
        (
            'environment.wheels = [{name = "a", path = "a.whl", version = "1"}]',
            "environment.wheels[0]: version goes with find-links only",
        ),
        ('environment.wheels = [{name = "a", path = "a.zip"}]', "environment.wheels[0].path: expected the path of a .whl"),
        ('environment.wheels = [{name = "a", url = "ftp://h/a.whl"}]', "environment.wheels[0].url: expected the http(s)"),
        ('environment.wheels = [{name = "../a", path = "a.whl"}]', "environment.wheels[0].name: expected the name"),
        (
            'environment.wheels = [{name = "a", version = ">=1", find-links = ["."]}]',
            "environment.wheels[0].version: expected an exact version",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_file_the_key_and_what_is_allowed(
    refused: Callable[..., str], text: str, what: str
) -> None:
    assert refused(text).startswith(f"APP/packhorse.toml: {what}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rot = 1", "rot: there is no such key. Did you mean root? Allowed here: root, environment, network, storage, run."),
        ("[netwrk]", "netwrk: there is no such key. Did you mean network? Allowed here:"),
        (
            "[network]\natempts = 1",
            "network.atempts: there is no such key. Did you mean attempts? Allowed here: attempts, timeout-small,",
        ),
        ("[network]\nlarge_size = 1", "network.large_size: there is no such key. Did you mean large-size?"),
        ('[environment]\nlocks = "l"', "environment.locks: there is no such key. Did you mean lock? Allowed here: requirements,"),
        ('[run]\ngpus = "all"', "run.gpus: there is no such key. Did you mean gpu? Allowed here: start, gpu, on-missing,"),
        (
            'environment.wheels = [{name = "a", links = "x"}]',
            "environment.wheels[0].links: there is no such key. Did you mean find-links? Allowed here: name, version, url,",
        ),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_close_one_and_those_allowed(
    refused: Callable[..., str], text: str, message: str
) -> None:
    assert refused(text).startswith(f"APP/packhorse.toml: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PACKHORSE_NETWORK_ATTEMPTS", "three", 'PACKHORSE_NETWORK_ATTEMPTS: expected an integer >= 1, got "three".'),
        ("PACKHORSE_ENVIRONMENT_KEEP_DOWNLOADS", "maybe", "PACKHORSE_ENVIRONMENT_KEEP_DOWNLOADS: expected true or false"),
        ("PACKHORSE_ENVIRONMENT_VERIFY", "a,b-c", "PACKHORSE_ENVIRONMENT_VERIFY[1]: expected the name of a module"),
        ("PACKHORSE_ENVIRONMENT_VERIFY", "[a]", "PACKHORSE_ENVIRONMENT_VERIFY is not valid TOML"),
        ("PACKHORSE_ENVIRONMENT_WHEELS", "[{name = 1}]", "PACKHORSE_ENVIRONMENT_WHEELS[0].name: expected the name"),
        ("PACKHORSE_STORE", "s3://b", "PACKHORSE_STORE: there is no such variable. Did you mean PACKHORSE_STORAGE_URL?"),
        ("PACKHORSE_TAG", "t", "PACKHORSE_TAG: there is no such variable. Did you mean PACKHORSE_STORAGE_TAG?"),
        ("PACKHORSE_STORGE_URL", "s3://b", "PACKHORSE_STORGE_URL: there is no such variable. Did you mean"),
        (
            "PACKHORSE_STORAGE_BUCKET",
            "b",
            "PACKHORSE_STORAGE_BUCKET: there is no such variable. Allowed here: PACKHORSE_STORAGE_URL,",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_variable(
    refused: Callable[..., str], name: str, value: str, message: str
) -> None:
    assert refused("", {name: value}).startswith(message)


def test_variables_of_others_that_begin_with_our_name_do_not_matter(load: Load) -> None:
    # Kubernetes sets the first three for a service called packhorse.
    names = ("SERVICE_HOST", "SERVICE_PORT", "PORT_80_TCP_ADDR", "PACKAGES")
    assert load("", {f"PACKHORSE_{name}": "1" for name in names}) == load("")


def test_an_error_names_the_flag(refused: Callable[..., str]) -> None:
    assert refused(root="/").startswith("--root: expected a directory for packhorse alone")
    assert refused(store="ftp://x").startswith("--store: expected s3://BUCKET/PREFIX")
    assert refused(tag="a b").startswith("--tag: expected at most 64 letters")


@pytest.mark.parametrize(
    "text",
    [
        '[storage]\nurl = "s3://KEY:hunter2@bucket/p"',
        '[storage]\nurl = "s3://KEY:hun/hunter2@bucket/p"',
        '[storage]\nurl = "s3://KEY:hunter2"',
        '[storage]\nurl = "az://c/p?sig=hunter2"',
        '[storage]\nurl = "https://KEY:hunter2@host/bucket"',
        '[storage]\nurl = "s3:KEY:hunter2@bucket"',
        '[storage]\nendpoint = "https://KEY:hunter2@host"',
        '[storage]\nendpoint = "KEY://x:hunter2@host"',
        '[storage]\nsecret-access-key = "hunter2"',
        '[storage]\naccess_key_id = "hunter2"',
        '[environment]\ndependencies = ["a @ https://u:hunter2@host/a.whl"]',
        '[environment]\ndependencies = ["--index-url=https://u:hunter2@host/simple"]',
        '[environment]\nrequirements = ["https://u:hunter2@host/r.txt"]',
        'environment.wheels = [{name = "a", url = "https://u:hunter2@host/a.whl"}]',
        'environment.wheels = [{name = "a", url = "https://host/a?token=hunter2"}]',
        'environment.wheels = [{name = "a", find-links = ["https://hunter2@host/"]}]',
        '[environment]\nverify = "https://u:hunter2@host"',
    ],
)
def test_credentials_are_refused_and_never_repeated(refused: Callable[..., str], text: str) -> None:
    assert "hunter2" not in refused(text)


def test_what_to_do_with_credentials_is_told(refused: Callable[..., str]) -> None:
    for message in (
        refused('[storage]\nurl = "s3://KEY:hunter2@bucket"'),
        refused('[storage]\nsecret-key = "hunter2"'),
        refused(store="s3://KEY:hunter2@bucket"),
        refused("", {"PACKHORSE_STORAGE_SECRET_KEY": "hunter2"}),
    ):
        assert "credentials do not belong here" in message
        assert "AWS_SECRET_ACCESS_KEY" in message
        assert "hunter2" not in message


def test_a_home_directory_that_nobody_knows_is_no_directory_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may run as a user without an entry in /etc/passwd."""

    def unknown(user: int) -> NoReturn:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match=r'--root: expected a path, got "~/x"\. There is no home directory'):
        config.load({}, tmp_path, root="~/x")


def test_names_that_are_no_text_do_not_break_the_message(tmp_path: Path) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    directory.mkdir()
    (directory / "packhorse.toml").write_text("root = 1")
    with pytest.raises(ConfigError) as caught:
        config.load({}, directory)
    str(caught.value).encode("utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load({}, tmp_path, root=f"{directory}:")
    str(caught.value).encode("utf-8")
    assert config.load({}, tmp_path, root=str(directory)).root == directory


PLAIN = (
    *("a", "A.b-c_d", "a[x]", "a [ x, y-z ] >= 2, <3", "a==1.2.3", "a<1,!=0.5 , >0", "a >2", "a<=2"),
    *("torch==2.6.0+cu124", "a == 1"),
)
OTHERS = (
    *(
        "a~=1.2",
        "a==1.*",
        "a==2.8.0.post2",
        "a===x",
        "a>=1rc1",
        "a (>=1)",
        "a[]",
        'a>=1; python_version < "3.12"',
    ),
    *("a @ https://h/a-1-py3-none-any.whl#sha256=00", "a @ git+https://h/a@main", "a @ file:///a/b"),
    *(
        "a==1 --hash=sha256:00 --hash=sha256:01",
        "a>=1  # why",
        "a==${VERSION}",
        "a @ https://h/${TOKEN}/a.whl",
    ),
)


@pytest.mark.parametrize("text", [*PLAIN, *OTHERS])
def test_a_requirement_is_taken_as_it_is_written(load: Load, text: str) -> None:
    listed = json.dumps([text])
    assert load(f"[environment]\ndependencies = {listed}").environment.dependencies == (text,)


def test_loading_imports_little() -> None:
    code = (
        "import os, sys, pathlib, packhorse.config as c; c.load(os.environ, pathlib.Path('/')); "
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PACKHORSE_ENVIRONMENT_DEPENDENCIES": ", ".join(PLAIN)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"difflib", "tomllib", "tomli", "packaging", "click", "obstore"} & set(loaded)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('environment.requirements = "requirements.txt"', 'Write ["requirements.txt"].'),
        ('run.backup = "models"', 'Write ["models"].'),
        ('run.backup = "all"', "Correct it, or leave it out for the default."),
        ("environment.verify = 1", "Correct it, or leave it out for the default."),
        ('environment.wheels = "a.whl"', "Correct it, or leave it out for the default."),
        ('environment.dependencies = "a @ https://h/a.whl?key=1"', "Correct it, or leave it out for the default."),
    ],
)  # fmt: skip
def test_text_in_place_of_a_list_is_told_as_the_list_it_could_be(
    refused: Callable[..., str], text: str, remedy: str
) -> None:
    assert ": expected a list, got " in refused(text)
    assert refused(text).endswith(f". {remedy}")


def test_a_bucket_whose_scheme_was_forgotten_is_told_as_it_has_to_be_written(
    refused: Callable[..., str],
) -> None:
    text = '[storage]\nendpoint = "https://h"\nurl = "{}"'
    assert refused(text.format("my-bucket/envs")).endswith(
        "Write the bucket as s3://my-bucket/envs, or take the endpoint out."
    )
    assert "Write the bucket as s3://BUCKET/PREFIX," in refused(text.format("/my-bucket/envs"))


def test_an_endpoint_from_elsewhere_leaves_a_store_in_a_directory_alone(load: Load) -> None:
    endpoint = {"PACKHORSE_STORAGE_ENDPOINT": "https://h"}
    assert load('[storage]\nurl = "envs"', endpoint).storage.url.startswith("file:")
    assert load('[storage]\nurl = "s3://b"\nendpoint = "https://h"', store="envs").storage.directory


# --- the document ---


def test_the_reference_names_every_key_its_variable_and_its_default() -> None:
    lines = (REPOSITORY / "docs/reference/configuration.md").read_text().splitlines()
    rows = {line.split("`")[3]: line for line in lines if line.startswith("| `") and "`PACKHORSE_" in line}
    expected = {config.variable(key): key for key in keys()}
    assert rows.keys() == expected.keys()
    defaults: dict[str, Any] = {
        f"{table}.{name}": default
        for table, struct in TABLES.items()
        for name, default in zip(struct.__struct_encode_fields__, struct.__struct_defaults__)
    }
    elsewise = {"network.large-size": "100MB", "run.backup-every": "off"}
    for name, row in rows.items():
        key = expected[name]
        columns = [column.strip() for column in row.strip("|").split(" | ")]
        assert columns[0].strip("`| ") == keys()[key]
        default = elsewise.get(key, defaults.get(key, ""))
        if default != "":
            assert columns[3].startswith(f"`{json.dumps(msgspec.to_builtins(default))}`"), row


def test_the_reference_names_every_key_of_a_wheel() -> None:
    text = (REPOSITORY / "docs/reference/configuration.md").read_text()
    for name in Wheel.__struct_encode_fields__:
        assert f"\n| `{name}` |" in text


def test_blanks_around_a_requirement_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "packhorse.toml").write_text('[environment]\ndependencies = [" numpy >= 2 "]')
    assert config.load({}, tmp_path).environment.dependencies == ("numpy >= 2",)
