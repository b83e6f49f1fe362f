"""Checks of the GEMV kernels that need a process of their own: `python gemv_checks.py JSON`, results as JSON.

The argument has a list of cases for each mode, and so has the result. `interpret` and `interpret_routed` run kernels in
Triton's interpreter, which must be chosen before Triton is imported; `compile` builds them for sm_90 without a GPU and
counts instructions.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, with_scales


def finite_blocks(type_name: str, num_rows: int, row_length: int) -> torch.Tensor:
    """Random blocks whose scales are ordinary numbers: uint8 [rows, row_bytes]."""
    layout = QUANT_TYPES[type_name]
    generator = torch.Generator().manual_seed(3)
    num_blocks = num_rows * row_length // layout.block_size
    blocks = torch.randint(0, 256, (num_blocks, layout.block_bytes), dtype=torch.uint8, generator=generator)
    if type_name == "MXFP4":
        blocks[:, 0] = blocks[:, 0] % 8 + 120
    elif type_name != "NVFP4":
        blocks = with_scales(
            type_name, blocks, torch.rand(num_blocks, num_scales(type_name), generator=generator) * 0.1 + 0.01
        )
    return blocks.reshape(num_rows, -1)


def activations(num_rows: int, row_length: int, hot: int) -> torch.Tensor:
    """Row 0 one-hot at `hot`, row 1 with an outlier of 100 sigma, the others normal; bf16."""
    x = torch.randn(num_rows, row_length, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    if num_rows > 1:
        x[1, row_length // 3] = 100.0
    x[0] = 0
    x[0, hot] = 1.0
    return x


def interpret(case: dict) -> dict:
    """Largest relative error over the rows of x but the first, and how many weights row 0 did not return."""
    from dynquant.kernels.planes import pack_planes
    from dynquant.kernels.triton import gemv
    from dynquant.kernels.triton.gemv import GemvConfig

    name, m, n, k = case["type"], case["m"], case["n"], case["k"]
    blocks = finite_blocks(name, n, k)
    weights = decode(name, blocks)
    # The interpreter cuts bf16 results off instead of rounding them; it rounds fp16.
    x = activations(m, k, case["hot"]).to(torch.float16)
    y = gemv.linear(x, pack_planes(name, blocks), name, case["act"], GemvConfig(**case["config"]))
    reference = x.double() @ weights.double().T
    wrong = (y[0] != weights[:, case["hot"]].to(x.dtype)).sum().item()
    error = ((y.double() - reference)[1:].norm(dim=1) / reference[1:].norm(dim=1)).max().item() if m > 1 else 0.0
    return {"error": error, "wrong": wrong}


def interpret_routed(case: dict) -> dict:
    """`interpret` for experts: the largest relative error over slots, and whether sentinels gave zeros."""
    from dynquant.kernels import reference
    from dynquant.kernels.planes import pack_planes
    from dynquant.kernels.triton import gemv
    from dynquant.kernels.triton.gemv import GemvConfig

    name, n, k, ids = case["type"], case["n"], case["k"], torch.tensor(case["ids"])
    blocks = finite_blocks(name, 3 * n, k).reshape(3, n, -1)
    x = activations(ids.numel() if case["per_slot"] else len(ids), k, 7).to(torch.float16)
    y = gemv.routed(x, pack_planes(name, blocks), ids, name, case["act"], GemvConfig(**case["config"]))
    inputs = x.reshape(*ids.shape, k) if case["per_slot"] else x
    expected = reference.experts_linear(inputs.double(), blocks, ids, name).reshape(-1, n)
    real = (ids.flatten() >= 0) & (ids.flatten() < 3)
    error = ((y.double() - expected)[real].norm(dim=1) / expected[real].norm(dim=1)).max().item()
    return {"error": error, "zeros": not y[~real].any().item()}


def compile_for_hopper(case: dict) -> dict:
    """Instructions per weight of the main loop, and of which kinds; `spills` counts local memory accesses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dynquant.kernels.triton import gemv

    config = gemv.gemv_config(case["type"], 1)
    planes = 1 + (case["act"] == "bf16")
    options = gemv.kernel_constants(case["type"], planes, 8192, config, routed=case.get("routed", False))
    constants = {key: value for key, value in options.items() if key not in ("num_warps", "launch_pdl")}
    names = ("w_ptr", "xq_ptr", "xd_ptr", "grid_ptr", "y_ptr", "ids_ptr", "N", "num_x_rows", "num_experts", "slots")
    types = ("*u8", "*i32", "*fp32", "*i32", "*bf16", "*i64", "i32", "i32", "i32", "i32")
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(gemv.gemv_kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps})
    lines = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    loop = _longest_loop(lines)
    kinds = collections.Counter(op for op, _ in loop)
    weights = config.bn * options["CHUNK"]
    everything = collections.Counter(op.split(".")[0] for op, _ in lines)
    return {
        "per_weight": len(loop) / weights,
        "spills": everything["LDL"] + everything["STL"],
        "shared": sum(count for op, count in kinds.items() if op.split(".")[0] in ("STS", "STSM", "BAR")),
        "wide_loads": kinds["LDG.E.128"],
    }


def _disassembled(cubin: bytes, nvdisasm: Path) -> list[tuple[str, str]]:
    """Instructions as (operation, operands); labels as ("label", name)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            found.append(("label", label[1]))
        else:
            code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line)
            if code:
                found.append((code[1], code[2]))
    return found


def _longest_loop(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    labels = {operands: i for i, (op, operands) in enumerate(lines) if op == "label"}
    loops = [[]]
    for i, (op, operands) in enumerate(lines):
        target = re.search(r"\.L_x_\d+", operands)
        if op == "BRA" and target and labels.get(target[0], i) < i:
            loops.append([line for line in lines[labels[target[0]] : i + 1] if line[0] != "label"])
    return max(loops, key=len)


if __name__ == "__main__":
    run = {"interpret": interpret, "interpret_routed": interpret_routed, "compile": compile_for_hopper}
    asked = json.loads(sys.argv[1])
    assert (os.environ.get("TRITON_INTERPRET") == "1") == ("compile" not in asked)
    print(json.dumps({mode: [run[mode](case) for case in cases] for mode, cases in asked.items()}))
