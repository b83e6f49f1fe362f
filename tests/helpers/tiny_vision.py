"""Random vision-language checkpoints of every family, with processors, and pictures to show them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.pictures import SampleEncoder, image_token_of, read_samples
from dynquant.inputs.processor import load_processor
from tests.examples.picture_model import processor_files as files

TOKENS = ("<image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image|>", "<start_of_image>", "<end_of_image>")
SIDE = 56
_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _qwen(tokenizer: Any, model_type: str) -> tuple[Any, Any]:
    token = tokenizer.convert_tokens_to_ids
    ids = {
        "image_token_id": token(files.IMAGE_PAD), "video_token_id": token(files.VIDEO_PAD),
        "vision_start_token_id": token(files.VISION_START), "vision_end_token_id": token(files.VISION_END),
    }  # fmt: skip
    text = {**_TEXT, "rope_parameters": _MROPE}
    if model_type == "qwen2_vl":
        tower = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
        return hf.Qwen2VLConfig(text_config=text, vision_config=tower, **ids), None
    tower = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
             "fullatt_block_indexes": [1], "window_size": 112}  # fmt: skip
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids), None


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    tower = {"model_type": "clip_vision_model", **_TOWER, "image_size": SIDE, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", **_TEXT}
    config = hf.LlavaConfig(text_config=text, vision_config=tower, vision_feature_layer=-2,
                            image_token_index=tokenizer.convert_tokens_to_ids("<image>"))  # fmt: skip
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return config, hf.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                     num_additional_image_tokens=1)  # fmt: skip


def _pixtral(tokenizer: Any, config_class: Any) -> tuple[Any, Any]:
    tower = {"model_type": "pixtral", **_TOWER, "image_size": SIDE, "patch_size": 14}
    text = {"model_type": "mistral", **_TEXT, "head_dim": 16}
    config = config_class(text_config=text, vision_config=tower, vision_feature_layer=-1,
                          image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"))  # fmt: skip
    if config_class is hf.LlavaConfig:
        config.vision_feature_select_strategy = "full"
    return config, None


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    named = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=files.END, eos_token=files.IM_END,
        extra_special_tokens=named,
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16},
        vision_config={**_TOWER, "image_size": SIDE, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    images = hf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return config, hf.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _mllama(tokenizer: Any) -> tuple[Any, Any]:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1,
             "attention_heads": 4, "image_size": SIDE, "patch_size": 14, "vision_output_dim": 192,
             "intermediate_layers_indices": [0, 1], "max_num_tiles": 2,
             "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}  # fmt: skip
    text = {**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    config = hf.MllamaConfig(text_config=text, vision_config=tower,
                             image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"))  # fmt: skip
    tokenizer.bos_token = files.END
    images = hf.MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=2)
    return config, hf.MllamaProcessor(images, tokenizer)


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "qwen2_vl": lambda tokenizer: _qwen(tokenizer, "qwen2_vl"),
    "qwen2_5_vl": lambda tokenizer: _qwen(tokenizer, "qwen2_5_vl"),
    "llava": _llava,
    "pixtral": lambda tokenizer: _pixtral(tokenizer, hf.LlavaConfig),
    "mistral3": lambda tokenizer: _pixtral(tokenizer, hf.Mistral3Config),
    "gemma3": _gemma3,
    "mllama": _mllama,
}


def save_vision_model(family: str, directory: Path, *, seed: int = 0) -> Path:
    """A random checkpoint that transformers' own classes load, image processor and tokenizer included."""
    tokenizer = files.train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    config, processor = FAMILIES[family](tokenizer)
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            elif not parameter.any():
                parameter.normal_(0, 0.5)  # gates of cross-attention start shut
    model.to(torch.bfloat16).save_pretrained(directory)
    if processor is None:
        files.save_processor(tokenizer, directory)
    else:
        tokenizer.chat_template = None
        processor.save_pretrained(directory)
    return directory


def pixtral_inputs(directory: Path, pictures: list[Path]) -> list[Batch]:
    """What Pixtral's processor would give: that class cannot be imported without torchvision, its parts can."""
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    config = hf.AutoConfig.from_pretrained(directory)
    merge = getattr(config, "spatial_merge_size", 1)
    images = hf.PixtralImageProcessorPil(patch_size={"height": 14, "width": 14}, size={"longest_edge": 4 * SIDE})
    found = []
    for path in pictures:
        picture = Image.open(path)
        columns, rows = (side // 14 // merge for side in picture.size)
        text = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]What color is the ring?"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        seen = images(picture, return_tensors="pt")
        found.append(Batch({"input_ids": ids, **seen}, ids != config.image_token_index))
    return found


def encoded_pictures(family: str, directory: Path, samples: Path) -> list[Batch]:
    """Model inputs of the samples that `write_pictures` wrote, for a checkpoint of the family in `directory`."""
    if family in ("pixtral", "mistral3"):
        return pixtral_inputs(directory, sorted(samples.parent.glob("[0-9].png")))
    encoder = SampleEncoder(load_processor(directory), image_token_of(directory))
    return list(encoder.encode_all(read_samples(samples).samples, 10_000))


def write_pictures(directory: Path, count: int, *, height: int = SIDE, width: int = SIDE) -> Path:
    """Coloured noise with a caption each; returns the sample file."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{index}.png")
        lines.append(json.dumps({"images": [f"{index}.png"], "text": f"What color is the ring? red {index}"}))
    path = directory / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path
