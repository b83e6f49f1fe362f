"""Times the encoding of a plan's tensors on local Ray clusters of 1, 2, ... nodes of one core, or of so many GPUs.

    python tests/examples/ray_scaling.py MODEL --plan DIR/plan.json --nodes 1,2 --repeat 3 --tensors blk.1.
    python tests/examples/ray_scaling.py MODEL --plan DIR/plan.json --nodes 1,2 --device cuda

GPUs are of one node, which numbers them. Workers are warm: each has encoded before. Efficiency is the time of one node
over N times that of N nodes. What else the machine does shows in the CPU seconds that a worker got per second of
encoding, 1.0 on an idle machine; how well the driver keeps workers fed, in the share of their time that they encode.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from ray.cluster_utils import Cluster

from dynquant.calibration.second_moments import load_beside
from dynquant.calibration.statistics import CalibrationStats
from dynquant.encoding.parts import PartLimits, TensorPart
from dynquant.encoding.remote import EncoderChoice, StoredFiles, _encode_from_storage
from dynquant.encoding.stream import TensorEncoder, guidance_of, load_encoder
from dynquant.families.open import open_model
from dynquant.recipes.plan import Plan
from dynquant.resources import parse_size
from dynquant.running.cluster import StoredModel, TaskNeeds, open_ray


@dataclass(frozen=True)
class Timed:
    """Encodes a part and tells seconds by the clock and of the CPU."""

    choice: EncoderChoice
    files: StoredFiles

    def __call__(self, part: TensorPart) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        _encode_from_storage(self.choice, self.files, False, part)
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(task: Timed, parts: list[TensorPart], nodes: int) -> tuple[float, float, float]:
    """Seconds until all parts are encoded, those that workers encoded, and their CPU seconds."""
    on_gpu = task.choice.device == "cuda"
    head = {"num_cpus": nodes, "num_gpus": nodes} if on_gpu else {"num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(0 if on_gpu else nodes - 1):
        cluster.add_node(num_cpus=1)
    needs = TaskNeeds(gpus=int(on_gpu))
    try:
        with open_ray(cluster.address) as pool:
            list(pool.run(task, parts[: 4 * nodes], needs))
            begin = time.perf_counter()
            found = [times for _, times in pool.run(task, parts, needs)]
            seconds = time.perf_counter() - begin
    finally:
        cluster.shutdown()
    return seconds, sum(wall for wall, _ in found), sum(cpu for _, cpu in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--nodes", default="1,2")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tensors", default="", help="Only tensors whose names begin so.")
    parser.add_argument("--max-memory", default="1GiB", help="Of one part.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    model, plan, encoder = open_model(given.model), Plan.load(given.plan), load_encoder("dynquant", given.device)
    stats_path = given.plan.with_name("stats.safetensors")
    stats = CalibrationStats.load(stats_path)
    guidance = guidance_of(stats, load_beside(stats_path, stats))
    chosen = tuple(entry for entry in plan.entries if entry.name.startswith(given.tensors))
    plan = plan.model_copy(update={"entries": chosen})
    limits = PartLimits(parse_size(given.max_memory))
    by_tensor = TensorEncoder(model, guidance, encoder, limits=limits).parts(plan, at_once=1)
    parts = [part for several in by_tensor.values() for part in several]
    files = StoredFiles(StoredModel.of(model), stats_path.resolve(), use_moments=True)
    task = Timed(EncoderChoice.of(encoder, given.device, 1), files)
    print(f"{len(parts)} parts, {sum(part.num_weights for part in parts):,} weights", flush=True)
    unit = "GPUs" if given.device == "cuda" else "nodes"
    for _ in range(given.repeat):
        single = None
        for nodes in map(int, given.nodes.split(",")):
            seconds, busy, cpu = measure(task, parts, nodes)
            single = single or nodes * seconds
            print(
                f"{nodes} {unit}: {seconds:.1f} s, efficiency {single / (nodes * seconds):.0%}, "
                f"workers encode {busy / (nodes * seconds):.0%} of the time and get {cpu / busy:.2f} CPU s per s, "
                f"{cpu:.1f} CPU s in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
