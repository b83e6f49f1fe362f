"""python vllm_logprobs.py REQUEST.json OUTPUT: log-probabilities that vLLM gives the tokens of texts, on the CPU.

The request has `tokens`, a list of texts, and `models`, a directory by name. OUTPUT/NAME.npy gets a row for each token
that has one after it, over the whole vocabulary; a line of JSON on stdout says what became of each model.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

# One process, no downloads, and latent attention computed as plain attention: vLLM's own kernels for it know the head
# sizes of DeepSeek's published models alone.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def logprobs(model: str, texts: list[list[int]]) -> np.ndarray:
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    # vLLM 0.32's C++ loop for the CPU misreads interleaved heads of DeepSeek (KL 1.7 for the original in float32); its
    # own form in PyTorch is right (KL below 1e-6).
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    options = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "enable_prefix_caching": False}
    options |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}  # of a GPU, where there is one
    engine = LLM(model, dtype="bfloat16", max_logprobs=-1, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    rows = []
    for answer in answers:
        values = answer.prompt_logprobs
        for start, end in list(zip(values.start_indices, values.end_indices, strict=True))[1:]:
            ids = np.array(values.token_ids[start:end])
            row = np.empty(ids.max() + 1, np.float32)
            row[ids] = values.logprobs[start:end]
            rows.append(row)
    return np.stack(rows)


def main() -> None:
    request, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm.distributed import cleanup_dist_env_and_memory

    for name, model in request["models"].items():
        problem = None
        try:
            np.save(output / f"{name}.npy", logprobs(model, request["tokens"]))
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(json.dumps({"name": name, "problem": problem}), flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
