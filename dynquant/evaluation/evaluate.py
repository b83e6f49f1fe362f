"""Compare a candidate model with its reference: KL divergence, top-1 agreement, perplexity, multiple choice.

Texts are cut into windows of `window` tokens without overlap; every position but the last of a window is scored. The
reference runs first, is reduced to compact distributions (`reference_cache`), and is freed before the candidate loads,
so only one model is in memory at a time. Both models see the same token ids, made by the reference's tokenizer.
Intervals are 95 %: blocks of 64 consecutive tokens resampled for text, Wilson's for accuracy.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynquant.errors import EvaluationError
from dynquant.evaluation import distributions, multiple_choice, reference_cache
from dynquant.evaluation.distributions import Distributions, log_probs_at
from dynquant.evaluation.multiple_choice import AnswerScores, EncodedQuestion, Scoring
from dynquant.evaluation.report import EvalReport, ModelIdentity, TokenScores, summarize_choices, summarize_text
from dynquant.evaluation.runners import (
    LLAMA_CPP,
    RUNNERS,
    LogitRunner,
    ModelInfo,
    TextEncoder,
    describe_model,
    open_encoder,
    open_runner,
)
from dynquant.families.open import is_gguf, locate_model
from dynquant.inputs.eval_text import EvalText, load_text
from dynquant.session import Progress, ignore_progress

TASKS = frozenset({"kl", "ppl", "mmlu"})
_Reference = tuple[Distributions, Tensor]
"""Distributions at the scored positions of a text, and the log-probability float64 of the token that follows each."""


@dataclass
class _Run:
    """Settings that stay fixed while one model after the other is scored."""

    num_columns: int
    seed: int
    cache_dir: Path | None
    progress: Progress
    open: Callable[..., LogitRunner]
    adapter: Path | None = None
    cache_options: dict[str, object] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        """Record the stage's wall time; gives the function that reports its progress."""
        start = time.perf_counter()
        unit = "questions" if stage.endswith("questions") else "windows"
        yield lambda done, total: self.progress(stage, done, total, unit=unit)
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def evaluate(
    candidate: str | Path,
    reference: str | Path,
    *,
    tasks: Collection[str] = ("kl", "ppl"),
    text: Sequence[Path] = (),
    mmlu_data: str | Path | None = None,
    shots: str | Path | None = None,
    num_shots: int = 5,
    limit: int | None = None,
    window: int = 512,
    max_tokens: int = 8192,
    threads: int | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    scoring: Sequence[Scoring] = ("letter", "cloze"),
    seed: int = 0,
    runner: str = LLAMA_CPP,
    rounded: bool = False,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Score `candidate` against `reference`; each is a Hugging Face directory, a hub id or a .gguf file.

    `text` files (.txt, or .jsonl with a "text" per line) serve `kl` and `ppl`; the first `max_tokens` tokens of each
    are used. `mmlu_data` and `shots` are .jsonl files, or a `datasets` id (`cais/mmlu` when not given; its `dev` split
    then gives the shots). `limit` takes that many questions at equal steps. With `cache_dir`, what the reference said
    is kept there and reused for the next candidate. `runner` runs GGUF files: llama.cpp, or transformers with the
    weights packed; `rounded` makes packed models in transformers round activations to 8 bits as llama.cpp does.
    `adapter` is a directory of PEFT that is put on the candidate. `threads=None` is all cores.

    Raises:
        EvaluationError: the models cannot be compared, an option or a text is unusable, or a model gives NaN.
        CheckpointError: a model cannot be loaded.
    """
    _check_options(tasks, text, window, max_tokens, scoring)
    if runner not in RUNNERS:
        raise EvaluationError(f"There is no runner `{runner}`; use one of {', '.join(RUNNERS)}.")
    reference, candidate = locate_model(reference), locate_model(candidate)
    if adapter is not None and is_gguf(candidate) and runner == LLAMA_CPP:
        raise EvaluationError(
            f"The adapter {adapter} is PEFT's, which llama.cpp does not read; give --runner transformers."
        )
    infos = describe_model(reference, runner=runner), describe_model(candidate, runner=runner)
    num_columns, notes = common_columns(*infos)
    context_length = min(info.context_length for info in infos)
    if window > context_length:
        raise EvaluationError(f"A window of {window} tokens does not fit the context of {context_length}; use less.")
    with open_encoder(reference) as encode:
        texts, questions = [], {}
        if {"kl", "ppl"} & set(tasks):
            texts = [load_text(path, encode, window=window, max_tokens=max_tokens) for path in text]
        if "mmlu" in tasks:
            questions = _load_questions(encode, mmlu_data, shots, num_shots, limit, context_length, scoring)
    run = _Run(
        num_columns=num_columns,
        seed=seed,
        cache_dir=cache_dir,
        progress=progress or ignore_progress,
        open=partial(open_runner, threads=threads, device=device, runner=runner, rounded=rounded),
        adapter=adapter,
        cache_options=_cache_options(reference, runner, rounded),
    )
    torch_threads = torch.get_num_threads()
    try:
        references, reference_answers = _run_reference(reference, texts, questions, run)
        scores, candidate_answers = _run_candidate(candidate, texts, references, questions, run)
    finally:
        torch.set_num_threads(torch_threads)
    return EvalReport(
        reference=_identify(infos[0]),
        candidate=_identify(infos[1]),
        options={
            "tasks": sorted(tasks), "window": window, "max_tokens": max_tokens, "seed": seed, "limit": limit,
            "num_shots": num_shots, "num_top": distributions.NUM_TOP, "num_tail": distributions.NUM_TAIL,
        },
        texts=[
            summarize_text(t.name, t.sha256, t.scored_lengths, targets.numpy(), s, with_kl="kl" in tasks)
            for t, (_, targets), s in zip(texts, references, scores, strict=True)
        ],
        multiple_choice=[
            summarize_choices(name, encoded, reference_answers[name], candidate_answers[name])
            for name, encoded in questions.items()
        ],
        notes=[*notes, *([f"The candidate runs with the adapter {adapter}."] if adapter is not None else [])],
        seconds=run.seconds,
    )  # fmt: skip


def _cache_options(reference: Path, runner: str, rounded: bool) -> dict[str, object]:
    """Return what else decides the reference's distributions; empty for what is the default."""
    options: dict[str, object] = {"rounded": True} if rounded else {}
    return options | ({"runner": runner} if is_gguf(reference) and runner != LLAMA_CPP else {})


def common_columns(reference: ModelInfo, candidate: ModelInfo) -> tuple[int, list[str]]:
    """Number of leading logits to compare, and notes on what was dropped.

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
    dropped = large.vocab_size - small.vocab_size
    return small.vocab_size, [
        f"{large.path.name}: the last {dropped} logits belong to padding tokens and were dropped."
    ]


def _check_options(
    tasks: Collection[str], text: Sequence[Path], window: int, max_tokens: int, scoring: Sequence[Scoring]
) -> None:
    unknown = set(tasks) - TASKS
    if unknown or not tasks:
        raise EvaluationError(f"Unknown tasks {sorted(unknown)}; choose from {', '.join(sorted(TASKS))}.")
    if {"kl", "ppl"} & set(tasks) and not text:
        raise EvaluationError("The tasks kl and ppl need a text that the models have not been tuned on; give --text.")
    if window < 2 or max_tokens < 2:
        raise EvaluationError(f"Window ({window}) and token limit ({max_tokens}) must both be at least 2.")
    if "mmlu" in tasks and (not scoring or set(scoring) - {"letter", "cloze"}):
        raise EvaluationError(f"Unknown scoring {list(scoring)}; choose letter, cloze or both.")


def _load_questions(
    encode: TextEncoder,
    data: str | Path | None,
    shots: str | Path | None,
    num_shots: int,
    limit: int | None,
    context_length: int,
    scoring: Sequence[Scoring],
) -> dict[Scoring, list[EncodedQuestion]]:
    data = data or "cais/mmlu"
    if shots is None and num_shots and Path(data).is_file():
        raise EvaluationError(
            f"{Path(data).name} needs a file of example questions for {num_shots}-shot prompts; give --shots, "
            "or ask for 0 shots."
        )
    questions = multiple_choice.take_evenly(multiple_choice.load_questions(data), limit)
    examples = multiple_choice.load_questions(shots or data, split="dev") if num_shots else []
    return {
        name: multiple_choice.encode_questions(
            questions, examples, name, encode, num_shots=num_shots, context_length=context_length
        )
        for name in dict.fromkeys(scoring)
    }


class _LazyRunner:
    """Loads the model when it is first needed: a reference whose results are all cached never is."""

    def __init__(self, path: Path, run: _Run, *, adapter: Path | None = None) -> None:
        self._path, self._run, self._adapter = path, run, adapter
        self._runner: LogitRunner | None = None

    def __enter__(self) -> "_LazyRunner":
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._runner:
            self._runner.close()

    def __call__(self) -> LogitRunner:
        if not self._runner:
            self._runner = self._run.open(self._path, adapter=self._adapter)
        return self._runner


def _run_reference(
    path: Path, texts: list[EvalText], questions: dict[Scoring, list[EncodedQuestion]], run: _Run
) -> tuple[list[_Reference], dict[Scoring, list[AnswerScores]]]:
    with _LazyRunner(path, run) as runner:
        references = []
        for item in texts:
            with run.timed(f"reference, {item.name}") as report:
                tokens = [token for window in item.windows for token in window]
                key = {"lengths": item.scored_lengths, "columns": run.num_columns, "seed": run.seed}
                key |= {"num_top": distributions.NUM_TOP, "num_tail": distributions.NUM_TAIL}
                tensors = _cached(
                    path, tokens, key, run, lambda item=item, report=report: _compress(runner(), item, run, report)
                )
                targets = tensors.pop("target_log_probs")
                references.append((Distributions(**tensors), targets))
        answers = {}
        for name, encoded in questions.items():
            with run.timed(f"reference, {name} questions") as report:
                parts = [part for e in encoded for part in (e.prompt, *e.answers)]
                tokens = [token for part in parts for token in part]
                tensors = _cached(
                    path, tokens, {"lengths": [len(part) for part in parts], "columns": run.num_columns}, run,
                    lambda encoded=encoded, report=report: _answer(runner(), encoded, run, report),
                )  # fmt: skip
                answers[name] = _split_answers(encoded, tensors["log_probs"].numpy())
    return references, answers


def _cached(
    path: Path, tokens: list[int], options: dict, run: _Run, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    if run.cache_dir is None:
        return make()
    key = reference_cache.cache_key(path, tokens, **options, **run.cache_options)
    tensors = reference_cache.load_cached(run.cache_dir, key)
    if tensors is None:
        tensors = make()
        reference_cache.save_cached(run.cache_dir, key, tensors)
    return tensors


def _compress(runner: LogitRunner, item: EvalText, run: _Run, report: Callable[[int, int], None]) -> dict:
    parts, targets = [], []
    runner.reserve(max(map(len, item.windows)))
    report(0, len(item.windows))
    for i, window in enumerate(item.windows):
        logits = runner.window_logits(window)[:-1, : run.num_columns]
        parts.append(Distributions.of(logits, seed=run.seed + i))
        targets.append(_log_probs_of_next(logits, window))
        report(i + 1, len(item.windows))
    return Distributions.concatenate(parts).tensors() | {"target_log_probs": torch.cat(targets)}


def _log_probs_of_next(logits: Tensor, window: list[int]) -> Tensor:
    """Log-probabilities float64 [T - 1] of the tokens that follow, under the logits before each."""
    return log_probs_at(logits, torch.tensor(window[1:])[:, None])[:, 0]


def _answer(
    runner: LogitRunner, encoded: list[EncodedQuestion], run: _Run, report: Callable[[int, int], None]
) -> dict[str, Tensor]:
    scores = multiple_choice.score_questions(runner, encoded, num_columns=run.num_columns, progress=report)
    return {"log_probs": torch.from_numpy(np.concatenate([score.log_probs for score in scores]))}


def _split_answers(encoded: list[EncodedQuestion], log_probs: np.ndarray) -> list[AnswerScores]:
    ends = np.cumsum([len(e.answers) for e in encoded])[:-1]
    return [AnswerScores(e.question, part) for e, part in zip(encoded, np.split(log_probs, ends), strict=True)]


def _run_candidate(
    path: Path,
    texts: list[EvalText],
    references: list[_Reference],
    questions: dict[Scoring, list[EncodedQuestion]],
    run: _Run,
) -> tuple[list[TokenScores], dict[Scoring, list[AnswerScores]]]:
    scores, answers = [], {}
    with _LazyRunner(path, run, adapter=run.adapter) as runner:
        for item, (distribution, _) in zip(texts, references, strict=True):
            with run.timed(f"candidate, {item.name}") as report:
                scores.append(_score_text(runner(), item, distribution, run, report))
        for name, encoded in questions.items():
            with run.timed(f"candidate, {name} questions") as report:
                answers[name] = _split_answers(encoded, _answer(runner(), encoded, run, report)["log_probs"].numpy())
    return scores, answers


def _score_text(
    runner: LogitRunner,
    item: EvalText,
    distribution: Distributions,
    run: _Run,
    report: Callable[[int, int], None],
) -> TokenScores:
    parts, start = [], 0
    runner.reserve(max(map(len, item.windows)))
    report(0, len(item.windows))
    for i, window in enumerate(item.windows):
        end = start + len(window) - 1
        logits = runner.window_logits(window)[:-1, : run.num_columns]
        part = distribution[start:end]
        parts.append((part.kl(logits), part.agreements(logits), _log_probs_of_next(logits, window)))
        start = end
        report(i + 1, len(item.windows))
    return TokenScores(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


def _identify(info: ModelInfo) -> ModelIdentity:
    files = reference_cache.model_files(info.path)
    return ModelIdentity(
        name=info.path.name,
        runner=info.kind,
        file_bytes=sum(file.stat().st_size for file in files if file.suffix in {".gguf", ".safetensors", ".bin"}),
        fingerprint=reference_cache.model_fingerprint(info.path),
    )
