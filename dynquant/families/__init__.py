"""From a Hugging Face checkpoint to GGUF names and metadata, and back. `open.open_model` is the way in.

    text, common        families of language models, one file each, and what they are written with
    vision              vision tower and projector: the mmproj file
    converter           any other architecture, by llama.cpp's own converter
    tokenizers          tokenizers in GGUF terms
    from_gguf           the way back: the config.json of a GGUF file
    complete_gguf       the check of every GGUF file that is opened
    linear_layers       a checkpoint's layers under its own names, as vLLM sees them
    pruned, model_kind  checkpoints with fewer experts; models told apart by their small files

An architecture that llama.cpp's converter knows is read without a line here. A family of its own needs no source tree
of llama.cpp, and its GGUF files run in transformers. It is written into:

    text/NAME.py                    `write_NAME_keys` and `add_NAME_tensors`, of the parts in `common.decoder` or, for
                                    tensors with other names, of `ConversionBook.add` and its like
    text/registry.py                `FAMILIES`
    common/metadata.py              `KEYS`: the numbers that config.json and GGUF both state
    from_gguf.py                    its configuration from those keys, in `_READERS`
    checkpoints/tensor_roles.py     `_PARTS`, where GGUF itself calls tensors by new names
    tests/helpers/tiny_models.py    `TINY`: a tiny checkpoint, whose logits tests compare in both runtimes

Where its tensors lie in transformers' model is traced (`running.parameter_map`): no map of those names is written.
"""
