"""Who has a shared library that is missing: an installed package, a package that is known to have it, or a driver.

A table of names that are met often; it need not be complete, since a name that is not in it is told as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_DRIVER = re.compile(
    r"lib(cuda|nvcuvid|nvidia-[\w.-]+|nvoptix|cudadebugger|GLX_nvidia|EGL_nvidia)\.so(\.\d+)*"
)
_CUDA = {
    "cudart": "nvidia-cuda-runtime",
    "nvrtc": "nvidia-cuda-nvrtc",
    "nvrtc-builtins": "nvidia-cuda-nvrtc",
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cupti": "nvidia-cuda-cupti",
    "nvToolsExt": "nvidia-nvtx",
    "nvJitLink": "nvidia-nvjitlink",
    "cufft": "nvidia-cufft",
    "cufile": "nvidia-cufile",
    "curand": "nvidia-curand",
    "cusolver": "nvidia-cusolver",
    "cusolverMg": "nvidia-cusolver",
    "cusparse": "nvidia-cusparse",
    "nvjpeg": "nvidia-nvjpeg",
}
"""By the name of the library: the distribution on the package index, which has -cu11 or -cu12 behind it up to CUDA 12."""
_WITH_CUDA = {"cudart", "nvrtc", "cublas", "cublasLt", "nvJitLink", "cupti"}
"""Those whose soname has the major version of CUDA; the others count for themselves."""
_OTHER = {
    r"libcudnn\w*\.so\.\d+": "nvidia-cudnn-cu13 (for CUDA 12 nvidia-cudnn-cu12)",
    r"libnccl\.so\.2": "nvidia-nccl-cu13 (for CUDA 12 nvidia-nccl-cu12)",
    r"libcusparseLt\.so\.\d+": "nvidia-cusparselt-cu13 (for CUDA 12 nvidia-cusparselt-cu12)",
    r"libnvshmem_host\.so\.\d+": "nvidia-nvshmem-cu13 (for CUDA 12 nvidia-nvshmem-cu12)",
    r"lib(torch|c10)\w*\.so": "torch",
    r"libnvinfer\w*\.so\.(\d+)": "tensorrt",
    r"libmkl_\w+\.so\.\d+": "mkl",
    r"libiomp5\.so": "intel-openmp",
    r"libtbb\w*\.so\.\d+": "tbb",
}
_SYSTEM = {
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libGLU.so.1": "libglu1-mesa",
    "libOpenGL.so.0": "libopengl0",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libSM.so.6": "libsm6",
    "libICE.so.6": "libice6",
    "libXext.so.6": "libxext6",
    "libXrender.so.1": "libxrender1",
    "libX11.so.6": "libx11-6",
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libgfortran.so.5": "libgfortran5",
    "libquadmath.so.0": "libquadmath0",
    "libopenblas.so.0": "libopenblas0",
    "libsndfile.so.1": "libsndfile1",
    "libportaudio.so.2": "libportaudio2",
    "libsox.so.3": "libsox3",
    "libavcodec.so.60": "libavcodec60",
    "libavcodec.so.59": "libavcodec59",
    "libavcodec.so.58": "libavcodec58",
    "libmagic.so.1": "libmagic1",
    "libcairo.so.2": "libcairo2",
    "libpango-1.0.so.0": "libpango-1.0-0",
    "libnuma.so.1": "libnuma1",
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libmlx5.so.1": "ibverbs-providers",
    "libmpi.so.40": "libopenmpi3",
    "libjemalloc.so.2": "libjemalloc2",
    "libtcmalloc.so.4": "libgoogle-perftools4",
    "libssl.so.1.1": "libssl1.1",
    "libssl.so.3": "libssl3",
    "libffi.so.8": "libffi8",
    "libffi.so.7": "libffi7",
    "libz.so.1": "zlib1g",
    "libbz2.so.1.0": "libbz2-1.0",
    "liblzma.so.5": "liblzma5",
    "libgdal.so.32": "libgdal32",
    "libspatialindex_c.so.6": "libspatialindex-c6",
    "libaio.so.1": "libaio1",
    "libzmq.so.5": "libzmq5",
    "libpq.so.5": "libpq5",
    "libtbb.so.12": "libtbb12",
}
"""By soname: the package of Debian and Ubuntu."""


def is_driver(name: str) -> bool:
    """Whether a library comes with the GPU's driver, and so is only where a GPU is."""
    return _DRIVER.fullmatch(name) is not None


def advice(name: str, packaged: Mapping[str, Sequence[Path]]) -> tuple[str, str]:
    """Why a library is not found, and what to do; `packaged` are the libraries of the packages by file name."""
    if name in packaged:
        return (
            f"it is in {packaged[name][0]}, where the loader does not look",
            "Import the package that brings it before, or put its directory into LD_LIBRARY_PATH.",
        )
    stem, _, _ = name.partition(".so")
    others = sorted(each for each in packaged if each.partition(".so")[0] == stem and each != name)
    instead = f"; there is {', '.join(others)}, of another version" if others else ""
    if package := distribution(name):
        return f"it is in {package}, which is not installed{instead}", f"Add {package} to the requirements."
    if name in _SYSTEM:
        return (
            f"the system does not have it{instead}",
            f"Install it in the image, on Debian and Ubuntu with `apt-get install {_SYSTEM[name]}`.",
        )
    return (
        f"nothing installed has it{instead}",
        "Install what it belongs to: a package of the image, or one of the requirements.",
    )


def distribution(name: str) -> str:
    """The Python distribution that is known to have a library; "" for none."""
    match = re.fullmatch(r"lib([\w-]+)\.so(?:\.(\d+))?(?:\.\d+)*", name)
    if match and match[1] in _CUDA:
        package, major = _CUDA[match[1]], int(match[2] or 0)
        if match[1] not in _WITH_CUDA:
            return f"{package} (for CUDA 12 {package}-cu12)"
        return package if major >= 13 else f"{package}-cu{major}"
    known = (package for pattern, package in _OTHER.items() if re.fullmatch(pattern, name))
    return next(known, "")
