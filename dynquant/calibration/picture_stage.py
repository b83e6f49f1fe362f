"""The stages of `calibrate` and `plan` that run a vision-language model on pictures and text (`--data FILE`)."""

import random
from dataclasses import dataclass
from pathlib import Path

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.picture_collector import KINDS, VisionCalibration, collect_vision_statistics, kind_path
from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.errors import DataError
from dynquant.inputs.pictures import Encoded, SampleEncoder, SampleFile, image_token_of, read_samples
from dynquant.inputs.processor import load_processor
from dynquant.resources import chosen_device
from dynquant.running.gradients import ModelInputs
from dynquant.running.load import load_hf
from dynquant.session import Session

TEXT_ONLY = (
    "This model has a vision tower, but the calibration is text alone: nothing of the vision tower, the projector and "
    "cross-attention will be measured. Their inputs are then taken to be even, types below 2.5 bits are closed to "
    "them, their sensitivities are guessed, and the language model is fitted to text tokens, whose statistics differ "
    "from those of image tokens. Give pictures with --data FILE."
)


@dataclass(frozen=True)
class DataOptions:
    """A file of samples with images; `strict` refuses it when an image cannot be decoded."""

    path: str
    tokens: int
    strict: bool = False

    @classmethod
    def of(cls, options: CalibrationOptions) -> "DataOptions":
        return cls(str(options.data), options.tokens, options.strict)

    @property
    def file(self) -> SampleFile:
        return read_samples(Path(self.path))


def encoded_samples(model: Model, options: DataOptions, session: Session) -> tuple[list[Encoded], SampleFile]:
    """The file's samples, shuffled, up to the number of tokens; those that had to be left out are told.

    Raises:
        DataError: the model sees no images, or nothing of the file can be used.
        CheckpointError: the model's processor is missing.
    """
    if not model.has_vision or model.hf_directory is None:
        raise DataError(
            f"{model.name} has no vision tower that transformers can run, so --data {options.path} with its images is "
            "not for it. Give text with --calibration."
        )
    file = options.file
    encoder = SampleEncoder(
        load_processor(model.hf_directory), image_token_of(model.hf_directory), strict=options.strict
    )
    samples = list(file.samples)
    random.Random(session.seed).shuffle(samples)
    found = list(encoder.encode_all(tuple(samples), options.tokens))
    if encoder.skipped:
        session.note(f"skipped {len(encoder.skipped)} samples whose images cannot be decoded:")
        for reason in encoder.skipped:
            session.note(f"  {reason}")
    if not found:
        raise DataError(f"No sample of {options.path} can be used: all of their images fail to decode.")
    return found, file


def calibrate_on_samples(
    model: Model, options: DataOptions, output: Path, session: Session, *, hessian_bytes: int | None
) -> VisionCalibration:
    """Run the model on samples and write the statistics of image and text tokens beside `output`."""
    samples, file = encoded_samples(model, options, session)
    provenance = StatsProvenance(
        fingerprint=model.fingerprint, text_hash=file.sha256, text_name=file.name, max_tokens=options.tokens,
        seed=session.seed,
    )  # fmt: skip
    hf_model = load_hf(model, device=chosen_device(session.device))
    with session.stage("Calibration is not kept: what it has measured so far is lost.") as progress:
        found = collect_vision_statistics(
            hf_model, samples, model, provenance, hessian_bytes=hessian_bytes, progress=progress
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    for kind, stats in found.by_kind.items():
        stats.save(kind_path(output, kind))
    num_images = sum(int(sample.is_image.sum()) for sample in samples)
    num_tokens = sum(sample.num_tokens for sample in samples)
    session.note(f"{len(samples)} samples: {num_images:,} image tokens, {num_tokens - num_images:,} text tokens")
    return found


def remove_kinds(output: Path) -> None:
    """Delete statistics of kinds of tokens that an earlier calibration left beside `output`."""
    for kind in KINDS:
        kind_path(output, kind).unlink(missing_ok=True)


def probe_inputs(model: Model, options: DataOptions, session: Session) -> list[ModelInputs]:
    """Inputs for a backward pass that reaches the vision tower."""
    samples, _ = encoded_samples(model, options, session)
    found: list[ModelInputs] = []
    for sample in samples:
        pixels = {
            name: value.clone().requires_grad_(True)
            for name, value in sample.inputs.items()
            if value.is_floating_point()
        }
        found.append({**sample.inputs, **pixels})
    return found
