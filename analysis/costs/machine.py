"""Speeds and memory of one machine, as `dynquant measure-machine` found it, for estimates of time and memory."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dynquant.errors import PlanError
from dynquant.storage.documents import FrozenRecord, read_document

Positive = Field(gt=0, allow_inf_nan=False)


class Machine(FrozenRecord):
    """Speeds are those of `threads` threads on an otherwise idle machine, in float32 on the CPU."""

    schema_version: Literal[1] = 1
    name: str
    threads: int = Field(gt=0)
    memory_bytes: int = Field(gt=0)
    disk_bytes_per_s: float = Positive
    start_seconds: float = Positive  # time of a command that imports PyTorch and transformers and opens a model
    start_bytes: int = Field(gt=0)  # resident memory of such a command before it loads weights
    run_bytes: int = Field(gt=0)  # what running a model adds besides weights: code that loads late, activations
    matmul_flops: dict[int, float]  # width of square weights -> operations per second on 512 rows
    element_seconds: float = Positive  # of a channel of a token in or out of a linear layer: norms, hooks, sums
    encode: dict[str, dict[str, float]]  # encoder -> type -> weights per second
    errors: dict[str, float]  # type -> weights per second of the error table: encoding by ggml, decoding, and sums
    table_seconds: dict[str, float]  # type -> seconds that ggml takes for its search tables, once a process

    @classmethod
    def load(cls, path: Path) -> "Machine":
        """Read a machine file. Raises PlanError: missing, or not written by `dynquant measure-machine`."""
        machine = read_document(path, cls, "a machine file", "Make one with `dynquant measure-machine -o FILE`.")
        speeds = [*machine.matmul_flops.values(), *machine.errors.values()]
        speeds += [speed for types in machine.encode.values() for speed in types.values()]
        if not machine.matmul_flops or not all(0 < speed < float("inf") for speed in speeds):
            raise PlanError(f"{path} holds a speed that is not positive. Measure again.")
        return machine
