"""python generation.py FOLDER BATCH...: how fast vLLM decodes with dummy weights, and their GPU memory, as JSON.

The bench runs it in vLLM's interpreter, where dynquant need not be. FOLDER has a config.json. A time is that of the
last 64 of 72 tokens after prompts of 32, the better of two; a GPU replays CUDA graphs. The line is
{"gib": ..., "speeds": [...]}, tokens a second for each BATCH, or {"problem": ...} with vLLM's words.
"""

import json
import os
import sys
import time

PROMPT, SHORT, LONG = 32, 8, 72

# One process, whose error is the answer; no downloads; latent attention of any head size, as plain attention.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def measure(folder: str, batches: list[int]) -> dict[str, object]:
    """Return what the line has of a model that loads."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda_alike()
    cache_bytes = 1 << 31 if on_gpu else 1 << 28
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches}
    engine = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=max(batches),
        enable_prefix_caching=False, gpu_memory_utilization=0.02, kv_cache_memory_bytes=cache_bytes,
        **{"compilation_config": graphs} if on_gpu else {"enforce_eager": True},
    )  # fmt: skip
    gib = None
    if on_gpu:
        import torch

        gib = (torch.cuda.memory_allocated() - cache_bytes) / 2**30

    def seconds(batch: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [7 * row + place + 10 for place in range(PROMPT)]} for row in range(batch)]
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    speeds = []
    for batch in batches:
        seconds(batch, 3)  # compiles and warms up
        short, long = (min(seconds(batch, tokens) for _ in range(2)) for tokens in (SHORT, LONG))
        speeds.append(batch * (LONG - SHORT) / (long - short))
    return {"gib": gib, "speeds": speeds}


def main() -> None:
    try:
        answer = measure(sys.argv[1], [int(batch) for batch in sys.argv[2:]])
    except Exception as error:
        answer = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
