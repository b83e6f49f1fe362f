"""GGUF files of ours in programs that are not: `python -m tests.readers.gguf_readers FOLDER [TYPE...]` prints a table.

A random Llama of two layers is written once in each type, embedding and output in Q8_0, and textbook-moe-16m in a
mixture. The likeliest next tokens of each program are compared with those of our own decoder in PyTorch.
"""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.evaluation.options import TRANSFORMERS
from dynquant.evaluation.runners import open_runner
from dynquant.families.open import open_model
from dynquant.formats.decode import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import plan_from_types
from tests.helpers.exports import export_gguf
from tests.helpers.packed_models import mixed_plan
from tests.helpers.tiny_models import save_tiny
from tests.readers.programs import HERE, Missing, interpreter, node_folder, program
from tests.readers.vllm_parity import SMALL_MOE, bundled_tokens

PROMPTS, PROMPT_TOKENS = 4, 24
MIXTURE = "mixture"
Top = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Agreement:
    """How a program's likeliest tokens compare with ours, or why it has none.

    `equal` of the `asked` prompts have our likeliest token; in ours the program's lies at most `behind` nats below it.
    Its five likeliest are at most `difference` from ours, where it tells them.
    """

    equal: int = 0
    asked: int = PROMPTS
    behind: float = 0.0
    difference: float | None = None
    problem: str | None = None

    def __str__(self) -> str:
        difference = "" if self.difference is None else f", {self.difference:.2f}"
        return self.problem or f"{self.equal}/{self.asked}{difference}"


def write_models(folder: Path) -> dict[str, Path]:
    """Write a file for each type and the mixture, encoded by ggml; returns them by type."""
    llama = folder / "llama"
    if not llama.is_dir():
        save_tiny("llama", llama, SMALL_MOE, intermediate_size=512)
    model, moe = open_model(llama), open_model(SMALL_MOE)
    stats, files = _flat_stats(model), {}
    for name in (*QUANT_TYPES, MIXTURE):
        files[name] = folder / f"{name}.gguf"
        plan, used = mixed_plan(moe), None
        if name != MIXTURE:
            types = {
                t: (name if t.startswith("blk.") else "Q8_0", "test") for t in model.source.names() if "norm" not in t
            }
            plan, used = plan_from_types(model, types, recipe="preset test", stats=stats, stats_hash="0"), stats
        if not files[name].is_file():
            source = moe if name == MIXTURE else model
            export_gguf(source, plan, used, files[name], encoder=load_encoder("ggml"), threads=1)
    return files


def _flat_stats(model: Model) -> CalibrationStats:
    """Statistics in which all inputs weigh the same, for types that ggml does not encode without."""
    shapes = {name: model.source.info(name).shape for name in model.source.names() if "norm" not in name}
    sizes = {name: (shape[0] if len(shape) == 3 else 1, shape[-1]) for name, shape in shapes.items() if len(shape) > 1}
    inputs = {
        name: InputStats(torch.ones(size, dtype=torch.float64), torch.ones(size[0], dtype=torch.int64))
        for name, size in sizes.items()
    }
    return CalibrationStats(StatsProvenance(fingerprint=model.fingerprint, text_hash="0", text_name="flat"), inputs)


def our_tops(file: Path) -> list[torch.Tensor]:
    """Return our log-probabilities after each prompt."""
    runner = open_runner(file, runner=TRANSFORMERS)
    try:
        return [runner.window_logits(prompt["tokens"])[-1].log_softmax(-1) for prompt in prompts()]
    finally:
        runner.close()


def prompts() -> list[dict[str, object]]:
    """Return pieces of the bundled text as `tokens` and `text`."""
    tokens, decode_tokens = bundled_tokens()
    pieces = [tokens[start : start + PROMPT_TOKENS] for start in range(0, PROMPTS * PROMPT_TOKENS, PROMPT_TOKENS)]
    return [{"tokens": piece, "text": decode_tokens(piece)} for piece in pieces]


def xllamacpp(file: Path) -> list[Top]:
    return _printed(interpreter("python"), program("xllamacpp_top.py"), file, _prompts_file(file))


def mistralrs(file: Path) -> list[Top]:
    return _printed(interpreter("python"), program("mistralrs_top.py"), file, _prompts_file(file))


def node_llama_cpp(file: Path) -> list[Top]:
    node = node_folder("node-llama-cpp")
    return _printed("node", program("node_llama_cpp_top.mjs"), file, _prompts_file(file), node)


def wllama(file: Path) -> list[Top]:
    """Run the page in a headless browser, served from here."""
    package = node_folder("@wllama/wllama") / "node_modules" / "@wllama" / "wllama"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise Missing("no Chromium is installed")
    answers: list[object] = []
    answered = threading.Event()
    places = {"/": HERE / "wllama.html", "/model.gguf": file, "/prompts.json": _prompts_file(file)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = places.get(self.path) or package / self.path.removeprefix("/wllama/")
            kinds = {".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm"}
            self.send_response(200 if place.is_file() else 404)
            self.send_header("Content-Type", kinds.get(place.suffix, "application/octet-stream"))
            self.end_headers()
            self.wfile.write(place.read_bytes() if place.is_file() else b"")

        def do_POST(self) -> None:
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            answered.set()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'browser'}"]
        page = subprocess.Popen(
            [browser, *flags, f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        answered.wait(120)
        page.terminate()
        page.wait()
        server.shutdown()
    if not answers or isinstance(answers[0], dict):
        raise RuntimeError(answers[0]["problem"] if answers else "the page did not answer in two minutes")
    return answers[0]


RUNNERS: dict[str, Callable[[Path], list[Top]]] = {
    "xllamacpp 2026.10": xllamacpp,
    "node-llama-cpp 3.21.1": node_llama_cpp,
    "wllama 3.8.1": wllama,
    "mistral.rs 0.9.5": mistralrs,
}


def agreement(run: Callable[[Path], list[Top]], file: Path, ours: list[torch.Tensor]) -> Agreement:
    """Return how the tops of a program compare with ours, or its last words."""
    try:
        tops = run(file)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Agreement(problem=f"refused: {' '.join(str(error).split())[:260]}")
    pairs = [(top, expected) for top, expected in zip(tops, ours, strict=True) if top is not None]
    if not pairs:
        return Agreement(problem="refused: no prompt was answered")
    behind = [float(expected.max() - expected[top[0][0]]) for top, expected in pairs]
    gaps = [abs(value - float(expected[token])) for top, expected in pairs for token, value in top if value is not None]
    return Agreement(behind.count(0.0), len(pairs), max(behind), max(gaps, default=None))


def header_differences(file: Path) -> list[str]:
    """Return what @huggingface/gguf reads otherwise than we do."""
    header = _printed("node", program("hf_gguf_header.mjs"), file, node_folder("@huggingface/gguf"))
    source = GGUFSource(file)
    infos = [source.info(name) for name in source.names()]
    expected = {info.name: [list(reversed(info.shape)), QUANT_TYPES[info.dtype].ggml_id] for info in infos}
    read = {name: [shape, number] for name, shape, number in header["tensors"]}
    different = [f"{name}: {read.get(name)} != {value}" for name, value in expected.items() if read.get(name) != value]
    for field in source.metadata:
        value = header["metadata"].get(field.key)
        if isinstance(field.value, str | int) and value != field.value:
            different.append(f"{field.key}: {value!r} != {field.value!r}")
        elif isinstance(field.value, list | tuple) and len(value or ()) != len(field.value):
            different.append(f"{field.key}: another length")
    return different


def decoded_by_libgguf(folder: Path) -> dict[str, str | None]:
    """Decode random blocks of every type by libgguf and by us; None where all bits are equal, else what is not."""
    folder.mkdir(exist_ok=True)
    python, generator = interpreter("python"), torch.Generator().manual_seed(0)
    blocks = {}
    for name, layout in QUANT_TYPES.items():
        if not layout.is_float:
            shape = (16, 8 * layout.block_bytes)
            blocks[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            np.save(folder / f"{name}.npy", blocks[name].numpy())
    (folder / "types.json").write_text(json.dumps({name: QUANT_TYPES[name].ggml_id for name in blocks}))
    problems = _printed(python, program("libgguf_decode.py"), folder)
    for name, packed in blocks.items():
        if problems[name] is None:
            ours, theirs = decode(name, packed).numpy(), np.load(folder / f"{name}.decoded.npy")
            same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
            problems[name] = None if same.all() else f"{(~same).sum()} of {same.size} weights differ"
    return problems


def _prompts_file(file: Path) -> Path:
    place = file.with_name("prompts.json")
    if not place.is_file():
        place.write_text(json.dumps(prompts()))
    return place


def _printed(*command: object) -> object:
    """Return the JSON of the last line; raises RuntimeError with the program's last words."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout).splitlines()
        reason = next((line for line in said if "Error" in line), said[-1] if said else "")
        raise RuntimeError(f"exit {done.returncode}: {reason}")
    return json.loads(lines[-1])


def main(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files, decoded = write_models(folder), decoded_by_libgguf(folder / "blocks")
    print("| type | libgguf 0.2.2 |", " | ".join(RUNNERS), "| header by @huggingface/gguf |")
    print("|---" * (len(RUNNERS) + 3) + "|")
    for name, file in files.items():
        if names and name not in names:
            continue
        ours = our_tops(file)
        bits = "" if name not in decoded else decoded[name] or "equal"
        cells = [str(agreement(run, file, ours)) for run in RUNNERS.values()]
        print("|", " | ".join([name, bits, *cells, "; ".join(header_differences(file)) or "equal"]), "|", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
