"""Samples with pictures as both models get them, and the questions about them that are answered."""

from collections.abc import Sequence
from typing import NamedTuple

from dynquant.errors import EvaluationError
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.pictures import Sample, SampleEncoder

SPARE_TOKENS = 4  # tokens by which an answer may be longer than the right one; beyond that it is wrong whatever follows


class PictureQuestion(NamedTuple):
    """A question about pictures: the model inputs up to the answer, and how long the right one is with its end."""

    sample: Sample
    prompt: Batch
    num_answer_tokens: int


def encoded_samples(
    encoder: SampleEncoder, samples: Sequence[Sample], *, asks: bool
) -> tuple[tuple[Batch, ...], list[PictureQuestion]]:
    """Return the inputs of samples, and if it `asks` their questions; what cannot be decoded is left out.

    Raises:
        EvaluationError: no sample is left, or it asks and none has a question.
    """
    if asks and not any(sample.question for sample in samples):
        raise EvaluationError("The task vqa needs lines with `images`, `question` and `answer`; the file has none.")
    batches, questions = [], []
    for sample in samples:
        batch = encoder.encode(sample, breaks_are_text=False)
        if batch is None:
            continue
        batches.append(batch)
        if asks and sample.question:
            prompt = encoder.encode(sample, prompt_only=True, breaks_are_text=False)
            if prompt is not None:
                questions.append(PictureQuestion(sample, prompt, batch.num_tokens - prompt.num_tokens))
    if not batches:
        raise EvaluationError("No sample can be used: all of their images fail to decode.")
    return tuple(batches), questions
