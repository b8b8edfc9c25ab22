"""Programs give the same results however late the large files of their environment come.

The larger ones of the same table are run by `make torture`.
"""

from __future__ import annotations

import shutil

import pytest
from tests.servers import S3Server
from tests.torture.harness import COMPLETE, QUICK_MODES, Environment, install
from tests.torture.programs import QUICK, Program


@pytest.fixture(scope="module")
def environment(seaweedfs: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of small wheels, installed from the index and pushed."""
    work = tmp_path_factory.mktemp("torture")
    root = work / "origin"
    install(sorted({name for program in QUICK for name in program.requirements}), root / "packages")
    environment = Environment(seaweedfs, work)
    environment.save(root)
    shutil.rmtree(root)
    return environment


@pytest.mark.parametrize("program", QUICK, ids=lambda program: program.name)
def test_a_program_gives_the_same_results_however_late_its_files_come(
    program: Program, environment: Environment
) -> None:
    expected = environment.run(program, COMPLETE, environment.work / "complete")
    assert expected.code == 0, expected.errors
    assert expected.output.strip()
    for mode in QUICK_MODES:
        root = environment.work / "new"
        outcome = environment.run(program, mode, root)
        assert outcome.same(expected), f"{mode.name}: {outcome.difference(expected)}"
        assert outcome.early, outcome.errors
        if mode.arrivals == "asked":
            late = expected.arrived - outcome.arrived
            assert late == 0 if program.everything else late > 0
        shutil.rmtree(root)
