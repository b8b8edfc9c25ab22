"""What an environment asks for → a generation of `packages/`: resolved or locked, then the extra wheels.

Promises that extra wheels come last, each in place of what has its name, and that they can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from packhorse.config import Environment
from packhorse.install import apply, lock, wheels
from packhorse.install.chosen import Chosen
from packhorse.install.extra import Extra
from packhorse.install.pip import Engine
from packhorse.install.resolution import Resolution


def bring(
    engine: Engine, environment: Environment, *, base: Path | None, mark: str, staging: Path
) -> list[wheels.Override]:
    """Fill `staging`, an empty directory; returns what the extra wheels took the place of.

    `base` and `mark` are those of apply.apply. Raises PackhorseError where anything cannot be had, or where a module
    of the extra wheels cannot be loaded.
    """
    return _Bringing(engine, environment, base, mark, staging).run()


class _Bringing:
    """One environment on its way."""

    def __init__(
        self, engine: Engine, environment: Environment, base: Path | None, mark: str, staging: Path
    ) -> None:
        self._engine, self._environment = engine, environment
        self._base, self._mark, self._staging = base, mark, staging
        self._resolution = Resolution(engine, environment)
        self._extra = Extra(engine, environment.wheels, self._resolution.access, staging)
        self._before: dict[str, str] = {}
        """The versions that were there, or would have come, without the extra wheels."""

    def run(self) -> list[wheels.Override]:
        brought = self._brought()
        overrides = [wheels.Override(name, self._before.get(name, ""), new) for name, new in brought.items()]
        if overrides:
            self._extra.check_symbols(set(brought))
        wheels.tell(overrides, self._engine)
        return overrides

    def _brought(self) -> Mapping[str, str]:
        """Bring all; returns the versions of the extra wheels by name."""
        environment, resolution = self._environment, self._resolution
        if environment.lock:
            locked = resolution.locked()
            if (last := lock.last_of(environment.lock)) is not None:
                kept = [each for each in locked if each.name not in last]
                return self._apply(kept, [each for name in last for each in locked if each.name == name])
            return self._with_extra(locked)
        if not environment.requirements and not environment.dependencies:
            return self._with_extra(())
        resolved = resolution.chosen(self._staging)
        if resolved is not None:
            return self._with_extra(resolved)
        resolution.install_whole(self._staging)
        self._before = {each.name: each.version for each in wheels.distributions(self._staging)}
        return self._late()

    def _with_extra(self, resolved: Sequence[Chosen]) -> Mapping[str, str]:
        """Without what an extra wheel takes the place of."""
        self._before = {each.name: each.version for each in resolved}
        early = self._extra.early(resolved)
        brought = self._apply([each for each in resolved if each.name not in self._extra.names], early or ())
        return brought if early is not None else self._late()

    def _late(self) -> Mapping[str, str]:
        """Choose each wheel for what is installed then."""
        brought: dict[str, str] = {}
        for wheel in self._environment.wheels:
            brought.update(self._apply((), [self._extra.late(wheel)]))
        return brought

    def _apply(self, chosen: Sequence[Chosen], last: Sequence[Chosen]) -> Mapping[str, str]:
        applied = apply.apply(
            chosen,
            self._engine,
            self._resolution.access,
            self._resolution.sources,
            base=self._base,
            mark=self._mark,
            staging=self._staging,
            scratch=self._staging.with_name("scratch"),
            last=last,
        )
        if applied.linked:
            count = len(chosen) + len(last)
            self._engine.note(f"{applied.linked} of {count} distributions are unchanged and were linked")
        return {each.name: applied.last[each.name] for each in last}
