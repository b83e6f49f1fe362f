"""Options of evaluation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from dynquant.errors import EvaluationError
from dynquant.options import ENCODERS, LARGEST, Flag, Former, ModelPath, Options, Strict, Window

TEXT_TASKS, PICTURE_TASKS = frozenset({"kl", "ppl", "mmlu", "generate"}), frozenset({"kl", "vqa"})
READ_TASKS = frozenset({"kl", "ppl", "generate"})
"""Tasks that need a text."""
Scoring = Literal["letter", "cloze"]
"""Way in which answers to questions are scored; see `tasks.multiple_choice`."""
SCORINGS = get_args(Scoring)
Scorings = Annotated[tuple[str, ...], Flag("letter, cloze or both.", choices=SCORINGS)]
LOOKED_UP = "lm-evaluation-harness, looking up"
"""Stage in which its tasks are found and their data read."""
CONTEXT_SCORED = 256
"""Tokens that are scored at the end of every length of context."""
LLAMA_CPP, TRANSFORMERS = RUNNERS = ("llama.cpp", "transformers")
"""Programs that can run a GGUF file."""
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Types of llama.cpp's key/value cache (`kv_cache_types` of its common/arg.cpp)."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Tasks that two models are compared on, and what they read: texts, prompts and questions."""

    text: Annotated[
        tuple[Path, ...], Flag("Text for kl and ppl, as --calibration of plan takes it. May be repeated.")
    ] = ()
    tasks: Annotated[
        tuple[str, ...],
        Flag(
            "Any of kl, ppl, mmlu, generate, and tasks of lm-evaluation-harness by name or .yaml, as gsm8k,ifeval; "
            "with --data kl and vqa."
        ),
    ] = ("kl", "ppl")
    max_tokens: Annotated[
        int, Flag("Tokens of each text.", ("--tokens",), min=2, is_tokens=True), Former("--max-tokens")
    ] = 8192
    prompts: Annotated[
        int,
        Flag(
            "For generate: starts of each text that both models go on from; at most what --tokens gives, one in 64.",
            min=1,
        ),
    ] = 64
    new_tokens: Annotated[
        int,
        Flag(
            "Tokens that both models write: for generate, and in place of a harness task's own.", min=1, is_tokens=True
        ),
    ] = 128
    mmlu_data: Annotated[
        str | None, Flag("Questions, .jsonl, .json, .parquet or a datasets id. Default: cais/mmlu.")
    ] = None
    shots: Annotated[
        str | None, Flag("Few-shot questions, in the same forms. Default: a file's first of each subject, not asked.")
    ] = None
    num_shots: Annotated[int, Flag("Shots before each question; of harness tasks in place of their own.", min=0)] = 5
    limit: Annotated[int | None, Flag("At most this many questions, spread evenly; 0 for all.", min=0)] = None
    scoring: Scorings = SCORINGS
    task_data: Annotated[
        Path | None,
        Flag(
            "Data of harness tasks: a folder with TASK.jsonl or TASK/SPLIT.parquet, or the file of one. "
            "Default: the hub."
        ),
    ] = None
    chat: Annotated[bool, Flag("Ask harness tasks in the original's chat template.", ("--chat",))] = False
    allow_code_execution: Annotated[
        bool, Flag("Run harness tasks that execute what models write, as humaneval.", ("--allow-code-execution",))
    ] = False

    @property
    def harness_tasks(self) -> list[str]:
        """Tasks that are none of our own."""
        return [name for name in dict.fromkeys(self.tasks) if name not in TEXT_TASKS]

    def check_text(self) -> None:
        """Raise EvaluationError for no tasks, and for tasks that need a text without one."""
        if not self.tasks:
            raise EvaluationError(f"--tasks names none; give some of {', '.join(sorted(TEXT_TASKS))}.")
        if READ_TASKS & set(self.tasks) and not self.text:
            raise EvaluationError(
                "The tasks kl, ppl and generate need a text that the models have not been tuned on; give --text."
            )


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Two models, what they are compared on, and what runs them."""

    candidate: ModelPath
    reference: Annotated[str, Flag("The model to compare with: HF directory, hub id or .gguf.")]
    asked: TaskOptions = field(default_factory=TaskOptions)
    data: Annotated[
        Path | None,
        Flag(
            "Questions with pictures, .jsonl, .json or .parquet, for kl and vqa of a vision-language model. The "
            "candidate is then a plan.json, its folder, a Hugging Face directory, packed or not,"
            " or a .gguf file with its mmproj file.",
            show_default=False,
        ),
    ] = None
    mmproj: Annotated[
        Path | None, Flag("With --data: the vision part of a .gguf candidate. Default: mmproj-NAME.gguf beside it.")
    ] = None
    strict: Strict = False
    encoder: Annotated[str, Flag("What renders a plan with --data: dynquant or ggml.", choices=ENCODERS)] = "dynquant"
    window: Window = 512
    contexts: Annotated[
        tuple[str, ...],
        Flag(
            f"Lengths of context in place of --window, as 512,4096,16384: the last {CONTEXT_SCORED} tokens of each are "
            "scored, which are the same. Those longer than the models' are left out.",
            show_default=False,
            is_tokens=True,
        ),
    ] = ()
    reference_cache: Annotated[Path | None, Flag("Keep the reference's distributions here.")] = None
    runner: Annotated[
        str,
        Flag(
            "What runs GGUF files: llama.cpp, or transformers with packed weights; the latter takes those of "
            "architectures without a family where --reference is the directory that they were made from.",
            choices=RUNNERS,
        ),
    ] = LLAMA_CPP
    rounded: Annotated[bool, Flag("Round activations to 8 bits in packed transformers models, as llama.cpp does.")] = (
        False
    )
    kv_type: Annotated[
        tuple[str, ...],
        Flag(
            "Type of the candidate's key/value cache in llama.cpp, or of keys and of values, as q8_0,q4_0, with flash "
            f"attention. One of {', '.join(KV_TYPES)}.",
            show_default=False,
            choices=KV_TYPES,
        ),
    ] = ()
    adapter: Annotated[Path | None, Flag("Run the candidate, packed in transformers, with this LoRA adapter.")] = None

    allow_difference: Annotated[
        bool, Flag("Compare models of different architectures or sizes, too.", ("--allow-difference",))
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kv_type) > 2:
            raise EvaluationError(f"--kv-type {','.join(self.kv_type)}: give one type, or those of keys and of values.")
        if any(not length.isdecimal() or not 2 * CONTEXT_SCORED <= int(length) <= LARGEST for length in self.contexts):
            raise EvaluationError(
                f"--contexts {','.join(self.contexts)}: give whole numbers of tokens from {2 * CONTEXT_SCORED} on, as "
                "512,4096,16384."
            )
        if self.contexts:
            self.refuse_unused("--contexts says how long windows are.", "window")
        tasks = self.asked.tasks
        if self.data is None:
            if self.mmproj is not None:
                raise EvaluationError("--mmproj is for questions with pictures; give them with --data FILE.")
            if "vqa" in tasks:
                raise EvaluationError("The task vqa needs questions with pictures; give them with --data FILE.")
            self.asked.check_text()
            return
        why = "with --data, all tasks run on its samples, and the models with pictures."
        text_only = (
            "text",
            "mmlu_data",
            "max_tokens",
            "shots",
            "num_shots",
            "scoring",
            "prompts",
            "new_tokens",
            "task_data",
            "chat",
            "allow_code_execution",
        )
        self.asked.refuse_unused(why, *text_only)
        self.refuse_unused(
            why, "window", "reference_cache", "runner", "rounded", "adapter", "kv_type", "allow_difference", "contexts"
        )
        unknown = sorted(set(tasks) - PICTURE_TASKS)
        if unknown or not tasks:
            raise EvaluationError(f"With --data, tasks are kl and vqa; {', '.join(unknown) or 'none'} was asked for.")

    @property
    def idle(self) -> list[str]:
        """Flags that none of the tasks has a use for."""
        if self.data is not None:
            return []
        asked, tasks, idle = self.asked, {*self.asked.tasks}, self.changed("strict", "encoder")
        if not READ_TASKS & tasks:
            idle += asked.changed("text", "max_tokens")
        if not {"kl", "ppl"} & tasks:
            idle += self.changed("window", "contexts")
        if "generate" not in tasks:
            idle += asked.changed("prompts")
        if "mmlu" not in tasks:
            idle += asked.changed("mmlu_data", "shots", "scoring")
        if not asked.harness_tasks:
            idle += asked.changed("task_data", "chat", "allow_code_execution")
            idle += asked.changed("new_tokens") if "generate" not in tasks else []
            idle += asked.changed("num_shots", "limit") if "mmlu" not in tasks else []
        return idle
