"""Tasks beside KL and perplexity: multiple-choice questions, what a model writes itself, and lm-evaluation-harness.

A task that lm-evaluation-harness has, or a .yaml of its kind, needs no code. One of our own is written into:

    NAME.py                   its inputs, what a `runners.LogitRunner` makes of them, and a record of both models
                              compared; `generation` is the shortest example
    evaluation/options.py     `TEXT_TASKS`, its flags, and in `EvalOptions.idle` when these do nothing
    evaluation/evaluate.py    `_inputs` reads, a method of `_Run` asks one model (`_cached` keeps what an original
                              answers), and `_evaluate_on_text` calls it for both
    evaluation/report.py      a field of `EvalReport`, and its rows in `EvalReport.sections`
"""
