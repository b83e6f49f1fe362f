"""`dynquant analyze`, and `dynquant super-weights`, which looks for single weights."""

from typing import Annotated

from dynquant.analysis.errors.options import AnalyzeOptions
from dynquant.analysis.outliers.options import SuperWeightOptions
from dynquant.cli.terminal import console
from dynquant.cli.terminal.parameters import AsJson
from dynquant.options import Only
from dynquant.session import Session


def analyze(options: AnalyzeOptions, session: Annotated[Session, Only(("seed", "device", "threads"))]) -> None:
    """Measure what every candidate type does to every tensor: bytes, weight error, activation error.

    Example: dynquant analyze ./model --stats stats.safetensors --types iq1_s,iq2_xxs,q4_k
    """
    from dynquant.analysis.errors import stage

    table = stage.analyze(options, session)
    console.say(f"{options.output}: {len(table.tensors())} tensors, {len(table.rows)} rows")


def super_weights(options: SuperWeightOptions, session: Annotated[Session, Only(())], as_json: AsJson = False) -> None:
    """Find the single weights that the model cannot do without, and show what happens when they are zeroed.

    Example: dynquant super-weights ./model --text wikitext.txt
    """
    from dynquant.analysis.outliers.stage import look_for_super_weights

    search = look_for_super_weights(options, session)
    if as_json:
        console.show_json([weight.model_dump() | {"ablation": e and e.model_dump()} for weight, e in search.weights])
        return
    rows = []
    for weight, effect in search.weights:
        expert = "" if weight.expert is None else f" expert {weight.expert}"
        sizes = f"{weight.value:.4f}", f"{weight.max_in:.1f}", f"{weight.max_out:.1f}"
        losses = (effect.perplexity, effect.without_super_weight, effect.without_next_largest) if effect else ()
        perplexities = [f"{perplexity:.2f}" for perplexity in losses] or [""] * 3
        rows.append((f"{weight.name}{expert} [{weight.row},{weight.col}]", *sizes, *perplexities))
    columns = ("super weight", "value", "max |in|", "max |out|", "perplexity", "zeroed", "1000 next-largest zeroed")
    title = f"{search.model}: {len(rows)} super weights on {search.num_tokens} tokens"
    console.print_table(title, columns, rows)
