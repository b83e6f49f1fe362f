"""Calibration and question files with images: their records, and the model inputs that a processor makes of them.

A record of a file (`inputs.records`) is one sample, in one of three forms; paths of images are relative to the file:

    {"images": ["a.png"], "text": "A train in the rain."}
    {"images": ["a.png"], "question": "What is this?", "answer": "a train"}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "…"}]}]}

`messages` may also hold plain strings, with the images in `images`: they go before the first turn of the user.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError, DataError
from dynquant.families.common.config import read_json
from dynquant.inputs.model_inputs import Batch, ModelInputs, check_context
from dynquant.inputs.processor import load_processor
from dynquant.inputs.records import part_text, read_records, shortened

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Sample:
    """One line. `turns` are chat turns with lists of parts; `text` is used as it stands when there are no turns."""

    place: str
    images: tuple[Path, ...]
    turns: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class SampleFile:
    """All samples of a file. `sha256` covers the file and the bytes of its images."""

    name: str
    samples: tuple[Sample, ...]
    sha256: str


def read_samples(path: Path) -> SampleFile:
    """Read a file of samples; images are not opened yet.

    Raises:
        DataError: no such file, no sample, no image in any sample, or a record of another form.
    """
    records = read_records(path, DataError)
    samples = tuple(_sample(record, place, path.parent) for _, place, record in records)
    if not samples:
        raise DataError(f"{path} holds no samples. Each line is a JSON object with `images` and `text`.")
    if not any(sample.images for sample in samples):
        raise DataError(
            f"None of the {len(samples)} samples of {path} has an image. Name some in `images`, or give text alone "
            "with --calibration."
        )
    digest = hashlib.sha256(path.read_bytes())
    for image in sorted({image for sample in samples for image in sample.images}):
        digest.update(image.read_bytes() if image.is_file() else b"")
    return SampleFile(path.name, samples, digest.hexdigest())


def picture_inputs(model: Model, path: Path, *, tokens: int, seed: int, strict: bool = False) -> ModelInputs:
    """Return the samples of a file, shuffled with `seed`, up to a number of tokens.

    Those whose images cannot be decoded are left out, and named in `skipped`; with `strict` they are refused.

    Raises:
        DataError: the model sees no images, or nothing of the file can be used.
        CheckpointError: the model's processor is missing.
    """
    if not model.has_vision or model.hf_directory is None:
        raise DataError(
            f"{model.name} has no vision tower that transformers can run, so --data {path} with its images is not for "
            "it. Give text with --calibration."
        )
    file = read_samples(path)
    encoder = SampleEncoder(load_processor(model.hf_directory), image_token_of(model.hf_directory), strict=strict)
    samples = list(file.samples)
    random.Random(seed).shuffle(samples)
    batches = tuple(encoder.encode_all(tuple(samples), tokens))
    if not batches:
        raise DataError(f"No sample of {path} can be used: all of their images fail to decode.")
    inputs = ModelInputs(batches, name=file.name, sha256=file.sha256, skipped=tuple(encoder.skipped))
    check_context(model, inputs.longest)
    return inputs


def _sample(record: Any, place: str, directory: Path) -> Sample:
    names = (record.get("images") or []) if isinstance(record, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{place}: `images` must be a list of file names.")
    images = tuple(directory / name for name in names)
    question, answer = record.get("question"), record.get("answer")
    if isinstance(question, str) and isinstance(answer, str):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns, images = _with_images(turns, images, place, directory)
        return Sample(place, images, turns, question=question, answer=answer)
    if isinstance(record.get("text"), str):
        return Sample(place, images, text=record["text"])
    if isinstance(record.get("messages"), list):
        turns, images = _with_images(record["messages"], images, place, directory)
        return Sample(place, images, turns)
    raise DataError(f"{place} has neither `text`, nor `messages`, nor `question` and `answer`.")


def _with_images(
    turns: list[Any], images: tuple[Path, ...], place: str, directory: Path
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Path, ...]]:
    """Turns with lists of parts; an image that a part names joins `images`, in order."""
    paths: list[Path] = []
    plain_turns = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise DataError(f"{place}: each entry of `messages` needs `role` and `content`.")
        content = turn["content"]
        if content is None:
            continue
        if not isinstance(content, str | list):
            raise DataError(f"{place}: `content` must be a text or a list of parts, but it is {shortened(content)}.")
        plain_parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image"):
                raise DataError(f"{place}: a part of `content` has the type {kind!r}; text and image are known.")
            path = next((part[key] for key in ("image", "path", "url") if isinstance(part.get(key), str)), None)
            if kind == "image" and path is not None:
                paths.append(directory / path)
            is_text = kind == "text"
            plain_parts.append({"type": kind} | ({"text": part_text(part, place, DataError)} if is_text else {}))
        plain_turns.append({"role": turn["role"], "content": plain_parts})
    holders = sum(part["type"] == "image" for turn in plain_turns for part in turn["content"])
    first = next((turn for turn in plain_turns if turn["role"] == "user"), None)
    if not holders and images and first is not None:
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
        holders = len(images)
    images = images or tuple(paths)
    if holders != len(images):
        raise DataError(f"{place} has {len(images)} images for {holders} places in `messages`.")
    return tuple(plain_turns), images


class SampleEncoder:
    """Makes model inputs of samples, one at a time, and counts those whose images cannot be decoded.

    With `strict` the first such image is refused.
    """

    def __init__(self, processor: "ProcessorMixin", image_token: int | None, *, strict: bool = False) -> None:
        self.processor, self._image_token, self._strict = processor, image_token, strict
        self.skipped: list[str] = []
        """Faults of the samples that were left out, one each."""

    def encode(self, sample: Sample, *, prompt_only: bool = False, breaks_are_text: bool = True) -> Batch | None:
        """Return the model inputs of one sample, or None when it is skipped; `prompt_only` leaves the answer out.

        Some models end every row of a picture with a token; unless `breaks_are_text` it belongs to the picture.

        Raises:
            DataError: the processor refuses the sample, or with `strict` an image cannot be decoded.
        """
        try:
            images = [open_image(path) for path in sample.images]
        except OSError as error:
            if self._strict:
                raise DataError(f"{sample.place}: {error} Repair or remove it, or leave --strict out.") from error
            self.skipped.append(f"{sample.place}: {error}")
            return None
        text, is_templated = self._text(sample, prompt_only)
        try:
            features = self.processor(
                images=[images] if images else None, text=[text], return_tensors="pt",
                add_special_tokens=not is_templated,
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{sample.place}: the model's processor refuses it: {error}") from error
        arguments = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        row_break = None if breaks_are_text else getattr(self.processor, "image_break_token_id", None)
        of_pictures = [token for token in (self._image_token, row_break) if token is not None]
        is_text = ~torch.isin(arguments["input_ids"], torch.tensor(of_pictures, dtype=torch.int64))
        return Batch(arguments, is_text, sample.images, sample.place)

    def encode_all(self, samples: tuple[Sample, ...], max_tokens: int) -> Iterator[Batch]:
        """Yield samples in order until they have `max_tokens` tokens."""
        total = 0
        for sample in samples:
            batch = self.encode(sample)
            if batch is not None:
                yield batch
                total += batch.num_tokens
            if total >= max_tokens:
                return

    def _text(self, sample: Sample, prompt_only: bool) -> tuple[str, bool]:
        """The text to encode, and whether it came from the chat template, which writes special tokens itself."""
        token = getattr(self.processor, "image_token", None) or "<image>"
        turns = list(sample.turns[:-1] if prompt_only else sample.turns)
        if not sample.turns:
            if sample.text.count(token) == len(sample.images):
                return sample.text, False
            parts = [{"type": "image"}] * len(sample.images) + [{"type": "text", "text": sample.text}]
            turns = [{"role": "user", "content": parts}]
        if not getattr(self.processor, "chat_template", None):
            lines = ([token if part["type"] == "image" else part["text"] for part in turn["content"]] for turn in turns)
            return "\n".join(map("".join, lines)), False
        from jinja2 import TemplateError

        try:
            text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt_only)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{sample.place}: the model's chat template refuses these turns: {error}.") from error
        return str(text), True


def open_image(path: Path) -> Any:
    """The decoded image, RGB. Raises OSError naming the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise OSError(f"There is no image {path}.") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"The image {path} cannot be decoded ({error}).") from error


def image_token_of(directory: Path) -> int | None:
    """The id of the placeholder that stands for image tokens, from config.json."""
    config = read_json(directory / "config.json")
    token = next((config[key] for key in ("image_token_id", "image_token_index") if key in config), None)
    if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
        raise CheckpointError(f"{directory / 'config.json'} gives the image token as {token!r:.80}, which is no id.")
    return token
