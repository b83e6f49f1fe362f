"""Times of products with routed experts: `python -m dynquant.kernels.bench.experts --out FILE.json`.

A model is EXPERTSxSLOTSxHIDDENxWIDTH: gate and up are [2 width, hidden] matrices, of one row for every token, and down
is [hidden, width], of one row for every slot. Products and their gradients (of the activations) are timed as `dispatch`
runs them, beside PyTorch's bf16 product of tokens that are sorted already; the sort of ours is inside its time. Times
are medians of CUDA-graph replays over experts and copies of the weights that rotate, so that the L2 cache does not hold
them. A time is reported after its result was compared with float64 for a few tokens. `fraction` is the share of the
read bandwidth by the packed bytes of the experts that have tokens. With --tune few tokens are timed both ways, one
expert a slot (`pairs`) and sorted (`tiles`). The file is rewritten after every row.
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels import ops
from dynquant.kernels.bench.gemv import ERROR_LIMIT, ROTATED_BYTES, ceilings, finite_blocks
from dynquant.kernels.bench.harness import JsonReport, Row, graph_time, numbers, options, precompile
from dynquant.kernels.planes import pack_planes
from dynquant.kernels.triton import grouped

TYPES = "Q4_K,IQ2_XXS,IQ1_S,Q2_K,Q6_K"
MODELS = "128x8x2048x768,256x8x7168x2048"
_CHECKED_TOKENS, _MOST_CALLS, _TUNED_PAIRS = 3, 16, 1024


@dataclass(frozen=True)
class Stack:
    """One matrix of every expert: E of [N, K], and whether a token gives a row to each of its `slots`."""

    experts: int
    slots: int
    part: str
    n: int
    k: int


@dataclass(frozen=True)
class Routed:
    """Activations, gradients of the results, and experts of one call."""

    x: Tensor
    dy: Tensor
    ids: Tensor


def stacks(model: str) -> list[Stack]:
    """Return the two stacks of a model, EXPERTSxSLOTSxHIDDENxWIDTH."""
    experts, slots, hidden, width = (int(number) for number in model.split("x"))
    return [Stack(experts, slots, "gate_up", 2 * width, hidden), Stack(experts, slots, "down", hidden, width)]


def routed_calls(stack: Stack, tokens: int, count: int, device: str = "cuda") -> list[Routed]:
    """Return inputs of calls; the first tokens of the first call go to the same experts whatever their number."""
    generator = torch.Generator(device).manual_seed(0)
    noise = [
        torch.rand(rows, stack.experts, device=device, generator=generator)
        for rows in (_CHECKED_TOKENS, count * tokens)
    ]
    every = torch.cat(noise).topk(stack.slots).indices
    x_shape = (tokens, stack.k) if stack.part == "gate_up" else (tokens, stack.slots, stack.k)
    calls = []
    for number in range(count):
        x = torch.randn(x_shape, device=device, dtype=torch.bfloat16)
        dy = torch.randn(tokens, stack.slots, stack.n, device=device, dtype=torch.bfloat16)
        calls.append(Routed(x, dy, every[number * tokens : (number + 1) * tokens].contiguous()))
    return calls


def truth(call: Routed, dense: dict[int, Tensor], is_grad: bool) -> Tensor:
    """Return the product of the first tokens in float64, with decoded weights by expert."""
    ids = call.ids[:_CHECKED_TOKENS].tolist()
    inputs = call.dy if is_grad else call.x
    rows = []
    for token, slot in itertools.product(range(len(ids)), range(len(ids[0]))):
        row = inputs[token, slot] if inputs.dim() == 3 else inputs[token]
        weight = dense[ids[token][slot]].double()
        rows.append(row.double() @ (weight if is_grad else weight.T))
    return torch.stack(rows).view(len(ids), len(ids[0]), -1)


def run(call: Routed, weight: Tensor, type_name: str, is_grad: bool) -> Tensor:
    """Return the product that is timed."""
    if is_grad:
        return ops.experts_input_grad(call.dy, weight, call.ids, type_name, layout="planes")
    return ops.experts_linear(call.x, weight, call.ids, type_name, layout="planes")


def bf16_call(call: Routed, dense: Tensor, is_grad: bool) -> Callable[[], Tensor]:
    """Return PyTorch's product by dense experts [E, N, K], of rows that are sorted by expert."""
    flat = call.ids.flatten()
    order = flat.argsort()
    ends = flat.bincount(minlength=len(dense)).cumsum(0).int()
    inputs = call.dy if is_grad else call.x
    by_token = inputs.dim() == 2
    rows = inputs.reshape(-1, inputs.shape[-1])[order // call.ids.shape[1] if by_token else order]
    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    weight = dense if is_grad else dense.transpose(1, 2)
    return lambda: product(rows, weight, offs=ends)


def bf16_times(stack: Stack, all_tokens: list[int]) -> dict[tuple[int, bool], float]:
    """Return microseconds of PyTorch's product for (tokens, whether it is the gradient)."""
    dense = torch.empty(stack.experts, stack.n, stack.k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    times = {}
    for tokens, is_grad in itertools.product(all_tokens, (False, True)):
        calls = routed_calls(stack, tokens, _num_calls(tokens))
        times[tokens, is_grad], _ = graph_time([bf16_call(call, dense, is_grad) for call in calls])
    return times


def measure(stack: Stack, type_name: str, all_tokens: list[int], read_gbps: float, tune: bool) -> Iterator[Row]:
    """Yield a row for every number of tokens, product and way."""
    row_bytes = QUANT_TYPES[type_name].row_bytes(stack.k)
    blocks = finite_blocks(type_name, stack.experts * stack.n, stack.k).view(stack.experts, stack.n, row_bytes)
    first = pack_planes(type_name, blocks)
    checked = routed_calls(stack, _CHECKED_TOKENS, 1)[0].ids.unique().tolist()
    dense = {expert: decode(type_name, blocks[expert]) for expert in checked}
    copies = [first, *(first.clone() for _ in range(-(-ROTATED_BYTES // first.numel()) - 1))]
    del blocks
    for tokens, is_grad in itertools.product(all_tokens, (False, True)):
        calls = routed_calls(stack, tokens, _num_calls(tokens))
        used = sum(len(call.ids.unique()) for call in calls) / len(calls) * stack.n * row_bytes
        for way in ("", "pairs", "tiles") if tune and tokens * stack.slots <= _TUNED_PAIRS else ("",):
            with _forced(way):
                row = {"experts": stack.experts, "part": stack.part, "n": stack.n, "k": stack.k, "type": type_name}
                row |= {"tokens": tokens, "product": "input_grad" if is_grad else "linear", "way": way or "dispatch"}
                reference = truth(calls[0], dense, is_grad)
                got = run(calls[0], first, type_name, is_grad)
                error = ((got[:_CHECKED_TOKENS].double() - reference).norm() / reference.norm()).item()
                row |= {"error": error, "memory": first.numel() / (2 * stack.experts * stack.n * stack.k)}
                if not error <= ERROR_LIMIT["bf16"] or not bool(got.isfinite().all()):
                    yield row | {"refused": f"error above {ERROR_LIMIT['bf16']}, or not finite"}
                    continue
                del got
                timed = [
                    partial(run, call, copies[number % len(copies)], type_name, is_grad)
                    for number, call in enumerate(calls)
                ]
                us, _ = graph_time(timed)
                yield row | {"us": us, "gbps": used / us / 1e3, "fraction": used / us / 1e3 / read_gbps}


def _num_calls(tokens: int) -> int:
    return max(2, min(_MOST_CALLS, 64 // tokens))


def _forced(way: str):
    return mock.patch.object(grouped, "is_few", lambda *_: way == "pairs") if way else nullcontext()


def _compile(job: tuple[str, Stack, int]) -> None:
    type_name, stack, tokens = job
    weight = torch.zeros(
        stack.experts, 256, QUANT_TYPES[type_name].row_bytes(stack.k), dtype=torch.uint8, device="cuda"
    )
    call = routed_calls(Stack(stack.experts, stack.slots, stack.part, 256, stack.k), tokens, 1)[0]
    for is_grad in (False, True):
        run(call, weight, type_name, is_grad)


def main() -> None:
    """Parse, compile, measure, write JSON after every row."""
    asked = options(
        __doc__, out=Path, types=TYPES, models=MODELS, tokens="1,4,16,64,256,1024,4096", workers=12, tune=False,
        seconds=(300.0, "stop measuring after this time"),
    )  # fmt: skip
    all_tokens = numbers(asked.tokens)
    types, every = asked.types.split(","), [stack for model in asked.models.split(",") for stack in stacks(model)]
    precompile(_compile, [(name, s, t) for s, t, name in itertools.product(every, all_tokens, types)], asked.workers)
    began = time.perf_counter()
    report = JsonReport(asked.out, ceilings())
    for row in _rows(asked, every, types, all_tokens, report.head["read_gbps"]):
        report.add(row)
        if time.perf_counter() - began > asked.seconds:
            print("time is up", flush=True)
            break
    print(f"{time.perf_counter() - began:.0f} s")


def _rows(
    asked: Namespace, every: list[Stack], types: list[str], all_tokens: list[int], read_gbps: float
) -> Iterator[Row]:
    for stack in every:
        dense = bf16_times(stack, all_tokens)
        torch.cuda.empty_cache()
        for type_name in types:
            for row in measure(stack, type_name, all_tokens, read_gbps, asked.tune):
                row["bf16_us"] = dense[row["tokens"], row["product"] == "input_grad"]
                yield row | ({"speedup": row["bf16_us"] / row["us"]} if "us" in row else {})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
