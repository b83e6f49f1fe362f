"""The kernels of vllm-gguf-plugin beside ours, on the same GGUF blocks: one matrix, and the experts of a mixture.

    python -m dynquant.kernels.bench.gguf_plugin --output FOLDER

The wheel of the plugin is enough, vLLM need not be there: its operators are imported without the package around them,
and chosen as its layers choose. "CUDA" is what it runs as it comes, "Triton" with `VLLM_GGUF_USE_CUDA=0`. A matrix is
[14336, 4096]; experts are gate and up of Qwen3-30B-A3B and then down, 128 of which every token goes to 8. Sorting
tokens by expert is inside our times alone: vLLM does it for the plugin, and `grouped_mm` gets tokens that are sorted.

Times are medians of CUDA-graph replays over weights that rotate through at least 240 MB, errors ||y - ref|| / ||ref||
of the calls that are timed, ref in float64 with the decoded weights (of two products the larger). Whatever fails or is
not there is listed with its reason. FOLDER gets gguf_plugin.json, whole after each row, and gguf_plugin.md.
"""

import importlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels import ops
from dynquant.kernels.bench.gemv import ROTATED_BYTES, finite_blocks
from dynquant.kernels.bench.harness import (
    JsonReport,
    Row,
    device_name,
    graph_time,
    numbers,
    options,
    precompile,
    release_memory,
)
from dynquant.kernels.planes import pack_planes
from dynquant.kernels.triton import gemv

TYPES = ("Q4_K", "Q2_K", "IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q8_0")
OTHER_TYPES = (
    "Q6_K", "Q5_K", "Q3_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ2_XS", "IQ1_M", "Q5_1", "Q5_0", "Q4_1", "Q4_0",
)  # fmt: skip
MATRIX = (14336, 4096)
EXPERTS, SLOTS, EXPERT_SHAPES = 128, 8, ((1536, 2048), (2048, 768))
SIDES = ("bf16", "dynquant", "dynquant int8", "plugin CUDA", "plugin Triton")

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Case:
    """One row of the table. `product` is "matrix" or "experts"; `rows` are rows of activations or tokens."""

    type_name: str
    product: str
    rows: int


@dataclass(frozen=True)
class Inputs:
    """Operands of a case: blocks [.., N, row_bytes] and activations of each product, rotated ids."""

    blocks: list[Tensor]
    activations: list[Tensor]
    ids: list[Tensor]


def main() -> None:
    """Parse, compile, measure, write JSON after every row and the table at the end."""
    asked = options(
        __doc__, output=Path, types=(",".join(TYPES), "names, or all that both know"), rows="1,16,4096",
        tokens="1,64,1024", workers=12, seconds=(300.0, "begin no row after this time"),
    )  # fmt: skip
    began = time.perf_counter()
    names = (*TYPES, *OTHER_TYPES) if asked.types == "all" else asked.types.split(",")
    texts = ("matrix", asked.rows), ("experts", asked.tokens)
    sizes = [(product, number) for product, text in texts for number in numbers(text)]
    cases = [Case(name, *size) for name, size in itertools.product(names, sizes)]
    asked.output.mkdir(parents=True, exist_ok=True)
    precompile(_compile, cases, asked.workers)
    head = {"device": device_name(), "torch": torch.__version__, "compiled_s": time.perf_counter() - began}
    report = JsonReport(asked.output / "gguf_plugin.json", head)
    for case in cases:
        if time.perf_counter() - began > asked.seconds:
            print("time is up", flush=True)
            break
        report.add(measure(case))
        (asked.output / "gguf_plugin.md").write_text("\n".join(table(report.rows)) + "\n")
    print((asked.output / "gguf_plugin.md").read_text(), f"{time.perf_counter() - began:.0f} s", sep="\n")


def measure(case: Case) -> Row:
    """Return a row: microseconds and error of every side, or why there are none."""
    row: Row = {"product": case.product, "type": case.type_name, "rows": case.rows}
    inputs = make_inputs(case)
    reference = references(case, inputs)
    for side in SIDES:
        is_sorted = side == "bf16" and case.product == "experts"
        release_memory()
        try:
            if calls := make_calls(side, case, inputs, is_rotated=True):
                row[f"{side} us"], results = graph_time(calls, replays=15 if case.rows <= 64 else 5)
                expected = [r[sorted_pairs(inputs.ids[0])] for r in reference] if is_sorted else reference
                row[f"{side} error"] = max(map(_error, results[0], expected))
        except Exception as error:  # a peer's failure is a result, not ours to fix
            row[f"{side} failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return row


def _error(result: Tensor, reference: Tensor) -> float:
    return ((result.double().view_as(reference) - reference).norm() / reference.norm()).item()


def make_inputs(case: Case) -> Inputs:
    """Return random blocks whose scales are ordinary numbers, normal activations and, for experts, several ids."""
    name, rows = case.type_name, case.rows
    if case.product == "matrix":
        return Inputs([finite_blocks(name, *MATRIX)], [_normal(rows, MATRIX[1])], [])
    blocks = [finite_blocks(name, EXPERTS * n, k).view(EXPERTS, n, -1) for n, k in EXPERT_SHAPES]
    activations = [_normal(rows, EXPERT_SHAPES[0][1]), _normal(rows * SLOTS, EXPERT_SHAPES[1][1])]
    if rows == 1:  # a replay reads every expert once
        ids = torch.randperm(EXPERTS, device="cuda").view(-1, 1, SLOTS)
    else:
        ids = torch.rand(2, rows, EXPERTS, device="cuda").topk(SLOTS).indices
    return Inputs(blocks, activations, list(ids))


def _normal(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, device="cuda", dtype=torch.bfloat16)


def references(case: Case, inputs: Inputs) -> list[Tensor]:
    """Return the products by the decoded weights in float64: [rows, N], or [pairs, N] of the first ids."""
    if case.product == "matrix":
        return [inputs.activations[0].double() @ decode(case.type_name, inputs.blocks[0]).double().T]
    products, pairs = [], inputs.ids[0].flatten()
    for blocks, x in zip(inputs.blocks, inputs.activations, strict=True):
        x = x.double().repeat_interleave(len(pairs) // len(x), 0)
        product = x.new_empty(len(pairs), blocks.shape[1])
        for expert in pairs.unique().tolist():
            chosen = pairs == expert
            product[chosen] = x[chosen] @ decode(case.type_name, blocks[expert]).double().T
        products.append(product)
    return products


def make_calls(side: str, case: Case, inputs: Inputs, *, is_rotated: bool) -> list[Call]:
    """Return the calls of one side, over copies of the weights if `is_rotated`; none where a side has no kernel."""
    name, is_matrix = case.type_name, case.product == "matrix"
    if side == "dynquant int8" and not (is_matrix and case.rows == 1):
        return []
    prepare = {"bf16": lambda w: decode(name, w).bfloat16(), "dynquant": partial(pack_planes, name)}.get(
        side.partition(" ")[0], lambda w: w
    )
    weights = [prepare(blocks) for blocks in inputs.blocks]
    num_bytes = sum(w.numel() * w.element_size() for w in weights)
    copies = -(-ROTATED_BYTES // num_bytes) if is_rotated else 1
    stacks = [
        weights,
        *([w.clone() for w in weights] for _ in range(min(copies, 3 if case.rows >= 256 else copies) - 1)),
    ]
    if is_matrix:
        multiply = partial(_MATRIX_SIDES[side], name)
        return [partial(multiply, *stack, *inputs.activations) for stack in stacks]
    routings = [_routing(side, name, ids, inputs.activations) for ids in (inputs.ids if is_rotated else inputs.ids[:1])]
    turns = range(max(len(stacks), len(routings)))
    multiply = partial(_EXPERT_SIDES[side], name)
    return [partial(multiply, stacks[i % len(stacks)], *routings[i % len(routings)]) for i in turns]


def _routing(side: str, name: str, ids: Tensor, activations: list[Tensor]) -> tuple:
    """Return what a side is given beside the weights, made before the clock runs."""
    if side == "dynquant":
        return activations[0], activations[1].view(*ids.shape, -1), ids
    if side == "bf16":
        order = sorted_pairs(ids)
        ends = ids.flatten().bincount(minlength=EXPERTS).cumsum(0).int()
        return activations[0][order // SLOTS], activations[1][order], ends
    block_size = load_plugin(side).ggml_moe_get_block_size(QUANT_TYPES[name].ggml_id)
    return *activations, ids.int(), *aligned(ids, block_size, EXPERTS)


def sorted_pairs(ids: Tensor) -> Tensor:
    """Return pairs of a token and a slot in the order of their experts."""
    return ids.flatten().argsort(stable=True)


def aligned(ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what vLLM's `moe_align_block_size` does: sorted pairs, each expert's filled up to whole blocks.

    Returns:
        pairs int32 [places], the number of pairs where a place is filled up; the expert of each block int32, -1 after
        the last; the number of places that are used, int32 [1].
    """
    flat, order = ids.flatten(), sorted_pairs(ids)
    counts = flat.bincount(minlength=num_experts)
    ends = ((counts + block_size - 1) // block_size * block_size).cumsum(0)
    shifts = ends - (counts + block_size - 1) // block_size * block_size - (counts.cumsum(0) - counts)
    num_blocks = min(len(flat), -(-(len(flat) + num_experts * (block_size - 1)) // block_size))
    pairs = torch.full((num_blocks * block_size,), len(flat), dtype=torch.int32, device=ids.device)
    pairs[torch.arange(len(flat), device=ids.device) + shifts[flat[order]]] = order.int()
    experts = torch.searchsorted(ends, torch.arange(num_blocks, device=ids.device) * block_size, right=True)
    return pairs, experts.where(experts < num_experts, -1).int(), ends[-1:].int()


def load_plugin(side: str) -> ModuleType:
    """Return the plugin's operators, set to what a side runs. Raises ImportError: the plugin or its CUDA part."""
    plugin = _operators()
    plugin._CUDA_ENABLED = side == "plugin CUDA"
    if plugin._CUDA_ENABLED and not plugin._CUDA_AVAILABLE:
        importlib.import_module(f"{plugin.__package__}._C_gguf")  # says why it could not be imported
    return plugin


@cache
def _operators() -> ModuleType:
    spec = importlib.util.find_spec("vllm_gguf_plugin")
    if spec is None:
        raise ImportError("install vllm-gguf-plugin (pip install --no-deps is enough)")
    package = ModuleType(spec.name)  # its own __init__ imports vLLM
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[spec.name] = package
    return importlib.import_module(f"{spec.name}.ops")


def _bf16_matrix(name: str, weight: Tensor, x: Tensor) -> Results:
    return (torch.nn.functional.linear(x, weight),)


def _dynquant_matrix(name: str, weight: Tensor, x: Tensor) -> Results:
    return (ops.linear(x, weight, name, layout="planes"),)


def _dynquant_int8_matrix(name: str, weight: Tensor, x: Tensor) -> Results:
    return (gemv.linear(x, weight, name, "int8"),)


def _plugin_matrix(side: str, name: str, weight: Tensor, x: Tensor) -> Results:
    """`_fused_mul_mat_gguf` of the plugin for a matrix of more than 5,120 rows."""
    plugin, kind, is_codebook = load_plugin(side), QUANT_TYPES[name].ggml_id, name.startswith("IQ")
    if len(x) <= (8 if is_codebook else 2):
        return (plugin.ggml_mul_mat_vec_a8(weight, x, kind, len(weight)),)
    if not is_codebook:
        return (plugin.ggml_mul_mat_a8(weight, x, kind, len(weight)),)
    return (x @ plugin.ggml_dequantize(weight, kind, len(weight), x.shape[1], x.dtype).T,)


def _bf16_experts(name: str, weights: list[Tensor], first: Tensor, second: Tensor, ends: Tensor) -> Results:
    return tuple(torch._grouped_mm(x, w.mT, ends) for x, w in zip((first, second), weights, strict=True))


def _dynquant_experts(name: str, weights: list[Tensor], first: Tensor, second: Tensor, ids: Tensor) -> Results:
    return tuple(
        ops.experts_linear(x, w, ids, name, layout="planes") for x, w in zip((first, second), weights, strict=True)
    )


def _plugin_experts(
    side: str, name: str, weights: list[Tensor], first: Tensor, second: Tensor, ids: Tensor, *blocks: Tensor
) -> Results:
    """The two products of the plugin's `_fused_moe_gguf`, without what lies between them."""
    plugin, kind, results = load_plugin(side), QUANT_TYPES[name].ggml_id, []
    is_sorted = side == "plugin Triton" or (len(ids) > 64 and not name.startswith("IQ"))
    for x, weight, slots in zip((first, second), weights, (SLOTS, 1), strict=True):
        sizes = (kind, weight.shape[1], slots, len(x))
        if is_sorted:
            results.append(plugin.ggml_moe_a8(x, weight, *blocks, *sizes))
        else:
            results.append(plugin.ggml_moe_a8_vec(x, weight, ids, slots, *sizes[:2], len(x)))
    return tuple(results)


_PLUGIN = ("plugin CUDA", "plugin Triton")
_MATRIX_SIDES = {
    "bf16": _bf16_matrix, "dynquant": _dynquant_matrix, "dynquant int8": _dynquant_int8_matrix,
    **{side: partial(_plugin_matrix, side) for side in _PLUGIN},
}  # fmt: skip
_EXPERT_SIDES = {
    "bf16": _bf16_experts, "dynquant": _dynquant_experts, **{side: partial(_plugin_experts, side) for side in _PLUGIN},
}  # fmt: skip


def _compile(case: Case) -> None:
    inputs = make_inputs(case)
    for side in SIDES[1:]:
        try:
            for call in make_calls(side, case, inputs, is_rotated=False):
                call()
        except Exception as error:  # `measure` meets it again and lists it
            print(f"{case}, {side}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table: microseconds, times bf16, and the error."""
    columns = ("product", "type", "rows", *SIDES)
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        cells = [str(row[name]) for name in columns[:3]] + [_cell(row, side) for side in SIDES]
        yield f"| {' | '.join(cells)} |"


def _cell(row: Row, side: str) -> str:
    if f"{side} us" not in row:
        return "failed" if f"{side} failed" in row else ""
    us = row[f"{side} us"]
    speed = f" ({row['bf16 us'] / us:.2f})" if side != "bf16" and "bf16 us" in row else ""
    return f"{us:.1f}{speed}, {row[f'{side} error']:.4f}" if side != "bf16" else f"{us:.1f}"


if __name__ == "__main__":
    main()
