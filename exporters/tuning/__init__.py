"""The training of the closing pass.

    training                      how long, which share of the change is taken, whether it is kept
    tensors                       what is trained
    interface                     a quantized model as the training sees it; `gguf_file` and `compressed_file` are two
    export                        exports that are tuned on the way to their output

`closing_pass`, a folder up, says when it can run, and runs it over a written file.
"""
