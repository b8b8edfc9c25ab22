"""Credentials come from the usual places, in the usual order, and are asked for where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.config import Storage
from packhorse.errors import StorageError
from packhorse.store.credentials import options

S3 = Storage(url="s3://bucket/prefix", endpoint="https://s3.us-west-004.backblazeb2.com")
AWS = {"AWS_ACCESS_KEY_ID": "aws-id", "AWS_SECRET_ACCESS_KEY": "aws-secret"}
B2 = {"B2_APPLICATION_KEY_ID": "b2-id", "B2_APPLICATION_KEY": "b2-secret"}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A home directory with credentials in files."""
    aws = tmp_path / ".aws"
    aws.mkdir()
    (aws / "credentials").write_text(
        "[default]\naws_access_key_id = file-id\naws_secret_access_key = file-secret\n"
        "[work]\naws_access_key_id = work-id\naws_secret_access_key = work-secret\naws_session_token = token\n"
    )
    (aws / "config").write_text("[default]\nregion = eu-north-1\n[profile work]\nregion = eu-south-1\n")
    return {"HOME": str(tmp_path)}


def _keys(environ: dict[str, str], storage: Storage = S3) -> tuple[str, str, str]:
    config = options(storage, environ).config
    return config["access_key_id"], config["secret_access_key"], config.get("session_token", "")


def test_variables_come_before_files_and_aws_before_b2(home: dict[str, str]) -> None:
    assert _keys({**AWS, **B2, **home}) == ("aws-id", "aws-secret", "")
    assert _keys({**AWS, "AWS_SESSION_TOKEN": "t"}) == ("aws-id", "aws-secret", "t")
    assert _keys({**B2, **home}) == ("b2-id", "b2-secret", "")
    assert _keys(home) == ("file-id", "file-secret", "")
    assert _keys({**home, "AWS_PROFILE": "work"}) == ("work-id", "work-secret", "token")


def test_a_half_given_key_does_not_count(home: dict[str, str]) -> None:
    assert _keys({"AWS_ACCESS_KEY_ID": "only", **B2}) == ("b2-id", "b2-secret", "")


@pytest.mark.parametrize("content", ["not an ini file\n", "\xff", "[default]\nregion\n"])
def test_a_broken_file_is_as_if_it_were_not_there(tmp_path: Path, content: str) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_bytes(content.encode("latin-1"))
    with pytest.raises(StorageError, match="no credentials"):
        options(S3, {"HOME": str(tmp_path)})


def test_no_credentials_are_told_with_what_to_set() -> None:
    with pytest.raises(StorageError) as refused:
        options(S3, {"HOME": "/nonexistent"})
    assert refused.value.exit_code == 6
    assert "AWS_ACCESS_KEY_ID" in refused.value.remedy
    assert "B2_APPLICATION_KEY_ID" in refused.value.remedy


@pytest.mark.parametrize(
    ("storage", "environ", "region"),
    [
        (S3, AWS, "us-west-004"),
        (Storage(url="s3://b", endpoint="https://s3api-eu-ro-1.runpod.io"), AWS, "eu-ro-1"),
        (Storage(url="s3://b", endpoint="https://s3.eu-west-1.amazonaws.com"), AWS, "eu-west-1"),
        (Storage(url="s3://b", endpoint="https://s3.example.org"), AWS, "us-east-1"),
        (Storage(url="s3://b", endpoint="https://s3.example.org"), {**AWS, "AWS_REGION": "x-1"}, "x-1"),
        (S3, {**AWS, "AWS_REGION": "x-1"}, "us-west-004"),
        (Storage(url="s3://b", region="given", endpoint=S3.endpoint), {**AWS, "AWS_REGION": "x-1"}, "given"),
    ],
)
def test_the_region_is_given_or_told_by_the_endpoint(
    storage: Storage, environ: dict[str, str], region: str
) -> None:
    assert options(storage, environ).config["region"] == region


def test_only_an_endpoint_without_tls_is_reached_without() -> None:
    assert options(Storage(url="s3://b", endpoint="http://127.0.0.1:1"), AWS).client["allow_http"]
    assert "allow_http" not in options(S3, AWS).client


def test_the_endpoint_may_come_from_the_environment() -> None:
    environ = {**AWS, "AWS_ENDPOINT_URL": "https://general.example.org"}
    assert options(Storage(url="s3://b"), environ).config["endpoint"] == "https://general.example.org"
    environ["AWS_ENDPOINT_URL_S3"] = "https://s3.example.org"
    assert options(Storage(url="s3://b"), environ).config["endpoint"] == "https://s3.example.org"
    assert options(S3, environ).config["endpoint"] == S3.endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "s3.us-west-004.backblazeb2.com",
        "https://",
        "https://[bad",
        "https://[::::]:9",
        "https://127.0.0.1:99999",
        "https://127.0.0.1:9\n",
        "https://127.0.0.1/a b",
        "https://me:hidden@127.0.0.1",
    ],
)
def test_an_endpoint_of_the_environment_that_is_none_is_told_and_not_shown(endpoint: str) -> None:
    with pytest.raises(StorageError, match="in AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is no") as refused:
        options(Storage(url="s3://b"), {**AWS, "AWS_ENDPOINT_URL": endpoint})
    assert "hidden" not in str(refused.value)


def test_the_end_of_a_line_behind_a_credential_is_left_out() -> None:
    environ = {**{name: f"{value}\n" for name, value in AWS.items()}, "AWS_REGION": "x-1\r\n"}
    assert _keys(environ) == ("aws-id", "aws-secret", "")
    assert options(Storage(url="s3://b"), environ).config["region"] == "x-1"


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"]
)
def test_a_control_character_in_a_credential_is_told_and_not_shown(name: str) -> None:
    with pytest.raises(StorageError, match="control character") as refused:
        options(Storage(url="s3://b"), {**AWS, name: "hid\nden"})
    assert "hid" not in str(refused.value)
