"""Tokens per second and peak memory of text generation, packed against bf16, on one GPU.

    python -m dynquant.analysis.bench.generation_speed 7b-a1b --types experts=IQ2_XXS,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed random --config DIR --types experts=IQ1_S,rest=Q4_K
    python -m dynquant.analysis.bench.generation_speed MODEL.gguf --reference DIR

Models of a shape (`random_models`), or of the one in a `config.json`, have random weights. A step is timed as
transformers' own `generate` does it and, where the model allows it, replayed from a CUDA graph over a static cache,
which shows the kernels without Python.
"""

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
PROMPT_TOKENS = 32


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "model", config=(str, f"Checkpoint directory with the shape of `{RANDOM_SHAPE}`."),
        reference=(str, "The bf16 checkpoint of the GGUF file; leave out to measure packed only."),
        types=("experts=IQ2_XXS,rest=Q4_K", "Quant types of random weights."), batches="1,16", tokens=128,
    )  # fmt: skip
    print(f"{asked.model}, {device_name()}, PyTorch {torch.__version__}, {asked.tokens} new tokens\n")
    table = MarkdownTable("weights", "batch", "generate, tokens/s", "CUDA graph, tokens/s", "weights, GiB", "peak, GiB")
    for label, build in _models(asked):
        before = torch.cuda.memory_allocated()
        model = build()
        held = torch.cuda.memory_allocated() - before
        for batch in (int(number) for number in asked.batches.split(",")):
            torch.cuda.reset_peak_memory_stats()
            eager = _generate_speed(model, batch, asked.tokens)
            graphed = _graph_speed(model, batch, asked.tokens)
            peak = torch.cuda.max_memory_allocated() / 2**30
            table.add(label, batch, f"{eager:.1f}", graphed, f"{held / 2**30:.2f}", f"{peak:.2f}")
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


@torch.inference_mode()
def _generate_speed(model: Any, batch: int, tokens: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
    lengths = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=8, min_new_tokens=8, **lengths)
    seconds, _ = measured(lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **lengths))
    return batch * tokens / seconds


@torch.inference_mode()
def _graph_speed(model: Any, batch: int, tokens: int) -> str:
    """Return tokens per second of one decoding step replayed from a CUDA graph, or why there is none."""
    from transformers import StaticCache

    # A static cache counts its positions on the device, in replays too.
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + tokens + 8)
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
    positions = torch.arange(PROMPT_TOKENS, device="cuda")
    model(ids, past_key_values=cache, cache_position=positions, use_cache=True)
    token, position = ids[:, -1:].clone(), torch.full((1,), PROMPT_TOKENS, device="cuda")

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
