"""Checkpoints as they are published in integers, made of float ones, and the float checkpoints that they stand for.

The layouts are written here from their descriptions, weight by weight, apart from the package's readers.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
_GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_INTEGERS = re.compile(r"(self_attn\.\w+_proj|mlp\.\w+_proj)\.weight$")


def save_tiny_gpt_oss(directory: Path, tokenizer_from: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.helpers.tiny_models import randomize

    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        max_position_embeddings=512, eos_token_id=0, bos_token_id=0, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomize(model)
    model.save_pretrained(directory)
    for file in tokenizer_from.glob("tokenizer*"):
        (directory / file.name).symlink_to(file.resolve())
    return directory


def save_mxfp4(source: Path, packed: Path, floats: Path) -> None:
    """Write `source`, a gpt-oss checkpoint in one file, with its experts as MXFP4, and as what these stand for."""
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() != 3:
            stored[name] = plain[name] = weight
            continue
        groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E, rows, blocks, 32]
        powers = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        codes = (groups / torch.exp2(powers)[..., None]).unsqueeze(-1).sub(_E2M1).abs().argmin(-1).to(torch.uint8)
        stored[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        stored[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        values = _E2M1[codes.long()] * torch.exp2(powers)[..., None]
        plain[name] = values.flatten(-2).transpose(1, 2).contiguous().bfloat16()
    _save(source, packed, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    _save(source, floats, plain, None)


def save_integers(source: Path, packed: Path, floats: Path, method: str, *, bits: int = 4, order: bool = False) -> None:
    """Write `source` with its linear layers as GPTQ or AWQ of `bits` bits, and as what these stand for.

    With `order`, the columns of GPTQ belong to groups in another order than their own.
    """
    stored, plain, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, weight in load_file(source / "model.safetensors").items():
        if not _IN_INTEGERS.search(name):
            stored[name] = plain[name] = weight
            continue
        rows, columns = weight.shape
        groups = torch.arange(columns) // _GROUP
        groups = groups[torch.randperm(columns, generator=generator)] if order else groups
        codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
        zeros = torch.randint(0, 1 << bits, (columns // _GROUP, rows), generator=generator)
        scales = (0.02 * torch.rand(zeros.shape, generator=generator) / (1 << bits)).half()
        plain[name] = ((codes - zeros[groups]) * scales.float()[groups]).T.contiguous()
        prefix = name.removesuffix(".weight")
        stored[f"{prefix}.scales"] = scales
        if method == "awq":
            stored[f"{prefix}.qweight"] = _packed(codes, bits, _AWQ_ORDER)
            stored[f"{prefix}.qzeros"] = _packed(zeros, bits, _AWQ_ORDER)
        else:
            plain_order = tuple(range(32 // bits))
            stored[f"{prefix}.qweight"] = _packed(codes.T, bits, plain_order).T.contiguous()
            stored[f"{prefix}.qzeros"] = _packed((zeros - 1) % (1 << bits), bits, plain_order)
            stored[f"{prefix}.g_idx"] = groups.int()
    scheme = {"quant_method": method, "bits": bits, "group_size": _GROUP, "desc_act": order}
    _save(source, packed, stored, scheme | ({"version": "gemm"} if method == "awq" else {}))
    _save(source, floats, plain, None)


def _packed(codes: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """Neighbours in a row, in an int32 from its lowest bits up."""
    runs = codes.reshape(codes.shape[0], -1, 32 // bits)
    words = sum(runs[..., place] << (bits * number) for number, place in enumerate(order))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _save(source: Path, directory: Path, tensors: dict[str, torch.Tensor], scheme: dict[str, object] | None) -> None:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | ({"quantization_config": scheme} if scheme else {})))
    for file in source.glob("tokenizer*"):
        (directory / file.name).symlink_to(file.resolve())
