"""What the tables of the benchmark say: ratios within a round, medians with their range, and who is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.tables import table

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))
import environments
from measure import Cost
from results import LINE, Results

BENCH = Path(__file__).parent.parent.parent / "bench"


def cost(seconds: float, *, moved: int | None = None, cpu: float = 1.0) -> Cost:
    return Cost(seconds, cpu, None, 50_000_000, 60_000_000, moved, 10)


def filled(*rounds: dict[str, Cost | None]) -> Results:
    """Results of the task "restore": what each contender cost in each round, None for a round that is not measured."""
    results = Results()
    for number, contenders in enumerate(rounds):
        results.round = number
        for name, each in contenders.items():
            results.add("restore", name, f"{name} --now", each)
    return results


def test_figures_are_medians_and_stand_before_their_range() -> None:
    results = filled(*({"tar": cost(seconds, cpu=seconds / 4)} for seconds in (12.0, 30.0, 14.0)))
    row = table(results.markdown())["tar"]
    assert row["seconds"] == "14.0 (12.0..30.0)"
    assert row["CPU s"] == "3.5"
    assert row["largest process, MB"] == "50"
    assert row["server CPU s"] == ""
    assert table(filled({"tar": cost(2.0)}).markdown())["tar"]["seconds"] == "2.00"
    assert results.median("restore", "tar", lambda each: each.seconds) == 14.0
    assert results.median("restore", "nobody", lambda each: each.seconds) is None


def test_a_ratio_is_taken_within_one_round() -> None:
    # The machine was four times as slow in the second round: by medians of seconds nothing would come out at 2.
    results = filled(
        {"packhorse pull": cost(1.0), "tar": cost(2.0)},
        {"packhorse pull": cost(4.0), "tar": cost(8.0)},
        {"packhorse pull": None, "tar": cost(100.0)},
    )
    rows = table(results.markdown())
    assert rows["tar"]["x packhorse"] == "2.00 (2.00..2.00)"
    assert rows["packhorse pull"]["x packhorse"] == ""


def test_who_is_not_there_has_a_row_and_who_was_not_measured_has_none() -> None:
    results = filled({"packhorse pull": cost(1.0), "tar": None})
    results.lacks("restore", "restic", "apt-get install restic")
    results.lacks("save", "restic", "apt-get install restic")
    text = results.markdown()
    assert list(table(text)) == ["packhorse pull", "restic"]
    assert "| restic | missing: `apt-get install restic` |" in text
    assert list(table(text, "save")) == ["restic"]


def test_who_did_not_get_through_a_faulty_line_is_counted() -> None:
    results = filled({"tar": cost(1.0)}, {"tar": cost(2.0)})
    results.fail("restore", "tar", "tar", "connection reset")
    results.fail("restore", "s5cmd", "s5cmd", "connection reset")
    rows = table(results.markdown(line=True))
    assert rows["tar"]["seconds"] == "1.50 (1.00..2.00) (1 of 3 failed)"
    assert rows["s5cmd"]["seconds"] == "(1 of 1 failed)"


def test_what_was_moved_twice_is_of_no_use_to_the_line() -> None:
    results = filled(
        {
            LINE: cost(10.0, moved=1_000),
            "packhorse pull": cost(20.0, moved=1_900),
            "tar": cost(20.0, moved=1_000),
            "local": cost(5.0, moved=0),
        },
    )
    rows = table(results.markdown(line=True))
    shares = {name: row["of the line, %"] for name, row in rows.items()}
    assert shares == {LINE: "100", "packhorse pull": "50", "tar": "50", "local": ""}
    assert "of the line" not in results.markdown()


def test_files_of_several_runs_become_one_set_of_tables_for_each_line(tmp_path: Path) -> None:
    first = filled({"packhorse pull": cost(1.0), "tar": cost(3.0)})
    second = filled({"packhorse pull": cost(10.0), "restic": cost(20.0)})
    second.lacks("restore", "s5cmd", "make .venv/.bench")
    second.note("One more thing.")
    for name, results, line in (
        ("a", first, "loopback"),
        ("b", second, "loopback"),
        ("c", filled({"tar": cost(7.0)}), "1 Gbit/s"),
    ):
        document = {"network": line, "line": line != "loopback", **results.document()}
        (tmp_path / name).write_text(json.dumps(document))
    words = [sys.executable, str(BENCH / "results.py"), *(str(tmp_path / name) for name in "abc")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    near, far = done.stdout.removeprefix("### loopback\n").split("### 1 Gbit/s\n")
    rows = table(near)
    assert list(rows) == ["packhorse pull", "tar", "restic", "s5cmd"]
    assert rows["packhorse pull"]["seconds"] == "5.50 (1.00..10.00)"
    assert (rows["tar"]["x packhorse"], rows["restic"]["x packhorse"]) == ("3.00", "2.00")
    assert near.rstrip().endswith("- One more thing.")
    assert list(table(far)) == ["tar"]
    assert "of the line, %" in far


def test_the_difference_of_two_trees_is_what_has_no_like_anywhere(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    for directory in (tree, other):
        directory.mkdir()
    (tree / "a").write_bytes(b"alike")
    (other / "moved").write_bytes(b"alike")
    (other / "new").write_bytes(bytes(1_000_000))
    (other / "link").symlink_to("new")
    change = environments.difference(tree, other)
    assert (change.files, change.size) == (1, 1_000_000)
    assert 0 < change.compressed < 1_000
