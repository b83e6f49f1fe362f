"""Random Hugging Face checkpoints of every convertible family, small enough to run both runtimes in a second.

Weights are drawn larger than a trained model's initialization (see `INIT_SCALE`): at transformers' default of 0.02 the
logits of so narrow a model are nearly flat, and a permuted head or a wrong rope would hardly move them. Norms, biases
and router corrections are randomized too, because their defaults of one and zero hide a swap.
"""

import shutil
from pathlib import Path

import gguf
import torch
from gguf import GGUFValueType

from dynquant.checkpoints.model import Model
from tests.helpers.gguf_writing import finish

INIT_SCALE = 0.08
VOCAB_SIZE = 8192
_COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}
_COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_COMMON |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_TIED = {"tie_word_embeddings": True}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 96, "num_hidden_layers": 3}
_MLA |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48, "moe_intermediate_size": 64}
_MLA |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
_MLA |= {"routed_scaling_factor": 1.7}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
_YARN |= {"beta_fast": 32, "beta_slow": 1}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "original_max_position_embeddings": 128}
_LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MOE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3}
_QWEN2_MOE = _MOE | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False}
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_GEMMA = _TIED | {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 96}
_PERIOD_3 = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def _yarn_of_deepseek(mscale: float) -> dict[str, object]:
    return {"rope_parameters": {**_YARN, "mscale": mscale, "mscale_all_dim": mscale}}


TINY: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", _TIED),
    "llama-rope3": ("llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**_YARN, "attention_factor": 1.5}}),
    "qwen3": ("qwen3", _TIED | {"head_dim": 80}),
    "qwen2-moe": ("qwen2_moe", _QWEN2_MOE),
    "qwen2-moe-tied": ("qwen2_moe", _QWEN2_MOE | _TIED),
    "qwen3-moe": ("qwen3_moe", _MOE | {"head_dim": 64, "norm_topk_prob": True}),
    "gemma3": ("gemma3_text", _GEMMA | {"num_hidden_layers": 7, "rope_parameters": _GEMMA_ROPE}),
    "gemma3-period-3": (
        "gemma3_text",
        _GEMMA | {"num_hidden_layers": 4, "layer_types": _PERIOD_3, "final_logit_softcapping": 30.0},
    ),
    "deepseek-v2": ("deepseek_v2", _MLA | _ONE_GROUP),
    "deepseek-v2-lite": ("deepseek_v2", {**_MLA, "q_lora_rank": None, **_yarn_of_deepseek(0.707)}),
    "deepseek-v3": ("deepseek_v3", _MLA | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
    "deepseek-v3-yarn": ("deepseek_v3", _MLA | _ONE_GROUP | _yarn_of_deepseek(1.0)),
}
"""Name -> (model_type, what differs from the common sizes)."""


def save_tiny(name: str, directory: Path, tokenizer_from: Path, **changes: object) -> Path:
    """Save the tiny checkpoint `name` with the tokenizer of another directory; returns `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = TINY[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **differences, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / file, directory / file)
    return directory


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Fill every parameter and router correction in place."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.copy_(0.1 * noise)
        elif "norm" in name:
            tensor.add_(0.2 * noise)
        elif name.endswith(("weight", "bias", "gate_up_proj", "down_proj")):
            tensor.copy_(INIT_SCALE * noise)


def write_f32(model: Model, path: Path, *, with_tensors: bool = True) -> Path:
    """Write keys and every tensor, as F32, with gguf-py alone; returns `path`."""
    writer = gguf.GGUFWriter(path, model.arch)
    for field in model.metadata:
        if field.key == "general.architecture":
            continue
        sub_type = field.item_type if field.value_type == GGUFValueType.ARRAY else None
        writer.add_key_value(field.key, field.value, field.value_type, sub_type)
    for name in model.source.names() if with_tensors else ():
        writer.add_tensor(name, model.source.load(name).numpy())
    finish(writer)
    return path


def llama_token_ids(path: Path, text: str) -> list[int]:
    """Ids that llama.cpp's tokenizer gives; special tokens in the text are recognized, none are added."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 8))()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), False, True)
    llama_cpp.llama_model_free(model)
    return list(tokens[:count])


def hf_logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    """Float32 logits of transformers with eager attention, [tokens, vocab]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def llama_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """Float32 logits of llama.cpp with an F32 cache and flash attention off, [tokens, vocab]."""
    from dynquant.evaluation.runners import open_runner

    runner = open_runner(path)
    try:
        return runner.window_logits(tokens)
    finally:
        runner.close()


def mean_kl(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean KL(reference || candidate) over positions, in nats."""
    reference, candidate = (logits.double().log_softmax(-1) for logits in (reference, candidate))
    return float((reference.exp() * (reference - candidate)).sum(-1).mean())
