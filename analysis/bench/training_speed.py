"""Step time and peak memory of LoRA on packed weights, on bf16 weights, and on NF4 weights of bitsandbytes, on one GPU.

    python -m dynquant.analysis.bench.training_speed 8b --types rest=Q4_K
    python -m dynquant.analysis.bench.training_speed 7b-a1b --types experts=IQ2_XXS,rest=Q4_K --types rest=Q4_K

Models of a shape (`random_models`) with random weights; rank 16 on all linear layers but the output head and, unless
`--no-experts`, on routed experts. Adapters are float32 under bfloat16 autocast, activations of the decoder layers are
recomputed, and a step is forward, backward and AdamW, as TRL trains models of this size. NF4 has double quantization
and stock PEFT, as QLoRA does; experts, which are no linear layers, by `bitsandbytes.nn.parametrize`, on which PEFT puts
no adapter: compare it with `--no-experts`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dynquant.analysis.bench.random_models import MODEL_SHAPES, random_model, random_packed, shape_config
from dynquant.kernels.bench.harness import MarkdownTable, device_name, parser, release_memory
from dynquant.lora import add_adapter

RANK, ALPHA = 16, 32
WARMUP_STEPS = 3


def main() -> None:
    """Parse, measure, print a Markdown table."""
    options = _options()
    print(
        f"{options.shape}, {device_name()}, PyTorch {torch.__version__}, {options.batch} sequences of "
        f"{options.window} tokens, experts {'adapted' if options.experts else 'not adapted'}\n"
    )
    table = MarkdownTable("base", "trained, M", "step, ms", "quartiles", "weights, GiB", "peak, GiB")
    for label, build in _models(options):
        before = torch.cuda.memory_allocated()
        model = build()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weights = torch.cuda.memory_allocated() - before - 4 * trained
        torch.cuda.reset_peak_memory_stats()
        low, middle, high = statistics.quantiles(_step_times(model, options), n=4)
        peak = torch.cuda.max_memory_allocated()
        sizes = (f"{size / 2**30:.2f}" for size in (weights, peak))
        table.add(label, f"{trained / 1e6:.1f}", f"{middle:.0f}", f"{low:.0f} to {high:.0f}", *sizes)
        del model
        release_memory()


def _options() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("shape", choices=MODEL_SHAPES)
    flags.add_argument("--types", action="append", default=[], help="Quant types of a packed base; may be repeated.")
    flags.add_argument("--batch", type=int, default=4)
    flags.add_argument("--window", type=int, default=1024)
    flags.add_argument("--steps", type=int, default=12, help="Timed steps.")
    flags.add_argument("--experts", action=argparse.BooleanOptionalAction, default=True)
    return flags.parse_args()


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    config = shape_config(options.shape)

    def adapted_float(quantized: bool) -> nn.Module:
        model = random_model(config)
        if quantized:
            _to_nf4(model)
        return _with_peft(model, options.experts)

    yield "bf16", lambda: adapted_float(False)
    yield "NF4 (bitsandbytes)", lambda: adapted_float(True)
    for spec in options.types:
        types = dict(part.split("=") for part in spec.split(","))
        yield (
            spec,
            lambda types=types: add_adapter(
                random_packed(config, types), rank=RANK, alpha=ALPHA, experts=options.experts
            ),
        )


def _with_peft(model: Any, experts: bool) -> nn.Module:
    """Stock PEFT on what `add_adapter` adapts of a packed model."""
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    fused = any(hasattr(module, "gate_up_proj") and hasattr(module, "has_gate") for module in model.modules())
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if experts and fused else None
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=sorted(names), target_parameters=parameters, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _to_nf4(model: Any) -> None:
    """Put every linear layer but the output head, and routed experts, into NF4."""
    import bitsandbytes as bnb
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    head = model.get_output_embeddings()
    linears = [
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    for path, module in linears:
        packed = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            compress_statistics=True, device="meta",
        )  # fmt: skip
        device = module.weight.device
        packed.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
        ).to(device)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
        module.weight = None
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate"):
            for part in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, part, compress_statistics=True, quant_type="nf4")
    model.is_loaded_in_4bit = True


def _step_times(model: Any, options: argparse.Namespace) -> list[float]:
    """Return milliseconds of each timed optimizer step."""
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.window), device=parameters[0].device)
    times = []
    for number in range(WARMUP_STEPS + options.steps):
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
        raise RuntimeError(f"the loss of {options.shape} is {float(loss)}")
    return times


if __name__ == "__main__":
    main()
