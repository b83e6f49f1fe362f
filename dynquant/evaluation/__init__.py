"""Step 5, eval: how far a quantized model is from its original. `evaluate.evaluate` is the way in.

    evaluate, options, report    what is asked of which model in which order, and the tables of it
    tasks                        questions, writing, lm-evaluation-harness; says where a new task is written
    distributions, statistics    the KL of every command, and intervals
    runners, llama_cpp           models that run, in transformers and in llama.cpp, behind one protocol
    reference_cache              what an original said, on disk
    rendered_model               a running model that takes on the types of any plan: `plan --select` scores by it
    pictures                     candidates and questions with pictures
    agreement                    whether llama.cpp and transformers compute the same, before anything is quantized

Two models that are compared see the same token ids, those of the original.
"""
