"""KL of a scheme under three ways of rounding, on text that calibration never saw.

    python -m tests.helpers.rounding_kl MODEL STATS TEXT SCHEME [TOKENS]

nearest: the largest magnitude of each group sets its scale, and the compressed-tensors library rounds; importance: our
search under E[x²]; feedback: under the second moments beside STATS.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dynquant.calibration.second_moments import load_beside
from dynquant.calibration.statistics import CalibrationStats
from dynquant.encoding.linears import LinearPiece, encode_piece, fused_scales
from dynquant.encoding.stream import guidance_of
from dynquant.families.linear_layers import LinearCheckpoint, linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.recipes.build_plan import plan_for_vllm
from dynquant.recipes.plan import PlanEntry
from tests.helpers.evaluating import evaluated


def rounded_to_nearest(entry: PlanEntry, weights: torch.Tensor) -> torch.Tensor:
    """One layer [R, C] in the integers of W4A16 or W8A16, quantized and dequantized by the library."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    scheme, group = entry.scheme, entry.group_size
    args = QuantizationArgs(**scheme.config_group([])["weights"])
    peak = weights.unflatten(-1, (-1, group)).abs().amax(-1)
    scale = (peak / ((2**scheme.num_bits - 1) / 2)).to(torch.bfloat16).float().clamp_min(1e-8)
    codes = quantize(weights, scale, None, args, dtype=torch.int8)
    return dequantize(codes, scale, None, args, dtype=torch.float32)


def kl_by_rounding(
    directory: Path, stats_path: Path, text: Path, schemes: Mapping[str, str], cache: Path, *, tokens: int = 8192
) -> Iterator[tuple[str, float, float]]:
    """Rounding, KL and half of its interval; units that `schemes` does not name stay as they are.

    What the original gives is kept in the folder `cache`.
    """
    model = open_model(directory)
    checkpoint = linear_checkpoint(model)
    stats = CalibrationStats.load(stats_path)
    wanted = {
        linear.name: Choice(schemes.get(linear.unit(mixed_experts=True), "BF16"), "") for linear in checkpoint.linears
    }
    plan = plan_for_vllm(model, checkpoint, wanted, recipe="", mixed_experts=True)
    guidance = guidance_of(stats, load_beside(stats_path, stats))
    scales, linears = fused_scales(checkpoint.linears), {linear.name: linear for linear in checkpoint.linears}
    for rounding in ("nearest", "importance", "feedback"):
        told = guidance if rounding == "feedback" else replace(guidance, hessian=None)
        weights = {}
        for entry in plan.entries:
            linear, experts = linears[entry.name], range(len(entry.modules))
            if not entry.scheme.is_quantized:
                found = [linear.load(expert) for expert in experts]
            elif rounding == "nearest":
                found = [rounded_to_nearest(entry, linear.load(expert)) for expert in experts]
            else:
                encoded = encode_piece(LinearPiece(linear, entry.scheme, experts), told, global_scales=scales)
                found = [one.decoded() for one in encoded]
            weights |= {f"{module}.weight": one for module, one in zip(entry.modules, found, strict=True)}
        with tempfile.TemporaryDirectory() as folder:
            _write(checkpoint, weights, Path(folder))
            report = evaluated(folder, directory, tasks=("kl",), text=[text], max_tokens=tokens, reference_cache=cache)
            kl = report.texts[0].kl
        yield rounding, kl.mean.value, (kl.mean.high - kl.mean.low) / 2


def _write(checkpoint: LinearCheckpoint, weights: dict[str, torch.Tensor], folder: Path) -> None:
    others = {tensor.key: checkpoint.source.load(tensor.key) for tensor in checkpoint.others}
    save_file({**others, **{n: w.contiguous() for n, w in weights.items()}}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.directory / name, folder / name)


def main(directory: str, stats: str, text: str, scheme: str, tokens: str = "8192") -> None:
    units = linear_checkpoint(open_model(directory)).units(mixed_experts=True)
    schemes = dict.fromkeys(units, scheme.upper())
    with tempfile.TemporaryDirectory() as cache:
        paths = (Path(directory), Path(stats), Path(text))
        for rounding, kl, half in kl_by_rounding(*paths, schemes, Path(cache), tokens=int(tokens)):
            print(f"{rounding:<12}{kl:.5f} ± {half:.5f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
