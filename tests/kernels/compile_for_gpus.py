"""Compile every Triton kernel for named GPUs on a machine that has none; prints one line a kernel and GPU.

A program of its own, because Triton decides once a process whether it interprets kernels or compiles them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import triton
from frames import as_tensors, noise_frame
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from faceage.kernels import AreaMeans, apply_change, begin_thumbnail, gather_crops
from faceage.types import Change

TYPES = {
    **{torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"},
    **{torch.uint8: "*u8", torch.uint16: "*u16"},
}
done = set()


def compile_only(kernel, *args, grid, warmup, **constants):
    """Stands in for a launch."""
    types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" if isinstance(a, int) else "fp32" for a in args]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in constants.items()})
    for capability in map(int, sys.argv[1:]):
        key = (kernel.__name__, str(constants), capability)
        if key not in done:
            done.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            spills = "__local_depot" in compiled.asm["ptx"]
            where = "local memory" if spills else "registers"
            sys.stdout.write(f"{kernel.__name__} {capability} {len(compiled.asm['cubin'])} {where}\n")


JITFunction.run = compile_only
for pixel_format in ("nv12", "p010le", "gray", "rgb24", "rgb48"):
    frame = as_tensors(noise_frame(pixel_format))
    matrix = np.array([[0.3, 0, 0], [0, 0.3, 0]], np.float32)
    gather_crops([frame], np.zeros(1, np.int64), matrix[None], 16, impl="triton")
    delta = np.zeros((3, 16, 16), np.float32)
    delta[:, 4:8, 4:8] = 1
    apply_change(frame, Change(delta=delta, gain=delta[0]), matrix, impl="triton")
    means = AreaMeans([frame], impl="triton")
    means.pictures(40, 40)
    means.pictures(5, 5)
    begin_thumbnail(frame, impl="triton")
