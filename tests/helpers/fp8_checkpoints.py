"""FP8 checkpoints as DeepSeek publishes them, made of float ones, and the float checkpoint that they stand for."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
_IN_FP8 = re.compile(r"(self_attn\.\w+_proj(_with_mqa)?|mlp\.(\w+\.)*\w+_proj)\.weight$")


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values, and one scale for each block of 128 x 128; edges may be ragged."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            scales[i, j] = weight[place].float().abs().max() / 448
            values[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights, float32."""
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return values.float() * whole[: values.shape[0], : values.shape[1]]


def save_fp8(source: Path, fp8: Path, floats: Path) -> None:
    """Write `source`, a checkpoint in one file, as FP8 and as the float32 that the FP8 stands for."""
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not _IN_FP8.search(name):
            stored[name] = plain[name] = weight
            continue
        values, scales = quantized(weight)
        stored[name], stored[f"{name}_scale_inv"] = values, scales
        plain[name] = dequantized(values, scales)
    config = json.loads((source / "config.json").read_text())
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    for directory, tensors, extra in ((fp8, stored, {"quantization_config": scheme}), (floats, plain, {})):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({**config, **extra}))
        for file in source.glob("tokenizer*"):
            (directory / file.name).symlink_to(file.resolve())
