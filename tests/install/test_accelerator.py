from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.tags import Tag, compatible_tags, cpython_tags, sys_tags
from packaging.version import Version
from tests.install import native
from tests.install.conftest import Installer
from tests.install.index import Index, wheel

from packhorse.errors import PackhorseError
from packhorse.install.accelerator import Needs, Worker, candidates, choose, needs, worker_tags
from packhorse.install.interpreter import Interpreter, worker_interpreter
from packhorse.install.links import Link
from packhorse.install.torch_build import Torch
from packhorse.install.wheels import Override

# --- what the releases really offer ---

PYTHONS = ("cp39", "cp310", "cp311", "cp312", "cp313")
FLASH_ATTN = [
    f"flash_attn-2.8.3+cu12torch{torch}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl"
    for torch in ("2.4", "2.5", "2.6", "2.7", "2.8")
    for abi in ("FALSE", "TRUE")
    for python in PYTHONS
    if (torch, python) != ("2.4", "cp313")
] + [
    "flash_attn-2.8.3+cu13torch2.9cxx11abiTRUE-cp312-cp312-linux_x86_64.whl",
    "flash_attn-2.8.3+cu13torch2.10cxx11abiTRUE-cp312-cp312-linux_x86_64.whl",
    "flash_attn-2.8.3.tar.gz",
]
OLD_FLASH_ATTN = [
    f"flash_attn-2.5.8+cu{cuda}torch{torch}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl"
    for cuda in ("118", "122")
    for torch in ("1.12", "1.13", "2.0", "2.1", "2.2", "2.3")
    for abi in ("FALSE", "TRUE")
    for python in ("cp37", "cp38", "cp39", "cp310", "cp311", "cp312")
]
MAMBA = [
    f"mamba_ssm-2.2.5+cu{cuda}torch{torch}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl"
    for cuda in ("11", "12")
    for torch in ("2.4", "2.5", "2.6", "2.7")
    for abi in ("FALSE", "TRUE")
    for python in PYTHONS
]
CAUSAL_CONV1D = [
    f"causal_conv1d-{version}+cu12torch{torch}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl"
    for version in ("1.5.0.post8", "1.5.2")
    for torch in ("2.4", "2.5", "2.6", "2.7")
    for abi in ("FALSE", "TRUE")
    for python in PYTHONS
]
SCATTER = [
    f"torch_scatter-2.1.2+pt{torch}{cuda}-{python}-{python}-{platform}.whl"
    for torch, cudas in (
        ("26", ("cpu", "cu118", "cu124", "cu126")),
        ("210", ("cpu", "cu126", "cu128", "cu130")),
    )
    for cuda in cudas
    for python in PYTHONS
    for platform in ("linux_x86_64", "win_amd64")
]
NATTEN = [
    f"natten-{version}-{python}-{python}-linux_x86_64.whl"
    for version in (
        "0.17.5+torch260cu124",
        "0.17.5+torch260cu126",
        "0.21.5+torch2100cu128",
        "0.21.6+torch2100cu130",
    )
    for python in PYTHONS
]


def _links(*files: str) -> list[Link]:
    return [Link(file, f"https://example.org/{file}") for file in files]


def _worker(python: str, torch: Torch | None, machine: str = "x86_64") -> Worker:
    """A worker on glibc 2.35."""
    version = (3, int(python.removeprefix("cp3")))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(35, 4, -1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    tags = [*cpython_tags(version, abis=[python], platforms=platforms)]
    tags += compatible_tags(version, interpreter=python, platforms=platforms)
    interpreter = Interpreter(
        "python", f"3.{version[1]}.1", f"cpython-3{version[1]}-{machine}-linux-gnu", f"linux-{machine}"
    )
    return Worker(interpreter, tags, torch)


@pytest.mark.parametrize(
    ("name", "version", "offered", "python", "torch", "expected"),
    [
        ("flash-attn", "2.8.3", FLASH_ATTN, "cp311", Torch("2.6.0+cu124", "12.4", "", False),
         "flash_attn-2.8.3+cu12torch2.6cxx11abiFALSE-cp311-cp311-linux_x86_64.whl"),
        ("flash-attn", "2.8.3", FLASH_ATTN, "cp311", Torch("2.6.0+cu126", "12.6", "", True),
         "flash_attn-2.8.3+cu12torch2.6cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"),
        ("flash_attn", "", FLASH_ATTN + OLD_FLASH_ATTN, "cp310", Torch("2.7.1+cu128", "12.8", "", True),
         "flash_attn-2.8.3+cu12torch2.7cxx11abiTRUE-cp310-cp310-linux_x86_64.whl"),
        ("flash-attn", "", FLASH_ATTN + OLD_FLASH_ATTN, "cp310", Torch("2.3.1", "12.1", "", False),
         "flash_attn-2.5.8+cu122torch2.3cxx11abiFALSE-cp310-cp310-linux_x86_64.whl"),
        ("flash-attn", "", OLD_FLASH_ATTN, "cp310", Torch("2.3.1+cu118", "11.8", "", False),
         "flash_attn-2.5.8+cu118torch2.3cxx11abiFALSE-cp310-cp310-linux_x86_64.whl"),
        ("flash-attn", "2.8.3", FLASH_ATTN, "cp312", Torch("2.10.0+cu130", "13.0", "", True),
         "flash_attn-2.8.3+cu13torch2.10cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"),
        ("mamba-ssm", "2.2.5", MAMBA, "cp312", Torch("2.7.0", "12.6", "", True),
         "mamba_ssm-2.2.5+cu12torch2.7cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"),
        ("mamba-ssm", "2.2.5", MAMBA, "cp39", Torch("2.4.1", "11.8", "", False),
         "mamba_ssm-2.2.5+cu11torch2.4cxx11abiFALSE-cp39-cp39-linux_x86_64.whl"),
        ("causal-conv1d", "", CAUSAL_CONV1D, "cp313", Torch("2.6.0", "12.4", "", False),
         "causal_conv1d-1.5.2+cu12torch2.6cxx11abiFALSE-cp313-cp313-linux_x86_64.whl"),
        ("causal-conv1d", "1.5.0.post8", CAUSAL_CONV1D, "cp313", Torch("2.6.0", "12.4", "", False),
         "causal_conv1d-1.5.0.post8+cu12torch2.6cxx11abiFALSE-cp313-cp313-linux_x86_64.whl"),
        ("torch-scatter", "", SCATTER, "cp311", Torch("2.6.0+cu124", "12.4", "", False),
         "torch_scatter-2.1.2+pt26cu124-cp311-cp311-linux_x86_64.whl"),
        ("torch-scatter", "", SCATTER, "cp311", Torch("2.6.0+cpu", "", "", False),
         "torch_scatter-2.1.2+pt26cpu-cp311-cp311-linux_x86_64.whl"),
        ("torch-scatter", "", SCATTER, "cp311", Torch("2.10.0+cu130", "13.0", "", True),
         "torch_scatter-2.1.2+pt210cu130-cp311-cp311-linux_x86_64.whl"),
        ("torch-scatter", "", SCATTER, "cp311", Torch("2.6.0+cu125", "12.5", "", True),
         "torch_scatter-2.1.2+pt26cu124-cp311-cp311-linux_x86_64.whl"),
        ("torch-scatter", "2.1.2+pt26cu126", SCATTER, "cp311", Torch("2.6.0+cu124", "12.4", "", False),
         "torch_scatter-2.1.2+pt26cu126-cp311-cp311-linux_x86_64.whl"),
        ("natten", "", NATTEN, "cp310", Torch("2.10.0+cu128", "12.8", "", True),
         "natten-0.21.5+torch2100cu128-cp310-cp310-linux_x86_64.whl"),
        ("natten", "", NATTEN, "cp310", Torch("2.6.0+cu126", "12.6", "", True),
         "natten-0.17.5+torch260cu126-cp310-cp310-linux_x86_64.whl"),
    ],
)  # fmt: skip
def test_the_wheel_built_for_this_torch_is_chosen(
    name: str, version: str, offered: list[str], python: str, torch: Torch, expected: str
) -> None:
    choice = choose(name, version, _links(*offered), _worker(python, torch))

    assert choice.candidate.link.file == expected
    assert expected in choice.why and str(torch.minor) in choice.why


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("cu12torch2.6cxx11abiFALSE", Needs("2.6", "12", "", False, False)),
        ("cu122torch2.3cxx11abiTRUE", Needs("2.3", "12.2", "", False, True)),
        ("cu128torch2.7.0cxx11abiFALSE", Needs("2.7.0", "12.8", "", False, False)),
        ("d20260310.cu130torch2.11.0cxx11abi1", Needs("2.11.0", "13.0", "", False, True)),
        ("pt26cu124", Needs("2.6", "12.4")),
        ("pt113cpu", Needs("1.13", "", "", True)),
        ("pt210cu128", Needs("2.10", "12.8")),
        ("pt2.4.1cu121", Needs("2.4.1", "12.1")),
        ("5043d15pt2.4.1cu121", Needs("2.4.1", "12.1")),
        ("torch260cu124", Needs("2.6.0", "12.4")),
        ("cu124", Needs("", "12.4")),
        ("cu92", Needs("", "9.2")),
        ("rocm6.2", Needs("", "", "6.2")),
        ("cpu", Needs("", "", "", True)),
        ("", Needs()),
        ("dirty", Needs()),
    ],
)
def test_names_tell_what_a_wheel_was_built_for(local: str, expected: Needs) -> None:
    assert needs(Version(f"1.0+{local}" if local else "1.0")) == expected


# --- preferences ---


def test_the_newest_that_fits_wins_over_a_newer_one_that_does_not() -> None:
    files = [
        "foo-3.0+cu12torch2.7-cp311-cp311-linux_x86_64.whl",
        "foo-2.0+cu12torch2.6-cp311-cp311-linux_x86_64.whl",
        "foo-1.0+cu12torch2.6-cp311-cp311-linux_x86_64.whl",
    ]
    choice = choose("foo", "", _links(*files), _worker("cp311", Torch("2.6.0", "12.4")))
    assert choice.candidate.link.file == files[1]
    assert "1 of 3" not in choice.why and "2 of 3 fit" in choice.why


def test_a_wheel_for_this_very_release_of_torch_wins() -> None:
    files = [f"foo-1.0+cu124torch{torch}-cp311-cp311-linux_x86_64.whl" for torch in ("2.6.1", "2.6.0", "2.6")]
    choice = choose("foo", "", _links(*files), _worker("cp311", Torch("2.6.0+cu124", "12.4")))
    assert choice.candidate.link.file == files[1]


def test_the_nearest_cuda_of_the_same_major_version_wins() -> None:
    files = [
        f"foo-1.0+pt26cu{cuda}-cp311-cp311-linux_x86_64.whl" for cuda in ("118", "121", "124", "128", "130")
    ]
    choice = choose("foo", "", _links(*files), _worker("cp311", Torch("2.6.0+cu126", "12.6")))
    assert choice.candidate.link.file == files[2]


def test_the_most_specific_platform_and_the_highest_build_win() -> None:
    files = [
        "foo-1.0-1-cp311-cp311-manylinux_2_28_x86_64.whl",
        "foo-1.0-2-cp311-cp311-manylinux_2_28_x86_64.whl",
        "foo-1.0-cp311-cp311-linux_x86_64.whl",
        "foo-1.0-py3-none-any.whl",
    ]
    assert choose("foo", "", _links(*files), _worker("cp311", None)).candidate.link.file == files[1]


def test_a_preview_is_taken_only_where_there_is_nothing_else() -> None:
    files = ["foo-2.0rc1-py3-none-any.whl", "foo-1.0-py3-none-any.whl"]
    worker = _worker("cp311", None)
    assert choose("foo", "", _links(*files), worker).candidate.link.file == files[1]
    assert choose("foo", "", _links(files[0]), worker).candidate.link.file == files[0]
    assert choose("foo", "2.0rc1", _links(*files), worker).candidate.link.file == files[0]


def test_wheels_of_the_stable_abi_and_of_other_machines() -> None:
    files = ["foo-1.0-cp39-abi3-linux_x86_64.whl", "foo-1.0-cp39-abi3-linux_aarch64.whl"]
    for machine, expected in zip(("x86_64", "aarch64"), files):
        choice = choose("foo", "", _links(*files), _worker("cp312", None, machine))
        assert choice.candidate.link.file == expected


def test_what_is_no_wheel_of_that_name_is_no_candidate() -> None:
    files = ["foo-1.0.tar.gz", "foo.whl", "foo_bar-1.0-py3-none-any.whl", "Foo-1.0-py3-none-any.whl"]
    found = candidates("foo", "", _links(*files, files[-1]))
    assert [candidate.link.file for candidate in found] == files[-1:]


# --- when none fits ---


def _refused(name: str, version: str, offered: list[str], worker: Worker) -> PackhorseError:
    with pytest.raises(PackhorseError) as caught:
        choose(name, version, _links(*offered), worker)
    return caught.value


@pytest.mark.parametrize(
    ("python", "torch", "column", "remedy"),
    [
        ("cp311", Torch("2.3.1", "12.1", "", False), "torch", "with torch 2.4 or 2.5 or 2.6 or 2.7 or 2.8"),
        ("cp314", Torch("2.8.0", "12.8", "", True), "Python", "with cp39 or cp310 or cp311 or cp312 or cp313 (environment.python)"),
        ("cp311", Torch("2.6.0+cu118", "11.8", "", False), "CUDA", "with a torch for 12"),
        ("cp312", Torch("2.10.0+cu130", "13.0", "", False), "ABI", "with a torch of the C++11 ABI TRUE"),
    ],
)  # fmt: skip
def test_the_wrong_tag_is_marked_and_the_remedy_names_what_would_fit(
    python: str, torch: Torch, column: str, remedy: str
) -> None:
    error = _refused("flash-attn", "2.8.3", FLASH_ATTN, _worker(python, torch))

    heading, needed, first, *_ = (re.split(r" {2,}", line.strip()) for line in error.what.splitlines()[1:])
    position = heading.index(column) - len(heading)
    assert heading == ["Python", "platform", "torch", "CUDA", "ABI"]
    assert needed == [
        "needed here",
        python,
        "linux_x86_64",
        torch.minor,
        torch.cuda,
        str(torch.cxx11_abi).upper(),
    ]
    assert [cell for cell in first if cell.endswith(" ✗")] == [first[position]]
    assert remedy in error.remedy
    assert error.exit_code == 1


def test_the_platform_can_be_what_is_wrong() -> None:
    torch = Torch("2.8.0", "12.8", "", True)
    error = _refused("flash-attn", "2.8.3", FLASH_ATTN, _worker("cp312", torch, "aarch64"))
    assert "linux_x86_64 ✗" in error.what
    assert "on linux_x86_64" in error.remedy


def test_without_torch_the_table_says_so() -> None:
    error = _refused("flash-attn", "2.8.3", FLASH_ATTN, _worker("cp312", None))
    assert "no torch" in error.what and "2.8 ✗" in error.what


def test_a_long_table_shows_the_nearest_and_counts_the_others() -> None:
    error = _refused(
        "flash-attn", "", FLASH_ATTN + OLD_FLASH_ATTN, _worker("cp311", Torch("2.9.0", "12.8", "", True))
    )
    lines = error.what.splitlines()
    assert "torch2.8cxx11abiTRUE-cp311" in lines[3]
    assert len(lines) == 3 + 12 + 1
    assert lines[-1].strip() == f"and {len(FLASH_ATTN) - 1 + len(OLD_FLASH_ATTN) - 12:,} that fit less"


def test_a_version_that_is_not_offered_is_told_with_those_that_are() -> None:
    worker = _worker("cp311", Torch("2.6.0", "12.4", "", False))
    error = _refused("causal-conv1d", "9.9", CAUSAL_CONV1D, worker)
    assert (
        error.what
        == "No wheel of causal-conv1d 9.9 is offered; of causal-conv1d there is: 1.5.0.post8, 1.5.2."
    )
    assert _refused("other", "", CAUSAL_CONV1D, worker).what.endswith("of other there is: none at all.")


# --- the tags of the worker's Python ---


def test_tags_are_those_of_the_workers_python(tmp_path: Path) -> None:
    own = worker_interpreter(sys.executable, {})
    copy = tmp_path / "other" / "bin" / "python3"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--copies", str(copy.parent.parent)], check=True
    )

    other = worker_interpreter(str(copy), {})

    assert worker_tags(own) == list(sys_tags())
    assert worker_tags(other) == list(sys_tags())
    assert Tag("py3", "none", "any") in worker_tags(other)


# --- in an installation ---


@pytest.fixture(scope="session")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | bytes]:
    """A torch 2.6.0 for CUDA 12.4 without the C++11 ABI."""
    return native.torch(tmp_path_factory.mktemp("torch"))


def _offer(directory: Path, local: str, *, tag: str = "py3-none-any") -> Path:
    """As flash-attn's are made: only the file's name has the local version, the metadata has not."""
    made = wheel(directory, "fast", "1.0", {"fast.py": f"LOCAL = {local!r}\n"}, tag=tag)
    return made.rename(directory / f"fast-1.0+{local}-{tag}.whl")


def test_the_torch_of_the_requirements_decides(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes], tmp_path: Path
) -> None:
    index.add("torch", "2.6.0", torch_files)
    (tmp_path / "links").mkdir()
    for local in ("cu12torch2.6cxx11abiFALSE", "cu12torch2.6cxx11abiTRUE", "cu12torch2.7cxx11abiFALSE"):
        _offer(index.directory, local)
        _offer(tmp_path / "links", local)

    page = installer(
        dependencies=["torch"],
        wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}],
        verify=["fast"],
    )
    directory = installer(
        dependencies=["torch"], wheels=[{"name": "fast", "find-links": [str(tmp_path / "links")]}]
    )

    assert page.wheels == directory.wheels == [Override("fast", "", "1.0")]
    assert "cu12torch2.6cxx11abiFALSE" in (installer.root.packages / "fast.py").read_text()
    chosen = "fast-1.0+cu12torch2.6cxx11abiFALSE-py3-none-any.whl"
    told = [note for note in installer.notes if note.startswith(f"fast: {chosen} for Python 3.")]
    assert len(told) == 2 and all(
        "torch 2.6.0, CUDA 12.4, C++11 ABI FALSE; 1 of 3 fit" in note for note in told
    )


def test_when_none_fits_nothing_is_downloaded_and_the_environment_before_stays(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes]
) -> None:
    index.add("foo", "1.0")
    installer(dependencies=["foo"])
    index.add("torch", "2.6.0", torch_files)
    _offer(index.directory, "cu12torch2.7cxx11abiFALSE")

    with pytest.raises(PackhorseError, match=r"No wheel of fast fits .*torch 2\.6\.0") as caught:
        installer(dependencies=["torch"], wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}])

    assert "2.7 ✗" in caught.value.what
    assert "with torch 2.7" in caught.value.remedy
    assert not any(file.startswith(("fast-", "torch-")) for file in index.requests)
    assert (installer.root.packages / "foo.py").exists()


def test_how_torch_was_built_is_read_from_parts_of_its_wheel(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes]
) -> None:
    """The ABI, too, which neither its version nor its metadata tell."""
    torch = index.add("torch", "2.6.0", torch_files)
    _offer(index.directory, "cu12torch2.6cxx11abiTRUE")

    with pytest.raises(PackhorseError, match=r"No wheel of fast fits") as caught:
        installer(dependencies=["torch"], wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}])

    assert "TRUE ✗" in caught.value.what
    assert torch.name in index.parts and torch.name not in index.requests


def test_where_the_server_has_no_parts_the_choice_waits_for_torch(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes]
) -> None:
    torch = index.add("torch", "2.6.0", torch_files)
    for local in ("cu12torch2.6cxx11abiFALSE", "cu12torch2.6cxx11abiTRUE"):
        _offer(index.directory, local)
    index.ranges = index.metadata = False

    installer(
        dependencies=["torch"],
        wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}],
        verify=["fast"],
    )

    assert "cu12torch2.6cxx11abiFALSE" in (installer.root.packages / "fast.py").read_text()
    assert sum(note.startswith("fast: fast-1.0+cu12torch2.6cxx11abiFALSE") for note in installer.notes) == 1
    assert f"how {torch.name} was built could not be read from it" in installer.log


def test_a_torch_among_the_extra_wheels_decides(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes]
) -> None:
    index.add("torch", "2.5.0")
    own = index.add("torch", "2.6.0", torch_files)
    for local in ("cu12torch2.5", "cu12torch2.6"):
        _offer(index.directory, local)

    done = installer(
        dependencies=["torch==2.5.0"],
        wheels=[
            {"name": "torch", "url": f"http://{index.host}/files/{own.name}"},
            {"name": "fast", "find-links": [f"{index.url}fast/"]},
        ],
    )

    assert done.wheels == [Override("torch", "2.5.0", "2.6.0"), Override("fast", "", "1.0")]
    assert "cu12torch2.6" in (installer.root.packages / "fast.py").read_text()


def test_a_torch_that_the_image_brings_counts(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes], tmp_path: Path
) -> None:
    for name, content in torch_files.items():
        path = tmp_path / "image" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    installer.environ["PYTHONPATH"] = str(tmp_path / "image")
    for local in ("cu12torch2.5", "cu12torch2.6"):
        _offer(index.directory, local)

    installer(wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}])

    assert "cu12torch2.6" in (installer.root.packages / "fast.py").read_text()


def test_a_wheel_named_by_hand_that_seems_wrong_is_installed_with_a_warning(
    index: Index, installer: Installer, torch_files: dict[str, str | bytes], tmp_path: Path
) -> None:
    index.add("torch", "2.6.0", torch_files)
    path = _offer(tmp_path, "cu12torch2.5cxx11abiFALSE")

    installer(dependencies=["torch"], wheels=[{"name": "fast", "path": str(path)}])

    assert (installer.root.packages / "fast.py").exists()
    assert any(
        note.startswith(f"warning: {path.name} was built for torch 2.5, and here is")
        for note in installer.notes
    )


def test_a_wheel_named_by_hand_for_another_python_is_refused(installer: Installer, tmp_path: Path) -> None:
    path = _offer(tmp_path, "cu12torch2.6", tag="cp27-cp27m-linux_x86_64")

    with pytest.raises(PackhorseError, match=r"does not fit .*\n(.*\n)*.*cp27-cp27m ✗"):
        installer(wheels=[{"name": "fast", "path": str(path)}])
