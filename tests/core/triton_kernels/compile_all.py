"""Compiles every kernel for a Hopper GPU, as its callers launch it, on a machine that has none. Run as a program.

A launch is replaced by compiling for the types of its arguments; nothing is computed. Prints each kernel's name.
"""

from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction, mangle_type

from pipeline.core.deferred import RowTerm
from pipeline.core.pattern import fixed_k
from pipeline.core.triton_kernels import adam, bag, bag_gradients, bag_of_tokens, largest, row_products, topk

HOPPER = GPUTarget("cuda", 90, 32)
B, F, D, K = 6, 5000, 300, 3


def compile_only(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **keywords: Any) -> None:
    options = {"num_warps": keywords.pop("num_warps")}
    given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    constant = {param.name for param in kernel.params if param.is_constexpr}
    signature = {n: "constexpr" if n in constant else mangle_type(given[n]) for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): given[n] for n in constant}
    source = ASTSource(kernel, signature, constexprs=values)
    compiled = compile_kernel(source, target=HOPPER, options=options)
    assert len(compiled.asm["cubin"]) > 0
    print(kernel.__name__, flush=True)  # noqa: T201


def main() -> None:
    torch.manual_seed(0)
    with mock.patch.object(JITFunction, "run", compile_only):
        for dtype in (torch.float32, torch.bfloat16):
            h = torch.randn(B, F).to(dtype)
            topk(h, K)
            topk(h[:, :100], K)
            largest(h.view(-1), K * B)
        pattern = fixed_k(torch.randint(0, F, (B, K)), F)
        values, rows = torch.randn(B * K), torch.randn(B, D)
        for dtype in (torch.float32, torch.bfloat16):
            table = torch.randn(F, D).to(dtype)
            bag(pattern, values, table)
            row_products(pattern, rows, table)
            bag_gradients(pattern, values, rows, table)
        with mock.patch("pipeline.core.triton_kernels.by_feature.CHUNK", 2):  # some features are cut
            pattern = fixed_k(torch.zeros(B, K, dtype=torch.int64), F)
            bag_of_tokens(pattern, values, rows)
            table = torch.randn(F, D)
            moments = torch.zeros_like(table), torch.zeros_like(table)
            settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
            for grad in (None, table):
                adam(table, moments, grad, [RowTerm(pattern, values, rows)], step=1, **settings)


if __name__ == "__main__":
    main()
