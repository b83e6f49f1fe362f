"""Collects the conversions of one checkpoint while a family names its tensors, and holds the family to the checkpoint.

Every tensor that a family asks for must be there in the expected shape, and every tensor that is there must have been
asked for: a bias or norm that a family does not know would otherwise be dropped in silence.
"""

import warnings
from collections.abc import Callable, Collection

import torch

from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.errors import CheckpointError
from dynquant.families.common.config import WAY_OUT, Config
from dynquant.families.common.conversion import Conversion, Transform, differ, unchanged
from dynquant.families.common.selection import Selection
from dynquant.families.common.strided_maps import whole

OUTPUT_NAME = "lm_head.weight"
COMPUTED_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Ends of names of what checkpoints may hold although the configuration decides it."""


class ConversionBook:
    """Conversions of one checkpoint, in the order in which they are added.

    `source` may be None, for planning from `config.json` alone. Then `names` are those of the checkpoint's tensors,
    whose shapes nobody checks, or None when they are not known either and every tensor counts as present.
    `whole_kv_b` leaves MLA's `attn_kv_b` in one piece, as llama.cpp wrote it until April 2025.
    """

    def __init__(
        self,
        config: Config,
        source: TensorSource | None,
        *,
        names: Collection[str] | None = None,
        whole_kv_b: bool = False,
    ) -> None:
        self.config = config
        self.conversions: list[Conversion] = []
        self.whole_kv_b = whole_kv_b
        self._source = source
        self._knows_names = source is not None or names is not None
        self._stored = frozenset(source.names() if source else names or ())
        self._unused = set(self._stored)
        self._missing: list[str] = []

    def holds(self, checkpoint_name: str) -> bool:
        """Return whether the checkpoint stores this tensor; without a list of names, it does not."""
        return checkpoint_name in self._stored

    def holds_another(self, checkpoint_name: str, copied_name: str) -> bool:
        """Return whether `checkpoint_name` is stored and no copy of `copied_name`; False without weights to compare."""
        if self._source is None or not {checkpoint_name, copied_name} <= self._stored:
            return False
        return differ(self._source, checkpoint_name, copied_name)

    def add(
        self,
        name: str,
        checkpoint_name: str,
        shape: tuple[int, ...],
        *,
        transform: Transform = unchanged,
        stored_shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        optional: bool = False,
    ) -> None:
        """Add a GGUF tensor of `shape` made of one checkpoint tensor of `stored_shape` (default: the same)."""
        if optional and not self.holds(checkpoint_name):
            return
        stored = self._take(checkpoint_name, stored_shape or shape)
        self.conversions.append(Conversion(name, (checkpoint_name,), shape, dtype or stored, transform))

    def add_stack(self, name: str, checkpoint_names: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Add a stacked tensor made of one checkpoint tensor per slice."""
        if not checkpoint_names:
            raise CheckpointError(f"{self.config.path} calls for experts and gives their number as 0. Fetch it again.")
        dtypes = [self._take(part, shape[1:]) for part in checkpoint_names]
        if len(checkpoint_names) > 1:
            self.conversions.append(Conversion(name, checkpoint_names, shape, dtypes[0]))
        else:  # a matrix that is a stack of one
            of_one = Selection(shape[1:], whole("", shape[1:]).viewed(shape))
            self.conversions.append(Conversion(name, checkpoint_names, shape, dtypes[0], of_one))

    def add_rows(self, name: str, checkpoint_name: str, shape: tuple[int, ...], start: int, stored_rows: int) -> None:
        """Add rows `start…` of every slice of a fused tensor [slices, stored_rows, columns]."""
        stored_shape = (shape[0], stored_rows, shape[2])
        rows = Selection(stored_shape, whole("", stored_shape).sliced(1, start, start + shape[1]))
        dtype = self._take(checkpoint_name, stored_shape)
        self.conversions.append(Conversion(name, (checkpoint_name,), shape, dtype, rows))

    def add_computed(self, name: str, values: torch.Tensor) -> None:
        """Add a tensor that follows from the configuration."""
        self.conversions.append(Conversion(name, (), tuple(values.shape), "F32", values=values))

    def drop(self, matches: Callable[[str], bool], reason: str) -> None:
        """Leave out checkpoint tensors that GGUF has no place for, and say so."""
        dropped = [name for name in self._unused if matches(name)]
        if dropped:
            self._unused.difference_update(dropped)
            warnings.warn(f"{len(dropped)} tensors are left out ({some_of(dropped)}): {reason}", stacklevel=4)

    def ignore(self, checkpoint_name: str) -> None:
        """Leave out a tensor that transformers does not use either."""
        self._unused.discard(checkpoint_name)

    def finish(self) -> list[Conversion]:
        """Return all conversions. Raises CheckpointError: tensors are missing, or stored but unknown to the family."""
        where = f"{self.config.path.parent} ({self.config.model_type})"
        if self._missing:
            raise CheckpointError(
                f"{where} lacks {len(self._missing)} tensors that its configuration calls for: "
                f"{some_of(self._missing)}. {self._likely_cause()}"
            )
        unknown = [name for name in self._unused if not name.endswith(COMPUTED_BUFFERS)]
        if unknown:
            raise CheckpointError(
                f"{where} holds {len(unknown)} tensors that its architecture has no place for: {some_of(unknown)}. "
                f"Leaving them out would change the model. {WAY_OUT}"
            )
        return self.conversions

    def _likely_cause(self) -> str:
        """Return why tensors may be missing, with the way out."""
        if self._missing == [OUTPUT_NAME]:
            return (
                "The download is incomplete; or the output is the embedding, and config.json should say so: set "
                "`tie_word_embeddings` to true."
            )
        first = next(name for name in self._missing if name != OUTPUT_NAME)
        core = first.removeprefix("model.")
        stored = next((name for name in sorted(self._unused) if name.endswith(f".{core}") or name == core), None)
        if stored is not None:
            return (
                f"It holds `{stored}` in the place of `{first}`: its tensors are named for another class of model. "
                "Load it in transformers with the class that wrote it, `save_pretrained` its language model, and give "
                "that."
            )
        return "The download is incomplete, or config.json belongs to another model."

    def _take(self, checkpoint_name: str, shape: tuple[int, ...]) -> str:
        """Mark as used, check the shape, and return the stored type."""
        if self._knows_names and not self.holds(checkpoint_name):
            self._missing.append(checkpoint_name)
            return "F32"
        self._unused.discard(checkpoint_name)
        if self._source is None:
            return "BF16"
        info = self._source.info(checkpoint_name)
        if info.shape != shape:
            raise CheckpointError(
                f"`{checkpoint_name}` in {self.config.path.parent} has shape {list(info.shape)}, but config.json calls "
                f"for {list(shape)}. The configuration belongs to another checkpoint."
            )
        return info.dtype


def some_of(names: Collection[str]) -> str:
    """Return the first names in alphabetical order, as messages show them."""
    shown = ", ".join(f"`{name}`" for name in sorted(names)[:4])
    return shown if len(names) <= 4 else f"{shown}, …"
