"""Trains an adapter on a packed GGUF, and compares llama.cpp with PyTorch on base and adapter.

    python -m tests.helpers.adapter_kl MODEL.gguf STATS TRAINING_TEXT TEST_TEXT DIRECTORY [STEPS]

Also merges it under the statistics of the model's export, with each encoder. Leaves the adapter, its llama.cpp file and
the decoded F32 base in the directory. KL is the mean over the tokens of
windows of 256 from the beginning of the test text, with half of its 95 % interval.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import torch

import dynquant
from dynquant.evaluation.llama_cpp import llama_encode, llama_vocabulary
from dynquant.exporters.adapter_gguf import export_adapter
from dynquant.families.open import open_model
from dynquant.lora import add_adapter, load_adapter, merge
from tests.helpers.tiny_models import write_f32

WINDOW, NUM_WINDOWS, BATCH = 256, 16, 4
Logits = Callable[[list[int]], torch.Tensor]


def windows(file: Path, text: Path) -> list[list[int]]:
    with llama_vocabulary(file) as (_, vocabulary):
        tokens = llama_encode(vocabulary, text.read_text(encoding="utf-8"), add_special=False)
    return [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]


def train(adapted: torch.nn.Module, batches: list[list[int]], steps: int) -> Iterator[float]:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        start = step * BATCH % (len(batches) - BATCH + 1)
        tokens = torch.tensor(batches[start : start + BATCH])
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def in_pytorch(model: torch.nn.Module) -> Logits:
    @torch.inference_mode()
    def run(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0]

    return run


def in_llama_cpp(file: Path, adapter: Path | None = None) -> Logits:
    llama = llama_cpp.Llama(
        str(file), lora_path=adapter and str(adapter), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip

    def run(tokens: list[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(tokens)
        return torch.from_numpy(llama.scores[: len(tokens)].copy())

    return run


def compare(name: str, reference: Logits, candidate: Logits, texts: list[list[int]]) -> None:
    kls = []
    for tokens in texts:
        p, q = (run(tokens).double().log_softmax(-1) for run in (reference, candidate))
        kls.append((p.exp() * (p - q)).sum(-1))
    each = torch.cat(kls)
    half = 1.96 * each.std() / len(each) ** 0.5
    print(f"{name:<58}{each.mean():.3e} ± {half:.1e}  ({len(each)} tokens)", flush=True)


def main(file: str, stats: str, training: str, test: str, directory: str, steps: str = "60") -> None:
    path, folder = Path(file), Path(directory)
    torch.manual_seed(0)
    adapted = add_adapter(dynquant.load(path), llama_cpp=True)
    start = time.monotonic()
    losses = list(train(adapted, windows(path, Path(training)), int(steps)))
    print(f"{steps} steps in {time.monotonic() - start:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    adapted.save_pretrained(folder / "adapter")
    exported = export_adapter(folder / "adapter", folder / "adapter.gguf")
    decoded = write_f32(open_model(path), folder / "decoded.gguf")
    adapted.eval()

    on = in_pytorch(adapted)

    def off(tokens: list[int]) -> torch.Tensor:
        with adapted.disable_adapter():
            return on(tokens)

    texts = windows(path, Path(test))[:NUM_WINDOWS]
    compare("PyTorch without the adapter", on, off, texts)
    compare("llama.cpp, decoded base", on, in_llama_cpp(decoded, exported), texts)
    compare("llama.cpp, packed base", on, in_llama_cpp(path, exported), texts)
    compare("llama.cpp, decoded base, both without the adapter", off, in_llama_cpp(decoded), texts)
    compare("llama.cpp, packed base, both without the adapter", off, in_llama_cpp(path), texts)
    for encoder in ("ggml", "dynquant"):
        merged = merge(load_adapter(dynquant.load(path), folder / "adapter"), stats=stats, encoder=encoder)
        compare(f"PyTorch, merged by the encoder {encoder}", on, in_pytorch(merged), texts)


if __name__ == "__main__":
    main(*sys.argv[1:])
