"""Credentials and client settings for a store, from the usual places and never from the configuration file.

For S3: the AWS variables, the AWS files, the B2 variables; on AWS itself obstore also asks the instance's role.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from packhorse.config import Storage
from packhorse.config_values import is_endpoint
from packhorse.errors import StorageError

ANSWER = 60
"""Seconds within which an answer begins, and goes on."""
_S3 = ("s3", "s3a")
SENDING = 300
"""Seconds that an object may take to be sent, for which nothing comes back: see docs/design/013."""

ALSO = {
    "az": ", and the variables AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "gs": ", and the file that the variable GOOGLE_APPLICATION_CREDENTIALS names",
}
"""What else may be wrong where a store cannot be opened, by the scheme of its URL."""


class Options(NamedTuple):
    """What obstore's `from_url` is given."""

    config: Any
    client: Any

    @property
    def sending(self) -> Any:
        """The client for what is large on its way out: reqwest counts the seconds to the answer from when it begins to
        send, so a limit for them would be one for the line."""
        others = {name: value for name, value in self.client.items() if name != "read_timeout"}
        return {**others, "timeout": f"{SENDING}s"}


def options(storage: Storage, environ: Mapping[str, str]) -> Options:
    """The settings for `storage`. Raises StorageError where an S3 service needs credentials and none are found, or
    where a variable holds what cannot be sent to it."""
    client: dict[str, Any] = {
        "connect_timeout": "10s",
        "read_timeout": f"{ANSWER}s",
        "timeout": "600s",
        "user_agent": "packhorse",
    }
    endpoint = endpoint_of(storage, environ)
    if endpoint and not is_endpoint(endpoint):  # that of the configuration is one
        raise StorageError(
            f"The address of the service for {storage.url} in AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is no http(s) URL.",
            'Write it as "https://s3.us-west-004.backblazeb2.com", without anything before or behind it.',
        )
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    if urlsplit(storage.url).scheme not in _S3:
        return Options({"endpoint": storage.endpoint} if storage.endpoint else {}, client)
    found = _keys(environ)
    usual_region = found.pop("region", "us-east-1")
    region = storage.region or _region_of(endpoint) or usual_region
    if not all(map(str.isprintable, (region, *found.values()))):  # obstore panics
        raise StorageError(
            f"The credentials or the region for {storage.url} have a line end or another control character in them.",
            "Set the variables anew, without it.",
        )
    # As the SDKs of AWS do, the content is not digested for the signature where nobody can change it on its way.
    config: dict[str, Any] = {"region": region, "unsigned_payload": _unchangeable(endpoint)}
    if endpoint:
        config["endpoint"] = endpoint.rstrip("/")
        config["virtual_hosted_style_request"] = False
    if "access_key_id" in found:
        config |= found
    elif endpoint and "amazonaws.com" not in endpoint:
        raise StorageError(
            f"There are no credentials for {storage.url}.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for Backblaze B2 also B2_APPLICATION_KEY_ID and "
            "B2_APPLICATION_KEY work).",
        )
    return Options(config, client)


def endpoint_of(storage: Storage, environ: Mapping[str, str]) -> str:
    """The address of the service that `storage` is asked for; "" for the one that belongs to its scheme."""
    if storage.endpoint or urlsplit(storage.url).scheme not in _S3:
        return storage.endpoint
    return environ.get("AWS_ENDPOINT_URL_S3", "") or environ.get("AWS_ENDPOINT_URL", "")


def _unchangeable(endpoint: str) -> bool:
    """Whether what is sent is protected by TLS, or never leaves this machine."""
    host = urlsplit(endpoint).hostname or ""
    return not endpoint.startswith("http://") or host in ("localhost", "::1") or host.startswith("127.")


def _keys(environ: Mapping[str, str]) -> dict[str, str]:
    found = {"region": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION", "")}
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"):
        found["access_key_id"] = environ["AWS_ACCESS_KEY_ID"]
        found["secret_access_key"] = environ["AWS_SECRET_ACCESS_KEY"]
        if environ.get("AWS_SESSION_TOKEN"):
            found["session_token"] = environ["AWS_SESSION_TOKEN"]
    elif environ.get("B2_APPLICATION_KEY_ID") and environ.get("B2_APPLICATION_KEY"):
        found["access_key_id"] = environ["B2_APPLICATION_KEY_ID"]
        found["secret_access_key"] = environ["B2_APPLICATION_KEY"]
    else:
        found |= _from_files(environ)
    # Secrets that come from files often end with the end of a line.
    return {name: value for name, text in found.items() if (value := text.strip())}


def _from_files(environ: Mapping[str, str]) -> dict[str, str]:
    """The keys and the region of the profile in ~/.aws (AWS CLI user guide, "Configuration and credential files")."""
    home = os.path.join(environ.get("HOME", ""), ".aws")
    profile = environ.get("AWS_PROFILE", "default")
    parser = configparser.RawConfigParser()
    try:
        parser.read(environ.get("AWS_CONFIG_FILE") or os.path.join(home, "config"))
        parser.read(environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.join(home, "credentials"))
    except (configparser.Error, UnicodeDecodeError):
        return {}
    names = {
        "region": "region",
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    found = {}
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            for name, key in names.items():
                if parser.has_option(section, name):
                    found[key] = parser.get(section, name)
    return found


def _region_of(endpoint: str) -> str:
    """The region in an endpoint's name: Backblaze B2, AWS and RunPod put it there."""
    host = urlsplit(endpoint).hostname or ""
    match = re.fullmatch(r"s3[.-]([a-z0-9-]+)\.(?:backblazeb2\.com|amazonaws\.com)", host)
    match = match or re.fullmatch(r"s3api-([a-z0-9-]+)\.runpod\.io", host)
    return match.group(1) if match else ""
