"""Exports with the options of an `Encoding` as arguments."""

from contextlib import nullcontext
from pathlib import Path

from dynquant.exporters import gguf, safetensors
from dynquant.exporters.output import Encoding
from dynquant.session import Session, ignore_progress


def export_gguf(model, plan, stats, output, *, split_max_bytes=None, **options) -> list[Path]:
    encoding = _encoding(model, plan, stats, **options)
    return gguf.export_gguf(encoding, output, split_max_bytes=split_max_bytes)


def export_safetensors(model, plan, stats, output, *, shard_max_bytes=None, stored=None, **options) -> list[Path]:
    encoding = _encoding(model, plan, stats, **options)
    return safetensors.export_safetensors(encoding, output, shard_max_bytes=shard_max_bytes, stored=stored)


def _encoding(model, plan, stats, *, threads=None, progress=ignore_progress, **options) -> Encoding:
    session = Session(threads=threads, stage=lambda _: nullcontext(progress))
    return Encoding(model=model, plan=plan, stats=stats, session=session, **options)
