from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.install.providers import advice, distribution, is_driver


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libcudart.so.11.0", "nvidia-cuda-runtime-cu11"),
        ("libcudart.so.12", "nvidia-cuda-runtime-cu12"),
        ("libcudart.so.13", "nvidia-cuda-runtime"),
        ("libcublasLt.so.12", "nvidia-cublas-cu12"),
        ("libnvJitLink.so.13", "nvidia-nvjitlink"),
        ("libcufft.so.11", "nvidia-cufft (for CUDA 12 nvidia-cufft-cu12)"),
        ("libcudnn_ops.so.9", "nvidia-cudnn-cu13 (for CUDA 12 nvidia-cudnn-cu12)"),
        ("libtorch_cuda.so", "torch"),
        ("libc10.so", "torch"),
        ("libtorchfoo.so.1", ""),
        ("libsomething.so.1", ""),
    ],
)
def test_the_package_that_has_a_library_is_known(library: str, package: str) -> None:
    assert distribution(library) == package


@pytest.mark.parametrize("name", ["libcuda.so.1", "libnvidia-ml.so.1", "libnvcuvid.so.1", "libcuda.so"])
def test_libraries_of_the_driver_are_known(name: str) -> None:
    assert is_driver(name)


@pytest.mark.parametrize("name", ["libcudart.so.12", "libcudnn.so.9", "libcudadevrt.a", "libGL.so.1"])
def test_libraries_of_packages_are_not_the_drivers(name: str) -> None:
    assert not is_driver(name)


def test_advice_names_the_package_of_the_system() -> None:
    reason, remedy = advice("libGL.so.1", {})
    assert reason == "the system does not have it"
    assert remedy == "Install it in the image, on Debian and Ubuntu with `apt-get install libgl1`."


def test_a_library_that_is_there_but_not_found_is_told_with_its_place() -> None:
    reason, remedy = advice("libfoo.so.1", {"libfoo.so.1": [Path("/root/packages/foo/libfoo.so.1")]})
    assert reason == "it is in /root/packages/foo/libfoo.so.1, where the loader does not look"
    assert "LD_LIBRARY_PATH" in remedy
