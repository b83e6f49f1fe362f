"""The words of the report: a heading for every plot, two sentences on how to read it, and why it may be absent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlotText:
    """Plain text, escaped by the report."""

    heading: str
    how_to_read: str
    needs: str  # input that a report without this plot lacks


PLOT_TEXTS = {
    "plan_map": PlotText(
        "What was kept and what was crushed",
        "Each cell is the type of one tensor: red cells are below 4 bits per weight, blue cells at 4 or more. "
        "A blue cell in a red column is a tensor that the plan protects, and the plan table says why.",
        "a model with layers",
    ),
    "size_breakdown": PlotText(
        "Where the bytes are",
        "The upper bars are the tensors of the 16-bit original and of this plan to one scale. "
        "Below, a role whose coloured bar is shorter than its hatched one is cheaper than the average weight; bits are "
        "won where the hatched bar is long.",
        "a plan",
    ),
    "error_by_layer": PlotText(
        "Which layers must not be quantized: error of the outputs",
        "Each line is one type: the error that it puts into a tensor's output on text held back from calibration, "
        "worst tensor of each layer, on a logarithmic axis shared by all panels. Spikes and raised first layers must "
        "stay precise; the black line is what the plan ships and should be low where the coloured lines spike.",
        "an error table with activation errors, measured on held-back calibration samples",
    ),
    "weight_error_by_layer": PlotText(
        "Which layers must not be quantized: error of the weights",
        "The same for the weights alone, without any text. Where a tensor is ordinary here but spikes above, its "
        "weights are ordinary and its inputs are not: look for super weights and outlier channels.",
        "an error table",
    ),
    "token_errors": PlotText(
        "Image tokens and text tokens",
        "What one type near 4 bits does to the output of every matrix on held-back image tokens and on text tokens. "
        "Where the lines part, statistics of text alone would have served one kind of token only; shaded layers are "
        "those of cross-attention, whose keys and values see pictures.",
        "calibration on pictures (“dynquant plan --data FILE”)",
    ),
    "super_weights": PlotText(
        "Super weights",
        "A super weight is one scalar of a down projection that a model cannot do without: it shows as a lone spike in "
        "the layer's largest input and output. The star gives its row (output channel) and column (input channel); "
        "GGUF stores one type for a whole tensor, so that tensor is kept precise.",
        "calibration statistics with the largest inputs and outputs of the down projections",
    ),
    "expert_heatmap": PlotText(
        "Experts: tokens seen and error",
        "One row a layer, one column an expert: how many calibration tokens the router sent there, and what the plan's "
        "types do to the output of the expert's worst projection. A cross marks an expert with too few tokens to be "
        "measured by itself; dark cells of high error with many tokens are where more bits would help most.",
        "routed experts with calibration counts; this model has none, or was not calibrated",
    ),
    "frontier": PlotText(
        "Size against predicted error",
        "Each point is one way to quantize this model, priced with the same error table; lower left is better, and a "
        "fixed recipe above the planner's line pays more error for its bytes. This is a prediction that ranks plans, "
        "and “dynquant eval” measures what they do.",
        "an error table with importance-weighted errors, priced at other budgets",
    ),
    "selection": PlotText(
        "Candidate plans, measured",
        "Each marker is a whole plan, rendered from the bytes of the table's encoder and run on text that neither "
        "calibration nor any price has seen. To the right the planner expected more damage, above there was more; "
        "what counts is that the order agrees. Prices add up errors to second order, so that at low bits the "
        "measured KL is higher.",
        "a selection (“dynquant plan --select”)",
    ),
    "measured_frontier": PlotText(
        "Size against measured damage",
        "Plans and recipes rendered and run instead of priced. Lower left is better on the left, upper left on the "
        "right. A fixed recipe above the planner's line loses more than it must at its size.",
        "a measured frontier (“dynquant plan --frontier 1.6:4.5”)",
    ),
}
