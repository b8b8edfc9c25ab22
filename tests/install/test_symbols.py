from __future__ import annotations

import contextlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tests.install import native
from tests.install.conftest import Installer
from tests.install.index import Index, wheel

from packhorse.errors import PackhorseError
from packhorse.install import symbols
from packhorse.install.interpreter import worker_interpreter
from packhorse.install.symbols import Finding, Scope, demangled, sentence
from packhorse.install.wheels import distributions

MODULE = f"fast{native.SUFFIX}"
ERROR = {
    True: "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    False: "_ZN3c105ErrorC1ENS_14SourceLocationESs",
}


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled files are kept for all tests."""
    return tmp_path_factory.mktemp("builds")


def _packages(place: Path, *contents: dict[str, str | bytes]) -> Path:
    """A directory of packages with a distribution `fast` that has all files of the last of `contents`."""
    for files in contents:
        for name, content in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    info = place / "fast-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in contents[-1]))
    return place


def _check(packages: Path, environ: dict[str, str] | None = None) -> list[Finding]:
    scope = Scope([packages], worker_interpreter(sys.executable, {}), environ or {})
    with contextlib.closing(scope):
        own = [found.distribution for found in distributions(packages) if found.name == "fast"]
        assert own
        return symbols.check(own, scope)


def _imported(packages: Path, statement: str = "import torch, fast; print(fast.answer())") -> str:
    """What the loader itself says."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(packages)!r}); {statement}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


# --- against a library that plays torch's part ---


@pytest.mark.parametrize("cxx11_abi", [True, False])
def test_a_module_that_can_be_loaded_is_not_complained_about(
    cxx11_abi: bool, builds: Path, tmp_path: Path
) -> None:
    module = native.extension(builds, "fast", cxx11_abi=cxx11_abi)
    packages = _packages(tmp_path, native.torch(builds, cxx11_abi=cxx11_abi), {MODULE: module})

    assert _imported(packages) == "42"
    assert _check(packages) == []


@pytest.mark.parametrize("cxx11_abi", [True, False])
def test_the_other_abi_is_found_as_the_loader_would(cxx11_abi: bool, builds: Path, tmp_path: Path) -> None:
    module = native.extension(builds, "fast", cxx11_abi=cxx11_abi)
    packages = _packages(tmp_path, native.torch(builds, cxx11_abi=not cxx11_abi), {MODULE: module})

    [finding] = _check(packages)

    assert f"undefined symbol: {ERROR[cxx11_abi]}" in _imported(packages)
    assert (finding.file, finding.kind, finding.missing) == (MODULE, "symbol", [ERROR[cxx11_abi]])
    here = str(not cxx11_abi).upper()
    assert finding.library == "torch/lib/libc10.so"
    assert finding.reason == (
        f"it was built with the C++11 ABI {str(cxx11_abi).upper()}, and torch/lib/libc10.so with {here}"
    )
    assert f"Take the wheel for cxx11abi{here}" in finding.remedy
    assert f"c10::Error::Error(c10::SourceLocation, std::string) ({ERROR[cxx11_abi]})" in sentence(finding)


def test_another_build_of_torch_is_told_by_the_library_that_lacks_the_symbol(
    builds: Path, tmp_path: Path
) -> None:
    module = native.extension(builds, "fast", newer=True)
    packages = _packages(tmp_path, native.torch(builds), {MODULE: module})

    [finding] = _check(packages)

    assert "undefined symbol: _ZN3c1013only_in_newerEi" in _imported(packages)
    assert finding.missing == ["_ZN3c1013only_in_newerEi"]
    assert sentence(finding) == (
        f"{MODULE} needs c10::only_in_newer(int) (_ZN3c1013only_in_newerEi), which nothing here defines: "
        "torch/lib/libc10.so should have it, so that is not the version or build which the wheel was made for"
    )


def test_without_torch_the_library_is_what_is_missing(builds: Path, tmp_path: Path) -> None:
    packages = _packages(tmp_path, {MODULE: native.extension(builds, "fast")})

    [finding] = _check(packages)

    assert (finding.kind, finding.library) == ("library", "libc10.so")
    assert "it is in torch, which is not installed" in finding.reason
    assert finding.remedy == "Add torch to the requirements."


# --- libraries and versions ---


def _module(directory: Path, source: str, *options: str) -> bytes:
    code = f"int used(void); {source} void *PyInit_fast(void) {{ return 0; }}"
    return native.library(directory, MODULE, code, *options).read_bytes()


def _linked(directory: Path, soname: str) -> tuple[str, ...]:
    """Options to link with a library of this name, which has a function `used`."""
    library = native.library(
        directory / "linked", f"lib{soname}", "int used(void) { return 1; }", f"-Wl,-soname,{soname}"
    )
    return ("-Wl,--no-as-needed", str(library))


CALL = "int call(void) { return used(); }"


def test_a_missing_library_is_told_with_the_package_that_has_it(tmp_path: Path) -> None:
    for soname, remedy in (
        ("libcudart.so.99", "Add nvidia-cuda-runtime to the requirements."),
        ("libgone.so.6", "Install what it belongs to: a package of the image, or one of the requirements."),
    ):
        module = _module(tmp_path, CALL, *_linked(tmp_path, soname))

        [finding] = _check(_packages(tmp_path / soname, {MODULE: module}))

        assert f"{soname}: cannot open shared object file" in _imported(tmp_path / soname, "import fast")
        assert (finding.kind, finding.library, finding.remedy) == ("library", soname, remedy)


def test_another_version_of_a_library_is_named(tmp_path: Path) -> None:
    other = native.library(tmp_path, "libcudart.so.98", "int other;").read_bytes()
    module = _module(tmp_path, CALL, *_linked(tmp_path, "libcudart.so.99"))
    packages = _packages(tmp_path / "packages", {"nvidia/lib/libcudart.so.98": other}, {MODULE: module})

    [finding] = _check(packages)

    assert "there is libcudart.so.98, of another version" in finding.reason


def test_the_driver_is_not_expected_to_be_here(tmp_path: Path) -> None:
    module = _module(tmp_path, CALL, *_linked(tmp_path, "libcuda.so.1"))
    assert _check(_packages(tmp_path / "packages", {MODULE: module})) == []


def test_a_library_on_the_search_path_of_the_module_is_found(tmp_path: Path) -> None:
    library = native.library(tmp_path, "libused.so", "int used(void) { return 1; }", "-Wl,-soname,libused.so")
    for tags in ("--enable-new-dtags", "--disable-new-dtags"):
        options = ("-Wl,--no-as-needed", str(library), f"-Wl,{tags}", "-Wl,-rpath,$ORIGIN/fast.libs")
        place = tmp_path / tags
        files: dict[str, str | bytes] = {
            MODULE: _module(tmp_path, CALL, *options),
            "fast.libs/libused.so": library.read_bytes(),
        }
        assert _check(_packages(place, files)) == []


def test_a_library_on_the_path_of_the_environment_is_found(tmp_path: Path) -> None:
    options = _linked(tmp_path, "libused.so.5")
    packages = _packages(tmp_path / "packages", {MODULE: _module(tmp_path, CALL, *options)})
    (tmp_path / "elsewhere").mkdir()
    Path(options[-1]).rename(tmp_path / "elsewhere" / "libused.so.5")

    assert [finding.library for finding in _check(packages)] == ["libused.so.5"]
    assert _check(packages, {"LD_LIBRARY_PATH": str(tmp_path / "elsewhere")}) == []


def test_a_version_that_a_library_lacks_is_found_as_the_loader_would(tmp_path: Path) -> None:
    built = {}
    for versions in (["USED_1"], ["USED_1", "USED_2"]):
        (tmp_path / "map").write_text(
            "".join(f"{each} {{ global: {each.lower()}; }};\n" for each in versions)
        )
        source = "".join(f"int {each.lower()}(void) {{ return 1; }}\n" for each in versions)
        options = ["-Wl,-soname,libversioned.so", f"-Wl,--version-script,{tmp_path / 'map'}"]
        built[len(versions)] = native.library(
            tmp_path / str(len(versions)), "libversioned.so", source, *options
        )
    source = "int used_2(void); int call(void) { return used_2(); }"
    module = _module(tmp_path, source, str(built[2]), "-Wl,-rpath,$ORIGIN")
    packages = _packages(tmp_path / "packages", {"libversioned.so": built[1].read_bytes()}, {MODULE: module})

    finding = _check(packages)[0]

    assert "version `USED_2' not found" in _imported(packages, "import fast")
    assert (finding.kind, finding.missing, finding.library) == ("version", ["USED_2"], "libversioned.so")
    assert "libversioned.so is older than the one that it was built with" in sentence(finding)
    (packages / "libversioned.so").write_bytes(built[2].read_bytes())
    assert _check(packages) == []


# --- no complaint without a reason ---


def test_a_symbol_that_another_package_has_is_left_to_the_import(tmp_path: Path) -> None:
    """It may have been loaded before for all to use (RTLD_GLOBAL)."""
    other = native.library(tmp_path, "other.so", "int used(void) { return 1; }").read_bytes()
    packages = _packages(tmp_path / "packages", {"other/other.so": other}, {MODULE: _module(tmp_path, CALL)})
    assert _check(packages) == []
    (packages / "other" / "other.so").unlink()
    assert [finding.missing for finding in _check(packages)] == [["used"]]


def test_libraries_for_other_machines_beside_the_modules_do_not_count(tmp_path: Path) -> None:
    module = _module(tmp_path, CALL, *_linked(tmp_path, "libcudart.so.11.0"))
    assert _check(_packages(tmp_path / "packages", {"fast/libfast_cuda110.so": module})) == []


def test_what_is_installed_beside_these_tests_can_be_loaded() -> None:
    place = Path(sysconfig.get_path("platlib"))
    scope = Scope([place], worker_interpreter(sys.executable, {}), {})
    with contextlib.closing(scope):
        found = symbols.check([each.distribution for each in distributions(place)], scope)
    assert [sentence(finding) for finding in found] == []
    assert len(scope.packaged) > 3


# --- names ---


def test_names_are_shown_as_people_write_them() -> None:
    assert (
        demangled(ERROR[True])
        == demangled(ERROR[False])
        == "c10::Error::Error(c10::SourceLocation, std::string)"
    )
    assert demangled("_Znot_a_name") == "_Znot_a_name"
    assert demangled("cuGetErrorString") == "cuGetErrorString"


# --- in an installation ---


def test_a_wheel_with_the_right_name_and_the_wrong_build_is_refused_before_it_is_imported(
    index: Index, installer: Installer, builds: Path
) -> None:
    index.add("foo", "1.0")
    installer(dependencies=["foo"])
    index.add("torch", "2.6.0", native.torch(builds, cxx11_abi=False))
    module = native.extension(builds, "fast", cxx11_abi=True)
    made = wheel(index.directory, "fast", "1.0", {MODULE: module}, tag=native.TAG)
    made.rename(index.directory / made.name.replace("1.0", "1.0+cu12torch2.6cxx11abiFALSE"))
    links = [{"name": "fast", "find-links": [f"{index.url}fast/"]}]

    with pytest.raises(PackhorseError) as caught:
        installer(dependencies=["torch"], wheels=links, verify=["torch", "fast"])

    assert caught.value.what.startswith(
        f"A wheel of [[environment.wheels]] cannot be loaded here: {MODULE} needs "
    )
    assert "the C++11 ABI TRUE, and torch/lib/libc10.so with FALSE" in caught.value.what
    assert ERROR[True] in installer.log
    assert "import_module" not in installer.log.partition("fast-1.0")[2]
    assert (installer.root.packages / "foo.py").exists()


def test_a_wheel_that_fits_is_installed_and_works(index: Index, installer: Installer, builds: Path) -> None:
    index.add("torch", "2.6.0", native.torch(builds, cxx11_abi=True, version="2.6.0+cu126"))
    for cxx11_abi in (True, False):
        files = {
            MODULE: native.extension(builds, "fast", cxx11_abi=cxx11_abi),
            "start.py": "import torch, fast\nassert fast.answer() == 42\n",
        }
        made = wheel(index.directory, "fast", "1.0", files, tag=native.TAG)
        made.rename(
            index.directory / made.name.replace("1.0", f"1.0+cu12torch2.6cxx11abi{str(cxx11_abi).upper()}")
        )

    done = installer(
        dependencies=["torch"],
        wheels=[{"name": "fast", "find-links": [f"{index.url}fast/"]}],
        verify=["start"],
    )

    assert [outcome.ok for outcome in done.imports] == [True]
