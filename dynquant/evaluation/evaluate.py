"""Compare a candidate model with its reference, on text and questions or on samples with pictures.

Scored is every text token that is followed by one: KL divergence, top-1 agreement and perplexity. Texts are cut into
windows of `window` tokens without overlap. Multiple-choice questions are scored by log-probability; questions about
pictures are answered greedily and are right when they are the file's answer, apart from case and surrounding space.

The reference runs first, is reduced to compact distributions (`distributions`) and, on text, is freed before the
candidate loads, so only one model is in memory at a time. Both models see the same token ids, made by the reference's
tokenizer. With pictures a candidate may also be a plan, whose types are then rendered into the running reference, or a
GGUF file with its mmproj file. Intervals are 95 %: blocks of 64 consecutive tokens resampled for KL and perplexity,
Wilson's for accuracy.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynquant.checkpoints.gguf_source import is_gguf
from dynquant.errors import EvaluationError
from dynquant.evaluation import distributions, runners
from dynquant.evaluation import report as reports
from dynquant.evaluation.distributions import NUM_TAIL, NUM_TOP, Distributions
from dynquant.evaluation.options import (
    CONTEXT_SCORED,
    LLAMA_CPP,
    LOOKED_UP,
    TEXT_TASKS,
    EvalOptions,
    Scoring,
    TaskOptions,
)
from dynquant.evaluation.pictures.candidate import (
    checked_candidate,
    needs_pictures,
    picture_candidate,
    plan_at,
    refuse_plan,
    stored_bytes,
)
from dynquant.evaluation.pictures.questions import SPARE_TOKENS, PictureQuestion, encoded_samples
from dynquant.evaluation.reference_cache import cache_key, cached, model_files, model_fingerprint
from dynquant.evaluation.tasks import multiple_choice
from dynquant.evaluation.tasks.generation import Continuations, Prompts, check_fits, read_prompts, summarize_generation
from dynquant.evaluation.tasks.multiple_choice import AnswerScores, EncodedQuestion
from dynquant.families.common.settings import settings_note
from dynquant.families.model_kind import check_same_kind, difference_of_kind
from dynquant.families.open import locate_model, open_model, settings_of
from dynquant.inputs.model_inputs import Batch, ModelInputs, check_context
from dynquant.inputs.pictures import SampleEncoder, image_token_of, read_samples
from dynquant.inputs.processor import load_processor
from dynquant.inputs.text import TextEncoder, context_windows, evaluation_windows, read_measured
from dynquant.lora.saved import read_adapter_config
from dynquant.packed.float32_products import use_tensor_cores
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf
from dynquant.session import SILENT, Progress, Session

if TYPE_CHECKING:
    from dynquant.evaluation.tasks.harness import Harness, Samples


def evaluate(options: EvalOptions, session: Session = SILENT) -> reports.EvalReport | reports.PictureReport:
    """Score a candidate against its reference on text and questions, or on samples with pictures.

    Raises:
        EvaluationError: the models cannot be compared, an option or a text is unusable, or a model gives NaN.
        DataError: the samples cannot be used, or with `strict` an image cannot be decoded.
        CheckpointError: a model cannot be loaded.
    """
    if idle := options.idle:
        session.note(f"{' and '.join(idle)} did nothing: no task of {', '.join(options.asked.tasks)} reads it")
    if options.data is not None:
        return _evaluate_on_pictures(options, options.data, session)
    loss = "Nothing is kept without --reference-cache: what the models said so far is lost."
    with session.stage("What the original said is kept." if options.reference_cache else loss) as progress:
        return _evaluate_on_text(options, session, progress)


def check_readable(asked: TaskOptions) -> None:
    """Raise EvaluationError, before anything long runs, for texts or questions that `evaluate` could not read or ask
    then."""
    for text in asked.text:
        read_measured(text, max_tokens=1)
    if "mmlu" in asked.tasks:
        multiple_choice.load_asked(asked)


def _evaluate_on_text(options: EvalOptions, session: Session, progress: Progress) -> reports.EvalReport:
    asked = options.asked
    refuse_plan(options)
    reference, candidate = locate_model(options.reference), locate_model(options.candidate)
    _check_program(options, candidate)
    of_kinds = _notes_on_kinds(options, reference, candidate)
    where = {"runner": options.runner, "base": reference}
    infos = [runners.describe_model(path, **where) for path in (reference, candidate)]
    num_columns, notes = common_columns(*infos)
    context_length = _context_length(options, infos)
    notes += of_kinds + runners.tokenizer_notes(reference, candidate) + _notes_on_settings(reference, candidate)
    harness = _harness(asked, reference, progress) if asked.harness_tasks else None
    with runners.open_encoder(reference) as encode:
        texts, prompts, questions = _inputs(options, encode, context_length, notes)
    run = _Run(options, session, progress, num_columns, reference, context_length)
    torch_threads = torch.get_num_threads()  # open_runner sets those of the session
    try:
        run.check_cache(candidate)
        with run.opening(reference) as runner:
            references = [run.reduced(runner, text) for text in texts]
            written = [run.written(runner, "reference", starts) for starts in prompts]
            before = {name: run.choices(runner, "reference", name, encoded) for name, encoded in questions.items()}
            harness_before = run.harness_samples(runner, "reference", harness) if harness else {}
        with run.opening(candidate, is_candidate=True) as runner:
            scores = [run.compared(runner, text, said) for text, (said, _) in zip(texts, references, strict=True)]
            pairs = [(first, run.written(runner, "candidate", *first)) for first in zip(prompts, written, strict=True)]
            after = {name: run.choices(runner, "candidate", name, encoded) for name, encoded in questions.items()}
            harness_after = run.harness_samples(runner, "candidate", harness) if harness else {}
    finally:
        torch.set_num_threads(torch_threads)
    notes += _notes_on_candidate(options)
    return reports.EvalReport(
        reference=_identify(infos[0]),
        candidate=_identify(infos[1]),
        options={
            "tasks": sorted(asked.tasks), "window": options.window, "max_tokens": asked.max_tokens,
            "seed": session.seed, "limit": asked.limit, "num_shots": asked.num_shots, "num_top": NUM_TOP,
            "num_tail": NUM_TAIL, "kv_type": list(options.kv_type),
        },
        texts=[
            reports.summarize_text(text, targets.numpy(), score, with_kl="kl" in asked.tasks)
            for text, (_, targets), score in zip(texts, references, scores, strict=True)
        ],
        multiple_choice=[
            reports.summarize_choices(name, encoded, before[name], after[name]) for name, encoded in questions.items()
        ],
        generated=tuple(summarize_generation(*first, second, asked.new_tokens) for first, second in pairs),
        harness=harness.results(harness_before, harness_after) if harness else (),
        notes=[*notes, *(harness.notes if harness else ())],
        seconds=run.seconds,
    )  # fmt: skip


def _check_program(options: EvalOptions, candidate: Path) -> None:
    """Refuse what the program that runs the candidate does not do."""
    runs_in_llama_cpp = is_gguf(candidate) and options.runner == LLAMA_CPP
    if options.adapter is not None and runs_in_llama_cpp:
        raise EvaluationError(
            f"The adapter {options.adapter} is PEFT's, which llama.cpp does not read; give --runner transformers."
        )
    if options.adapter is not None:
        read_adapter_config(options.adapter)
    if options.kv_type and not runs_in_llama_cpp:
        raise EvaluationError("--kv-type is of llama.cpp's cache; the candidate is no GGUF file that runs there.")


def _context_length(options: EvalOptions, infos: Sequence[runners.ModelInfo]) -> int:
    """Return the tokens of context that both models have. Raises EvaluationError: a window is longer."""
    context_length = min(info.context_length for info in infos)
    if options.window > context_length and not options.contexts:
        raise EvaluationError(
            f"A window of {options.window} tokens does not fit the context of {context_length}; use less."
        )
    return context_length


def _harness(asked: TaskOptions, reference: Path, progress: Progress) -> "Harness":
    """Return the tasks of lm-evaluation-harness that were asked for, with their data."""
    progress(LOOKED_UP, 0, len(asked.harness_tasks), unit="tasks")  # which takes seconds
    try:
        from dynquant.evaluation.tasks.harness import Harness
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{', '.join(asked.harness_tasks)} is none of {', '.join(sorted(TEXT_TASKS))}, and tasks of "
            f"lm-evaluation-harness need the package {error.name}, which is not there: pip install "
            "'dynquant-toolchain[tasks]'."
        ) from error
    return Harness(asked, reference, progress)


class _Inputs(NamedTuple):
    texts: list[ModelInputs]
    prompts: list[Prompts]
    questions: dict[Scoring, list[EncodedQuestion]]


def _inputs(options: EvalOptions, encode: TextEncoder, context_length: int, notes: list[str]) -> _Inputs:
    inputs, asked = _Inputs([], [], {}), options.asked
    if {"kl", "ppl"} & set(asked.tasks):
        contexts = [length for length in sorted({*map(int, options.contexts)}) if length <= context_length]
        if len(contexts) < len({*options.contexts}):
            left_out = f"--contexts {','.join(options.contexts)}: the models have {context_length:,} tokens of context"
            if not contexts:
                raise EvaluationError(f"{left_out}; give shorter ones.")
            notes.append(f"{left_out}, and longer ones were left out.")
        for path in asked.text:
            if contexts:
                inputs.texts.extend(
                    context_windows(path, encode, contexts, CONTEXT_SCORED, max_tokens=asked.max_tokens)
                )
            else:
                inputs.texts.append(
                    evaluation_windows(path, encode, window=options.window, max_tokens=asked.max_tokens)
                )
    if "generate" in asked.tasks:
        check_fits(asked.new_tokens, context_length)
        limits = {"count": asked.prompts, "max_tokens": asked.max_tokens}
        inputs.prompts.extend(read_prompts(path, encode, **limits) for path in asked.text)
    if "mmlu" in asked.tasks:
        inputs.questions.update(multiple_choice.read_questions(asked, encode, context_length))
    return inputs


def _notes_on_kinds(options: EvalOptions, reference: Path, candidate: Path) -> list[str]:
    """Return a note where a comparison of models of two kinds was allowed, or refuse it before anything runs."""
    difference = difference_of_kind(reference, candidate)
    if difference and not options.allow_difference:
        raise EvaluationError(
            f"Nothing was run, since {difference}. Give the model that the candidate was made from as --reference. If "
            "the two are to be compared as they are, repeat this with --allow-difference."
        )
    return [f"The comparison was allowed although {difference}."] if difference else []


def _notes_on_settings(reference: Path, candidate: Path) -> list[str]:
    """Return a note where the two models compute different things from their weights."""
    difference = settings_note(settings_of(reference), settings_of(candidate))
    if not difference:
        return []
    return [f"{reference.name} and {candidate.name} differ in more than their weights: {difference}."]


def _notes_on_candidate(options: EvalOptions) -> list[str]:
    """Return what the candidate runs with and the reference does not."""
    notes = []
    if options.adapter is not None:
        notes.append(_adapter_note(options.adapter))
    if options.kv_type:
        notes.append(f"The candidate's key/value cache is {' and '.join(options.kv_type)}, the reference's float32.")
    return notes


def common_columns(reference: runners.ModelInfo, candidate: runners.ModelInfo) -> tuple[int, list[str]]:
    """Return the number of leading logits to compare, and notes on what was dropped.

    Vocabularies may differ in size only by padding entries at the end, unnamed or named `[PADn]`.
    """
    if reference.vocab_size == candidate.vocab_size:
        return reference.vocab_size, []
    small, large = sorted((reference, candidate), key=lambda info: info.vocab_size)
    if large.num_named_tokens > small.vocab_size:
        raise EvaluationError(
            f"{reference.path.name} has a vocabulary of {reference.vocab_size} tokens and {candidate.path.name} one of "
            f"{candidate.vocab_size}; probabilities over different vocabularies cannot be compared. "
            "Give two versions of the same model."
        )
    dropped = f"the last {large.vocab_size - small.vocab_size} logits belong to padding tokens and were dropped"
    return small.vocab_size, [f"{large.path.name}: {dropped}."]


Opener = Callable[[], runners.LogitRunner]  # gives the running model


@dataclass
class _Run:
    """One model after the other over the same inputs: what stays fixed, and the seconds that each stage took."""

    options: EvalOptions
    session: Session
    progress: Progress
    num_columns: int | None = None  # leading logits that both models have; None for all
    reference: Path | None = None  # whose distributions are cached, if any are
    context_length: int = 0  # that both models have
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Context manager: records the stage's wall time; yields the function that reports its progress."""
        start = time.perf_counter()
        yield lambda done, total: self.progress(stage, done, total, unit=unit)
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    @contextmanager
    def opening(self, path: Path, *, is_candidate: bool = False) -> Iterator[Opener]:
        """Context manager: loads the model when it is first asked for, which never happens where all is cached."""
        where: dict[str, Any] = {"threads": self.session.threads, "device": self.session.device}
        if is_candidate:
            where |= {"adapter": self.options.adapter, "kv_types": (self.options.kv_type * 2)[:2]}
        how = {"runner": self.options.runner, "rounded": self.options.rounded, "base": self.reference}
        opener = cache(partial(runners.open_runner, path, **where, **how))  # loads once
        try:
            yield opener
        finally:
            if opener.cache_info().currsize:
                opener().close()

    def check_cache(self, candidate: Path) -> None:
        """Refuse types of the key/value cache that llama.cpp does not take, before the reference runs for nothing."""
        if self.options.kv_type:
            with self.opening(candidate, is_candidate=True) as runner:
                runner().reserve(1)

    def reduced(self, runner: Opener, inputs: ModelInputs) -> tuple[Distributions, Tensor]:
        """Return the reference's distributions at all scored positions, and log-probabilities of what follows."""

        def run(report: Callable[[int, int], None]) -> dict[str, Tensor]:
            parts = [
                distributions.reduced(logits, batch.targets, self.session.seed + number)
                for number, (batch, logits) in enumerate(self._logits(runner, inputs, report))
            ]
            said, targets = zip(*parts, strict=True)
            return Distributions.concatenate(list(said)).tensors() | {"target_log_probs": torch.cat(targets)}

        with self.timed(f"reference, {inputs.name}", inputs.unit) as report:
            tokens = [token for batch in inputs for token in batch.ids[0].tolist()]
            lengths = [len(batch.scored) for batch in inputs]
            key = {"lengths": lengths, "seed": self.session.seed, "num_top": NUM_TOP, "num_tail": NUM_TAIL}
            tensors = self._cached(tokens, key, lambda: run(report))
        targets = tensors.pop("target_log_probs")
        return Distributions(**tensors), targets

    def compared(self, runner: Opener, inputs: ModelInputs, reference: Distributions) -> reports.TokenScores:
        """Return what the candidate does at the positions of `reference`."""
        parts, start = [], 0
        with self.timed(f"candidate, {inputs.name}", inputs.unit) as report:
            for batch, logits in self._logits(runner, inputs, report):
                said = reference[start : start + len(logits)]
                start += len(logits)
                try:
                    parts.append(distributions.compared(said, logits, batch.targets))
                except EvaluationError as error:
                    raise EvaluationError(f"{batch.place}: {error}" if batch.place else str(error)) from error
        return reports.TokenScores(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))

    def _logits(
        self, runner: Opener, inputs: ModelInputs, report: Callable[[int, int], None]
    ) -> Iterator[tuple[Batch, Tensor]]:
        model = runner()
        model.reserve(inputs.longest)
        report(0, len(inputs))
        for done, (batch, logits) in enumerate(zip(inputs, model.scored_logits(inputs), strict=True), start=1):
            yield batch, logits[:, : self.num_columns]
            report(done, len(inputs))

    def written(
        self, runner: Opener, side: str, prompts: Prompts, reference: Continuations | None = None
    ) -> Continuations:
        """Return what a model writes after the prompts, up to tokens that end the reference's texts."""
        num_tokens = self.options.asked.new_tokens
        with self.timed(f"{side}, writing, {prompts.name}", "prompts") as report:

            def run() -> dict[str, Tensor]:
                ends = runner().stop_tokens if reference is None else reference.stop
                written: list[list[int]] = []
                report(0, len(prompts.tokens))
                for batch in runner().write(prompts.tokens, num_tokens, ends):
                    written += batch
                    report(len(written), len(prompts.tokens))
                return Continuations(written, ends).tensors()

            tokens, key = [token for ids in prompts.tokens for token in ids], {"new_tokens": num_tokens}
            return Continuations.from_tensors(**(self._cached(tokens, key, run) if side == "reference" else run()))

    def choices(self, runner: Opener, side: str, name: Scoring, encoded: list[EncodedQuestion]) -> list[AnswerScores]:
        """Return a model's log-probabilities of the answers to multiple-choice questions."""
        with self.timed(f"{side}, {name} questions", "questions") as report:

            def run() -> dict[str, Tensor]:
                scores = multiple_choice.score_questions(runner(), encoded, self.num_columns, report)
                return {"log_probs": torch.from_numpy(np.concatenate([score.log_probs for score in scores]))}

            parts = [part for e in encoded for part in (e.prompt, *e.answers)]
            tokens, key = [token for part in parts for token in part], {"lengths": [len(part) for part in parts]}
            log_probs = (self._cached(tokens, key, run) if side == "reference" else run())["log_probs"].numpy()
        ends = np.cumsum([len(e.answers) for e in encoded])[:-1]
        return [AnswerScores(e.question, part) for e, part in zip(encoded, np.split(log_probs, ends), strict=True)]

    def harness_samples(self, runner: Opener, side: str, harness: "Harness") -> "Samples":
        """Return what the harness logs of every question of its tasks."""
        limits, cache = {"context_length": self.context_length, "num_columns": self.num_columns}, None
        if side == "reference" and self.options.reference_cache is not None:
            name = self._cache_key([], {"kind": "harness", "context_length": self.context_length})
            cache = self.options.reference_cache / f"{name}.sqlite"
        with self.timed(f"{side}, {', '.join(harness.tasks)}", "questions") as report:
            return harness.ask(runner, report, cache, **limits)

    def answers(
        self, runner: runners.PictureRunner, side: str, questions: Sequence[PictureQuestion], tokenizer: Any
    ) -> list[str]:
        """Return a model's greedy answers to questions about pictures."""
        answers = []
        with self.timed(f"{side}, questions", "questions") as report:
            for done, question in enumerate(questions, start=1):
                ids = runner.answer(question.prompt, question.num_answer_tokens + SPARE_TOKENS)
                answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
                report(done, len(questions))
        return answers

    def _cached(
        self, tokens: list[int], key: dict[str, Any], run: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        directory = self.options.reference_cache
        if directory is None or self.reference is None:
            return run()
        return cached(directory, self._cache_key(tokens, key), run)

    def _cache_key(self, tokens: list[int], key: dict[str, Any]) -> str:
        assert self.reference is not None
        # Only what is not the default is part of a name.
        more: dict[str, object] = {"rounded": True} if self.options.rounded else {}
        if is_gguf(self.reference) and self.options.runner != LLAMA_CPP:
            more["runner"] = self.options.runner
        return cache_key(self.reference, tokens, columns=self.num_columns, **key, **more)


def _adapter_note(adapter: Path) -> str:
    size = sum(file.stat().st_size for file in adapter.glob("adapter_model.safetensors"))
    return f"The candidate runs with the adapter {adapter}, whose {size:,} bytes are not among its bytes."


def _identify(info: runners.ModelInfo) -> reports.ModelIdentity:
    weights = [file for file in model_files(info.path) if is_gguf(file) or file.suffix == ".safetensors"]
    return reports.ModelIdentity(
        name=info.path.name,
        runner=info.kind,
        file_bytes=sum(file.stat().st_size for file in weights),
        fingerprint=model_fingerprint(info.path),
    )


def _evaluate_on_pictures(options: EvalOptions, data: Path, session: Session) -> reports.PictureReport:
    tasks = options.asked.tasks
    model = open_model(options.reference)
    plan_file = plan_at(Path(options.candidate))
    if not model.has_vision or model.hf_directory is None:
        way_out = needs_pictures(options, plan_file) if plan_file else "Leave --data out."
        raise EvaluationError(f"{model.name} has no vision tower that transformers can run. {way_out}")
    planned = checked_candidate(options, model, plan_file)
    file = read_samples(data)
    processor = load_processor(model.hf_directory)
    encoder = SampleEncoder(processor, image_token_of(model.hf_directory), strict=options.strict)
    batches, questions = encoded_samples(encoder, file.samples[: options.asked.limit or None], asks="vqa" in tasks)
    inputs = ModelInputs(batches, name=file.name, sha256=file.sha256, skipped=tuple(encoder.skipped))
    if is_gguf(candidate := Path(options.candidate)) or (candidate / "config.json").is_file():
        check_same_kind(
            model.hf_directory, candidate, "Give the model that the candidate was made from as --reference."
        )
        for note in runners.tokenizer_notes(model.hf_directory, candidate):
            session.note(note)
    check_context(model, inputs.longest)
    with session.stage("Nothing is kept.") as progress:
        run = _Run(options, session, progress)
        hf_model = load_hf(model, dtype=torch.float32, device=chosen_device(session.device))
        use_tensor_cores(hf_model, weights_stay=False)  # a plan is installed into it
        original = runners.HuggingFaceRunner(hf_model)
        reference = run.reduced(lambda: original, inputs) if "kl" in tasks else None
        before = run.answers(original, "reference", questions, processor.tokenizer)
        with picture_candidate(options, model, original, processor, planned) as (candidate, candidate_bytes):
            scores = run.compared(lambda: candidate, inputs, reference[0]) if reference else None
            after = run.answers(candidate, "candidate", questions, processor.tokenizer)
    return reports.PictureReport(
        reference=model.name,
        candidate=str(options.candidate),
        reference_bytes=stored_bytes(model.hf_directory),
        candidate_bytes=candidate_bytes,
        data=file.name,
        data_sha256=file.sha256,
        samples=len(inputs),
        skipped=inputs.skipped,
        **(scores.means([len(batch.scored) for batch in inputs]) if scores is not None else {}),
        questions=(
            reports.summarize_answers([question.sample for question in questions], before, after) if questions else None
        ),
    )
