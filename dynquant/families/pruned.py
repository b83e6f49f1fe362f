"""A checkpoint with fewer routed experts, written as a directory of its own: the same number less in every layer.

Whatever comes after it, any step and any program, sees a smaller model and needs to know nothing of pruning. Tensors
are copied as they are stored, also in FP8 or MXFP4: all of an expert alone, or slices of the first dimension of stacks
and routers. Which experts are gone is written beside them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynquant.checkpoints import checkpoint_directory
from dynquant.checkpoints.model import Model, PrunedExperts
from dynquant.checkpoints.safetensors_format import FileSpan
from dynquant.checkpoints.safetensors_source import checkpoint_spans
from dynquant.checkpoints.tensor_roles import layer_of, stored_ahead
from dynquant.errors import CheckpointError
from dynquant.families.common.config import read_json
from dynquant.formats.storage_format import StoredTensor
from dynquant.storage.atomic import writing_folder
from dynquant.storage.documents import read_document

PRUNED_NAME = "pruned_experts.json"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_count")
"""Names of the number of routed experts in config.json, and in GGUF."""
HAS_EXPERTS = re.compile(r"\.(ffn_gate_inp|exp_probs_b\w*|ffn_\w+exps|ffn_gate_tid2eid)\.")
"""Tensors, by their names in GGUF, that have a slice for each expert."""
_OF_ONE = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


class _Kept(NamedTuple):
    """A tensor of the new checkpoint: one of the old, all of it or some slices of its dimension `axis`."""

    name: str
    span: FileSpan
    slices: tuple[int, ...] | None = None
    axis: int = 0

    @property
    def stored(self) -> StoredTensor:
        shape = list(self.span.shape)
        if self.slices is not None:
            shape[self.axis] = len(self.slices)
        return StoredTensor(self.name, self.span.dtype, tuple(shape))

    def read(self) -> torch.Tensor:
        if self.slices is None:
            return self.span.read()
        if self.axis:
            return self.span.read()[:, self.slices]
        return torch.stack([self.span.read(index) for index in self.slices])  # never all of a stack in memory


def read_pruned(directory: Path) -> PrunedExperts | None:
    """Return which experts a directory lacks; None for one that was not pruned here."""
    path = directory / PRUNED_NAME
    what = "a record of pruned experts"
    return read_document(path, PrunedExperts, what, "Fetch the checkpoint again.") if path.is_file() else None


def check_prunable(model: Model) -> None:
    """Raise CheckpointError for a model that is no Hugging Face directory, or that sees pictures."""
    if model.hf_directory is None or model.base_gguf is not None or model.has_vision:
        raise CheckpointError(
            f"{model.name} is no Hugging Face checkpoint of a language model alone, and experts are pruned from no "
            "other. Give its directory, or leave --prune-experts out."
        )


def write_without_experts(model: Model, pruned: PrunedExperts, directory: Path) -> None:
    """Write the checkpoint of `model` without some experts.

    Raises:
        CheckpointError: as `check_prunable`, or experts that are stored or counted in a way that is not known.
        WriteError: no space or no permission.
    """
    check_prunable(model)
    assert model.hf_directory is not None
    config = read_json(model.hf_directory / "config.json")
    tensors = list(_kept(model, pruned, config))
    _lower_counts(model, config, pruned)
    shards = checkpoint_directory.shards_of([tensor.stored for tensor in tensors])
    by_name = {tensor.name: tensor for tensor in tensors}
    documents = {
        "config.json": checkpoint_directory.as_json(config),
        PRUNED_NAME: pruned.model_dump_json(indent=1).encode(),
    }
    documents |= checkpoint_directory.index_of(shards) | checkpoint_directory.copied_files(model.hf_directory)
    if (card := model.hf_directory / "README.md").is_file():
        documents["README.md"] = card.read_bytes()  # of which GGUF keys are made
    with writing_folder(directory) as folder:
        for name, content in documents.items():
            (folder / name).write_bytes(content)
        for file_name, shard in shards.items():
            with (folder / file_name).open("wb") as file:
                file.write(shard.header)
                for name in shard.spans:  # in the order of their places
                    file.write(checkpoint_directory.tensor_bytes(by_name[name].read()))


def _kept(model: Model, pruned: PrunedExperts, config: Mapping[str, Any]) -> Iterator[_Kept]:
    """Yield the tensors that stay; layers that predict tokens ahead, whose experts nobody ranked, do not."""
    assert model.hf_directory is not None
    layers, ranks = _layers_by_name(model), {}
    for layer, gone in pruned.experts.items():
        staying = [expert for expert in range(pruned.num_experts) if expert not in gone]
        ranks[layer] = {expert: rank for rank, expert in enumerate(staying)}
    for name, span in checkpoint_spans(model.hf_directory).items():
        of_one, layer = _OF_ONE.fullmatch(name), None
        if stored_ahead(name, config):
            continue
        if of_one and (layer := layers.get(of_one[1])) is not None:
            if (rank := ranks[layer].get(int(of_one[2]))) is not None:
                yield _Kept(f"{of_one[1]}{rank}{of_one[3]}", span)
            continue
        layer = layers.get(name, layers.get(re.sub(r"_(blocks|scales|scale_inv)$", "", name)))
        if layer is None:
            yield _Kept(name, span)
            continue
        axis = int(span.shape[:1] == (1,))  # Ernie's corrections are [1, experts]
        if span.shape[axis : axis + 1] != (pruned.num_experts,):
            raise CheckpointError(
                f"{model.name} stores `{name}` as {list(span.shape)}, which is not one slice for each of its "
                f"{pruned.num_experts} experts. Leave --prune-experts out."
            )
        yield _Kept(name, span, tuple(ranks[layer]), axis)


def _layers_by_name(model: Model) -> dict[str, int]:
    """Return the layer of every tensor that has a slice for each expert, and of what names of single experts begin
    with."""
    layers: dict[str, int] = {}
    for name in filter(HAS_EXPERTS.search, model.source.names()):
        for stored in model.checkpoint_names(name):
            of_one = _OF_ONE.fullmatch(stored)
            layers[of_one[1] if of_one else stored] = layer_of(name) or 0
    return layers


def _lower_counts(model: Model, config: dict[str, Any], pruned: PrunedExperts) -> None:
    """Lower the number of experts in a config.json."""
    count = pruned.num_experts - len(next(iter(pruned.experts.values())))
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    places = [(part, key) for part in parts for key in COUNTS if part.get(key) == pruned.num_experts]
    if not places:
        raise CheckpointError(
            f"config.json of {model.name} gives its {pruned.num_experts} experts under none of the names "
            f"{', '.join(COUNTS)}, so their number cannot be lowered. Leave --prune-experts out."
        )
    for part, key in places:
        part[key] = count
    for part in parts:
        if "num_nextn_predict_layers" in part:
            part["num_nextn_predict_layers"] = 0
