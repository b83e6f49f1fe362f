"""Step 4a, export: weights to bytes, by our encoder or by ggml; `exporters` puts them into files.

    stream, parts                   a plan's tensors, loaded and encoded in parts
    interface                       what every encoder takes and refuses
    dynquant_encoder, search        our encoder, and its numerics
    ggml                            the reference: bytes of llama-quantize
    vllm, linears                   linear layers in the schemes that vLLM reads
    store, scheme_store             encoded once and kept, for plans that are tried
    remote                          on a Ray cluster

`stream.load_encoder` makes an encoder by its name.
"""
