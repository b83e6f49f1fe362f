"""Loads the processor of a vision-language checkpoint: images and text in, model inputs out.

transformers' processors of models that also take videos need torchvision although nothing here is a video. Where it is
not installed, such a processor is put together from its tokenizer and image processor, without the video part.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynquant.errors import CheckpointError
from dynquant.storage.strict_json import parse_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def load_processor(directory: Path) -> "ProcessorMixin":
    """The processor that the checkpoint comes with.

    Raises:
        CheckpointError: the directory has no processor files, they are damaged, or Pillow is missing.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "Images cannot be read without Pillow; install it with `pip install 'dynquant-toolchain[vision]'`."
        ) from error
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{directory} has neither preprocessor_config.json nor processor_config.json: its processor, which turns "
            "images into model inputs, is missing. Copy the file from the original checkpoint into the directory."
        )
    try:
        return _load(directory)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"The processor in {directory} needs the package {error.name}, which is not installed. Install it "
            "(torchvision in the build that matches your PyTorch) and try again."
        ) from error
    except Exception as error:  # transformers raises errors of many libraries, none of them a contract
        raise CheckpointError(
            f"transformers cannot load the processor in {directory} ({type(error).__name__}: {error}). Fetch the "
            "checkpoint's preprocessor_config.json, processor_config.json and tokenizer files again."
        ) from error


def image_token_limits(processor: Any) -> tuple[int, int] | None:
    """Fewest and most tokens of a picture of free size; None where all pictures get the same size."""
    images = processor.image_processor
    size, patch = getattr(images, "size", None) or {}, getattr(images, "patch_size", None)
    if patch is None or not size.get("longest_edge"):
        return None
    side = (patch if isinstance(patch, int) else patch["height"]) * getattr(images, "merge_size", 1)
    side *= getattr(processor, "spatial_merge_size", 1)
    if size.get("shortest_edge"):  # of Qwen2-VL: both are numbers of pixels
        return max(1, size["shortest_edge"] // side**2), max(1, size["longest_edge"] // side**2)
    return 1, max(1, (size["longest_edge"] // side) ** 2)


def _load(directory: Path) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    options = {"local_files_only": True, "trust_remote_code": False}
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(directory, **options)
    processor_class = _class_of(directory)
    if "video_processor" not in processor_class.get_attributes():
        return processor_class.from_pretrained(directory, **options)
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    return _without_video(processor_class)(
        image_processor=AutoImageProcessor.from_pretrained(directory, **options),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def _class_of(directory: Path) -> Any:
    """The processor class that the files name, or that of the model's type.

    It is imported from its module: transformers' own namespace holds a stand-in that asks for torchvision.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model_type = _value(directory, "config.json", "model_type")
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    named = [_value(directory, file, "processor_class") for file in files]
    name = next(filter(None, named), None) or PROCESSOR_MAPPING_NAMES[model_type]
    folder = next((key for key, of_type in PROCESSOR_MAPPING_NAMES.items() if of_type == name), model_type)
    return getattr(import_module(f"transformers.models.{folder}.processing_{folder}"), name)


def _value(directory: Path, file: str, key: str) -> Any:
    path = directory / file
    return parse_json(path.read_bytes()).get(key) if path.is_file() else None


def _without_video(processor_class: Any) -> Any:
    """The same class, except that it accepts None in place of a video processor."""

    class WithoutVideo(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideo
