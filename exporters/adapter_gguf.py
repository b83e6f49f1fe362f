"""Writes a saved PEFT adapter as the LoRA file that llama.cpp adds to a GGUF model.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    NAME.lora_a  [r, C]      NAME.lora_b  [N, r]        linear layers
    NAME.lora_a  [E, r, C]   NAME.lora_b  [E, N, r]     routed experts

llama.cpp scales each product by alpha / r; what PEFT scales by beyond that (rank-stabilised, a pattern of alphas) is
multiplied into lora_b. Rows of lora_b are in the order of the GGUF tensor, which llama.cpp's Llama interleaves within
heads. transformers' fused `gate_up_proj` becomes the adapters of two tensors with one and the same lora_a.

Names and shapes follow llama.cpp's loader (src/llama-adapter.cpp), what is applied its graphs (`lora.places`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import torch

from dynquant import __version__
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import AdapterError, ExportError
from dynquant.families.common.config import Config, read_config
from dynquant.families.from_gguf import config_from_gguf
from dynquant.families.text.registry import FAMILIES
from dynquant.families.vision.checkpoint import has_tower
from dynquant.lora.places import takes_adapter
from dynquant.lora.saved import AdaptedWeight, SavedAdapter, check_copies
from dynquant.packed.places import Place, build_meta_model, find_places
from dynquant.storage.atomic import writing


@dataclass(frozen=True)
class _Target:
    """One GGUF tensor, which has the rows `start` to `stop` of the weight's B."""

    weight: AdaptedWeight
    place: Place
    parameter: str  # the weight's name as PEFT matches it with patterns
    start: int = 0
    stop: int | None = None


def export_adapter(adapter: Path, output: Path, *, base: Path | None = None) -> Path:
    """Write the adapter in the directory `adapter` to the file `output`, in float32, and return it.

    `base` is the model that it belongs to, packed or original, or a GGUF file of it; by default the place from which
    the adapter says that it was loaded. Of it, only the configuration is read, and what the adapter has copies of.

    Raises:
        AdapterError: no LoRA adapter, one of another model, or one that llama.cpp would not apply whole.
        CheckpointError: a base of an architecture that dynquant does not know.
        ExportError: an output that is no GGUF file, or cannot be written.
    """
    adapter, output = Path(adapter), Path(output)
    if output.is_dir() or output.suffix != ".gguf":
        raise ExportError(f"The output {output} is not the name of a .gguf file; name it {output}.gguf.")
    saved = SavedAdapter(adapter)
    path = Path(base or saved.config.base_model_name_or_path or "")
    config, whole_kv_b = _base_config(saved, path)
    arch = FAMILIES[config.model_type].arch
    places, _ = find_places(config, build_meta_model(config), whole_kv_b=whole_kv_b)
    by_key = {place.key: place for place in places.values()}
    if config.get("tie_word_embeddings") and any(weight.path == "lm_head" for weight in saved.weights):
        raise AdapterError(
            f"The adapter in {adapter} changes `lm_head`, which {path} ties to the token embedding. GGUF has one "
            "tensor for both, and llama.cpp would change the embedding too. Train without `lm_head`, or merge the "
            "adapter into the original (`merge_and_unload` of PEFT) and export that."
        )
    targets = [target for weight in saved.weights for target in _targets(saved, weight, by_key)]
    _check_graph(targets, arch)
    _check_whole_weights(saved, path, config)
    with writing(output) as temporary:
        _write(temporary, arch, saved, targets)
    return output


def _base_config(saved: SavedAdapter, path: Path) -> tuple[Config, bool]:
    """The configuration of the base model at `path`, and whether MLA's `attn_kv_b` is in one piece."""
    if path.suffix == ".gguf":
        source = GGUFSource(path)
        return config_from_gguf(source), "blk.0.attn_kv_b.weight" in source.names()
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
    return read_config(path, FAMILIES), False


def _targets(saved: SavedAdapter, weight: AdaptedWeight, by_key: Mapping[str, Place]) -> Iterator[_Target]:
    """Yield the GGUF tensors that one adapted weight changes; refuse one that the base does not have."""
    path = weight.path
    rank, columns = saved.shape(weight.a_key)
    rows, b_rank = saved.shape(weight.b_key)
    parts = {part: by_key.get(f"{path}.{part}") for part in ("weight", "k_b", "gate_proj", "up_proj", "down_proj")}
    if (place := parts["weight"] or parts["k_b"]) is not None:
        if rank == b_rank and (place is parts["k_b"] or (rows, columns) == (prod(place.shape[:-1]), place.shape[-1])):
            yield _Target(weight, place, path)
            return
    elif (gate := parts["gate_proj"]) is not None and rank == b_rank and rank % gate.shape[0] == 0:
        _, width, hidden = gate.shape
        if (rows, columns) == (2 * width, hidden):
            yield _Target(weight, gate, f"{path}.gate_up_proj", 0, width)
            yield _Target(weight, parts["up_proj"], f"{path}.gate_up_proj", width)
            return
        if (rows, columns) == (hidden, width):
            yield _Target(weight, parts["down_proj"], f"{path}.down_proj")
            return
    raise AdapterError(
        f"The adapter in {saved.directory} changes `{path}` by factors [{rank}, {columns}] and [{rows}, {b_rank}], and "
        "the base model has no such weight there. Give the model that the adapter was trained on with --base."
    )


def _check_whole_weights(saved: SavedAdapter, base: Path, config: Config) -> None:
    """Refuse whole weights that a LoRA file has no place for, unless they are those of the base.

    Only an original checkpoint can tell; beside a packed one, copies that PEFT makes unasked pass, and what
    `modules_to_save` lists counts as trained.
    """
    if base.suffix == ".gguf" or config.raw.get("quantization_config"):
        trained = next(iter(saved.whole), None)
    elif saved.copies or saved.whole:
        source = SafetensorsSource(base)

        def is_same(module: str, copy: torch.Tensor) -> bool:
            name = f"{module}.weight"
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                name = "model.embed_tokens.weight"
            return name in source.names() and torch.equal(copy, source.load(name).to(copy.dtype))

        check_copies(saved.directory, saved.copies, str(base), is_same)
        trained = next((key for key, module in saved.whole.items() if not is_same(module, saved.stored(key))), None)
    else:
        return
    if trained is not None:
        raise AdapterError(
            f"The adapter in {saved.directory} holds `{trained}`, a whole weight and no LoRA factor, which was trained "
            f"unless it is that of the original model (give this with --base); {base} has another, or a packed one. "
            "A LoRA file has no place for it: train without `train_norms`, `train_router` and `modules_to_save`, or "
            "merge the adapter into the original and export that."
        )


def _check_graph(targets: list[_Target], arch: str) -> None:
    left_out = sorted({target.weight.path for target in targets if not takes_adapter(arch, target.place.name)})
    if left_out:
        kinds = sorted({path.rpartition(".")[2] for path in left_out})
        raise AdapterError(
            f"The adapter changes {', '.join(kinds)} (`{left_out[0]}` and {len(left_out) - 1} more), to which "
            f"llama.cpp applies no adapter in its {arch} graph: it would load the file and leave these out. Train an "
            "adapter without them; `add_adapter(model, llama_cpp=True)` chooses what llama.cpp applies."
        )


def _write(path: Path, arch: str, saved: SavedAdapter, targets: list[_Target]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, saved.config.lora_alpha)
    writer.add_string("dynquant.version", __version__)
    try:
        for target in targets:
            a, b = _factors(saved, target)
            writer.add_tensor(f"{target.place.name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{target.place.name}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _factors(saved: SavedAdapter, target: _Target) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = saved.load(target.weight.a_key), saved.load(target.weight.b_key)
    if len(target.place.shape) == 3:
        num_experts = target.place.shape[0]
        a, b = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    b = b[..., target.start : target.stop, :] if target.place.order is None else b[target.place.order]
    rank, stated = a.shape[-2], saved.config.rank_of(target.parameter)
    if rank != stated:  # PEFT scales by the stated one, llama.cpp by that of the factors
        raise AdapterError(
            f"The factors of `{target.parameter}` in {saved.directory} have rank {rank}, and adapter_config.json says "
            f"{stated}: one of the two files is of another adapter. Save it again."
        )
    llama_cpp_scaling = saved.config.lora_alpha / rank
    return a, b * (saved.scaling(target.parameter, rank) / llama_cpp_scaling)
