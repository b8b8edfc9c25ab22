from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index

from packhorse.errors import PackhorseError
from packhorse.install.slim import slim


def _make(directory: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    "path",
    [
        "nvidia/cu13/lib/libcudart_static.a",
        "nvidia/cudnn/include/cudnn.h",
        "torch_tensorrt/include/torch_tensorrt/macros.h",
        "sympy/core/tests/test_basic.py",
        "sympy/core/tests/__pycache__/test_basic.cpython-311.pyc",
        "sympy/core/tests/deeper/data.json",
        "tests/test_of_a_careless_package.py",
        "torch/_C/_VariableFunctions.pyi",
        "scipy/linalg/cython_blas.pxd",
        "torch/share/cmake/Torch/TorchConfig.cmake",
    ],
)
def test_what_no_program_needs_goes(tmp_path: Path, path: str) -> None:
    slim(_make(tmp_path, {path: ""}))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "nvidia/cu13/lib/libcudadevrt.a",
        "nvidia/cu13/include/cuda_fp16.h",
        "nvidia/cuda_runtime/include/cuda_fp16.hpp",
        "torch/include/ATen/ATen.h",
        "torch/_inductor/codegen/cpp_prefix.h",
        "triton/backends/nvidia/include/cuda.h",
        "cupy/_core/include/cupy/complex.cuh",
        "numpy/testing/__init__.py",
        "tensorflow/_api/v2/test/__init__.py",
        "jinja2/tests.py",
        "skimage/filters/__init__.pyi",
        "Cython/Includes/libc/math.pxd",
        "foo/py.typed",
        "torch-2.0.dist-info/licenses/third_party/tests/LICENSE",
    ],
)
def test_what_programs_are_known_to_need_stays(tmp_path: Path, path: str) -> None:
    assert slim(_make(tmp_path, {path: ""})) == []
    assert _names(tmp_path) == {path}


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("foo/__init__.py", "from .tests import run"),
        ("foo/__init__.py", "from .tests.helper import (\n    run,\n)"),
        ("foo/__init__.py", "from . import other, tests"),
        ("foo/__init__.py", "from . import (\n    other,\n    tests,\n)"),
        ("foo/deep/mod.py", "def late():\n    from ..tests import run"),
        ("foo/deep/mod.py", "import foo.tests.helper as h"),
        ("bar.py", "from foo.tests.helper import run"),
    ],
)
def test_a_test_suite_that_is_imported_stays(tmp_path: Path, importer: str, statement: str) -> None:
    suite = {"foo/tests/__init__.py", "foo/tests/helper.py", "foo/tests/data/x.json"}
    _make(tmp_path, dict.fromkeys(suite, "") | {"foo/core/tests/test_x.py": "", importer: f"{statement}\n"})

    slim(tmp_path)

    assert _names(tmp_path) == suite | {importer}


def test_a_test_suite_that_such_a_suite_imports_stays(tmp_path: Path) -> None:
    _make(
        tmp_path,
        {
            "foo.py": "import bar.tests\n",
            "bar/tests/__init__.py": "from baz.tests import run\n",
            "baz/tests/__init__.py": "# used by foo.tests\n",
            "foo/tests/x.py": "",
        },
    )
    slim(tmp_path)

    assert _names(tmp_path) == {"foo.py", "bar/tests/__init__.py", "baz/tests/__init__.py"}


def test_patterns_of_the_user_win_over_the_rules_and_those_that_keep_over_those_that_remove(
    tmp_path: Path,
) -> None:
    _make(
        tmp_path,
        dict.fromkeys(
            ("foo/tests/a.py", "foo/tests/b.py", "foo/x.h", "torch/include/a.h", "bar/model.bin"), ""
        ),
    )

    saved = slim(tmp_path, keep=["foo/*", "a.h"], remove=["torch/include/*", "*.bin", "foo/x.h"])

    assert _names(tmp_path) == {"foo/tests/a.py", "foo/tests/b.py", "foo/x.h", "torch/include/a.h"}
    assert [(each.rule, each.files) for each in saved] == [("slim-remove", 1)]


def test_bytecode_goes_and_stays_with_its_source(tmp_path: Path) -> None:
    _make(
        tmp_path,
        dict.fromkeys(
            (
                "demos/a.py",
                "demos/__pycache__/a.cpython-311.pyc",
                "demos/__pycache__/a.cpython-311.opt-1.pyc",
            ),
            "",
        ),
    )
    slim(tmp_path, keep=["demos/a.py"], remove=["demos/*"])
    assert len(_names(tmp_path)) == 3

    slim(tmp_path, remove=["demos/a.py"])
    assert list(tmp_path.iterdir()) == []


def test_metadata_stays_whatever_is_removed(tmp_path: Path) -> None:
    _make(tmp_path, {"foo-1.0.dist-info/METADATA": "", "foo.py": ""})

    slim(tmp_path, remove=["*"])

    assert _names(tmp_path) == {"foo-1.0.dist-info/METADATA"}


def test_what_went_is_counted_by_rule(tmp_path: Path) -> None:
    _make(tmp_path, {"a.a": "x" * 5000, "b.a": "x", "c.h": "", "d.py": ""})
    before = {path.name: path.stat().st_blocks * 512 for path in tmp_path.iterdir()}

    assert slim(tmp_path) == [
        ("static libraries", 2, before["a.a"] + before["b.a"]),
        ("headers", 1, before["c.h"]),
    ]


def test_other_hard_links_stay_as_they_are(tmp_path: Path) -> None:
    text = "foo.h,,\nfoo-1.0.dist-info/RECORD,,\n"
    before = _make(tmp_path / "before", {"foo.h": "x", "foo-1.0.dist-info/RECORD": text})
    after = tmp_path / "after"
    (after / "foo-1.0.dist-info").mkdir(parents=True)
    for name in _names(before):
        os.link(before / name, after / name)

    slim(after)

    assert (before / "foo.h").read_text() == "x"
    assert (before / "foo-1.0.dist-info/RECORD").read_text() == text
    lines = (after / "foo-1.0.dist-info/RECORD").read_text().splitlines()
    assert lines == ["foo-1.0.dist-info/RECORD,,", "foo-1.0.dist-info/packhorse-slim,,"]


# --- as a part of an installation ---


@pytest.fixture
def offered(index: Index) -> None:
    """A package with what a slim environment leaves out, in names that a RECORD has to quote."""
    index.add(
        "foo",
        "1.0",
        {
            "foo/__init__.py": "from foo import core\n",
            "foo/core.py": "",
            "foo/core.pyi": "",
            "foo/tests/test_core.py": "",
            "foo/include/a,b.h": "x" * 9000,
            'foo/say "x", y.txt': "",
        },
    )


def test_a_slim_environment_passes_the_import_check_and_says_what_was_left_out(
    offered: None, installer: Installer
) -> None:
    done = installer(dependencies=["foo"], profile="slim", verify=["foo"])

    names = {
        name for name in _names(installer.root.packages) if name.startswith("foo/") and ".pyc" not in name
    }
    assert names == {"foo/__init__.py", "foo/core.py", 'foo/say "x", y.txt'}
    assert done.slim_files == 4  # with the bytecode of the test
    assert done.slim_bytes >= 9000
    assert "headers: 1 files" in installer.log


def test_metadata_of_a_slim_environment_is_true(offered: None, installer: Installer) -> None:
    installer(dependencies=["foo"], profile="slim")
    packages = installer.root.packages

    [foo] = distributions(path=[str(packages)])
    assert {str(file) for file in foo.files or ()} == _names(packages)
    with open(packages / "foo-1.0.dist-info/RECORD", newline="") as record:
        assert all(row[1:] == ["", ""] or row[1].startswith("sha256=") for row in csv.reader(record))


def test_extra_wheels_become_slim_too(index: Index, installer: Installer, tmp_path: Path) -> None:
    index.add("bar", "1.0", {"bar.py": "", "bar.h": ""}).rename(tmp_path / "bar-1.0-py3-none-any.whl")
    wheels = [{"name": "bar", "path": str(tmp_path / "bar-1.0-py3-none-any.whl")}]

    installer(profile="slim", wheels=wheels)

    assert not (installer.root.packages / "bar.h").exists()


def test_another_profile_or_other_rules_lead_to_another_installation(
    offered: None, installer: Installer
) -> None:
    header = installer.root.packages / "foo/include/a,b.h"

    assert installer(dependencies=["foo"], profile="slim").installed
    assert installer(dependencies=["foo"], profile="slim", slim_keep=["*.h"]).installed
    assert header.exists()
    assert not installer(dependencies=["foo"], profile="slim", slim_keep=["*.h"]).installed
    assert installer(dependencies=["foo"]).installed
    assert (installer.root.packages / "foo/tests/test_core.py").exists()


def test_a_slim_environment_that_lacks_something_is_not_put_in_force(
    offered: None, installer: Installer
) -> None:
    with pytest.raises(PackhorseError, match=r"`import foo`: ImportError: .*core"):
        installer(dependencies=["foo"], profile="slim", slim_remove=["foo/core.py"], verify=["foo"])
    assert list(installer.root.packages.iterdir()) == []
