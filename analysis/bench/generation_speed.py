"""Tokens per second and peak memory of text generation, packed against bf16, on one GPU.

    python -m dynquant.analysis.bench.generation_speed 7b-a1b --types experts=IQ2_XXS,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed random --config DIR --types experts=IQ1_S,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed MODEL.gguf --reference DIR

Models of a shape (`random_models`), or of the one in a `config.json`, have random weights. Decoding is timed without
the prompt, as transformers' own `generate` does it, as it does it with a static cache, which compiles the step into
CUDA graphs, and where the model allows it as one step replayed from a CUDA graph, which shows the kernels without
Python.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.analysis.bench.random_models import MODEL_SHAPES, random_model, random_packed, shape_config
from dynquant.kernels.bench.harness import MarkdownTable, device_name, measured, options, release_memory
from dynquant.packed.load_gguf import load

RANDOM_SHAPE = "random"
COMPILED = {"cache_implementation": "static"}
"""Options of `generate`, which compiles the decoding step for a static cache."""
_UNSTEADY = 6  # first tokens, in which graphs are recorded


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "model", config=(str, f"Checkpoint directory with the shape of `{RANDOM_SHAPE}`."),
        reference=(str, "The bf16 checkpoint of the GGUF file; leave out to measure packed only."),
        types=("experts=IQ2_XXS,rest=Q4_K", "Quant types of random weights."), batches="1,16", prompt=32, tokens=128,
    )  # fmt: skip
    lengths = f"{asked.prompt} tokens of prompt, {asked.tokens} new ones"
    print(f"{asked.model}, {device_name()}, PyTorch {torch.__version__}, {lengths}, decoding in tokens/s\n")
    table = MarkdownTable("weights", "batch", "generate", "compiled", "CUDA graph", "weights, GiB", "peak, GiB")
    for label, build in _models(asked):
        before = torch.cuda.memory_allocated()
        model = build()
        held = torch.cuda.memory_allocated() - before
        for batch in (int(number) for number in asked.batches.split(",")):
            torch.cuda.reset_peak_memory_stats()
            lengths = batch, asked.prompt, asked.tokens
            speeds = [generate_speed(model, *lengths), generate_speed(model, *lengths, **COMPILED)]
            graphed = graph_speed(model, *lengths)
            peak = torch.cuda.max_memory_allocated() / 2**30
            table.add(label, batch, *(f"{s:.1f}" for s in speeds), graphed, f"{held / 2**30:.2f}", f"{peak:.2f}")
        del model
        release_memory()


def _models(asked: Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if asked.model in (*MODEL_SHAPES, RANDOM_SHAPE):
        is_named = asked.model in MODEL_SHAPES
        config = shape_config(asked.model) if is_named else AutoConfig.from_pretrained(asked.config)
        yield "bf16", lambda: random_model(config)
        yield asked.types, lambda: random_packed(config, asked.types)
        return
    place = {"device_map": "cuda", "dtype": torch.bfloat16}
    if asked.reference:
        yield "bf16", lambda: AutoModelForCausalLM.from_pretrained(asked.reference, **place).eval()
    yield Path(asked.model).stem, lambda: load(asked.model, **place).eval()


def generate_speed(model: Any, batch: int, prompt: int, tokens: int, **options: Any) -> float:
    """Return tokens per second of `generate` once it runs steadily; `options` are its own."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    options |= {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if options.get("cache_implementation") == "static":
        options["max_cache_len"] = prompt + tokens  # caches of one length, so that nothing is compiled twice
    for count in (_UNSTEADY, tokens):
        times: list[float] = []

        def record(ids: Tensor, *_: Any, times=times) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(ids, max_new_tokens=count, min_new_tokens=count, stopping_criteria=[record], **options)
    return batch * (tokens - _UNSTEADY) / (times[-1] - times[_UNSTEADY - 1])


@torch.inference_mode()
def graph_speed(model: Any, batch: int, prompt: int, tokens: int) -> str:
    """Return tokens per second of one decoding step replayed from a CUDA graph, or why there is none."""
    from transformers import StaticCache

    # A static cache counts its positions on the device, in replays too.
    cache = StaticCache(config=model.config, max_cache_len=prompt + tokens + 8)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    positions = torch.arange(prompt, device="cuda")
    model(ids, past_key_values=cache, cache_position=positions, use_cache=True)
    token, position = ids[:, -1:].clone(), torch.full((1,), prompt, device="cuda")

    def step() -> Tensor:
        places = {"cache_position": position, "position_ids": position.expand(batch, 1)}
        return model(token, past_key_values=cache, use_cache=True, **places).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"none ({str(error).splitlines()[0][:60]})"
    seconds, _ = measured(lambda: [graph.replay() for _ in range(tokens)])
    return f"{batch * tokens / seconds:.1f}"


if __name__ == "__main__":
    main()
