"""Which tensors llama.cpp applies an adapter to.

Its loader takes a pair of factors for any tensor of the model, but only products that its graph makes by
`build_lora_mm` and `build_lora_mm_id` use them; the rest is left out without a word. Found by
loading an adapter of each tensor in turn and comparing logits (llama-cpp-python 0.3.36; `tests/test_export_adapter.py`
does it again).
"""

import re

_LEFT_OUT = {"deepseek2": r"blk\.\d+\.attn_(q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\.weight|output\.weight"}


def takes_adapter(arch: str, name: str) -> bool:
    """Return whether an adapter of the matrix `name` has an effect in the graph of `arch`; one of an embedding has
    none."""
    return name != "token_embd.weight" and not re.fullmatch(_LEFT_OUT.get(arch, ""), name)
