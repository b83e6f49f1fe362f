"""Tokens per second and peak memory of text generation, packed against bf16, on one GPU.

    python -m dynquant.analysis.bench.generation_speed 7b-a1b --types experts=IQ2_XXS,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed random --config DIR --types experts=IQ1_S,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed MODEL.gguf --reference DIR

Models of a shape (`random_models`), or of the one in a `config.json`, have random weights. The prompt is timed by
itself. Decoding is timed without it, as transformers' own `generate` does it, as it does it with a static cache, which
compiles the step into CUDA graphs, and where the model allows it as one step replayed from a CUDA graph, which shows
the kernels without Python. The peak is that of the prompt and of the replays.
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.analysis.bench.random_models import MODEL_SHAPES, random_model, random_packed, shape_config
from dynquant.kernels.bench.harness import MarkdownTable, device_name, measured, numbers, options, release_memory
from dynquant.packed.load_gguf import load

RANDOM_SHAPE = "random"
DEFAULT_TYPES = "experts=IQ2_XXS,rest=Q4_K"
COMPILED = {"cache_implementation": "static"}
"""Options of `generate`, which compiles the decoding step for a static cache."""
_UNSTEADY = 6  # first tokens, in which graphs are recorded


def main() -> None:
    """Parse, measure, print a Markdown table."""
    all_unless = "batches at the first length of prompt; all of them without it, 0 for none"
    asked = options(
        __doc__, "model", config=(str, f"Checkpoint directory with the shape of `{RANDOM_SHAPE}`."),
        reference=(str, "The bf16 checkpoint of the GGUF file; leave out to measure packed only."),
        types=([], f"Quant types of random weights, {DEFAULT_TYPES} without it; may be repeated."), batches="1,16",
        prompts=("32", "Tokens of prompt."), tokens=128, bf16=(True, "Measure random weights in bf16 too."),
        generate=(str, f"Time `generate`: {all_unless}."), compiled=(str, f"Time a compiled step: {all_unless}."),
        layers=(int, "Decoder layers, where fewer than the model's will do."),
    )  # fmt: skip
    lengths = f"{asked.prompts} tokens of prompt, {asked.tokens} new ones"
    print(f"{asked.model}, {device_name()}, PyTorch {torch.__version__}, {lengths}, tokens/s\n")
    ways = "prompt read", "generate", "compiled", "CUDA graph"
    table = MarkdownTable("weights", "batch", "prompt", *ways, "weights, GiB", "peak, GiB")
    for label, build in _models(asked):
        before = torch.cuda.memory_allocated()
        model = build()
        held = torch.cuda.memory_allocated() - before
        prompts, batches = numbers(asked.prompts), numbers(asked.batches)
        for prompt, batch in itertools.product(prompts, batches):
            lengths = batch, prompt, asked.tokens
            speeds = [
                f"{generate_speed(model, *lengths, **how):.1f}"
                if prompt == prompts[0] and batch in (batches if some is None else numbers(some)) else ""
                for some, how in ((asked.generate, {}), (asked.compiled, COMPILED))
            ]  # fmt: skip
            cache, read, peak = read_prompt(model, batch, prompt)
            graphed, peak_of_steps = graph_speed(model, cache, *lengths)
            sizes = (f"{size / 2**30:.2f}" for size in (held, max(peak, peak_of_steps)))
            table.add(label, batch, prompt, f"{read:.0f}", *speeds, graphed, *sizes)
            del cache
            release_memory()
        del model
        release_memory()


def _models(asked: Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if asked.model in (*MODEL_SHAPES, RANDOM_SHAPE):
        is_named = asked.model in MODEL_SHAPES
        config = shape_config(asked.model) if is_named else AutoConfig.from_pretrained(asked.config)
        config.num_hidden_layers = asked.layers or config.num_hidden_layers
        if asked.bf16:
            yield "bf16", lambda: random_model(config)
        for types in asked.types or [DEFAULT_TYPES]:
            yield types, lambda types=types: random_packed(config, types)
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
def read_prompt(model: Any, batch: int, prompt: int) -> tuple[Any, float, int]:
    """Return the cache that random prompts fill, tokens per second of reading them, and the peak of GPU memory."""
    from transformers import DynamicCache

    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids[:1], use_cache=False, logits_to_keep=1)  # kernels are loaded
    read = partial(model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds, peak = measured(read, model.device.type)
    return cache, batch * prompt / seconds, peak


def static_copy(cache: Any, config: Any, room: int) -> Any:
    """Return a static cache for `room` tokens with what a dynamic one holds, which is given back layer by layer."""
    from transformers import StaticCache

    static = StaticCache(config=config, max_cache_len=room)
    for number, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, number)
        layer.keys = layer.values = None
    return static


@torch.inference_mode()
def graph_speed(model: Any, cache: Any, batch: int, prompt: int, tokens: int) -> tuple[str, int]:
    """Return tokens per second of one decoding step after `cache`, replayed from a CUDA graph, and the peak of memory.

    Says why there is no such step instead, where there is none.
    """
    # A static cache counts its positions on the device, in replays too.
    cache = static_copy(cache, model.config, prompt + tokens + 8)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    position = torch.full((1,), prompt, device="cuda")

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
        return f"none ({str(error).splitlines()[0][:60]})", 0
    seconds, peak = measured(lambda: [graph.replay() for _ in range(tokens)])
    return f"{batch * tokens / seconds:.1f}", peak


if __name__ == "__main__":
    main()
