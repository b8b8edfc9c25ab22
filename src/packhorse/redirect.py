"""The environment table: which variable sends which writer into which place of the root, and why.

The one module that decides the environment of pip, uv and the worker; `run`, `exec`, `install` and `env` apply it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from packhorse import atomic
from packhorse.errors import ConfigError
from packhorse.root import Root


class Row(NamedTuple):
    """One variable: its value as a template over the places of a root, and the reason for it."""

    variable: str
    value: str
    why: str


_EPHEMERAL_CACHES = (
    Row("PIP_CACHE_DIR", "{tmp}/pip", "pip's downloads; gone with the invocation"),
    Row("UV_CACHE_DIR", "{tmp}/uv", "uv's downloads and unpacked wheels; gone with the invocation"),
)
_KEPT_CACHES = (
    Row("PIP_CACHE_DIR", "{pip}", "pip's downloads, kept because of keep-downloads"),
    Row("UV_CACHE_DIR", "{pip}/uv", "uv's downloads and unpacked wheels, kept because of keep-downloads"),
)

TABLE = (
    Row("PACKHORSE_ROOT", "{root}", "nested packhorse commands work on the same root"),
    Row("TMPDIR", "{tmp}", "temporary files of everything: pip and uv download, unpack and build here"),
    Row("TEMP", "{tmp}", "the same, for programs that ask for TEMP"),
    Row("TMP", "{tmp}", "the same, for programs that ask for TMP"),
    Row("PIP_BUILD_DIR", "{build}", "builds of pip before 20.3; later ones build in TMPDIR"),
    Row("UV_PYTHON_INSTALL_DIR", "{deps}/uv/python", "interpreters that uv installs"),
    Row("UV_PYTHON_BIN_DIR", "{deps}/uv/bin", "their commands"),
    Row("UV_TOOL_DIR", "{deps}/uv/tools", "tools that uv installs"),
    Row("UV_TOOL_BIN_DIR", "{deps}/uv/bin", "their commands"),
    Row("XDG_CACHE_HOME", "{deps}/cache", "caches of every program that follows the XDG specification"),
    Row("HF_HOME", "{models}/huggingface", "Hugging Face: models and data sets"),
    Row("TORCH_HOME", "{models}/torch", "torch.hub: models and checkpoints"),
    Row("MODELSCOPE_CACHE", "{models}/modelscope", "ModelScope: models and data sets"),
    Row("KAGGLEHUB_CACHE", "{models}/kagglehub", "kagglehub: models and data sets"),
    Row("KERAS_HOME", "{models}/keras", "Keras: weights, data sets and configuration"),
    Row("TFHUB_CACHE_DIR", "{models}/tfhub", "TensorFlow Hub: models"),
    Row("TFDS_DATA_DIR", "{models}/tensorflow_datasets", "TensorFlow Datasets: data sets"),
    Row("FASTEMBED_CACHE_PATH", "{models}/fastembed", "FastEmbed: models"),
    Row("EASYOCR_MODULE_PATH", "{models}/easyocr", "EasyOCR: models"),
    Row("PADDLE_PDX_CACHE_HOME", "{models}/paddlex", "PaddleX and PaddleOCR: models"),
    Row("NLTK_DATA", "{models}/nltk", "NLTK: corpora and models"),
    Row("TIKTOKEN_CACHE_DIR", "{models}/tiktoken", "tiktoken: encodings"),
    Row("TORCH_EXTENSIONS_DIR", "{deps}/torch_extensions", "torch.utils.cpp_extension: compiled extensions"),
    Row("TORCHINDUCTOR_CACHE_DIR", "{deps}/inductor", "torch.compile: compiled graphs, GPU time saved"),
    Row("TRITON_CACHE_DIR", "{deps}/triton", "Triton: compiled kernels, GPU time saved"),
    Row("CUDA_CACHE_PATH", "{deps}/cuda", "the CUDA driver: kernels compiled from PTX"),
    Row("CUPY_CACHE_DIR", "{deps}/cupy", "CuPy: compiled kernels"),
    Row("NUMBA_CACHE_DIR", "{deps}/numba", "Numba: compiled functions"),
    Row("MPLCONFIGDIR", "{deps}/matplotlib", "Matplotlib: font cache and configuration"),
    Row("VLLM_CACHE_ROOT", "{deps}/vllm", "vLLM: compiled graphs, GPU time saved"),
    Row("FLASHINFER_WORKSPACE_BASE", "{deps}/flashinfer", "FlashInfer: compiled kernels"),
    Row("TVM_FFI_CACHE_DIR", "{deps}/tvm_ffi", "TVM FFI: compiled extensions"),
    Row("CUTE_DSL_CACHE_DIR", "{deps}/cute_dsl", "CuTe DSL: compiled kernels"),
    Row("WANDB_DATA_DIR", "{deps}/wandb", "Weights & Biases: copies of artifacts until they are sent"),
)

COMPUTED = (
    Row("PYTHONPATH", "", "app-path, packages/ and its .pth files, then what was there"),
    Row("PATH", "", "the commands of packages/, then what was there, then the commands that uv installs"),
    Row("HF_TOKEN_PATH", "", "Hugging Face: the token stays where it was, out of models/ and its snapshots"),
)
"""Variables whose value depends on what they held before."""

_PAST_HF_HOME = tuple(
    Row(variable, "", "would lead past HF_HOME, out of the root")
    for variable in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_CACHE",
        "SENTENCE_TRANSFORMERS_HOME",
        "HF_DATASETS_CACHE",
        "HF_MODULES_CACHE",
        "HF_ASSETS_CACHE",
        "HF_XET_CACHE",
    )
)
"""Images for GPU workers often set them; each wins over HF_HOME for a part of what that holds."""

UNSET = (
    Row("PYTHONPYCACHEPREFIX", "", "would hide the bytecode shipped in packages/ and recompile it elsewhere"),
    Row("PYTHONHOME", "", "would give the worker another interpreter's standard library"),
    *_PAST_HF_HOME,
)
"""Variables taken out of the environment."""

_SITECUSTOMIZE = '''\
"""Processes the .pth files of packages/, which Python does only for site directories, then makes way."""
import os
import site
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_packages = os.environ.get("PACKHORSE_PACKAGES") or os.path.join(
    os.path.dirname(os.path.dirname(_here)), "packages"
)
if os.path.isdir(_packages):
    site.addsitedir(_packages)

# The sitecustomize that this one stands in front of, if there is one; another root's chains on from there.
_path = [os.path.abspath(p or ".") for p in sys.path]
_path = sys.path[_path.index(_here) + 1 :] if _here in _path else []
_self = sys.modules.pop("sitecustomize", None)
try:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _spec = PathFinder.find_spec("sitecustomize", _path)
    if _spec is not None and _spec.loader is not None:
        _module = module_from_spec(_spec)
        sys.modules["sitecustomize"] = _module
        _spec.loader.exec_module(_module)
finally:
    if _self is not None:
        sys.modules.setdefault("sitecustomize", _self)
'''


def changes(
    root: Root,
    inherited: Mapping[str, str],
    *,
    tmp: Path,
    build: Path,
    app_path: str = "",
    packages: Path | None = None,
    keep_downloads: bool = False,
) -> dict[str, str | None]:
    """What the table sets (or, by None, unsets) for one invocation; see TABLE.

    `inherited` is the environment it goes on top of: PYTHONPATH and PATH are put in front of what they hold
    there. `packages` is another generation than the one in force, for the check of one not yet exchanged in.
    Raises ConfigError where the root's path cannot stand in a path list.
    """
    if os.pathsep in f"{root.path}{app_path}":
        raise ConfigError(
            f"{root.path if os.pathsep in str(root.path) else app_path} has a colon in its name, which "
            "separates the entries of PYTHONPATH and PATH.",
            "Choose another directory.",
        )
    place = packages if packages is not None else root.packages
    names = {name: str(getattr(root, name)) for name in ("pip", "models", "deps")}
    names |= {"root": str(root.path), "tmp": str(tmp), "build": str(build)}
    caches = _KEPT_CACHES if keep_downloads else _EPHEMERAL_CACHES
    result: dict[str, str | None] = {row.variable: row.value.format(**names) for row in (*TABLE, *caches)}
    result["HF_TOKEN_PATH"] = inherited.get("HF_TOKEN_PATH") or _hugging_face_token(inherited)
    ahead = [app_path, str(place)]
    # Python imports the first sitecustomize only; ours hands on to the next, theirs may not.
    ahead.insert(0 if any(map(_has_sitecustomize, ahead)) else len(ahead), str(root.site))
    result["PYTHONPATH"] = _prepend(ahead, inherited.get("PYTHONPATH", ""))
    path = _prepend([str(place / "bin")], inherited.get("PATH", os.defpath)).split(os.pathsep)
    # Last, so that an interpreter that uv installs becomes nobody's `python3`.
    result["PATH"] = os.pathsep.join(dict.fromkeys([*path, str(result["UV_TOOL_BIN_DIR"])]))
    if packages is not None:
        result["PACKHORSE_PACKAGES"] = str(packages)
    elif "PACKHORSE_PACKAGES" in inherited:
        result["PACKHORSE_PACKAGES"] = None
    for row in UNSET:
        if row.variable in inherited:
            result[row.variable] = None
    return result


def environment(inherited: Mapping[str, str], changed: Mapping[str, str | None]) -> dict[str, str]:
    """`inherited` with `changed` applied."""
    merged = {**inherited, **changed}
    return {name: value for name, value in merged.items() if value is not None}


def own(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` for packhorse's own processes: without the packages of a root that it was started under."""
    if "PYTHONPATH" not in inherited or "PACKHORSE_ROOT" not in inherited:
        return dict(inherited)
    root = Root(Path(inherited["PACKHORSE_ROOT"]))
    theirs = {str(root.packages), str(root.site)}
    kept = [part for part in inherited["PYTHONPATH"].split(os.pathsep) if part not in theirs]
    return {**inherited, "PYTHONPATH": os.pathsep.join(kept)}


def outside(root: Root, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the table that `environ` has, but with a place outside of `root`."""
    rows = (*TABLE, *_EPHEMERAL_CACHES, *_PAST_HF_HOME)
    present = {row.variable: environ[row.variable] for row in rows if environ.get(row.variable)}
    return {
        name: value
        for name, value in present.items()
        if not Path(os.path.abspath(value)).is_relative_to(root.path)
    }


def reasons(*, keep_downloads: bool = False) -> dict[str, str]:
    """Why each variable is changed."""
    caches = _KEPT_CACHES if keep_downloads else _EPHEMERAL_CACHES
    return {row.variable: row.why for row in (*TABLE, *caches, *COMPUTED, *UNSET)}


def prepare(root: Root) -> None:
    """Write what the environment refers to: the chained sitecustomize."""
    if (root.packages / "nltk").is_dir():
        # NLTK downloads to the first place that exists, else to the home directory.
        (root.models / "nltk").mkdir(exist_ok=True)
    target = root.site / "sitecustomize.py"
    content = _SITECUSTOMIZE.encode()
    try:
        if target.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    atomic.write_file(target, content)


def _prepend(ahead: list[str], behind: str) -> str:
    """A path list of `ahead` and then `behind`, without repeating what nested invocations already added.

    An empty part of `behind` stays: it means the working directory.
    """
    ahead = [part for part in ahead if part]
    rest = [part for part in behind.split(os.pathsep) if part not in ahead] if behind else []
    return os.pathsep.join([*ahead, *rest])


def _has_sitecustomize(directory: str) -> bool:
    return directory != "" and any(
        os.path.exists(os.path.join(directory, name)) for name in ("sitecustomize.py", "sitecustomize")
    )


def _hugging_face_token(inherited: Mapping[str, str]) -> str:
    """Where the token of Hugging Face lies without the table (huggingface_hub.constants)."""
    home = inherited.get("HOME", "") or os.path.expanduser("~")
    cache = inherited.get("XDG_CACHE_HOME", "") or os.path.join(home, ".cache")
    return os.path.join(inherited.get("HF_HOME", "") or os.path.join(cache, "huggingface"), "token")
