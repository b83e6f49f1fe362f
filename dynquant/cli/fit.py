"""`dynquant fit`: where the parts of a file go, on the GPU and in host memory."""

from dataclasses import asdict, fields

from dynquant.cli.terminal import console
from dynquant.cli.terminal.parameters import AsJson
from dynquant.planning.options import FitOptions
from dynquant.resources import human_bytes


def fit(options: FitOptions, as_json: AsJson = False) -> None:
    """Print llama.cpp's options that put as much of a file on the GPU as fits, and the bytes of every buffer.

    Example: dynquant fit model.gguf --gpu 24GB --ram 64GB --context 16384
    """
    from dynquant.planning.placement import fit as place

    placement = place(options)
    flags = placement.flags(options.context, options.kv_type)
    if as_json:
        console.show_json(asdict(placement) | {"flags": flags})
        return
    rows = []
    for name in (*(field.name for field in fields(placement.gpu)), "total"):
        sizes = (getattr(side, name) for side in (placement.gpu, placement.host))
        rows.append((name.replace("_", " ").replace("kv", "KV").replace("cuda", "CUDA"), *map(human_bytes, sizes)))
    rows.append(("of", options.gpu or "none", options.ram))
    console.print_table(f"{options.file.name}, {options.context:,} tokens", ("", "GPU", "host"), rows)
    on_gpu = placement.layers_on_gpu
    experts = f", the experts of the first {placement.cpu_moe} in host memory" if placement.cpu_moe else ""
    console.say(f"{on_gpu} of {placement.layers} layers on the GPU{experts}")
    console.say(f"llama-server -m {options.file} {flags}")
