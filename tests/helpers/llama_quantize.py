"""The reference to compare with: tiny F32 GGUF models with random weights, and llama.cpp's own quantizer on them."""

import ctypes
import os
import re
import shlex
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import HyperParams
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.llama_mixtures import LLAMA_FTYPES
from tests.helpers.gguf_writing import finish

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyModel:
    """Metadata and tensor shapes (last dimension is the row) of a model that llama-quantize accepts."""

    hyper: HyperParams
    shapes: Shapes
    metadata: dict[str, int | float] = field(default_factory=dict)
    head_dim: int = 64

    def weights(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}

    def importance(self, seed: int = 1) -> dict[str, torch.Tensor]:
        """Lognormal importance, [experts, row_length], of every matrix."""
        generator = torch.Generator().manual_seed(seed)
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) > 1}
        return {
            name: torch.randn((shape[0] if len(shape) == 3 else 1, shape[-1]), generator=generator).exp()
            for name, shape in matrices.items()
        }

    def write(self, path: Path) -> Path:
        """An F32 GGUF with the weights of `weights()`."""
        writer = self._writer(path)
        for name, tensor in self.weights().items():
            writer.add_tensor(name, tensor.numpy())
        finish(writer)
        return path

    def write_hollow(self, path: Path) -> Path:
        """An F32 GGUF of zeros that takes no space on disk, for questions that no weight answers."""
        writer = self._writer(path)
        data_bytes = 0
        for name, shape in self.shapes.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * prod(shape))
            data_bytes += GGUFWriter.ggml_pad(4 * prod(shape), writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header_bytes = GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
        os.truncate(path, header_bytes + data_bytes)
        return path

    def _writer(self, path: Path) -> GGUFWriter:
        writer = GGUFWriter(path, self.hyper.arch)
        writer.add_block_count(self.hyper.n_layer)
        writer.add_context_length(64)
        writer.add_embedding_length(self.hyper.n_embd)
        up = self.shapes.get("blk.0.ffn_up.weight") or self.shapes.get("blk.0.ffn_up_exps.weight", (512, 0))
        writer.add_feed_forward_length(up[-2])
        writer.add_head_count(self.hyper.n_head)
        writer.add_head_count_kv(self.hyper.n_head_kv)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(self.hyper.n_vocab)
        if self.hyper.n_expert:
            writer.add_expert_count(self.hyper.n_expert)
            writer.add_expert_used_count(self.hyper.n_expert_used)
        widths = {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        for key, value in {**widths, **self.metadata}.items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{self.hyper.arch}.{key}", value)
        return writer


def llama_model(
    *,
    arch: str = "llama",
    layers: int = 2,
    hidden: int = 256,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 64,
    ffn: int = 512,
    vocab: int = 256,
    experts: int = 0,
    tied: bool = False,
    fused_qkv: bool = False,
) -> TinyModel:
    """A Llama, or with `experts` a Mixtral-like MoE; `fused_qkv` gives the Falcon and GPT-NeoX attention names."""
    hyper = HyperParams(arch, layers, hidden, heads, kv_heads, vocab, experts, min(2, experts))
    shapes: Shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocab, hidden)
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim
    for layer in range(layers):
        part: Shapes = {"attn_norm": (hidden,), "attn_output": (hidden, q_rows), "ffn_norm": (hidden,)}
        if fused_qkv:
            part["attn_qkv"] = (q_rows + 2 * kv_rows, hidden)
        else:
            part |= {"attn_q": (q_rows, hidden), "attn_k": (kv_rows, hidden), "attn_v": (kv_rows, hidden)}
        if experts:
            part |= {"ffn_gate_inp": (experts, hidden), "ffn_down_exps": (experts, hidden, ffn)}
            part |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, ffn, hidden))
        else:
            part |= {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in part.items()}
    return TinyModel(hyper, shapes, {"rope.dimension_count": head_dim}, head_dim)


def deepseek_model(*, layers: int = 4, hidden: int = 256, experts: int = 8, ffn: int = 256) -> TinyModel:
    """DeepSeek-V3 shapes: latent attention with 3-D per-head matrices, a dense first layer, shared experts."""
    heads, nope, rope, value, q_rank, kv_rank = 4, 64, 32, 64, 128, 256
    hyper = HyperParams("deepseek2", layers, hidden, heads, 1, 256, experts, 2, leading_dense=1)
    shapes: Shapes = {
        "token_embd.weight": (256, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (256, hidden),
    }
    for layer in range(layers):
        part: Shapes = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_output": (hidden, heads * value)}
        part |= {"attn_q_a": (q_rank, hidden), "attn_q_a_norm": (q_rank,), "attn_kv_a_norm": (kv_rank,)}
        part |= {"attn_q_b": (heads * (nope + rope), q_rank), "attn_kv_a_mqa": (kv_rank + rope, hidden)}
        part |= {"attn_k_b": (heads, kv_rank, nope), "attn_v_b": (heads, value, kv_rank)}
        if layer < hyper.leading_dense:
            part |= {"ffn_gate": (512, hidden), "ffn_up": (512, hidden), "ffn_down": (hidden, 512)}
        else:
            part |= {"ffn_gate_inp": (experts, hidden), "ffn_down_exps": (experts, hidden, ffn)}
            part |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, ffn, hidden))
            part |= {"ffn_down_shexp": (hidden, ffn), "ffn_gate_shexp": (ffn, hidden), "ffn_up_shexp": (ffn, hidden)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in part.items()}
    metadata = {"leading_dense_block_count": hyper.leading_dense, "rope.dimension_count": rope}
    metadata |= {"attention.q_lora_rank": q_rank, "attention.kv_lora_rank": kv_rank}
    metadata |= {"attention.key_length": kv_rank + rope, "attention.value_length": kv_rank}
    metadata |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": value}
    metadata |= {"expert_feed_forward_length": ffn, "expert_shared_count": 1, "expert_gating_func": 2}
    return TinyModel(hyper, shapes, metadata | {"expert_weights_scale": 1.0})


@dataclass(frozen=True)
class Overrides:
    """Arguments of llama-quantize beside the file type, as its command line reads them."""

    patterns: tuple[tuple[str, int], ...] = ()
    token_embedding: int | None = None
    output: int | None = None
    pure: bool = False


def read_command(command: str) -> tuple[int, Overrides]:
    """File type and overrides of a command line; follows `main` of llama.cpp's tools/quantize/quantize.cpp."""
    words = shlex.split(command.replace("\\\n", " "))[1:]
    named: dict[str, int] = {}
    patterns: list[tuple[str, int]] = []
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--token-embedding-type", "--output-tensor-type"):
            named[option] = _ggml_type(words.pop(0))
        elif option == "--tensor-type":
            pattern, type_name = words.pop(0).split("=", 1)
            patterns.append((pattern.lower(), _ggml_type(type_name)))
        elif option == "--pure":
            named[option] = True
        else:
            assert option == "--imatrix", option
            words.pop(0)
    overrides = Overrides(
        tuple(patterns), named.get("--token-embedding-type"), named.get("--output-tensor-type"), "--pure" in named
    )
    return LLAMA_FTYPES[words[2].lower()].id, overrides


def _ggml_type(name: str) -> int:
    return QUANT_TYPES[name.upper()].ggml_id


def llama_quantize(
    source: Path, target: Path, ftype_id: int, importance: dict[str, torch.Tensor], overrides: Overrides | None = None
) -> dict[str, tuple[str, np.ndarray]]:
    """What `llama_model_quantize` writes with an importance matrix: name -> (type name, bytes [..., row_bytes])."""
    _run_llama_quantize(source, target, ftype_id, importance, overrides, dry_run=False)
    return read_tensors(target)


_LOG_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)


def llama_quantize_types(source: Path, ftype_id: int, overrides: Overrides | None = None) -> dict[str, str]:
    """Name -> type that `llama_model_quantize` announces in a dry run as if it had an importance matrix."""
    log = _run_llama_quantize(source, Path(os.devnull), ftype_id, {"none": torch.ones(1)}, overrides, dry_run=True)
    return {name: (new or old).upper() for name, old, new in _LOG_LINE.findall(log)}


def _run_llama_quantize(
    source: Path,
    target: Path,
    ftype_id: int,
    importance: dict[str, torch.Tensor],
    overrides: Overrides | None,
    *,
    dry_run: bool,
) -> str:
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    flat = {name: np.ascontiguousarray(values.numpy().reshape(-1)) for name, values in importance.items()}
    for entry, (name, values) in zip(entries, flat.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = ftype_id, 2, dry_run
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    given = overrides or Overrides()
    patterns = (llama_cpp.llama_model_tensor_override * (len(given.patterns) + 1))()
    for slot, (pattern, type_id) in zip(patterns, given.patterns, strict=False):
        slot.pattern, slot.type = pattern.encode(), type_id
    params.tt_overrides = ctypes.cast(patterns, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    params.pure = given.pure
    if given.token_embedding is not None:
        params.token_embedding_type = given.token_embedding
    if given.output is not None:
        params.output_tensor_type = given.output
    log: list[str] = []
    collect = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode()))
    llama_cpp.llama_log_set(collect, None)
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code} for {source}: {''.join(log[-5:])}")
    return "".join(log)


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (type name, bytes [..., row_bytes]) of a GGUF file."""
    source = GGUFSource(path)  # gguf-py's reader does not know the newest types
    return {name: (source.info(name).dtype, source.load_packed(name).numpy()) for name in source.names()}
