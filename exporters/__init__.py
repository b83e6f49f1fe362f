"""Step 4b, export: the files that other runtimes load. `stage.export` is the way in.

    stage, options, output                       a plan and what belongs to it gathered; what exporters share
    gguf, safetensors, compressed_tensors        a plan as files, one module a format
    closing_pass, tuning                         trains what has no codes in a written file, and keeps it if it helps
    asymmetric                                   encodes under the inputs that the quantized model itself has
    adapter_gguf                                 a LoRA adapter for llama.cpp
    model_card, modelfile, compressed_config     small files beside the weights

Blocks come from `encoding`, entries of a plan from `recipes.build_plan`.
"""
