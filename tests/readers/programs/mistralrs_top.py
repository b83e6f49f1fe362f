"""python mistralrs_top.py MODEL.gguf PROMPTS.json: the likeliest next tokens as mistral.rs gives them, from text."""

import json
import sys
from pathlib import Path

from mistralrs import CompletionRequest, Runner, Which

model = Path(sys.argv[1])
which = Which.GGUF(quantized_model_id=str(model.parent), quantized_filename=model.name, tok_model_id=None)
runner = Runner(which=which, no_paged_attn=True)
tops = []
for prompt in json.loads(Path(sys.argv[2]).read_text()):
    request = CompletionRequest(prompt=prompt["text"], model="default", max_tokens=1, temperature=0.0)
    text = runner.send_completion_request(request).choices[0].text
    ids = runner.tokenize_text(text, add_special_tokens=False, enable_thinking=None)
    # A token that is a part of a letter comes back as another text, which no longer tells the token.
    tops.append([[ids[0], None]] if len(ids) == 1 and "\ufffd" not in text else None)
print(json.dumps(tops))
