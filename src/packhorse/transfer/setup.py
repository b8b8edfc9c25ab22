"""What push, pull and their callers share: one invocation's configuration, root, store and worker Python.

Each is made when it is first asked for, so that a command that needs little starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from packhorse.config import Config
from packhorse.install.interpreter import Interpreter
from packhorse.root import Root, private_directory, refuse_foreign_links
from packhorse.store.objects import Store


class Setup:
    """A configuration at work."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ

    @cached_property
    def root(self) -> Root:
        """The root, created where it is not there yet."""
        return Root.open(self.config.root)

    @cached_property
    def store(self) -> Store:
        """The store of the configuration.

        The one beside the root is checked as the root is: in /tmp anybody can have put something there before.
        """
        directory = self.config.storage.directory
        if self.config.store_is_default and directory is not None:
            refuse_foreign_links(directory)
            directory.parent.mkdir(parents=True, exist_ok=True)
            private_directory(directory)
        return Store(self.config.storage, self.environ)

    @cached_property
    def interpreter(self) -> Interpreter:
        """The worker's Python."""
        from packhorse.install.interpreter import worker_interpreter

        return worker_interpreter(self.config.environment.python, self.environ)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of what is configured, "" where nothing is."""
        from packhorse.install.fingerprint import fingerprint

        if not self.config.environment.configured:
            return ""
        return fingerprint(self.config.environment, self.interpreter)
