"""What was measured, and the table of it: medians, and ratios to packhorse within each round with their spread."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from measure import Cost

COLUMNS = [
    "contender", "seconds", "x packhorse", "CPU s", "server CPU s", "largest process, MB", "together, MB", "MB moved",
    "requests",
]  # fmt: skip


class Results:
    """The costs of each task, by contender, one for each measured round."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, list[Cost]]] = {}
        self.commands: dict[str, dict[str, str]] = {}
        self.missing: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []

    def add(self, task: str, contender: str, command: str, cost: Cost | None) -> None:
        """Write down what a run cost; None for one that is not measured."""
        self.commands.setdefault(task, {})[contender] = command
        costs = self.costs.setdefault(task, {}).setdefault(contender, [])
        if cost is not None:
            costs.append(cost)

    def lacks(self, task: str, contender: str, how: str) -> None:
        """Write down that a contender is not there."""
        self.missing.setdefault(task, {})[contender] = how

    def note(self, text: str) -> None:
        """Write a sentence below the tables, once."""
        if text not in self.notes:
            self.notes.append(text)

    def median(self, task: str, contender: str, figure: Callable[[Cost], float | None]) -> float | None:
        """The median of a figure over the rounds; None where it is not known."""
        values = [
            value
            for cost in self.costs.get(task, {}).get(contender, ())
            if (value := figure(cost)) is not None
        ]
        return statistics.median(values) if values else None

    def markdown(self) -> str:
        """All tasks, one table each."""
        parts = []
        for task in dict.fromkeys((*self.costs, *self.missing)):
            parts += [
                f"**{task}**",
                "",
                f"| {' | '.join(COLUMNS)} |",
                f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
            ]
            contenders = self.costs.get(task, {})
            reference = next((name for name in contenders if name.startswith("packhorse")), "")
            for name, costs in contenders.items():
                if costs:
                    parts.append(
                        _row(name, costs, contenders.get(reference, []) if name != reference else [])
                    )
            for name, how in self.missing.get(task, {}).items():
                parts.append(f"| {name} | missing: `{how}` |{' |' * (len(COLUMNS) - 2)}")
            parts.append("")
        parts += [f"- {note}" for note in self.notes]
        return "\n".join(parts)

    def document(self) -> dict[str, Any]:
        """Everything, for `--json`: sizes in bytes, times in seconds."""
        return {
            "tasks": {
                task: {
                    name: {"command": self.commands[task][name], "rounds": [_figures(cost) for cost in costs]}
                    for name, costs in contenders.items()
                }
                for task, contenders in self.costs.items()
            },
            "missing": self.missing,
            "notes": self.notes,
        }


def _figures(cost: Cost) -> dict[str, Any]:
    figures = asdict(cost)
    del figures["output"]
    return figures


def _row(name: str, costs: Sequence[Cost], reference: Sequence[Cost]) -> str:
    cells = [
        name,
        _spread([cost.seconds for cost in costs], ".1f" if costs[0].seconds >= 10 else ".2f"),
        _spread([cost.seconds / other.seconds for cost, other in zip(costs, reference)], ".2f"),
        _middle([cost.cpu for cost in costs], ".1f"),
        _middle([cost.server_cpu for cost in costs], ".1f"),
        _middle([_scaled(cost.peak_memory) for cost in costs], ",.0f"),
        _middle([_scaled(cost.together) for cost in costs], ",.0f"),
        _middle([_scaled(cost.moved) for cost in costs], ",.1f"),
        _middle([cost.requests for cost in costs], ",.0f"),
    ]
    return f"| {' | '.join(cells)} |"


def _scaled(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}..{max(values):{form}})"


def _middle(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else ""


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
