"""Step time and peak memory of LoRA on packed weights, on bf16 weights, and on NF4 weights of bitsandbytes, on one GPU.

    python -m dynquant.analysis.bench.training_speed 8b --types rest=Q4_K
    python -m dynquant.analysis.bench.training_speed 7b-a1b --types experts=IQ2_XXS,rest=Q4_K --types rest=Q4_K

Models of a shape (`random_models`) with random weights; rank 16 on all linear layers but the output head and, unless
`--no-experts`, on routed experts. Adapters are float32 under bfloat16 autocast, activations of the decoder layers are
recomputed, and a step is forward, backward and AdamW, as TRL trains models of this size. NF4 has double quantization
and stock PEFT, as QLoRA does; experts, which are no linear layers, by `bitsandbytes.nn.parametrize`, on which PEFT puts
no adapter: compare it with `--no-experts`.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dynquant.analysis.bench.random_models import MODEL_SHAPES, random_model, random_packed, shape_config
from dynquant.kernels.bench.harness import MarkdownTable, device_name, options, release_memory
from dynquant.lora import add_adapter

RANK, ALPHA = 16, 32
FUSED_PARTS = ("gate_up_proj", "down_proj")
WARMUP_STEPS = 3


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "shape", MODEL_SHAPES, types=([], "Quant types of a packed base; may be repeated."), batch=4,
        window=1024, steps=(12, "Timed steps."), experts=True, dense=(True, "Measure bf16 and NF4 too."),
        layers=(int, "Decoder layers, where fewer than the model's will do."),
    )  # fmt: skip
    work = f"{asked.batch} sequences of {asked.window} tokens, experts {'' if asked.experts else 'not '}adapted"
    print(f"{asked.shape}, {device_name()}, PyTorch {torch.__version__}, {work}\n")
    table = MarkdownTable("base", "trained, M", "step, ms", "quartiles", "weights, GiB", "peak, GiB")
    for label, build in _models(asked):
        before = torch.cuda.memory_allocated()
        try:
            model = build()
        except Exception as error:  # that bitsandbytes or PEFT cannot is a result
            table.add(label, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}", "", "", "", "")
            release_memory()
            continue
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weights = torch.cuda.memory_allocated() - before - 4 * trained
        torch.cuda.reset_peak_memory_stats()
        low, middle, high = statistics.quantiles(_step_times(model, asked), n=4)
        peak = torch.cuda.max_memory_allocated()
        sizes = (f"{size / 2**30:.2f}" for size in (weights, peak))
        table.add(label, f"{trained / 1e6:.1f}", f"{middle:.0f}", f"{low:.0f} to {high:.0f}", *sizes)
        del model
        release_memory()


def _models(asked: Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    config = shape_config(asked.shape)
    config.num_hidden_layers = asked.layers or config.num_hidden_layers
    lora = {"rank": RANK, "alpha": ALPHA, "experts": asked.experts}
    if asked.dense:
        yield "bf16", lambda: _with_peft(random_model(config), asked.experts)
        yield "NF4 (bitsandbytes)", lambda: _with_peft(_to_nf4(random_model(config)), asked.experts)
    for types in asked.types:
        yield types, lambda types=types: add_adapter(random_packed(config, types), **lora)


def _adapted(model: Any) -> tuple[dict[str, nn.Linear], list[nn.Module]]:
    """Return what `add_adapter` adapts of a packed model: linear layers but the output head, and routed experts."""
    head = model.get_output_embeddings()
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return linears, [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "has_gate")]


def _with_peft(model: Any, experts: bool) -> nn.Module:
    """Return a model with stock PEFT on it."""
    from peft import LoraConfig, get_peft_model

    linears, fused = _adapted(model)
    names = sorted({path.rpartition(".")[2] for path in linears})
    parts = [f"experts.{part}" for part in FUSED_PARTS] if experts and fused else None
    lora = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(target_modules=names, target_parameters=parts, **lora))


def _to_nf4(model: Any) -> nn.Module:
    """Put what is adapted into NF4 and return the model."""
    import bitsandbytes as bnb
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    linears, fused = _adapted(model)
    nf4 = {"quant_type": "nf4", "compress_statistics": True}
    for path, module in linears.items():
        empty = {"bias": False, "compute_dtype": torch.bfloat16, "device": "meta"}
        packed = bnb.nn.Linear4bit(module.in_features, module.out_features, **empty, **nf4)
        weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, module=packed, **nf4)
        packed.weight = weight.to(module.weight.device)
        model.set_submodule(path, packed)
        module.weight = None  # gives its memory back at once
    for module in fused:
        for part in FUSED_PARTS:
            replace_parameter_4bit(module, part, **nf4)
    model.is_loaded_in_4bit = True
    return model


def _step_times(model: Any, asked: Namespace) -> list[float]:
    """Return milliseconds of each timed optimizer step."""
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (asked.batch, asked.window), device=parameters[0].device)
    times = []
    for number in range(WARMUP_STEPS + asked.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if number >= WARMUP_STEPS:
            times.append(1000 * (time.perf_counter() - start))
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss of {asked.shape} is {float(loss)}")
    return times


if __name__ == "__main__":
    main()
