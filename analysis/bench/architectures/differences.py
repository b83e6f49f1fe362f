"""Shows what known differences of llama.cpp come from: transformers, changed to compute the same, then agrees with it.

    python -m dynquant.analysis.bench.architectures.differences [NAME...] --llama-cpp DIR

One line for each tiny checkpoint: the mean KL over 512 tokens as it is, that of the changed
model, and of the changed model in float64 from itself in float32: values beside an edge of a table fall to either side.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dynquant.analysis.bench.architectures.checkpoints import write_tiny
from dynquant.calibration.run import text_inputs
from dynquant.checkpoints.gguf_layout import write_float32
from dynquant.evaluation.agreement.same_computation import NUM_TOKENS, mean_kl
from dynquant.evaluation.llama_cpp_alone import separate_window_logits
from dynquant.evaluation.runners import HuggingFaceRunner
from dynquant.families.open import open_model
from dynquant.running.load import load_hf

NAMES = ("phimoe", "nemotron_h", "gpt_oss", "gemma2", "gemma3n", "gemma4", "starcoder2", "gpt_neox")


def table_gelu(_module: nn.Module, x: Tensor) -> Tensor:
    """Return GELU as ggml_vec_gelu_f32 does: of 16-bit values and rounded to such, with nothing between the two."""
    rounded = functional.gelu(x.float().half().float(), approximate="tanh").half()
    return torch.where(x <= -10, 0, torch.where(x >= 10, x, rounded.to(x.dtype)))


def rms_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return the norm of phi3.cpp, which subtracts no mean."""
    return functional.rms_norm(x, module.normalized_shape, module.weight, module.eps) + module.bias


def softmax_router(module: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, weights and experts of build_moe_ffn: the best of a softmax, to a sum of one."""
    logits = functional.linear(x, module.weight)
    weights, experts = logits.softmax(-1).topk(module.top_k, -1)
    return logits, weights / weights.sum(-1, keepdim=True), experts


def sparse(module: nn.Module, x: Tensor) -> Tensor:
    """Return what gaussian_topk of gemma3n.cpp leaves: the deviation divides by n - 1."""
    deviations = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(module.activation_sparsity))
    return (x - x.mean(-1, keepdim=True) - x.std(-1, keepdim=True) * deviations).relu()


def change(hf_model: nn.Module) -> None:
    """Let a model of transformers compute what llama.cpp computes in its place."""
    for module in hf_model.modules():
        kind = type(module).__name__
        if "GELU" in kind:
            module.forward = MethodType(table_gelu, module)
        elif kind == "LayerNorm" and hf_model.config.model_type == "phimoe":
            module.forward = MethodType(rms_norm, module)
        elif kind == "PhimoeTopKRouter":
            module.forward = MethodType(softmax_router, module)
        elif kind == "Gemma3nTextMLP":
            module._gaussian_topk = MethodType(sparse, module)
        elif kind == "NemotronHMamba2Mixer":
            module.time_step_limit = (0.0, float("inf"))
        elif kind == "GptOssRotaryEmbedding":
            module.config.rope_parameters["truncate"] = True
            module.inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](module.config, module.inv_freq.device)


def main() -> None:
    """Parse, run, print a line for every name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    asked = parser.parse_args()
    os.environ["LLAMA_CPP_DIR"] = str(asked.llama_cpp.resolve())
    print("| architecture | KL | of the changed model | its float64 from its float32 |\n|---|---|---|---|")
    for name in asked.names:
        with TemporaryDirectory() as folder:
            figures = _figures(name, Path(folder))
        print(f"| {name} | {' | '.join(f'{kl:.1e}' for kl in figures)} |", flush=True)


def _figures(name: str, folder: Path) -> tuple[float, float, float]:
    model = open_model(write_tiny(name, folder / "model"))
    tokens = text_inputs(model, None, tokens=NUM_TOKENS, window=NUM_TOKENS).windows[0].tolist()
    expected = separate_window_logits(write_float32(model, folder / "f32.gguf"), tokens, 1)
    hf_model = load_hf(model, dtype=torch.float32)
    original = HuggingFaceRunner(hf_model).window_logits(tokens)
    change(hf_model)
    changed = HuggingFaceRunner(hf_model).window_logits(tokens)
    hf_model.set_experts_implementation("eager")  # grouped products have no float64
    exact = HuggingFaceRunner(hf_model.double()).window_logits(tokens)
    return mean_kl(original, expected), mean_kl(changed, expected), mean_kl(exact, changed)


if __name__ == "__main__":
    main()
