"""Formats of stored weights, as layouts and their decoding: quant types of GGUF, and the schemes that vLLM reads.

`decode` is all a reader of weights needs. Beside the `decode_NAME` of a type stands `pack_NAME`, which puts fields into
blocks; what the fields should be is searched in `encoding`. A new quant type of ggml is written into:

    quant_types                                  `_NAMES`, and the tables there of what llama.cpp keeps in code
    plain_quants, k_quants or codebook_quants    `decode_NAME`, found by its name, and `pack_NAME`
    scale_fields                                 `_OFFSETS`, where blocks have fp16 numbers, which a closing pass trains
    kernels.planes, kernels.triton               fields as planes, and their kernels: packed models run by these
    encoding.search.layouts                      `LAYOUTS`; without it, dynquant's encoder leaves the type to ggml's
    checkpoints.gguf_layout                      `_FILE_TYPE_OF`, where llama.cpp calls files of it otherwise
    analysis.errors.options                      `DEFAULT_TYPES`, for `plan` to try it without --types

The first two rows are enough to plan, to export as GGUF and to evaluate in llama.cpp. All else goes by the registry:
error table, planner, exporters and readers, and tests of decoding, planes and ggml.
"""

from dynquant.formats.decode import decode

__all__ = ["decode"]
