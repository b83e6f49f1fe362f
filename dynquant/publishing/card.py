"""README.md of a release: what the files are, what they lose and where they fit, how they run, and how they were made.

Numbers of a file are those of its report by `eval`; sizes and memories are those that `plan --fits` reckons with.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynquant.analysis.plots.style import PlotFiles
from dynquant.checkpoints.gguf_layout import is_tuned
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.model import Model
from dynquant.errors import hub_failures
from dynquant.evaluation.report import EvalReport, markdown
from dynquant.evaluation.statistics import shown_kl
from dynquant.planning.memory.budget import CUDA_CONTEXT_BYTES, compute_buffer_bytes, kv_cache_bytes
from dynquant.planning.memory.placement import COMMON_CARDS, Placement, fit_common_cards
from dynquant.publishing.options import REPORTS_NAME, ReleaseOptions
from dynquant.publishing.record import Release, ReleasedFile
from dynquant.resources import human_bytes

_CARDS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 80, 96, 141, 192, 288)
"""Memories of common graphics cards and computers in GB."""
_CONTEXTS = (4096, 16384, 65536)
_REPO = "OWNER/REPO"


def release_card(
    record: Release, reports: Mapping[str, EvalReport], model: Model, options: ReleaseOptions, plot: PlotFiles | None
) -> str:
    """Return the card as Markdown with the Hub's metadata block."""
    original = _original_card(model, options)
    base = options.base_model or (options.model if model.path != Path(options.model) and "/" in options.model else None)
    name = options.name or model.name
    original_name = f"[{base}](https://huggingface.co/{base})" if base else model.name
    count = sum(row.is_released for row in record.files)
    about = (
        f"{original_name} ({model.arch}, {record.num_weights:,} weights) in {count} size{'s' * (count != 1)} for "
        "llama.cpp and programs built on it. The quant types of all tensors are chosen together, by measured errors, "
        f"so that a file of its size loses least (dynquant {record.tool_version}). A file's name says the type of most "
        "weights and the bits per weight of the whole file."
    )
    besides = _besides(model, options)
    licence = f"The licence is that of the original: {original['license']}." if original.get("license") else ""
    parts = [
        f"---\n{_metadata(record, model, options, base, original)}---",
        f"# {name}, quantized by measurement",
        " ".join(part for part in (about, _of_quantized(model), licence) if part),
        "## Files",
        "The largest file that fits in your memory loses least." * (count > 1),
        _files(record, reports, next(iter(besides.values()))),
        f"![{plot.headline}]({plot.png.name})" if plot else "",
        " ".join(_explained(reports, record, is_own_text=not options.asked.text)),
        "## Memory",
        *_memory(record, besides, options),
        "## How to run",
        _how_to_run(record, model, options, base),
        "## How the files were made",
        _how_made(record, options),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_quantized(model: Model) -> str:
    """Say that the original is a quantized GGUF file, whose own loss no figure of the card counts; else nothing."""
    if not isinstance(model.source, GGUFSource):
        return ""
    summary = inspect(model.path)
    most = max(summary.types, key=lambda share: share.num_weights).label
    if most in ("F32", "F16", "BF16"):
        return ""
    return (
        f"The original is a quantized file itself ({most} for most weights, {summary.bits_per_weight:.2f} bits per "
        "weight): all figures compare with it, and what it had lost before comes on top."
    )


def _original_card(model: Model, options: ReleaseOptions) -> dict[str, Any]:
    """Return the metadata of the original's own card; empty without one."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    card = model.path / "README.md" if model.path.is_dir() else model.path.with_name("README.md")
    is_here = Path(options.model).exists()
    if is_here and not card.is_file():
        return {}
    try:
        return ModelCard.load(card if is_here else options.model, ignore_metadata_errors=True).data.to_dict()
    except (*hub_failures(), YAMLError, ValueError):
        return {}


def _metadata(
    record: Release, model: Model, options: ReleaseOptions, base: str | None, original: Mapping[str, Any]
) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    task = "image-text-to-text" if model.has_vision else "text-generation"
    tags = ["gguf", "dynquant", "quantized", *(["imatrix"] if record.extra_files else []), record.arch]
    experts = ["mixture-of-experts"] if model.hyper.n_expert else []
    kept = {key: original[key] for key in ("license", "license_name", "license_link", "language") if original.get(key)}
    relation = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    quantized_by = {"quantized_by": options.quantized_by} if options.quantized_by else {}
    data = ModelCardData(
        **relation,
        **quantized_by,
        **kept,
        pipeline_tag=original.get("pipeline_tag", task),
        library_name="gguf",
        tags=[*tags, *experts],
    )
    return f"{data.to_yaml()}\n"


def _files(record: Release, reports: Mapping[str, EvalReport], besides: int) -> str:
    """Return the table of files: size, bits, the memory that holds each and `besides`, and what it was measured at;
    recipes compared with are in italics."""
    header = ["file", "size", "bits per weight", "fits"]
    texts = next((report.texts for report in reports.values()), [])
    asked = next((report.multiple_choice for report in reports.values()), [])
    for text in texts:
        suffix = f", {text.name}" * (len(texts) > 1)
        header += [f"KL{suffix}", f"same top token{suffix}", f"perplexity ratio{suffix}"]
    header += [f"accuracy ({result.scoring}; original {result.reference.accuracy.value:.1%})" for result in asked]
    written = next((report.generated for report in reports.values()), ())
    for result in written:
        suffix = f", {result.name}" * (len(written) > 1)
        loops = f"loops{suffix} (original {result.reference.loops.value:.1%})"
        header += [f"divergence@{result.new_tokens}{suffix}", loops]
    rows = []
    for row in record.files:
        name = f"[{row.name}]({row.name})" if row.is_released else f"*{row.request} (not here)*"
        fits = next((f"{size} GB" for size in _CARDS if row.bytes + besides <= size * 10**9), "several cards")
        cells = [name, human_bytes(row.bytes), f"{row.bits_per_weight:.2f}", fits if row.is_released else ""]
        report = reports.get(row.name)
        for text in report.texts if report else ():
            cells += [text.kl.mean.shown(shown_kl), text.kl.top1_agreement.shown(".1%")] if text.kl else ["", ""]
            cells.append(text.perplexity_ratio.shown(".3f"))
        cells += [result.candidate.accuracy.shown(".1%") for result in report.multiple_choice] if report else []
        for result in report.generated if report else ():
            cells += [result.shared_tokens.shown(".1f"), result.candidate.loops.shown(".1%")]
        # A narrow column breaks before an interval, not in it.
        cells[1:] = [re.sub(r"(?<=,) | (?=[GM]B)", "\N{NO-BREAK SPACE}", cell) for cell in cells[1:]]
        rows.append([*cells, *[""] * (len(header) - len(cells))])
    return markdown(header, rows).rstrip()


def _explained(reports: Mapping[str, EvalReport], record: Release, *, is_own_text: bool) -> Iterator[str]:
    report = next(iter(reports.values()), None)
    if report is None:
        yield "The files were not measured: no text was given (`--text FILE`)."
    unseen = ", which calibration did not see" * is_own_text
    for text in report.texts if report else ():
        yield (
            f"Measured in {report.candidate.runner} against the original on {text.scored_tokens:,} tokens of "
            f"{text.name} (SHA-256 {text.sha256[:16]}){unseen}."
        )
    if report and report.texts:
        yield (
            "KL is the mean Kullback-Leibler divergence of the next token's distribution in nats; the perplexity "
            f"ratio is 1 where nothing is lost. Intervals are 95 %. Details are in [{REPORTS_NAME}/]({REPORTS_NAME}/)."
        )
    for result in report.multiple_choice if report else ():
        yield f"Accuracies are of {result.questions:,} multiple-choice questions, {result.scoring} scoring."
    for result in report.generated if report else ():
        yield (
            f"Divergence@{result.new_tokens} counts the tokens that file and original write alike, greedily, before "
            f"they part, after {result.prompts:,} pieces of {result.name}; loops end in a block that repeats."
        )
    if any(not row.is_released for row in record.files):
        yield "A row in italics has a published recipe's types, encoded as these files were; it is for comparison."
    if any(name.startswith("mmproj-") for row in record.files for name in row.files):
        yield "Vision tower and projector of each file are in `mmproj-` and its name, and count in its size."
    for name in record.extra_files:
        text = f" on {record.calibration}" * bool(record.calibration)
        yield f"[{name}]({name}) has the statistics of calibration{text}, as `llama-quantize --imatrix` reads them."


def _besides(model: Model, options: ReleaseOptions) -> dict[int, int]:
    """Return what a device holds beside the file, in bytes by tokens of context, which the model can have; of the
    context that memories are told for first."""
    limit = model.hyper.n_ctx or max(_CONTEXTS)
    return {
        context: kv_cache_bytes(model, context, options.kv_type)
        + compute_buffer_bytes(model, context, options.kv_type)
        + CUDA_CONTEXT_BYTES
        for context in dict.fromkeys(min(context, limit) for context in (options.context, *_CONTEXTS))
    }


def _memory(record: Release, besides: Mapping[int, int], options: ReleaseOptions) -> Iterator[str]:
    """Yield the table of memories: file, KV cache, buffers and CUDA context on one device; and how to split files."""
    rows, contexts, told = [row for row in record.files if row.is_released], sorted(besides), next(iter(besides))
    sizes = [[row.name, *(human_bytes(row.bytes + besides[context]) for context in contexts)] for row in rows]
    yield markdown(["file", *(f"with {context:,} tokens" for context in contexts)], sizes).rstrip()
    yield (
        f"All on one device: the file, a KV cache of type {options.kv_type}, llama.cpp's buffers (at most) and "
        f"{human_bytes(CUDA_CONTEXT_BYTES)} of CUDA context. A file `fits` in the memory that holds all that with "
        f"{told:,} tokens."
    )
    flags = {
        row.name: [
            _shown(each) for each in fit_common_cards(file, told, options.kv_type, asks_llama_cpp=False).values()
        ]
        for row in rows
        if (file := options.output / row.name).is_file()
    }
    different = {cell for cells in flags.values() for cell in cells}
    if len(different) == 1:
        yield f"Every file fits on a graphics card of {COMMON_CARDS[0]}, with {different.pop()} for llama.cpp."
    elif different:
        header = ["file", *(f"card of {card}" for card in COMMON_CARDS)]
        yield markdown(header, [[name, *cells] for name, cells in flags.items()]).rstrip()
        yield (
            f"llama.cpp's options for {told:,} tokens on common cards, by `dynquant fit FILE`: routed experts leave "
            "the GPU first, then layers. What stands behind a plus is in host memory."
        )


def _shown(placement: Placement) -> str:
    """Return flags, and the host memory where layers or experts are there."""
    is_split = placement.cpu_moe > 0 or placement.layers_on_gpu < placement.layers
    return f"`{placement.offload_flags}`" + f" + {human_bytes(placement.host.total)}" * is_split


def _how_to_run(record: Release, model: Model, options: ReleaseOptions, base: str | None) -> str:
    """Return commands for each runtime, with the middle size as their example."""
    released = [row for row in record.files if row.is_released]
    row, repo = released[len(released) // 2], options.push or _REPO
    context = min(options.context, model.hyper.n_ctx or options.context)
    mmproj = next((name for name in row.files if name.startswith("mmproj-")), None)
    eye = f" --mmproj {mmproj}" if mmproj else ""
    modelfile = next((name for name in row.files if name.endswith(".Modelfile")), None)
    create = f"\n# or, with both files here:\nollama create NAME -f {modelfile}" if modelfile else ""
    packed = _packed_words(row, released)
    return f"""llama.cpp:

```
llama-cli -hf {repo} -hff {row.name} -c {context}
# or, once it is downloaded:
llama-server -m {row.name}{eye} -c {context}
```

Ollama, by name or with a file's Modelfile, which has stop texts, parameters and, if the model has one, the template:

```
ollama run hf.co/{repo}:{row.name}{create}
```

LM Studio finds the repository by name ({repo}); a file that is there already: `lms import {row.name}`.

transformers, with weights that stay packed ({packed}):

```python
import dynquant

model = dynquant.load("{row.name}")
```

vLLM reads GGUF of some architectures (`vllm serve ./{row.name} --tokenizer {base or "ORIGINAL"}`), which was not tried
with these files; `dynquant plan --for vllm` makes checkpoints for its own kernels."""


def _packed_words(row: ReleasedFile, released: Iterable[ReleasedFile]) -> str:
    folder = next((name.partition("/")[0] for each in (row, *released) for name in each.packed), None)
    if folder is None:
        return "needs dynquant"
    return f"needs dynquant; `{folder}/` is a checkpoint for `from_pretrained` after `import dynquant`"


def _command_lines(words: Iterable[str]) -> str:
    """Return a command with a line for each option, since a long line is cut off in a browser."""
    return f"dynquant release {shlex.join(words)}".replace(" --", " \\\n  --")


def _how_made(record: Release, options: ReleaseOptions) -> str:
    hashes = {name: digest for row in record.files if row.is_released for name, digest in row.files.items()}
    hashes |= record.extra_files
    statistics = record.stats_hash or "none"
    rows = [[f"`{name}`", f"`{digest}`"] for name, digest in hashes.items() if name.endswith(".gguf")]
    table = markdown(["file", "SHA-256"], rows).rstrip()
    types = "\n".join(
        f"- {row.name}: " + ", ".join(f"{count} {name}" for name, count in row.types.items())
        for row in record.files
        if row.is_released
    )
    commands = "\n".join(map(_command_lines, record.commands))
    several = "Each command made the files of its own sizes. " * (len(record.commands) > 1)
    files = [options.output / row.name for row in record.files if row.is_released]
    tuned = [file.name for file in files if file.is_file() and is_tuned(GGUFSource(file))]
    of_tuned = "" if len(tuned) == len(files) else f" of {', '.join(tuned)}"
    closing = f"The closing pass tuned scales and norms{of_tuned} on the KL to the original. " * bool(tuned)
    tools = dict.fromkeys(
        f"{', '.join(f'{name} {version}' for name, version in run.versions.items())} on {run.device}"
        for run in record.runs
    )
    return f"""```
{commands}
```

{several}{closing}Made with {"; ".join(tools)}. Checkpoint `{record.fingerprint}`, statistics `{statistics}`.

{table}

Tensors of each type:

{types}"""
