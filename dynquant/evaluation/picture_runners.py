"""Runs samples with pictures: in transformers, and as GGUF with an mmproj file in llama.cpp.

Both take the token ids that the original's processor made, so that they see the same text. llama.cpp gets the pictures
themselves and resizes them its own way, to as many tokens as the processor allows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import EvaluationError
from dynquant.evaluation.llama_cpp_pictures import MtmdRunner, Segment
from dynquant.evaluation.rendered_model import scored_logits
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.pictures import Sample, open_image
from dynquant.inputs.processor import image_token_limits


@dataclass(frozen=True)
class PictureItem:
    """One sample, whole and up to the answer."""

    sample: Sample
    whole: Batch
    prompt: Batch | None

    @property
    def answer_tokens(self) -> int:
        """Number of tokens of the right answer and of what ends it."""
        return self.whole.num_tokens - self.prompt.num_tokens if self.prompt is not None else 0


class PictureRunner(Protocol):
    """One model that sees pictures."""

    def logits(self, item: PictureItem) -> torch.Tensor:
        """Float32 [scored positions, vocabulary]."""

    def answer(self, item: PictureItem, max_tokens: int) -> list[int]:
        """The greedy answer to the item's question."""


class TransformersPictures:
    """A model in transformers."""

    def __init__(self, hf_model: Any) -> None:
        self.hf_model = hf_model

    def logits(self, item: PictureItem) -> torch.Tensor:
        return scored_logits(self.hf_model, item.whole)

    def answer(self, item: PictureItem, max_tokens: int) -> list[int]:
        assert item.prompt is not None
        inputs = item.prompt.on(self.hf_model.device)
        made = self.hf_model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return made[0, item.prompt.num_tokens :].tolist()

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        found = self.hf_model.generation_config.eos_token_id
        return frozenset([] if found is None else found if isinstance(found, list) else [found])

    @property
    def vocab_size(self) -> int:
        return self.hf_model.config.get_text_config().vocab_size


class GgufPictures:
    """A language GGUF and its mmproj file in llama.cpp."""

    def __init__(self, path: Path, mmproj: Path, original: TransformersPictures, processor: Any) -> None:
        self._name = path.name
        self._stop = original.stop_tokens
        self._runner = MtmdRunner(path, mmproj, image_tokens=image_token_limits(processor))
        if self._runner.vocab_size != original.vocab_size:
            size = self._runner.vocab_size
            self.close()
            raise EvaluationError(
                f"{path.name} has {size:,} tokens and the reference {original.vocab_size:,}; they are not the same "
                "model. Give the checkpoint that the file was made from."
            )

    def logits(self, item: PictureItem) -> torch.Tensor:
        rows = self._runner.sample_logits(self._segments(item, item.whole))
        return rows[(item.whole.is_text[0].cumsum(0) - 1)[item.whole.scored]]

    def answer(self, item: PictureItem, max_tokens: int) -> list[int]:
        assert item.prompt is not None
        return self._runner.answer(self._segments(item, item.prompt), max_tokens, self._stop)

    def close(self) -> None:
        self._runner.close()

    def _segments(self, item: PictureItem, batch: Batch) -> list[Segment]:
        pictures = (np.asarray(open_image(path)) for path in item.sample.images)
        segments = segments_of(batch.ids[0], batch.is_text[0], pictures)
        if segments is None:
            raise EvaluationError(
                f"{item.sample.place}: its {len(item.sample.images)} pictures are not that many runs of image tokens; "
                "with text between them, llama.cpp can run them."
            )
        return segments


def segments_of(ids: torch.Tensor, is_text: torch.Tensor, pictures: Iterator[np.ndarray]) -> list[Segment] | None:
    """Text as token ids, each run of other tokens as the next picture; None when their numbers differ."""
    boundaries = [0, *((is_text[1:] != is_text[:-1]).nonzero().flatten() + 1).tolist(), len(ids)]
    segments: list[Segment] = []
    for start, stop in pairwise(boundaries):
        segment = ids[start:stop].tolist() if is_text[start] else next(pictures, None)
        if segment is None:
            return None
        segments.append(segment)
    return segments if next(pictures, None) is None else None


def gguf_bytes(paths: Sequence[Path]) -> int:
    """Bytes of GGUF files, with all parts of split ones."""
    return sum(file.stat().st_size for path in paths for file in GGUFSource(path).files)
