"""Step 3, plan: a quant type for every matrix. `stage.make_plan` is the way in.

    options, target         what is asked for: a budget, a memory, a recipe, another file's types
    planner                 floors by role and exceptions from measurement, and the reason of every type
    allocate                the types of the lowest cost within the bytes, under these floors
    chooser                 both at the target's budget, for any prices of tensors
    selecting               `--select`, `--frontier`, `--check-plans`: plans are made, rendered and scored by their KL
      search                the plans, their scores, and the choice
      text                  the text that they are scored on
      selection             selection.json, the record of that
    frontier                the curve of predicted errors in the report
    vision_modules          vision tower and projector as wholes
    pruning, memory         experts of no bits; `--fits`

Why a tensor has its type is the `reason` of its entry in plan.json, written where the type was decided: by cost in
`planner` (`_reason`), without cost in `recipes.held_types`, for modules in `vision_modules`, by a recipe in
`recipes.presets`, `type_lists` or `command_line`. `recipes.build_plan` adds why another type is stored than was wanted.
What a type costs is in errors.json, from `analysis.errors` and `analysis.sensitivity`.
"""
