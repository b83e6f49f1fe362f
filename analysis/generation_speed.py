"""Tokens per second and peak memory of text generation, packed against bf16, on one GPU.

    python -m dynquant.analysis.generation_speed random-7b-a1b --types experts=IQ2_XXS,rest=Q4_K
    python -m dynquant.analysis.generation_speed random --config DIR --types experts=IQ1_S,rest=Q4_K
    python -m dynquant.analysis.generation_speed MODEL.gguf --reference DIR

`random-7b-a1b` is a mixture of experts in the shape of 7 billion weights, one billion of them active, with random
weights: time and memory do not depend on their values. `random` is the same for the shape in a `config.json`. A step
is timed as transformers' own `generate` does it and, where the model allows it, replayed from a CUDA graph over a
static cache, which shows the kernels without Python.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.codecs.scale_fields import num_scales, with_scales
from dynquant.gguf_model import load
from dynquant.layers import EXPERT_PARTS, PackedModule, choose_layout
from dynquant.packed_model import pack_modules
from dynquant.quant_types import quant_type

RANDOM, RANDOM_SHAPE = "random-7b-a1b", "random"
PROMPT_TOKENS = 32


def main() -> None:
    """Parse, measure, print a Markdown table."""
    options = _options()
    print(
        f"{options.model}, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {options.tokens} new tokens\n"
    )
    print(
        "| weights | batch | generate, tokens/s | CUDA graph, tokens/s | weights, GiB | peak, GiB |\n"
        + "|---" * 6
        + "|"
    )
    for label, build in _models(options):
        before = torch.cuda.memory_allocated()
        model = build()
        held = torch.cuda.memory_allocated() - before
        for batch in (int(number) for number in options.batches.split(",")):
            torch.cuda.reset_peak_memory_stats()
            eager = _generate_speed(model, batch, options.tokens)
            graphed = _graph_speed(model, batch, options.tokens)
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"| {label} | {batch} | {eager:.1f} | {graphed} | {held / 2**30:.2f} | {peak:.2f} |", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help=f"{RANDOM}, {RANDOM_SHAPE}, or a GGUF file")
    parser.add_argument("--config", help=f"Checkpoint directory with the shape of `{RANDOM_SHAPE}`.")
    parser.add_argument("--reference", help="The bf16 checkpoint of the GGUF file; leave out to measure packed only.")
    parser.add_argument("--types", default="experts=IQ2_XXS,rest=Q4_K", help="Quant types of random weights.")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--tokens", type=int, default=128)
    return parser.parse_args()


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if options.model in (RANDOM, RANDOM_SHAPE):
        types = dict(part.split("=") for part in options.types.split(","))
        config = _config() if options.model == RANDOM else AutoConfig.from_pretrained(options.config)
        yield "bf16", lambda: _filled(_empty(config))
        yield options.types, lambda: _random_packed(config, types)
        return
    if options.reference:
        yield (
            "bf16",
            lambda: AutoModelForCausalLM.from_pretrained(options.reference, dtype=torch.bfloat16).cuda().eval(),
        )
    yield Path(options.model).stem, lambda: load(options.model, device_map="cuda", dtype=torch.bfloat16).eval()


def _config() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=50_304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        head_dim=128, intermediate_size=4096, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def _empty(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _random_packed(config: Any, types: dict[str, str]) -> nn.Module:
    """MLA's latent projection stays in bf16: packed, it is two tensors that a file has to make of it."""
    model = _empty(config)
    chosen: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not path.endswith(("mlp.gate", "kv_b_proj")):
            chosen[f"{path}.weight"] = types["rest"]
        elif hasattr(module, "gate_up_proj"):
            chosen |= {f"{path}.{part}": types["experts"] for part in EXPERT_PARTS}
    pack_modules(model, chosen, dtype=torch.bfloat16)
    return _filled(model)


def _filled(model: nn.Module) -> nn.Module:
    """Random weights of a plausible size on the GPU; the rotary tables are computed anew."""
    rotary = type(model.model.rotary_emb)
    model.to_empty(device="cuda")
    for buffer in model.buffers():
        buffer.zero_()
    model.model.rotary_emb = rotary(config=model.config).to("cuda")
    packed = {
        id(getattr(module, name)): module.types[name]
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name in module.packed_names
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in packed:
                _fill_blocks(parameter.data, packed[id(parameter)])
            else:
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.0 if parameter.dim() == 1 else 0.02)
    choose_layout(model)
    return model.eval()


def _fill_blocks(weight: Tensor, type_name: str) -> None:
    stored = quant_type(type_name)
    for part in weight.reshape(-1, stored.block_bytes).split(1 << 20):
        part.random_(0, 256)
        if num_scales(type_name):
            scales = torch.full((len(part), num_scales(type_name)), 1e-3, device=part.device)
            part.copy_(with_scales(type_name, part, scales))


@torch.inference_mode()
def _generate_speed(model: Any, batch: int, tokens: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
    lengths = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=8, min_new_tokens=8, **lengths)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **lengths)
    torch.cuda.synchronize()
    return batch * tokens / (time.perf_counter() - start)


@torch.inference_mode()
def _graph_speed(model: Any, batch: int, tokens: int) -> str:
    """Tokens per second of one decoding step replayed from a CUDA graph, or why there is none."""
    from transformers import StaticCache

    # A static cache counts its positions on the device, in replays too.
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + tokens + 8)
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
    positions = torch.arange(PROMPT_TOKENS, device="cuda")
    model(ids, past_key_values=cache, cache_position=positions, use_cache=True)
    token, position = ids[:, -1:].clone(), torch.full((1,), PROMPT_TOKENS, device="cuda")

    def step() -> Tensor:
        return model(
            token,
            past_key_values=cache,
            cache_position=position,
            position_ids=position.expand(batch, 1),
            use_cache=True,
        ).logits

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
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        graph.replay()
    torch.cuda.synchronize()
    return f"{batch * tokens / (time.perf_counter() - start):.1f}"


if __name__ == "__main__":
    main()
