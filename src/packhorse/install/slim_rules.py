"""The table of the slim profile: what no program needs at run time, and what is kept all the same, and why."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """What goes, and what of it stays: patterns (fnmatch) of a file's name or of its path below `packages/`."""

    name: str
    remove: tuple[str, ...]
    keep: tuple[str, ...] = ()


RULES = (
    Rule(
        "static libraries",
        ("*.a", "*.la"),
        # numba and cupy link it into kernels at run time.
        keep=("libcudadevrt.a",),
    ),
    Rule(
        "headers",
        ("*.h", "*.hh", "*.hpp", "*.hxx", "*.cuh", "*.inl"),
        keep=(
            # torch.compile and torch.utils.cpp_extension compile C++ with them.
            *("torch/include/*", "torch/_inductor/*", "torch/utils/*", "torchgen/*"),
            # Triton compiles a launcher in C for each kernel.
            *("triton/*", "triton_kernels/*"),
            # NVRTC and nvcc compile with them for cupy, numba and others.
            *("nvidia/cu[0-9]*/include/*", "nvidia/cuda_*/include/*", "cuda/*"),
            # These bring CUDA or C++ code that they compile when it is first used.
            *("cupy/*", "pycuda/*", "pyopencl/*", "numba/*", "numba_cuda/*", "warp/*", "taichi/*"),
            *("flashinfer/*", "deep_gemm/*", "deepspeed/*", "gsplat/*", "tilelang/*", "tvm/*", "tvm_ffi/*"),
            *("keopscore/*", "pykeops/*", "cutlass*/*", "cppyy*/*", "pythran/*", "cffi/*"),
            # A compiler needs its own.
            *("ziglang/*", "clang/*"),
        ),
    ),
    Rule(
        "test suites",
        ("tests/*", "*/tests/*"),  # a directory called test or testing may be an interface, as numpy.testing
    ),
    Rule(
        "type stubs",
        ("*.pyi",),
        # lazy_loader.attach_stub reads them: scikit-image, librosa and others.
        keep=("__init__.pyi",),
    ),
    Rule(
        "Cython sources",
        ("*.pyx", "*.pxd", "*.pxi"),
        keep=("Cython/*",),
    ),
    Rule(
        "build files",
        ("*.cmake", "*.pc"),
    ),
)
