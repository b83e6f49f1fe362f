"""Data of lm-evaluation-harness's tasks in local files, in place of the data sets on a hub that its tasks name.

    DIR/gsm8k.jsonl                                   questions of the task gsm8k
    DIR/gsm8k/test.jsonl, DIR/gsm8k/train.jsonl       with a file for each of its splits
    DIR/gsm8k/main/test-00000-of-00001.parquet        as a data set of the hub was downloaded
    FILE                                              questions of the one task that was asked for

A folder has the name of the task or of its data set. Where a task takes its shots from a split that has no file, other
questions are its shots.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from dynquant.errors import EvaluationError

_FORMS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_LOCAL = {"json", "parquet", "csv", "text", "pandas", "arrow"}
"""Builders of `datasets` that read the files which a task names itself."""


@contextmanager
def data_from(source: Path | None, notes: list[str]) -> Iterator[None]:
    """Context manager: tasks that are made meanwhile have their data from `source`, a folder, or a file of one task;
    where it is None, from where they say."""
    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        try:
            if source is None or task.config.dataset_path in _LOCAL:
                original(task, dataset_kwargs, **options)
            else:
                task.dataset = _read(source, task, notes)
        except EvaluationError:
            raise
        except Exception as error:  # of `datasets`, which has many
            raise EvaluationError(_no_data(source, task, error)) from error

    # A task loads its data while it is made, also as part of a group, and takes no other way to give it any.
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _read(source: Path, task: Any, notes: list[str]) -> Any:
    config = task.config
    asked = config.test_split or config.validation_split
    splits = dict.fromkeys(filter(None, (asked, config.validation_split, config.training_split, config.fewshot_split)))
    files = {split: _files(source, task, split) for split in splits}
    if source.is_file():
        files[asked] = [source]
    if not files[asked]:
        raise EvaluationError(
            f"--task-data {source} has no data of {config.task}: neither {config.task}.jsonl nor "
            f"{config.task}/{asked}.jsonl (or .json, .parquet). They are what the data set {_hub_name(task)} holds."
        )
    shots = task.fewshot_cfg.split or config.training_split or asked
    if task.fewshot_cfg.samples is None and not files.get(shots):
        config.test_split = asked  # the harness leaves a question out of its own shots where both have one split
        config.validation_split = config.training_split = None
        task.fewshot_cfg.split = asked
        if config.num_fewshot:
            place = f"{files[asked][0]}, for there is no file of their split, `{shots}`"
            notes.append(f"Shots of {config.task} are other questions of {place}.")
    read = {split: _load(paths) for split, paths in files.items() if paths}
    return datasets.DatasetDict(read)


def _files(source: Path, task: Any, split: str) -> list[Path]:
    config = task.config
    for name in (config.task, Path(config.dataset_path or "").name):
        folder = source / name
        if folder.is_dir():
            within = folder / str(config.dataset_name)
            listed = (within if within.is_dir() else folder).rglob("*")
            alike = re.compile(rf"{re.escape(split)}([-._].*)?")
            if files := sorted(file for file in listed if file.suffix in _FORMS and alike.fullmatch(file.stem)):
                return files
        if split == (config.test_split or config.validation_split):
            for form in _FORMS:
                if (file := source / f"{name}{form}").is_file():
                    return [file]
    return []


def _load(paths: list[Path]) -> Any:
    form = _FORMS.get(paths[0].suffix)
    if form is None:
        raise EvaluationError(f"{paths[0]} is no .jsonl, .json or .parquet file, of which --task-data reads questions.")
    return datasets.load_dataset(form, data_files=list(map(str, paths)), split="train")


def _hub_name(task: Any) -> str:
    config = task.config
    return f"{config.dataset_path}" + (f" ({config.dataset_name})" if config.dataset_name else "")


def _no_data(source: Path | None, task: Any, error: Exception) -> str:
    name, said = task.config.task, " ".join(str(error).split())
    if source is not None or task.config.dataset_path in _LOCAL:
        return f"The data of {name} cannot be read: {said}"
    split = task.config.test_split or task.config.validation_split
    return (
        f"The data of {name}, {_hub_name(task)}, cannot be had: {said}. Go online, or give --task-data DIR with "
        f"DIR/{name}/{split}.jsonl (or .json, .parquet), and a file of shots beside it, named as their split."
    )
