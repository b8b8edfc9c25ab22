"""What the tests of installing share: pip that knows the test's index alone, and installations without the command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from tests.install.index import Index

from packhorse.config import Config, Environment, Network, Run, Storage
from packhorse.install.environment import InstallResult, check_imports, install
from packhorse.install.imports import ImportOutcome
from packhorse.progress import Silent
from packhorse.root import Root


@pytest.fixture
def pip_environ(environ: dict[str, str], index: Index) -> dict[str, str]:
    """An environment in which pip knows this index and nothing else."""
    return index.environ(environ)


@dataclass
class Installer:
    """Installs into one root, and keeps what was said and how long it would have waited."""

    root: Root
    environ: dict[str, str]
    notes: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __call__(
        self,
        *,
        network: Network | None = None,
        reinstall: bool = False,
        file: Path | None = None,
        **environment: object,
    ) -> InstallResult:
        """Install what `environment` (keys of [environment]) says. Nothing is waited for."""
        config = self._config(environment, network, file)
        return install(
            self.root,
            config,
            self.environ,
            Silent(),
            self.notes.append,
            reinstall=reinstall,
            sleep=self.waits.append,
        )

    def check(self, *verify: str) -> list[ImportOutcome]:
        """Import modules from the environment in force."""
        return check_imports(self.root, self._config({"verify": verify}), self.environ, Silent())

    def _config(
        self, environment: Mapping[str, object], network: Network | None = None, file: Path | None = None
    ) -> Config:
        keys = {key.replace("_", "-"): value for key, value in environment.items()}
        return Config(
            root=self.root.path,
            environment=msgspec.convert({"python": sys.executable, **keys}, Environment),
            network=network or Network(),
            storage=Storage(),
            run=Run(),
            file=file,
        )

    @property
    def log(self) -> str:
        """All that was logged."""
        return "".join(path.read_text() for path in sorted(self.root.logs.iterdir()))


@pytest.fixture
def installer(root_path: Path, pip_environ: dict[str, str]) -> Installer:
    """Installs into the root of this test, from the index of this test."""
    return Installer(Root.open(root_path), pip_environ)
