"""Writes a saved PEFT adapter as the LoRA file that llama.cpp adds to a GGUF model.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    NAME.lora_a  [r, C]      NAME.lora_b  [N, r]        linear layers
    NAME.lora_a  [E, r, C]   NAME.lora_b  [E, N, r]     routed experts

llama.cpp scales each product by alpha / r; what PEFT scales by beyond that (rank-stabilised, a pattern of alphas) is
multiplied into lora_b. A GGUF tensor is a selection of rows and columns of a parameter, which the traced maps give:
rows of B and columns of A are taken as it has them. Several that share a parameter, as gate and up of experts, have the
same lora_a; one that joins several parameters has their factors side by side.

Names and shapes follow llama.cpp's loader (src/llama-adapter.cpp), what is applied its graphs (`lora.places`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import gguf
import torch
from torch import Tensor

from dynquant import __version__
from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import AdapterError
from dynquant.families.common.config import Config, quantization_of, read_config, read_json
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import RowBlock, StridedMap, row_blocks
from dynquant.families.from_gguf import NotUnderstoodError, config_from_gguf
from dynquant.families.open import NoWeights, open_model
from dynquant.families.text.registry import FAMILIES, conversions_of
from dynquant.families.vision.checkpoint import has_tower
from dynquant.lora.places import takes_adapter
from dynquant.lora.saved import AdaptedWeight, SavedAdapter, check_copies
from dynquant.packed.places import build_meta_model
from dynquant.running.expert_hooks import expert_layout, is_fused_experts
from dynquant.running.load import empty_hf
from dynquant.running.parameter_map import ParameterMap, parameter_map, unmapped
from dynquant.storage.atomic import writing

_PARTS = ("weight", "gate_up_proj", "up_proj", "down_proj")
"""Names of a layer's weight; those of experts in the order in which PEFT wraps them."""


@dataclass(frozen=True)
class _Base:
    """The model that an adapter belongs to, on the meta device, and the traced maps between it and GGUF."""

    path: Path
    arch: str
    hf_model: Any
    source: ConvertedSource
    traced: ParameterMap

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of parameters: [rows, columns], of experts [E, rows, columns] whatever the order in the model."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.hf_model.state_dict().items()}
        return {n: (s[0], s[2], s[1]) if n in self._transposed else s for n, s in shapes.items()}

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Parameters that are others of the model."""
        return getattr(self.hf_model, "all_tied_weights_keys", None) or {}

    @cached_property
    def matrices(self) -> dict[str, StridedMap]:
        """Matrices of the GGUF file as entries of parameters."""
        source = self.source
        maps = {n: self.traced.gguf(source, n) for n in source.names() if len(source.info(n).shape) > 1}
        return {name: entries for name, entries in maps.items() if entries is not None}

    def blocks(self, name: str) -> list[RowBlock] | None:
        """Return which rows of parameters a GGUF matrix has, those of the experts of a stack counted on."""

        def located(parameter: str, positions: Tensor) -> tuple[Tensor, Tensor]:
            *_, rows, columns = self.shapes[parameter]
            if parameter not in self._transposed:
                return positions // columns, positions % columns
            return positions // (rows * columns) * rows + positions % rows, positions // rows % columns

        return row_blocks(self.matrices[name], located)

    @cached_property
    def _transposed(self) -> frozenset[str]:
        """Stacks that the model has as [E, columns, rows]."""
        experts = [(path, module) for path, module in self.hf_model.named_modules() if is_fused_experts(module)]
        return frozenset(f"{path}.{part}" for path, module in experts for part in expert_layout(module).transposed)


def export_adapter(adapter: Path, output: Path, *, base: Path | None = None) -> Path:
    """Write the adapter in the directory `adapter` to the file `output`, in float32, and return it.

    `base` is the model that it belongs to, packed or original, or a GGUF file of it; by default the place from which
    the adapter says that it was loaded. Of it, only the configuration is read, and what the adapter has copies of. Of
    an architecture without a family it is the original, whose tensors llama.cpp's converter names.

    Raises:
        AdapterError: no LoRA adapter, one of another model, or one that llama.cpp would not apply whole.
        CheckpointError: a base of an architecture that dynquant does not know.
        WriteError: the output cannot be written.
    """
    adapter, output = Path(adapter), Path(output)
    saved = SavedAdapter(adapter)
    model = _open_base(saved, Path(base or saved.config.base_model_name_or_path or ""))
    adapted = {_parameter_of(saved, weight, model): weight for weight in saved.weights}
    targets = [name for name, entries in model.matrices.items() if not adapted.keys().isdisjoint(entries.sources)]
    _check_graph(model, adapted, targets)
    blocks = _checked_blocks(model, adapted, targets)
    _check_whole_weights(saved, model)
    with writing(output) as temporary:
        _write(temporary, model, saved, adapted, blocks)
    return output


def _open_base(saved: SavedAdapter, path: Path) -> _Base:
    if is_gguf(path):
        source = GGUFSource(path)
        try:
            return _of_family(path, config_from_gguf(source), whole_kv_b="blk.0.attn_kv_b.weight" in source.names())
        except NotUnderstoodError as error:
            raise AdapterError(f"{error} Give this checkpoint with --base.") from error
    if not (path / "config.json").is_file():
        raise AdapterError(
            f"The base model of {saved.directory} is given as {str(path)!r}, which is neither a directory with "
            "config.json nor a .gguf file. Give the model that the adapter was trained on, packed or original, with "
            "--base."
        )
    if has_tower(path):
        raise AdapterError(
            f"{path} is a vision-language model, whose adapters dynquant does not write for llama.cpp. Use it in "
            "transformers: load the packed model and give the adapter to `dynquant.lora.load_adapter`."
        )
    model_type = read_json(path / "config.json").get("model_type")
    if model_type in FAMILIES:
        return _of_family(path, read_config(path, FAMILIES))
    if quantization_of(path).get("quant_method") == "dynquant":
        raise AdapterError(
            f"{path} is packed, and of its type {model_type!r} only the original says in which order llama.cpp has "
            "rows and columns. Give the checkpoint that it was made from with --base."
        )
    model = open_model(path)
    assert isinstance(model.source, ConvertedSource)
    empty = empty_hf(model, dtype=torch.float32)
    return _Base(path, model.arch, empty, model.source, parameter_map(empty, model.source.checkpoint))


def _of_family(path: Path, config: Config, *, whole_kv_b: bool = False) -> _Base:
    """Return what a configuration alone says of a model, packed or not."""
    meta = build_meta_model(config)
    source = ConvertedSource(NoWeights(path), conversions_of(config, meta.state_dict(), whole_kv_b=whole_kv_b))
    return _Base(path, FAMILIES[config.model_type].arch, meta, source, unmapped(meta))


def _parameter_of(saved: SavedAdapter, weight: AdaptedWeight, base: _Base) -> str:
    """Return the parameter that an adapted weight changes; refuse one that the base does not have."""
    (rank, columns), (rows, b_rank) = saved.shape(weight.a_key), saved.shape(weight.b_key)
    listed = tuple(f".{name}" for name in saved.config.target_parameters or _PARTS)
    fitting = []
    for part in _PARTS:
        shape = base.shapes.get(f"{weight.path}.{part}", ())
        if shape[-2:] == (rows, columns) and rank == b_rank and rank % prod(shape[:-2]) == 0:
            fitting.append(f"{weight.path}.{part}")
    if len(fitting) > 1:  # experts without a gate that are as wide as the model; the outermost was wrapped last
        fitting = [name for name in fitting if f".{name}".endswith(listed)][: -weight.depth or None]
    if not fitting:
        raise AdapterError(
            f"The adapter in {saved.directory} changes `{weight.path}` by factors [{rank}, {columns}] and [{rows}, "
            f"{b_rank}], and the base model has no such weight there. Give the model that the adapter was trained on "
            "with --base."
        )
    if fitting[-1] in base.tied:
        raise AdapterError(
            f"The adapter in {saved.directory} changes `{weight.path}`, which {base.path} ties to the token embedding. "
            "GGUF has one tensor for both, and llama.cpp would change the embedding too. Train without it, or merge "
            "the adapter into the original (`merge_and_unload` of PEFT) and export that."
        )
    return fitting[-1]


def _checked_blocks(base: _Base, adapted: Mapping[str, AdaptedWeight], targets: list[str]) -> dict[str, list[RowBlock]]:
    """Return which rows of parameters the GGUF matrices have; refuse an adapted one that they do not have whole."""
    blocks: dict[str, list[RowBlock]] = {}
    covered = dict.fromkeys(adapted, 0)
    for name in targets:
        shape, parts = base.source.info(name).shape, base.blocks(name)
        is_stack = len(shape) == 3
        if parts is None or (is_stack and (len(parts) > 1 or len(base.shapes[parts[0].source]) < 3)):
            _refuse(base, base.matrices[name].sources[0], f"of which `{name}` is no selection of rows and columns")
        blocks[name] = parts
        for block in parts:
            if not _keeps_experts(block, shape, base.shapes[block.source]):
                _refuse(base, block.source, f"of which `{name}` has some experts apart")
            if block.source in covered:
                covered[block.source] += len(block.rows) * len(block.columns)
    for parameter, count in covered.items():
        if count != prod(base.shapes[parameter]):
            _refuse(base, parameter, f"of which GGUF has {count:,} of {prod(base.shapes[parameter]):,} weights as such")
    return blocks


def _keeps_experts(block: RowBlock, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Return whether every slice of a stack is of one expert of a parameter; True where neither is a stack."""
    if len(shape) != 3 or len(stored) != 3:
        return len(shape) == len(stored)
    experts = block.stored_rows.view(shape[0], -1) // stored[1]
    return shape[0] == stored[0] and bool((experts == experts[:, :1]).all())


def _refuse(base: _Base, parameter: str, reason: str) -> NoReturn:
    raise AdapterError(
        f"The adapter changes `{parameter}`, {reason} in llama.cpp's {base.arch}, so a LoRA file cannot express it. "
        "Train without it, or merge the adapter into the original (`merge_and_unload` of PEFT) and export that."
    )


def _check_whole_weights(saved: SavedAdapter, base: _Base) -> None:
    """Refuse whole weights that a LoRA file has no place for, unless they are those of the base.

    Only an original checkpoint can tell; beside a packed one, copies that PEFT makes unasked pass, and what
    `modules_to_save` lists counts as trained.
    """
    if is_gguf(base.path) or quantization_of(base.path):
        trained = next(iter(saved.whole), None)
    elif saved.copies or saved.whole:
        source = SafetensorsSource(base.path)

        def is_same(module: str, copy: Tensor) -> bool:
            name = f"{module}.weight"
            entries = base.traced.parameters.get(base.tied.get(name, name))
            if entries is None or not set(entries.sources) <= set(source.names()):
                return False
            return torch.equal(copy, entries.gather(source.load).to(copy.dtype))

        check_copies(saved.directory, saved.copies, str(base.path), is_same)
        trained = next((key for key, module in saved.whole.items() if not is_same(module, saved.stored(key))), None)
    else:
        return
    if trained is not None:
        raise AdapterError(
            f"The adapter in {saved.directory} holds `{trained}`, a whole weight and no LoRA factor, which was trained "
            f"unless it is that of the original model (give this with --base); {base.path} has another, or a packed "
            "one. A LoRA file has no place for it: train without `train_norms`, `train_router` and `modules_to_save`, "
            "or merge the adapter into the original and export that."
        )


def _check_graph(base: _Base, adapted: Mapping[str, AdaptedWeight], targets: list[str]) -> None:
    ignored = {name for name in targets if not takes_adapter(base.arch, name)}
    left_out = sorted(
        {
            adapted[parameter].path
            for name in ignored
            for parameter in base.matrices[name].sources
            if parameter in adapted
        }
    )
    if left_out:
        kinds = sorted({path.rpartition(".")[2] for path in left_out})
        raise AdapterError(
            f"The adapter changes {', '.join(kinds)} (`{left_out[0]}` and {len(left_out) - 1} more), to which "
            f"llama.cpp applies no adapter in its {base.arch} graph: it would load the file and leave these out. Train "
            "an adapter without them: `--for-llama-cpp` of `finetune` and `heal`, or `add_adapter(model, "
            "llama_cpp=True)`, takes what llama.cpp applies."
        )


def _write(
    path: Path,
    base: _Base,
    saved: SavedAdapter,
    adapted: Mapping[str, AdaptedWeight],
    blocks: Mapping[str, list[RowBlock]],
) -> None:
    writer = gguf.GGUFWriter(path, base.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, saved.config.lora_alpha)
    writer.add_string("dynquant.version", __version__)
    try:
        for name, parts in blocks.items():
            changed = [block for block in parts if block.source in adapted]
            of = [_factors(saved, adapted[block.source], block, base.shapes[block.source]) for block in changed]
            a, b = torch.cat([a for a, _ in of], -2), _beside(changed, [b for _, b in of], base.source.info(name).shape)
            b *= b.shape[-1] / saved.config.lora_alpha  # llama.cpp scales by the inverse
            writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _beside(blocks: list[RowBlock], factors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the factors B of some rows each as one of all rows of a matrix."""
    if len(shape) == 3:
        return factors[0]
    whole, start = torch.zeros(shape[0], sum(b.shape[-1] for b in factors)), 0
    for block, b in zip(blocks, factors, strict=True):
        whole[block.rows, start : start + b.shape[-1]] = b
        start += b.shape[-1]
    return whole


def _factors(
    saved: SavedAdapter, weight: AdaptedWeight, block: RowBlock, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return A and the scaled B of the rows and columns of a block, of experts in its order of them."""
    a, b = saved.load(weight.a_key), saved.load(weight.b_key)
    rows = block.stored_rows
    if len(shape) == 3:
        num_experts, num_rows, _ = shape
        experts, rows = (rows.view(num_experts, -1) // num_rows)[:, 0], rows.view(num_experts, -1) % num_rows
        a = a.unflatten(0, (num_experts, -1))[experts]
        b = b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)[experts[:, None], rows]
    else:
        b = b[rows]
    name = weight.path if block.source.endswith(".weight") else block.source  # as PEFT matches it with patterns
    rank, stated = a.shape[-2], saved.config.rank_of(name)
    if rank != stated:  # PEFT scales by the stated one, llama.cpp by that of the factors
        raise AdapterError(
            f"The factors of `{name}` in {saved.directory} have rank {rank}, and adapter_config.json says {stated}: "
            "one of the two files is of another adapter. Save it again."
        )
    return a[..., block.columns], b * saved.scaling(name, rank)
