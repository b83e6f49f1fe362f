"""Tasks of lm-evaluation-harness, with its prompts, its data and its scorers, on models that run here."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from dynquant.errors import DynquantError, EvaluationError
from dynquant.evaluation.options import LOOKED_UP, TEXT_TASKS, TaskOptions
from dynquant.evaluation.runners import LogitRunner
from dynquant.evaluation.tasks.harness_data import data_from
from dynquant.evaluation.tasks.harness_model import HarnessModel, generation_of, open_codec
from dynquant.evaluation.tasks.harness_results import TaskResult, summarize_task
from dynquant.families.tokenizers.chat_template import chat_format
from dynquant.inputs.questions import take_evenly
from dynquant.session import Progress

SHOTS_SEED = 1234  # the harness's own, so that its shots are drawn
Samples = dict[str, list[dict[str, Any]]]
"""Logs of `lm_eval.evaluate`, one a question, by task."""


class Harness:
    """Tasks with their data, which models are asked one after the other; `notes` are what their reader should know."""

    def __init__(self, asked: TaskOptions, original: Path, progress: Progress) -> None:
        """Load tasks. Raises EvaluationError: unknown, without data, or not to be run as they are."""
        self._asked, self._original = asked, original
        self._chat = chat_format(original) if asked.chat else None
        if self._chat is not None and self._chat.template is None:
            raise EvaluationError(f"{original.name} has no chat template, which --chat asks for; leave it out.")
        self.notes: list[str] = []
        with self._running(", ".join(asked.harness_tasks)):
            self.tasks = _load(asked, self.notes, progress)
        self._places = {name: _chosen(tasks, asked.limit) for name, tasks in self.tasks.items()}

    def ask(
        self,
        runner: Callable[[], LogitRunner],
        progress: Callable[[int, int], None],
        kept: Path | None,
        *,
        context_length: int,
        num_columns: int,
    ) -> Samples:
        """Return what is logged of every question; answers go to the file `kept`, if there is one, as they come."""
        places: dict[str, list[int]] = {}
        for chosen in self._places.values():
            for name, numbers in chosen.items():
                places[name] = sorted({*places.get(name, ()), *numbers})
        tasks = {name: task for tasks in self.tasks.values() for name, task in tasks.items() if name in places}
        for task in tasks.values():
            task.set_fewshot_seed(SHOTS_SEED)
        names = ", ".join(self.tasks)
        is_chat = self._chat is not None
        limits = {"context_length": context_length, "num_columns": num_columns}
        with open_codec(self._original) as codec, self._running(names):
            model = HarnessModel(runner, codec, self._chat, progress=progress, **limits)
            results = lm_eval.evaluate(
                lm_eval.api.model.CachingLM(model, str(kept)) if kept is not None else model,
                {"tasks": tasks},
                samples=places if self._asked.limit else None,
                bootstrap_iters=0,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=is_chat,
                confirm_run_unsafe_code=self._asked.allow_code_execution,
            )
        cut = f"{model.cut} prompts of {names} lost their beginning to fit the context of {context_length:,}."
        if model.cut and cut not in self.notes:  # those of the other model are the same
            self.notes.append(cut)
        return results["samples"]

    @contextmanager
    def _running(self, names: str) -> Iterator[None]:
        """Context manager: code of tasks runs, quietly; what goes wrong in it is a refusal."""
        with _quiet(), _code_execution(self._asked.allow_code_execution), _explained(names):
            yield

    def results(self, before: Samples, after: Samples) -> tuple[TaskResult, ...]:
        """Compare what was logged of two models, name by name."""
        compared = []
        for name, chosen in self._places.items():
            tasks = {task: self.tasks[name][task] for task in chosen}
            with self._running(name):  # scores of all questions together are the task's own programs, too
                compared.append(summarize_task(name, tasks, before, after))
        return tuple(compared)


def _load(asked: TaskOptions, notes: list[str], progress: Progress) -> dict[str, dict[str, lm_eval.api.task.Task]]:
    names = asked.harness_tasks
    paths = {name for name in names if Path(name).suffix in (".yaml", ".yml")}
    for name in names:
        _check_name(name, is_path=name in paths)
    manager = _manager(with_its_own=len(paths) < len(names))
    loaded = {}
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None and name not in paths:
            raise _unknown(name)
        if entry is not None and entry.cfg and entry.cfg.get("unsafe_code"):
            _check_code(name, asked)
        with data_from(asked.task_data, notes), _explained(name):
            tasks = manager.load([name])["tasks"]
        if asked.task_data is not None and asked.task_data.is_file() and len(names) + len(tasks) > 2:
            raise EvaluationError(
                f"--task-data {asked.task_data} is one file, and several tasks were asked for: "
                f"{', '.join([*names, *tasks])[:300]}. Give a folder with a file of each, named as the task."
            )
        label = Path(name).stem if name in paths else name
        taken = {task for others in loaded.values() for task in others}
        if label in loaded or (paths and taken & {*tasks}):
            raise EvaluationError(f"{name} has the name of another task that was asked for; run it by itself.")
        for task in tasks.values():
            _set_options(name, task, asked, notes)
        loaded[label] = tasks
        progress(LOOKED_UP, len(loaded), len(names), unit="tasks")
    return loaded


@cache
def _manager(*, with_its_own: bool) -> TaskManager:
    """Return the index of the harness's own tasks, whose thousands of files take seconds to read, or an empty one."""
    return TaskManager(include_defaults=with_its_own)


@cache
def _task_files() -> str:
    """Return the text of the harness's own task files, which takes a tenth of the time of their index."""
    files = sorted(path for path in Path(lm_eval.tasks.__file__).parent.rglob("*") if path.suffix in ("", ".yaml"))
    return "\n".join(path.read_text("utf-8", "replace") for path in files if path.is_file())


def _check_name(name: str, *, is_path: bool) -> None:
    """Raise EvaluationError for a task that is surely not there, before the index of all is read."""
    if is_path:
        if not Path(name).is_file():
            raise EvaluationError(f"There is no task file {name}; check the path.")
    elif not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", _task_files()):
        raise _unknown(name)


def _unknown(name: str) -> EvaluationError:
    names = re.findall(r"""^[ -]*["']?(?:task|group|tag)["']?[ ]*:[ ]*["']?([\w.+-]+)""", _task_files(), re.MULTILINE)
    near = difflib.get_close_matches(name, sorted({*TEXT_TASKS, *names}), n=5, cutoff=0.5)
    return EvaluationError(
        f"There is no task {name}, neither here ({', '.join(sorted(TEXT_TASKS))}) nor in lm-evaluation-harness "
        f"{lm_eval.__version__}. The nearest names are {', '.join(near) or 'none'}; the path of a task's .yaml works, "
        "too."
    )


def _check_code(name: str, asked: TaskOptions) -> None:
    if not asked.allow_code_execution:
        raise EvaluationError(
            f"The task {name} runs the code that models write, on this machine and as you. Repeat this with "
            "--allow-code-execution where that is safe, as in a container."
        )


def _set_options(name: str, task: lm_eval.api.task.Task, asked: TaskOptions, notes: list[str]) -> None:
    if getattr(task, "UNSAFE_CODE", False) or task.config.unsafe_code:
        _check_code(name, asked)
    if task.config.num_fewshot is None or (asked.changed("num_shots") and task.config.num_fewshot):
        task.set_config("num_fewshot", asked.num_shots if asked.changed("num_shots") else 0)
    elif asked.num_shots and asked.changed("num_shots"):
        notes.append(f"{task.config.task} has no shots whatever --num-shots says: its file sets none.")
    if task.OUTPUT_TYPE == "generate_until":
        if asked.changed("new_tokens"):
            task.set_config("generation_kwargs", {"max_gen_toks": asked.new_tokens}, update=True)
        generation_of(task.config.generation_kwargs or {})


def _chosen(tasks: Mapping[str, lm_eval.api.task.Task], limit: int | None) -> dict[str, list[int]]:
    """Return places of at most `limit` questions, spread evenly over all tasks of one name."""
    places: dict[str, list[int]] = {}
    every = [(name, number) for name, task in tasks.items() for number in range(len(task.eval_docs))]
    for name, number in take_evenly(every, limit or None):
        places.setdefault(name, []).append(number)
    return places


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Context manager: tasks are programs of others, so that anything may come of them; it is told in one paragraph."""
    try:
        yield
    except DynquantError:
        raise
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"The task {name} needs the package {error.name}, which is not there: pip install "
            f"'dynquant-toolchain[tasks]', or {error.name} itself."
        ) from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if script := re.search(r"module script at .*?(\w+)/\1\.py", said):  # of the package `evaluate`, which has none
            said += (
                f" Such scorers come from the hub: go online, or put {script[1]}/ of huggingface/evaluate, where it is "
                f"metrics/{script[1]}, into the folder that this is run in."
            )
        raise EvaluationError(f"lm-evaluation-harness cannot run {name}: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: the harness's remarks on how its task files are written, and its bars, are not shown."""
    logger, modules = logging.getLogger("lm_eval"), (lm_eval.api.model, lm_eval.api.task)
    before = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in modules:  # its bars have no other switch once tqdm is imported
        module.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(before[0])
        if before[1]:
            datasets.enable_progress_bars()
        for module in modules:
            module.tqdm = tqdm


@contextmanager
def _code_execution(is_allowed: bool) -> Iterator[None]:
    """Context manager: scorers of the package `evaluate` run code only where this variable of theirs says so."""
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.pop(name, None)
    if is_allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
