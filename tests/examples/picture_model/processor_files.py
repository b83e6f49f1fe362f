"""The tokenizer and processor files of the picture model, so that transformers' own Qwen2VLProcessor reads them.

Byte-level BPE by Qwen2's splitting rules, learned on the questions and answers that can be asked, with Qwen2-VL's
special tokens behind it. Pictures of 112 x 112 pixels are 8 x 8 patches, merged to 16 tokens.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dynquant.families.tokenizers.pre_tokenizers import QWEN2
from tests.examples.picture_model.pictures import ask, describe, draw_picture

VOCAB_SIZE = 512
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 14, 2, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which nearly every word of the questions is one token; the same on every call."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_sentences(500), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=END, eos_token=IM_END, chat_template=CHAT_TEMPLATE, model_max_length=1024,
    )  # fmt: skip


def save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer and `preprocessor_config.json`, as Qwen2-VL checkpoints have them.

    The latter is written by hand: transformers' image processors need Pillow or torchvision even to be saved.
    """
    tokenizer.save_pretrained(directory)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "resample": 3,
        "patch_size": PATCH_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224},
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _sentences(num_pictures: int) -> list[str]:
    rng = np.random.default_rng(0)
    pictures = (draw_picture(0, index) for index in range(num_pictures))
    asked = ([*ask(picture, 8, rng), describe(picture)] for picture in pictures)
    return [text for one in itertools.chain.from_iterable(asked) for text in (one.text, one.answer)] + [
        "user\n", "assistant\n", "system\n",
    ] * 100  # fmt: skip
