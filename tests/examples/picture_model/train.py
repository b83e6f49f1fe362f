"""Trains a Qwen2-VL of 5.7 million weights to answer questions about synthetic pictures.

    python -m tests.examples.picture_model.train -o picture-model --device cuda --minutes 8

A batch is a number of new pictures, each with a few questions and a description in one conversation; the loss is that
of the answers. The description teaches the model to see long before single questions do; it stands last, as answers
that can be read from the text teach nothing about the picture.
Held-out accuracy is exact match of one question a picture, on pictures of another seed: a greedy answer is exact when
the most probable token is right at every position of the right answer, so one forward pass tells. Training ends at the
target accuracy, after the given minutes or after the given steps, whichever comes first; the learning rate falls to
zero towards the nearer end. The model directory is written at every best evaluation, in bfloat16, and training goes on
from `checkpoint.pt` beside it after a kill.
"""

import argparse
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision

from tests.examples.picture_model import processor_files as files
from tests.examples.picture_model.pictures import QUESTION_KINDS, SIZE, Question, ask, describe, draw_picture

TRAIN_SEED, HELD_OUT_SEED = 1, 2
PATCHES = SIZE // files.PATCH_SIZE
IMAGE_TOKENS = (PATCHES // files.MERGE_SIZE) ** 2
IGNORED = -100
INITIAL_STD = 0.05


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Widths are multiples of 256, so that every quant type fits every matrix of the language model.

    Weights start larger than transformers' 0.02, at which signals of a model this narrow are too weak to learn to see.
    """
    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": files.VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "initializer_range": INITIAL_STD,
            "bos_token_id": token(files.END), "eos_token_id": token(files.IM_END), "pad_token_id": token(files.END),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3, "embed_dim": 256, "hidden_size": 256, "mlp_ratio": 2, "num_heads": 4,
            "patch_size": files.PATCH_SIZE, "spatial_merge_size": files.MERGE_SIZE,
            "temporal_patch_size": files.TEMPORAL_PATCH_SIZE, "initializer_range": INITIAL_STD,
        },
        image_token_id=token(files.IMAGE_PAD), video_token_id=token(files.VIDEO_PAD),
        vision_start_token_id=token(files.VISION_START), vision_end_token_id=token(files.VISION_END),
        tie_word_embeddings=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """`pixels` uint8 [B, SIZE, SIZE, 3]; `input_ids` and `labels` int64 [B, T]; kind of the first question of each."""

    pixels: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    kinds: list[str]


class Encoder:
    """Writes conversations about a picture as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._ids = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.pad = tokenizer.pad_token_id

    def conversation(self, asked: list[Question]) -> tuple[list[int], list[int]]:
        """Ids and labels; only answers and the tokens that end them have labels."""
        ids, labels = [], []
        picture = files.VISION_START + files.IMAGE_PAD * IMAGE_TOKENS + files.VISION_END
        for question in asked:
            prompt = f"{files.IM_START}user\n{picture}{question.text}{files.IM_END}\n{files.IM_START}assistant\n"
            answer = self._ids(question.answer) + self._ids(files.IM_END)
            for part, is_answer in ((self._ids(prompt), False), (answer, True), (self._ids("\n"), False)):
                ids += part
                labels += part if is_answer else [IGNORED] * len(part)
            picture = ""
        return ids, labels

    def batch(self, seed: int, indices: range, questions: int, *, described: bool = False) -> Batch:
        """Pictures `indices` of the set `seed`, with as many questions each, and a description behind them."""
        pictures = [draw_picture(seed, index) for index in indices]
        asked = [
            ask(picture, questions, np.random.default_rng([seed, index, questions]))
            for picture, index in zip(pictures, indices, strict=True)
        ]
        if described:
            asked = [[*one, describe(picture)] for one, picture in zip(asked, pictures, strict=True)]
        rows = [self.conversation(one) for one in asked]
        longest = max(len(ids) for ids, _ in rows)
        return Batch(
            torch.from_numpy(np.stack([picture.pixels for picture in pictures])),
            torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
            [one[0].kind for one in asked],
        )


class TrainingBatches(IterableDataset):
    """Endless batches of new pictures, dealt to the workers in turn; batch `first` is the first."""

    def __init__(self, encoder: Encoder, size: int, questions: int, first: int) -> None:
        self._encoder, self._size, self._questions, self._first = encoder, size, questions, first

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(self._first + start, step):
            indices = range(number * self._size, (number + 1) * self._size)
            yield self._encoder.batch(TRAIN_SEED, indices, self._questions, described=True)


def model_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """What the processor would give for these pictures, for a batch at once."""
    num = len(batch.pixels)
    x = batch.pixels.to(device, non_blocking=True).float() / 255
    x = (x - torch.tensor(files.MEAN, device=device)) / torch.tensor(files.STD, device=device)
    merged = PATCHES // files.MERGE_SIZE
    x = x.reshape(num, merged, files.MERGE_SIZE, files.PATCH_SIZE, merged, files.MERGE_SIZE, files.PATCH_SIZE, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # [B, rows, columns, 2, 2, 3, 14, 14]
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, files.TEMPORAL_PATCH_SIZE, -1, -1)
    return {
        "input_ids": batch.input_ids.to(device),
        "pixel_values": x.reshape(num * PATCHES**2, -1),
        "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]] * num, device=device),
        "position_ids": _positions(batch.input_ids).to(device),
    }


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Positions [3, B, T] in time, height and width; the picture begins at the same token in every row."""
    num, length = input_ids.shape
    ids = input_ids[0].tolist()
    image_id = max(set(ids[:IMAGE_TOKENS]), key=ids.count)  # the placeholder fills most of the prefix
    start, side = ids.index(image_id), PATCHES // files.MERGE_SIZE
    grid = torch.arange(IMAGE_TOKENS)
    picture = torch.stack([torch.zeros_like(grid), grid // side, grid % side]) + start
    before = torch.arange(start).expand(3, -1)
    after = (torch.arange(length - start - IMAGE_TOKENS) + start + side).expand(3, -1)
    return torch.cat([before, picture, after], dim=1).unsqueeze(1).expand(3, num, length)


def attend_together(model: Qwen2VLForConditionalGeneration) -> None:
    """Let the vision tower attend to all pictures of a batch at once, where transformers takes one after the other.

    They have one size, so that the result is the same; on a GPU a step takes a fraction of the time.
    """

    def forward(
        attention: VisionAttention,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: object,
    ) -> torch.Tensor:
        length = len(hidden_states)
        q, k, v = attention.qkv(hidden_states).view(length, 3, attention.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v.to(q.dtype))
        return attention.proj(out.transpose(1, 2).reshape(length, -1).to(hidden_states.dtype))

    for module in model.modules():
        if isinstance(module, VisionAttention):
            module.forward = MethodType(forward, module)


@torch.inference_mode()
def accuracy(model: Qwen2VLForConditionalGeneration, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    """Share of exact answers to the first question of each picture, in all and by kind of question."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    model.eval()
    for batch in batches:
        logits = model(**model_inputs(batch, model.device), use_cache=False).logits[:, :-1]
        labels = batch.labels[:, 1:].to(model.device)
        exact = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).tolist()
        asked.update(batch.kinds)
        right.update(kind for kind, is_right in zip(batch.kinds, exact, strict=True) if is_right)
    return right.total() / asked.total(), {kind: right[kind] / asked[kind] for kind in QUESTION_KINDS if asked[kind]}


def held_out_batches(encoder: Encoder, count: int, size: int = 100) -> list[Batch]:
    """Pictures that training never sees, with one question each."""
    return [encoder.batch(HELD_OUT_SEED, range(first, min(first + size, count)), 1) for first in range(0, count, size)]


def save_model(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a bfloat16 copy with everything that `from_pretrained` needs."""
    rounded = Qwen2VLForConditionalGeneration(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.tie_weights()
    rounded.to(torch.bfloat16).save_pretrained(directory)
    files.save_processor(tokenizer, directory)


class Training:
    """The model with its optimizer, what has been reached, and the checkpoint that a killed run goes on from."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.model = Qwen2VLForConditionalGeneration(make_config(tokenizer)).to(self.device)
        attend_together(self.model)
        self.step, self.best = 0, -1.0
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.98))
        self._options = options
        self._checkpoint = options.output.with_name(f"{options.output.name}-checkpoint.pt")
        spent = self._load() if self._checkpoint.is_file() else 0.0
        self._started = time.monotonic() - spent

    @property
    def seconds(self) -> float:
        """Of training so far, over all runs."""
        return time.monotonic() - self._started

    @property
    def done(self) -> float:
        """The share of the steps or minutes that is used up, whichever is nearer its end."""
        return max(self.step / self._options.steps, self.seconds / 60 / self._options.minutes)

    def take_step(self, batch: Batch) -> torch.Tensor:
        """One update; the learning rate rises over the warm-up and falls as a cosine towards the end."""
        warm = min(1, (self.step + 1) / self._options.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(1, self.done)))
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(**model_inputs(batch, self.device), use_cache=False).logits[:, :-1]
        labels = batch.labels[:, 1:].to(self.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "step": self.step, "best": self.best, "spent": self.seconds}, self._checkpoint)

    def _load(self) -> float:
        saved = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        print(f"goes on from step {self.step}, best accuracy {self.best:.4f}", flush=True)
        return saved["spent"]


def train(options: argparse.Namespace) -> float:
    """Train and return the held-out accuracy of the saved directory."""
    torch.manual_seed(0)
    tokenizer = files.train_tokenizer()
    encoder = Encoder(tokenizer)
    options.output.mkdir(parents=True, exist_ok=True)
    training = Training(tokenizer, options)
    num_weights = sum(p.numel() for p in training.model.parameters())
    print(f"{num_weights:,} weights, {len(tokenizer)} tokens", flush=True)
    held_out = held_out_batches(encoder, options.held_out)
    stream = TrainingBatches(encoder, options.pictures, options.questions, training.step)
    losses: list[torch.Tensor] = []
    for batch in DataLoader(stream, batch_size=None, num_workers=options.workers):
        losses.append(training.take_step(batch))
        if training.step % options.evaluate_every and training.done < 1:
            continue
        share, by_kind = accuracy(training.model, held_out)
        kinds = " ".join(f"{kind}={value:.3f}" for kind, value in by_kind.items())
        loss = float(torch.stack(losses).mean())
        print(
            f"step {training.step} {training.seconds:.0f} s loss {loss:.4f} held-out accuracy {share:.4f} | {kinds}",
            flush=True,
        )
        losses.clear()
        if share > training.best:
            training.best = share
            save_model(training.model, tokenizer, options.output)
        training.save()
        if training.done >= 1 or share >= options.target:
            break
    return _report(options.output, held_out, training.device)


def _report(directory: Path, held_out: list[Batch], device: torch.device) -> float:
    """Accuracy and size of what was saved, as it will be loaded."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).to(device)
    share, by_kind = accuracy(model, held_out)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(json.dumps({"accuracy": share, "by_kind": by_kind, "bytes": size}, indent=1), flush=True)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="model directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=8, help="of training, over all runs of this directory")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--pictures", type=int, default=128, help="in a batch")
    parser.add_argument("--questions", type=int, default=4, help="about each picture")
    parser.add_argument("--held-out", type=int, default=2000, help="pictures of an evaluation, one question each")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--target", type=float, default=0.985, help="held-out accuracy that is enough")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
