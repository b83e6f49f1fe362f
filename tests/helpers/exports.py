"""Exports with the options of an `Encoding` as arguments."""

from contextlib import nullcontext
from pathlib import Path

from dynquant.encoding.stream import load_encoder
from dynquant.exporters import compressed_tensors, gguf, safetensors
from dynquant.exporters.output import Encoding
from dynquant.session import Session, ignore_progress


def export_gguf(model, plan, stats, output, *, split_max_bytes=None, **options) -> list[Path]:
    encoding = _encoding(model, plan, stats, **options)
    return gguf.export_gguf(encoding, output, split_max_bytes=split_max_bytes)


def export_safetensors(model, plan, stats, output, *, shard_max_bytes=None, stored=None, **options) -> list[Path]:
    encoding = _encoding(model, plan, stats, **options)
    return safetensors.export_safetensors(encoding, output, shard_max_bytes=shard_max_bytes, stored=stored)


def export_compressed_tensors(model, plan, checkpoint, output, *, shard_max_bytes=None, **options) -> list[Path]:
    encoding = _encoding(model, plan, None, encoder=load_encoder("dynquant", "cpu"), **options)
    return compressed_tensors.export_compressed_tensors(encoding, checkpoint, output, shard_max_bytes=shard_max_bytes)


def _encoding(model, plan, stats, *, threads=None, progress=ignore_progress, **options) -> Encoding:
    session = Session(threads=threads, stage=lambda _: nullcontext(progress))
    return Encoding(model=model, plan=plan, stats=stats, session=session, **options)
