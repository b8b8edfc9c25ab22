"""Programs that compute on a GPU, each a function of this file: `python on_gpu.py NAME [SHARD/SHARDS]`.

Each prints one line for each result: what it is, and of each tensor its shape, type and sum, to four digits. An error is
a result as any other: what a GPU does not know it does not know in the next run either.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def told(value: Any) -> list[str]:
    """What of a result has to be the same in each run."""
    found = []
    for leaf in _pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            tensor = leaf.detach()
            if tensor.layout != torch.strided:
                tensor = tensor.to_dense()
            if tensor.is_quantized:
                tensor = tensor.dequantize()
            if tensor.is_complex():
                tensor = torch.view_as_real(tensor.resolve_conj())
            tensor = tensor.cpu().double()
            finite = tensor[torch.isfinite(tensor)]
            found.append(
                f"{[*leaf.shape]} {leaf.dtype} {float(finite.abs().sum()):.4g} {tensor.numel() - finite.numel()}"
            )
        elif isinstance(leaf, (bool, int, float)):
            found.append(f"{float(leaf):.4g}")
    return found


def step(name: str, work: Callable[[], Any]) -> None:
    """Compute one result from the same random numbers, and print it."""
    torch.manual_seed(7)
    try:
        print(name, *told(work()), sep="; ", flush=True)
    except Exception as error:
        print(f"{name}: {type(error).__name__} {str(error).splitlines()[:1]}", flush=True)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of random numbers, the same in each run."""
    if dtype.is_complex:
        return torch.randn(*shape, device=DEVICE, dtype=dtype)
    return torch.randn(*shape, device=DEVICE).to(dtype)


def products() -> None:
    """cuBLAS, cuBLASLt, and CUTLASS in libtorch_cuda: among others the kernels for sm_90a alone."""
    for dtype in (torch.float64, torch.complex64, *FLOATS):
        for size in (31, 64, 257, 1024, 2048):
            step(f"{size} {dtype}", lambda: some(size, size, dtype=dtype) @ some(size, size, dtype=dtype))
        step(f"batch {dtype}", lambda: torch.bmm(some(8, 33, 65, dtype=dtype), some(8, 65, 17, dtype=dtype)))
    for dtype in FLOATS:
        step(
            f"linear, gelu {dtype}",
            lambda: functional.gelu(
                functional.linear(some(128, 256, dtype=dtype), some(512, 256, dtype=dtype), some(512, dtype=dtype))
            ),
        )  # fmt: skip
    eighth = torch.float8_e4m3fn
    left, right = some(64, 128).to(eighth), some(96, 128).to(eighth).t()
    one, rows, columns = (torch.ones(shape, device=DEVICE) for shape in ((), (64, 1), (1, 96)))
    step("8 bits", lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16))
    step("8 bits, by rows", lambda: torch._scaled_mm(left, right, rows, columns, out_dtype=torch.bfloat16))
    ends = torch.tensor([16, 32, 48, 64], device=DEVICE, dtype=torch.int32)
    half = torch.bfloat16
    step(
        "groups", lambda: torch._grouped_mm(some(64, 64, dtype=half), some(4, 64, 64, dtype=half), offs=ends)
    )
    numbers = torch.arange(64 * 64, device=DEVICE).reshape(64, 64).remainder(19).to(torch.int8)
    step("integers", lambda: torch._int_mm(numbers, numbers))


def networks() -> None:
    """cuDNN and the attention kernels, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for dtype in FLOATS:
        for channels, form in itertools.product((3, 64), (torch.contiguous_format, torch.channels_last)):
            step(
                f"convolution {channels} {form} {dtype}",
                lambda: functional.conv2d(
                    some(4, channels, 56, 56, dtype=dtype).to(memory_format=form),
                    some(32, channels, 3, 3, dtype=dtype).to(memory_format=form),
                    padding=1,
                ),
            )
        for kind in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
            step(f"{kind.__name__} {dtype}", lambda: _trained(kind(32, 64, 2), some(12, 4, 32, dtype=dtype)))
        layers = (
            torch.nn.Conv2d(3, 16, 3),
            torch.nn.BatchNorm2d(16),
            torch.nn.Conv2d(16, 16, 3, groups=16),
            torch.nn.ConvTranspose2d(16, 8, 3),
            torch.nn.MaxPool2d(2),
        )
        step(
            f"layers {dtype}", lambda: _trained(torch.nn.Sequential(*layers), some(8, 3, 32, 32, dtype=dtype))
        )
        kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        for backend, size in itertools.product((*kernels, SDPBackend.MATH), (64, 128)):

            def attention() -> Any:
                given = [some(2, 4, 128, size, dtype=dtype).requires_grad_() for _ in range(3)]
                with sdpa_kernel(backend):
                    found = functional.scaled_dot_product_attention(*given, is_causal=True)
                found.float().sum().backward()
                return found, [tensor.grad for tensor in given]

            step(f"attention {backend} {size} {dtype}", attention)


def _trained(module: torch.nn.Module, given: torch.Tensor) -> Any:
    torch.manual_seed(11)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    module.to(given.device, given.dtype)
    found = module(given)
    found = found[0] if isinstance(found, tuple) else found
    module.zero_grad()
    found.float().square().mean().backward()
    return found, [parameter.grad for parameter in module.parameters()]


def algebra() -> None:
    """cuSOLVER, MAGMA, cuFFT, cuSPARSE and cuSPARSELt."""
    for dtype in (torch.float32, torch.float64, torch.complex64):

        def definite(size: int) -> torch.Tensor:
            given = some(size, size, dtype=dtype)
            return given @ given.mH + size * torch.eye(size, device=DEVICE, dtype=dtype)

        for size in (8, 65, 300):
            step(f"cholesky {size} {dtype}", lambda: torch.linalg.cholesky(definite(size)).abs())
            step(f"eigenvalues {size} {dtype}", lambda: torch.linalg.eigvalsh(definite(size)).abs())
            step(
                f"singular values {size} {dtype}", lambda: torch.linalg.svdvals(some(size, size, dtype=dtype))
            )
            step(f"qr {size} {dtype}", lambda: torch.linalg.qr(some(size, size, dtype=dtype)).R.abs())
            step(
                f"solve {size} {dtype}",
                lambda: torch.linalg.solve(definite(size), some(size, 3, dtype=dtype)),
            )
        for size in (16, 100, 1000, 4096, 10007):
            step(f"fft {size} {dtype}", lambda: torch.fft.fft(some(4, size, dtype=dtype)))
        step(f"fft2 {dtype}", lambda: torch.fft.fft2(some(3, 48, 80, dtype=dtype)))
        step(f"sparse {dtype}", lambda: some(90, 90, dtype=dtype).to_sparse_csr() @ some(90, 9, dtype=dtype))
        step(
            f"sparser {dtype}",
            lambda: some(90, 90, dtype=dtype).to_sparse_csr() @ definite(90).to_sparse_csr(),
        )
    pruned = torch.tensor([0, 0, 1, 1], device=DEVICE, dtype=torch.float16).tile(128, 32)
    dense = some(128, 64, dtype=torch.float16)
    step("half of it", lambda: torch.mm(torch.sparse.to_sparse_semi_structured(pruned), dense))


def models() -> None:
    """transformers and torchvision; NCCL, as far as one GPU goes; graphs; a compiled function (Triton)."""
    import torchvision
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for dtype, attention in itertools.product((torch.float32, torch.bfloat16), ("sdpa", "eager")):

        def llama() -> Any:
            config = LlamaConfig(vocab_size=512, attn_implementation=attention, **sizes, **heads)
            model = LlamaForCausalLM(config).to(DEVICE, dtype).eval()
            given = torch.arange(40, device=DEVICE)[None]
            more = {"attention_mask": torch.ones_like(given), "pad_token_id": 0}
            answer = model.generate(given, min_new_tokens=8, max_new_tokens=8, do_sample=False, **more)
            return model(given).logits, answer.shape[1]

        step(f"llama {attention} {dtype}", llama)
    step("resnet", lambda: _trained(torchvision.models.resnet18(weights=None), some(2, 3, 96, 96)))
    boxes = torch.cat([torch.rand(50, 2) * 50, torch.rand(50, 2) * 50 + 60], 1).to(DEVICE)
    step("nms", lambda: torchvision.ops.nms(boxes, torch.arange(50.0, device=DEVICE), 0.5))
    step("roi align", lambda: torchvision.ops.roi_align(some(1, 3, 64, 64), [boxes / 2], 7))
    image = torch.arange(3 * 64 * 64).remainder(251).reshape(3, 64, 64).to(torch.uint8)
    coded = torchvision.io.encode_jpeg(image)
    step("jpeg", lambda: torchvision.io.decode_jpeg(coded, device=DEVICE))
    step(
        "compiled",
        lambda: torch.compile(lambda given: (given.sin() + given.cos()).softmax(-1))(some(128, 128)),
    )
    step("made at run time", lambda: torch.special.bessel_j1(some(50)))
    if DEVICE == "cuda":
        step("graph", _graph)
        step("nccl", _nccl)


def _graph() -> torch.Tensor:
    given, graph = some(64, 64), torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        given @ given
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = (given @ given).relu()
    graph.replay()
    return found


def _nccl() -> Any:
    from torch import distributed

    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        given = torch.arange(1000, device=DEVICE).to(dtype)
        distributed.all_reduce(given)
        gathered = torch.empty_like(given)
        distributed.all_gather_into_tensor(gathered, given)
        found += [given, gathered]
    distributed.destroy_process_group()
    return found


def operators(share: str) -> None:
    """Every operator of torch that its own tests know, with their samples, forward and backward."""
    from torch.testing._internal.common_methods_invocations import op_db

    shard, shards = map(int, share.split("/"))
    unsettled = ("empty", "new_empty", "torch.ops.aten._efficient_attention_forward")  # memory, random seeds
    for operator in op_db[shard::shards]:
        if operator.name.startswith(unsettled):
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.complex64, torch.int64):
            if dtype not in operator.supported_dtypes(DEVICE):
                continue
            backward = dtype == torch.float32 and operator.supports_autograd
            step(
                f"{operator.name} {operator.variant_test_name} {dtype}",
                lambda: list(_sampled(operator, dtype, backward)),
            )


def _sampled(operator: Any, dtype: torch.dtype, backward: bool) -> Any:
    samples = operator.sample_inputs(DEVICE, dtype, requires_grad=backward)
    for sample in itertools.islice(samples, 2 if backward else 1):
        torch.manual_seed(11)
        found = operator(sample.input, *sample.args, **sample.kwargs)
        yield found
        ends = [
            leaf
            for leaf in _pytree.tree_leaves(found)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.layout == torch.strided
        ]
        given = sample.input
        if backward and ends and isinstance(given, torch.Tensor) and given.is_leaf and given.requires_grad:
            torch.autograd.backward([(leaf.abs() if leaf.is_complex() else leaf).sum() for leaf in ends])
            yield given.grad


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    print(torch.__version__, torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU")
    globals()[sys.argv[1]](*sys.argv[2:])
