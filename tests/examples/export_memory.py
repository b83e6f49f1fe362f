"""Peak memory of an export whose one stack of experts would take 1 GiB as float32, in parts of a given size.

    python tests/examples/export_memory.py --part-memory 64MiB

Experts are drawn when they are read, so that all memory beyond the start is the export's.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.stream import load_encoder
from dynquant.recipes.build_plan import plan_from_types
from dynquant.resources import parse_size

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.exports import export_gguf

SHAPE = (256, 1024, 1024)
NAME = "blk.0.ffn_up_exps.weight"


class DrawnExperts:
    """A source of one stack, whose experts follow from their numbers."""

    fingerprint = "0" * 64

    def names(self) -> list[str]:
        return [NAME]

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, SHAPE, "BF16")

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        if not isinstance(index, int):
            raise ValueError("the stack must not be read as a whole")
        return torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(index))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(part_bytes: int | None, directory: Path) -> tuple[int, int]:
    """Bytes of the process before the export and at most during it."""
    fields = (
        MetadataField("general.architecture", "llama", GGUFValueType.STRING),
        MetadataField("llama.block_count", 1, GGUFValueType.UINT32),
        MetadataField("llama.embedding_length", SHAPE[-1], GGUFValueType.UINT32),
        MetadataField("tokenizer.ggml.tokens", ["a"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    )
    model = Model(Path("drawn"), DrawnExperts(), fields, lambda name: (name,))
    plan = plan_from_types(model, {NAME: ("Q8_0", "asked")}, recipe="preset uniform-q8_0")
    encoder = load_encoder("ggml")
    encoder.encode(plan.entries[0].quant_type, torch.randn(8, 256), None, 1)
    before = peak_bytes()
    export_gguf(model, plan, None, directory / "a.gguf", encoder=encoder, threads=4, limits=PartLimits(part_bytes))
    return before, peak_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part-memory", help="As 64MiB. Default: parts of 64 Mi weights.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        before, peak = measure(parse_size(given.part_memory) if given.part_memory else None, Path(directory))
    print(f"{before / 2**20:.0f} MiB before, {peak / 2**20:.0f} MiB at most, {(peak - before) / 2**20:.0f} MiB more")


if __name__ == "__main__":
    main()
