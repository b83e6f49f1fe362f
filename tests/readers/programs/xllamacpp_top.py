"""python xllamacpp_top.py MODEL.gguf PROMPTS.json: the likeliest next tokens as llama.cpp's server gives them."""

import json
import sys
from pathlib import Path

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
tops = []
for prompt in json.loads(Path(sys.argv[2]).read_text()):
    request = {"prompt": prompt["tokens"], "max_tokens": 1, "temperature": 0.0, "logprobs": 5}
    answer = server.handle_completions(request)
    if "choices" not in answer:
        raise SystemExit(json.dumps(answer))
    logprobs = answer["choices"][0]["logprobs"]  # none where the token is a part of a letter
    top = logprobs and logprobs["content"][0]["top_logprobs"]
    tops.append(top and [[entry["id"], entry["logprob"]] for entry in top])
print(json.dumps(tops))
