"""What a compressed-tensors checkpoint should give: its weights as dynquant decodes them, in an ordinary model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dynquant.encoding.vllm import EncodedLayer
from dynquant.formats.vllm_schemes import Scheme, codes_of, zero_points_of
from dynquant.recipes.plan import Plan

TOKENS = torch.arange(7, 71)[None]


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def stored_parts(directory: Path, plan: Plan) -> dict[str, dict[str, torch.Tensor]]:
    """Linear layer -> what it is stored as, by suffix."""
    tensors = stored_tensors(directory)
    found = {}
    for entry in plan.entries:
        suffixes = [part.key for part in entry.scheme.parts(*entry.shape[-2:])]
        found |= {module: {suffix: tensors[f"{module}.{suffix}"] for suffix in suffixes} for module in entry.modules}
    return found


def filled(
    directory: Path, plan: Plan, target: Path, dtype: torch.dtype, experts: torch.dtype = torch.bfloat16
) -> Path:
    """An ordinary checkpoint of the decoded weights; experts are by default as transformers merges them."""
    parts = stored_parts(directory, plan)
    tensors = stored_tensors(directory)
    for entry in plan.entries:
        for module in entry.modules:
            for suffix in parts[module]:
                tensors.pop(f"{module}.{suffix}")
            decoded = from_stored(entry.scheme, parts[module])
            tensors[f"{module}.weight"] = decoded.decoded(experts if entry.is_expert_stack else dtype).to(dtype)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits(directory: Path, dtype: torch.dtype, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return model(tokens).logits[0].float()


def library_weights(parts: dict[str, torch.Tensor], scheme, dtype: torch.dtype) -> torch.Tensor:
    """What the compressed-tensors library makes of one layer in a model of `dtype`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    given = dict(parts)
    if given["weight_scale"].dtype == torch.bfloat16:
        given["weight_scale"] = given["weight_scale"].to(dtype)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(given, QuantizationScheme(**scheme.config_group(["Linear"])))["weight"].to(dtype)


def from_stored(scheme: Scheme, parts: dict[str, torch.Tensor]) -> EncodedLayer:
    """Return what `EncodedLayer.stored` was called on."""
    if scheme.strategy == "none":
        return EncodedLayer(scheme, parts["weight"].to(torch.float32), parts["weight"][:, :0])
    global_scale = float(parts["weight_global_scale"]) if "weight_global_scale" in parts else None
    return EncodedLayer(scheme, codes_of(parts), parts["weight_scale"], zero_points_of(parts), global_scale)
