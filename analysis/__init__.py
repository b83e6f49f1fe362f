"""Step 2, analyze: what quantization breaks, and the plots and pages that show it.

    errors         2a: what every type does to every tensor (errors.json); `errors.stage.analyze` is the way in
    sensitivity    2b: what an error in each tensor costs in KL
    outliers       single weights and experts that a model cannot do without
    plots, report  report.html of a plan
    costs          time and memory of a run, estimated
    bench          measurements that are run by hand

Planning rests on what the first three find.
"""
