"""A model as GGUF sees it, wherever its files come from.

Every stage has the same view: GGUF tensor names, shapes and float32 values, GGUF metadata, and the numbers that
planning rules need. `checkpoint.open_model` makes one from a directory or a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.tensor_roles import HyperParams
from dynquant.checkpoints.tensor_source import TensorSource


@dataclass(frozen=True)
class Model:
    """One checkpoint in GGUF terms.

    `hf_directory` is set when transformers can load the model from a directory; `gguf_file` when it is a GGUF.
    `checkpoint_names(name)` lists the checkpoint's own tensors that a GGUF tensor is made of. A vision-language model
    is written as several files, its `parts`; `unwritten` says why parts are missing there.
    """

    path: Path
    source: TensorSource
    metadata: tuple[MetadataField, ...]
    checkpoint_names: Callable[[str], tuple[str, ...]]
    hf_directory: Path | None = None
    gguf_file: Path | None = None
    parts: "tuple[ModelPart, ...]" = ()
    unwritten: tuple[str, ...] = ()

    @cached_property
    def hyper(self) -> HyperParams:
        return HyperParams.from_metadata({field.key: field.value for field in self.metadata})

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @cached_property
    def has_vision(self) -> bool:
        """Whether there is a vision tower."""
        return any(name.startswith("v.") for name in self.source.names())

    @cached_property
    def num_weights(self) -> int:
        """Of all tensors."""
        return sum(self.source.info(name).numel for name in self.source.names())

    @property
    def arch(self) -> str:
        return self.hyper.arch

    @property
    def name(self) -> str:
        return self.path.stem if self.gguf_file and self.path.is_file() else self.path.resolve().name


@dataclass(frozen=True)
class ModelPart:
    """One GGUF file of a model that is written as several.

    `plan_name(name)` is the tensor of the whole model from which a tensor of the file takes its type.
    """

    model: Model
    plan_name: Callable[[str], str]
    is_projector: bool = False
