"""How every benchmark tells what it measured: Markdown tables on stdout, and the same figures in a file with --json.

`Results` holds what peers.py measures: medians, and ratios to packhorse within each round with their spread. Called with
files that peers.py wrote by --json, prints the tables of all of them: one set for each line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import Cost

FLOOR = "floor: "
LINE = f"{FLOOR}fetch to nowhere"
"""The contender that shows what a line can carry."""
COLUMNS = [
    "contender", "seconds", "x packhorse", "CPU s", "server CPU s", "largest process, MB", "together, MB", "MB moved",
    "requests",
]  # fmt: skip


Rounds = dict[int, Cost]
"""What one contender's runs of a task cost, by the number of the round."""


class Results:
    """The costs of each task, by contender, one for each measured round."""

    def __init__(self) -> None:
        self.round = 0
        self.costs: dict[str, dict[str, Rounds]] = {}
        self.commands: dict[str, dict[str, str]] = {}
        self.failures: dict[str, dict[str, list[str]]] = {}
        """What contenders said that did not get through a line with faults."""
        self.missing: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []

    def add(self, task: str, contender: str, command: str, cost: Cost | None) -> None:
        """Write down what a run of the present round cost; None for one that is not measured."""
        self.commands.setdefault(task, {})[contender] = command
        costs = self.costs.setdefault(task, {}).setdefault(contender, {})
        if cost is not None:
            costs[self.round] = cost

    def fail(self, task: str, contender: str, command: str, said: str) -> None:
        """Write down that a contender did not get through a line with faults."""
        self.add(task, contender, command, None)
        self.failures.setdefault(task, {}).setdefault(contender, []).append(said)

    def lacks(self, task: str, contender: str, how: str) -> None:
        """Write down that a contender is not there."""
        self.missing.setdefault(task, {})[contender] = how

    def note(self, text: str) -> None:
        """Write a sentence below the tables, once."""
        if text not in self.notes:
            self.notes.append(text)

    def median(self, task: str, contender: str, figure: Callable[[Cost], float | None]) -> float | None:
        """The median of a figure over the rounds; None where it is not known."""
        costs = self.costs.get(task, {}).get(contender, {})
        values = [value for cost in costs.values() if (value := figure(cost)) is not None]
        return statistics.median(values) if values else None

    def markdown(self, *, line: bool = False) -> str:
        """All tables, and the notes below."""
        return page(self.tables(line=line), self.notes)

    def tables(self, *, line: bool = False) -> list[str]:
        """All tasks, one table each. On a `line` with what of it each contender used."""
        columns = [*COLUMNS, *(["of the line, %"] if line else [])]
        tables = []
        for task in dict.fromkeys((*self.costs, *self.missing)):
            if not any(self.costs.get(task, {}).values()) and task not in {**self.missing, **self.failures}:
                continue  # not measured
            rows = []
            contenders = self.costs.get(task, {})
            reference = next((name for name in contenders if name.startswith("packhorse")), "")
            for name, costs in contenders.items():
                cells = _cells(costs, contenders[reference] if name != reference and reference else {})
                if line:
                    cells.append(spread(_shares(costs, contenders.get(LINE, {})), ".0f"))
                if failures := self.failures.get(task, {}).get(name):
                    cells[0] += f" ({len(failures)} of {len(failures) + len(costs)} failed)"
                if costs or failures:
                    rows.append([name, *cells])
            for name, how in self.missing.get(task, {}).items():
                rows.append([name, f"missing: `{how}`", *[""] * (len(columns) - 2)])
            tables.append(table(task, columns, rows))
        return tables

    def document(self) -> dict[str, Any]:
        """Everything, for `--json` and `read`: sizes in bytes, times in seconds."""
        return {
            "tasks": {
                task: {
                    name: {
                        "command": self.commands[task][name],
                        "rounds": [{"round": number, **_figures(cost)} for number, cost in costs.items()],
                    }
                    for name, costs in contenders.items()
                }
                for task, contenders in self.costs.items()
            },
            "failures": self.failures,
            "missing": self.missing,
            "notes": self.notes,
        }

    def read(self, document: Mapping[str, Any]) -> None:
        """Add what another run wrote down by `document`. Its rounds are other rounds than those that are here."""
        before = self.round
        for task, contenders in document["tasks"].items():
            for name, found in contenders.items():
                self.add(task, name, found["command"], None)
                for figures in found["rounds"]:
                    cost = Cost(**{key: value for key, value in figures.items() if key != "round"})
                    number = before + 1 + figures["round"]
                    self.costs[task][name][number] = cost
                    self.round = max(self.round, number)
        for task, failures in document["failures"].items():
            for name, said in failures.items():
                self.failures.setdefault(task, {}).setdefault(name, []).extend(said)
        for task, missing in document["missing"].items():
            self.missing.setdefault(task, {}).update(missing)
        for text in document["notes"]:
            self.note(text)


def _figures(cost: Cost) -> dict[str, Any]:
    figures = asdict(cost)
    del figures["output"]
    return figures


def _cells(rounds: Rounds, reference: Rounds) -> list[str]:
    costs = list(rounds.values())
    seconds = [cost.seconds for cost in costs]
    return [
        spread(seconds, ".1f" if min(seconds, default=0) >= 10 else ".2f"),
        spread([cost.seconds / reference[number].seconds for number, cost in rounds.items() if number in reference], ".2f"),
        _middle([cost.cpu for cost in costs], ".1f"),
        _middle([cost.server_cpu for cost in costs], ".1f"),
        _middle([_scaled(cost.peak_memory) for cost in costs], ",.0f"),
        _middle([_scaled(cost.together) for cost in costs], ",.0f"),
        _middle([_scaled(cost.moved) for cost in costs], ",.1f"),
        _middle([cost.requests for cost in costs], ",.0f"),
    ]  # fmt: skip


def _shares(rounds: Rounds, line: Rounds) -> list[float]:
    """Percent of the bytes a second that the line carried in the same round.

    The bytes are for all those that the plain fetch asked for. What was moved twice, after a fault or to be sure, is of no
    use to anybody.
    """
    return [
        100 * line[number].seconds / cost.seconds
        for number, cost in rounds.items()
        if number in line and cost.moved
    ]


def _scaled(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def spread(values: Sequence[float], form: str) -> str:
    """The median, and behind it in brackets the smallest and the largest where there is more than one."""
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}..{max(values):{form}})"


def _middle(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else ""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown below its title. The first column names the rows, the others are figures."""
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def page(tables: Sequence[str], notes: Sequence[str]) -> str:
    """Tables, and below them a list of sentences."""
    return "\n\n".join([*tables, "\n".join(f"- {note}" for note in notes)]).rstrip()


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option whose value `report` takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")


def report(
    file: Path | None, figures: Mapping[str, Any], tables: Sequence[str], notes: Sequence[str]
) -> None:
    """Print the tables and the notes, and write the same figures to `file`: sizes in bytes, times in seconds."""
    if file:
        file.write_text(json.dumps({"machine": machine(), **figures}, indent=1))
    print(page(tables, notes), flush=True)


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def ran_on(*more: str) -> str:
    """A note of what it ran on, and `more` that counts."""
    here = machine()
    memory = f"{here['memory'] / 1e9:.0f} GB of memory"
    told = [f"{here['cores']} cores", memory, f"Python {here['python']}", f"Linux {here['kernel']}", *more]
    return f"{', '.join(told)}."


def main() -> None:
    """Print the tables of the files that are named."""
    if len(sys.argv) < 2:
        sys.exit("Name files that peers.py wrote by --json.")
    by_line: dict[tuple[str, bool], Results] = {}
    for name in sys.argv[1:]:
        document = json.loads(Path(name).read_text())
        by_line.setdefault((document["network"], document["line"]), Results()).read(document)
    for (title, line), results in by_line.items():
        print(f"### {title}\n\n{results.markdown(line=line)}\n")


if __name__ == "__main__":
    main()
