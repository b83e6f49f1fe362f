"""What the benchmark beside vllm-gguf-plugin prepares and writes; its kernels need a GPU and the plugin."""

import pytest
import torch

pytest.importorskip("triton")

from dynquant.kernels.bench import gguf_plugin


@pytest.mark.parametrize("tokens", [1, 70])
def test_pairs_are_aligned_to_blocks_of_one_expert(tokens: int) -> None:
    ids = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(5)).topk(3).indices
    pairs, experts, used = gguf_plugin.aligned(ids, 4, 16)
    assert len(pairs) == 4 * len(experts)
    places = pairs[: int(used)].view(-1, 4)
    real = places < ids.numel()
    assert sorted(places[real].tolist()) == list(range(ids.numel()))
    assert (pairs[int(used) :] == ids.numel()).all()
    expert_of_place = experts[: len(places), None].expand(-1, 4)
    assert (expert_of_place[real] == ids.flatten()[places[real].long()]).all()
    assert (experts[len(places) :] == -1).all()


def test_a_plugin_that_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match="vllm-gguf-plugin"):
        gguf_plugin.load_plugin("plugin CUDA")


def test_the_table_has_speeds_beside_bf16_and_what_failed() -> None:
    row = {"product": "matrix", "type": "Q4_K", "rows": 1, "bf16 us": 30.0, "dynquant us": 15.0}
    row |= {"dynquant error": 0.0016, "plugin CUDA failed": "ImportError: no"}
    *_, line = gguf_plugin.table([row])
    assert line == "| matrix | Q4_K | 1 | 30.0 | 15.0 (2.00), 0.0016 |  | failed |  |"
