"""llama.cpp with pictures: a language GGUF and its mmproj file through libmtmd of llama-cpp-python.

Text comes as token ids and is decoded as in `llama_cpp`; a picture is resized, encoded and decoded by libmtmd, which
also gives its tokens their positions. Everything computes in F32, without flash attention.
"""

import ctypes
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from dynquant.errors import CheckpointError, EvaluationError
from dynquant.evaluation.llama_cpp import BATCH_TOKENS, LlamaCppRunner, llama_log
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.pictures import open_image

Segment = Sequence[int] | np.ndarray  # token ids, or a picture uint8 [height, width, 3]


class MtmdRunner(LlamaCppRunner):
    """A vision-language model in llama.cpp.

    `image_tokens` are the fewest and the most tokens of a picture, which decide how pictures of free size are resized;
    None leaves llama.cpp's own. An answer ends before a token of `stop`.

    Raises:
        CheckpointError: libmtmd cannot load the mmproj file, or it does not fit the language model.
    """

    def __init__(
        self, path: Path, mmproj: Path, *, image_tokens: tuple[int, int] | None = None, stop: Collection[int] = ()
    ) -> None:
        super().__init__(path)
        self._mtmd, self._stop = self._api, stop
        log = llama_log()
        log.clear()
        self._mtmd.mtmd_log_set(log.callback, ctypes.c_void_p(0))
        self._mtmd.mtmd_helper_log_set(log.callback, ctypes.c_void_p(0))
        params = self._mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = self._threads
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if image_tokens is not None:
            params.image_min_tokens, params.image_max_tokens = image_tokens
        self._vision = self._mtmd.mtmd_init_from_file(os.fsencode(mmproj), self._model, params)
        if not self._vision:
            self.close()
            raise CheckpointError(f"{mmproj.name}: llama.cpp cannot load the file beside {path.name}: {log.last()}")

    def scored_logits(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            rows, _ = self.text_logits(_segments(batch))
            yield rows[(batch.is_text[0].cumsum(0) - 1)[batch.scored]]  # rows are those of text tokens

    def answer(self, prompt: Batch, max_tokens: int) -> list[int]:
        rows, position = self.text_logits(_segments(prompt), spare=max_tokens)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            token = int(rows[-1].argmax())
            if token in self._stop:
                break
            tokens.append(token)
            rows = self._decode([(token, position, (0,), True)])
            position += 1
        return tokens

    def close(self) -> None:
        if getattr(self, "_vision", None):
            self._mtmd.mtmd_free(self._vision)
        self._vision = None
        super().close()

    def text_logits(self, segments: Sequence[Segment], spare: int = 0) -> tuple[torch.Tensor, int]:
        """Return logits behind every text token, float32 [text tokens, vocabulary], and the position that follows."""
        pictures = {i: _Picture(self, part) for i, part in enumerate(segments) if isinstance(part, np.ndarray)}
        try:
            text = sum(len(part) for i, part in enumerate(segments) if i not in pictures)
            self._clear(text + sum(picture.num_tokens for picture in pictures.values()) + spare)
            rows, position = [], 0
            for index, segment in enumerate(segments):
                if index in pictures:
                    position = pictures[index].decode(position)
                else:
                    rows.append(self._decode([(token, position + i, (0,), True) for i, token in enumerate(segment)]))
                    position += len(segment)
            return torch.cat(rows), position
        finally:
            for picture in pictures.values():
                picture.free()


def _segments(batch: Batch) -> list[Segment]:
    segments = segments_of(batch.ids[0], batch.is_text[0], (np.asarray(open_image(path)) for path in batch.pictures))
    if segments is None:
        raise EvaluationError(
            f"{batch.place}: its {len(batch.pictures)} pictures are not that many runs of image tokens; with text "
            "between them, llama.cpp can run them."
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


class _Picture:
    """The chunks that libmtmd makes of one picture; text that it puts around it is left out."""

    def __init__(self, runner: MtmdRunner, pixels: np.ndarray) -> None:
        self._runner, self._mtmd = runner, runner._mtmd
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels, dtype=np.uint8)
        bitmap = self._mtmd.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        marker = self._mtmd.mtmd_default_marker()
        text = self._mtmd.mtmd_input_text(marker, len(marker), False, True)
        self._chunks = self._mtmd.mtmd_input_chunks_init()
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        code = self._mtmd.mtmd_tokenize(runner._vision, self._chunks, ctypes.byref(text), bitmaps, 1)
        self._mtmd.mtmd_bitmap_free(bitmap)
        if code != 0:
            self.free()
            raise EvaluationError(f"libmtmd cannot prepare a picture of {width} x {height} pixels: {llama_log()}")
        count, kind_of = self._mtmd.mtmd_input_chunks_size(self._chunks), self._mtmd.mtmd_input_chunk_get_type
        chunks = (self._mtmd.mtmd_input_chunks_get(self._chunks, i) for i in range(count))
        self._seen = [chunk for chunk in chunks if kind_of(chunk) == self._mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        self.num_tokens = sum(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk) for chunk in self._seen)

    def decode(self, position: int) -> int:
        """Decode the picture's tokens from `position` on; returns the position that follows."""
        following = self._runner._api.llama_pos(position)
        for chunk in self._seen:
            with _zeroed_memory():
                code = self._mtmd.mtmd_helper_eval_chunk_single(
                    self._runner._vision, self._runner._context, chunk, following.value, 0, BATCH_TOKENS, False,
                    ctypes.byref(following),
                )  # fmt: skip
            if code != 0:
                raise EvaluationError(f"libmtmd cannot run a picture of {self.num_tokens} tokens: {llama_log()}")
        return following.value

    def free(self) -> None:
        self._mtmd.mtmd_input_chunks_free(self._chunks)


_M_PERTURB, _ZEROS = -6, 0xFF  # of glibc: with 0xFF, allocated memory is filled with its complement


@contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Let glibc fill the memory that it gives out with zeros.

    llama.cpp's Pixtral graph multiplies memory that it never wrote by zero; where that holds NaN, so do the results.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, _ZEROS)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
