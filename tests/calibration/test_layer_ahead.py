"""The layer that predicts a token ahead is calibrated: what it sees is what a forward pass written by hand sees.

No test says how well it predicts: that takes a trained layer, and the checkpoints here are random.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dynquant.calibration.run import Calibration, StatisticsOptions, collect_statistics, provenance_of
from dynquant.calibration.streamed import calibrate_streamed
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.exporters.options import ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.common.conversion import Conversion, unchanged
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.plan_notes import notes_of
from dynquant.recipes.presets import preset_types
from dynquant.running.layer_ahead import layer_ahead_of
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from dynquant.running.weights import add_layer_ahead
from dynquant.session import Progress, Session, ignore_progress
from tests.helpers.architectures import converted_model
from tests.helpers.layers_ahead import NUM_LAYERS, SIZES, save_with_layer_ahead

INPUTS = ModelInputs(torch.randint(3, 8000, (6, 48), generator=torch.Generator().manual_seed(2)), 2, "text", "ab")
SUMMED = INPUTS.hold_back(0.1)[0].windows
BLOCK = f"blk.{NUM_LAYERS}"
LAYER = {"glm4_moe": f"model.layers.{NUM_LAYERS}", "qwen3_next": "mtp.layers.0"}
NAMES = {
    "glm4_moe": ("glm4moe", f"model.layers.{NUM_LAYERS}", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    "qwen3_next": ("qwen3next", "mtp", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
}
ORDER = torch.arange(64).flip(0)


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path: Path, small_moe: Path) -> tuple[str, Model, Any]:
    """Kind, checkpoint with GGUF tensors of its layer ahead (one with its columns in another order), larger model."""
    kind = request.param
    larger = save_with_layer_ahead(kind, tmp_path, small_moe).eval()
    arch, path, projection, *_ = NAMES[kind]
    stored, layer = load_file(tmp_path / "model.safetensors"), LAYER[kind]
    matrices = (
        ("nextn.eh_proj", f"{path}.{projection}", unchanged),
        ("attn_q", f"{layer}.self_attn.q_proj", unchanged),
        ("attn_output", f"{layer}.self_attn.o_proj", lambda weight: weight[:, ORDER]),
    )
    conversions = [
        Conversion(f"{BLOCK}.{name}.weight", (f"{part}.weight",), tuple(stored[f"{part}.weight"].shape), "F32", order)
        for name, part, order in matrices
    ]
    for name in ("gate", "up", "down"):
        parts = tuple(f"{layer}.mlp.experts.{expert}.{name}_proj.weight" for expert in range(4))
        shape = (4, *stored[parts[0]].shape)
        conversions.append(Conversion(f"{BLOCK}.ffn_{name}_exps.weight", parts, shape, "F32"))
    return kind, converted_model(tmp_path, conversions, arch=arch), larger


def calibrated(model: Model, hessians: str = "none") -> tuple[Any, Calibration]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers leaves the layer out
        hf_model = load_hf(model)
    add_layer_ahead(model, hf_model)
    provenance = provenance_of(model, INPUTS, tokens=INPUTS.num_tokens, seed=0)
    names = weight_inputs(model, hf_model)
    options = StatisticsOptions(hessians)  # type: ignore[arg-type]
    return hf_model, collect_statistics(hf_model, INPUTS, names=names, provenance=provenance, options=options)


class Reference:
    """What the matrices of the layer ahead see, by a forward pass on `SUMMED` that uses nothing of dynquant."""

    def __init__(self, kind: str, larger: Any, stored: dict[str, Tensor]) -> None:
        _, path, projection, token_norm, state_norm, final_norm = NAMES[kind]
        self._offset, self._eps = float(path == "mtp"), larger.config.rms_norm_eps
        layer, decoder = larger.model.layers[NUM_LAYERS], larger.model
        larger.config.num_hidden_layers = NUM_LAYERS
        states = decoder(SUMMED, use_cache=False).last_hidden_state[:, :-1]
        tokens = stored["model.embed_tokens.weight"][SUMMED[:, 1:]]
        parts = (self._norm(tokens, stored[f"{path}.{token_norm}.weight"]),)
        parts += (self._norm(states, stored[f"{path}.{state_norm}.weight"]),)
        self.joined = torch.cat(parts, -1)
        x = self.joined @ stored[f"{path}.{projection}.weight"].T
        self.seen: dict[str, Any] = {}
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts"):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, name=name: self.seen.update({name: args})
            )
        length = x.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1).expand(len(x), 1, length, length)
        places = torch.arange(length)[None]
        out = layer(x, position_embeddings=decoder.rotary_emb(x, places), attention_mask=mask, position_ids=places)
        self.logits = self._norm(out, stored[f"{path}.{final_norm}.weight"]) @ stored["lm_head.weight"].T
        self.experts = layer.mlp.experts

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self._eps).rsqrt() * (weight + self._offset)

    def routed(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert with its inputs and those of its down-projection."""
        hidden, chosen, _ = self.seen["mlp.experts"]
        for expert in range(4):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = (x @ self.experts.gate_up_proj[expert].T).chunk(2, -1)
            yield expert, x, functional.silu(gate) * up


@torch.no_grad()
def test_statistics_are_those_of_a_plain_forward_pass(made: tuple[str, Model, Any], tmp_path: Path) -> None:
    kind, model, larger = made
    hf_model, found = calibrated(model, "activations")
    stats, moments = found.stats, found.moments
    reference = Reference(kind, larger, load_file(tmp_path / "model.safetensors"))

    def squares(x: Tensor) -> Tensor:
        return x.double().square().flatten(0, -2).sum(0)

    close = {"rtol": 1e-4, "atol": 1e-5}
    eh_proj = stats.input_of(f"{BLOCK}.nextn.eh_proj.weight")
    assert eh_proj is not None and eh_proj.counts.tolist() == [SUMMED[:, 1:].numel()]
    torch.testing.assert_close(eh_proj.in_sum2[0], squares(reference.joined), **close)
    seen = {name: args[0] for name, args in reference.seen.items()}
    by_name = {"attn_q": seen["self_attn.q_proj"], "attn_output": seen["self_attn.o_proj"][..., ORDER]}
    assert moments is not None
    for name, x in (by_name | {"nextn.eh_proj": reference.joined}).items():
        weight = f"{BLOCK}.{name}.weight"
        torch.testing.assert_close(stats.input_of(weight).in_sum2[0], squares(x), **close)
        x = x.flatten(0, -2)
        torch.testing.assert_close(moments.sums[moments.aliases.get(weight, weight)][0], x.T @ x, rtol=1e-3, atol=1e-3)
    inner, down = (stats.input_of(f"{BLOCK}.ffn_{name}_exps.weight") for name in ("up", "down"))
    for expert, x, h in reference.routed():
        assert inner.counts[expert] == down.counts[expert] == len(x) > 0
        torch.testing.assert_close(inner.in_sum2[expert], squares(x), **close)
        torch.testing.assert_close(down.in_sum2[expert], squares(h), **close)
    ahead = layer_ahead_of(hf_model)
    with torch.enable_grad(), ahead.following():
        hf_model(SUMMED, use_cache=False)
        logits = ahead.logits(SUMMED).detach()
    torch.testing.assert_close(logits, reference.logits, rtol=1e-3, atol=1e-3)


def test_the_model_itself_sees_what_it_saw_without_the_layer(made: tuple[str, Model, Any]) -> None:
    _, model, larger = made
    hf_model, found = calibrated(model, "gradients")
    larger.config.num_hidden_layers = NUM_LAYERS
    with torch.no_grad():
        assert torch.equal(hf_model(SUMMED, use_cache=False).logits, larger(SUMMED, use_cache=False).logits)
    assert found.moments is not None
    for name in ("nextn.eh_proj", "ffn_down_exps"):  # weighted by gradients of its own predictions
        assert bool(found.moments.sums[f"{BLOCK}.{name}.weight"].any())


def test_a_streamed_model_gives_the_same_files_after_a_kill(
    made: tuple[str, Model, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, model, _ = made
    found = calibrated(model, "gradients")[1]
    whole, streamed = (tmp_path_factory.mktemp(name) for name in ("whole", "streamed"))
    assert found.moments is not None
    found.stats.save(whole / "stats.safetensors")
    found.moments.save(whole / "hessians.safetensors")
    provenance = provenance_of(model, INPUTS, tokens=INPUTS.num_tokens, seed=0)

    def stop_before_head(_stage: str, done: int, _total: int, **_where: object) -> None:
        if done == NUM_LAYERS + 2:
            raise KeyboardInterrupt

    def run(progress: Progress = ignore_progress) -> None:
        output = streamed / "stats.safetensors"
        calibrate_streamed(model, INPUTS, provenance, output, StatisticsOptions("gradients"), progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run(stop_before_head)
    run()
    for name in ("stats.safetensors", "hessians.safetensors"):
        assert (whole / name).read_bytes() == (streamed / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SIZES)
def test_a_plan_lists_no_matrix_of_the_layer(
    kind: str, tmp_path: Path, small_moe: Path, llama_cpp_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
    save_with_layer_ahead(kind, tmp_path, small_moe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_model(tmp_path)
        if kind == "deepseek_v3":  # llama.cpp's architecture has no place for the layer
            assert not model.mtp_tensors
            return
        hf_model, found = calibrated(model)
    plan = plan_from_types(model, preset_types("uniform-q8_0", model), recipe="preset uniform-q8_0")
    entries = [entry for entry in plan.entries if entry.role is Role.MTP]
    assert any(entry.name == f"{BLOCK}.nextn.eh_proj.weight" for entry in entries)
    assert not any("were not run" in note for note in notes_of(entries, found.stats))
    assert layer_ahead_of(hf_model) is not None
    for entry in entries:
        if entry.name.endswith("_exps.weight"):
            assert bool((found.stats.input_of(entry.name).counts > 0).all()), entry.name


@pytest.mark.nightly
def test_an_export_without_the_layer_says_that_the_plan_was_with_it(
    tmp_path: Path, small_moe: Path, llama_cpp_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
    save_with_layer_ahead("glm4_moe", directory := tmp_path / "model", small_moe)
    model = open_model(directory)
    plan = plan_from_types(model, preset_types("uniform-q8_0", model), recipe="preset uniform-q8_0")
    plan.save(tmp_path / "plan.json")
    how = {"plan": tmp_path / "plan.json", "output": tmp_path / "o.gguf", "encoder": "ggml", "mtp": False}
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export(ExportOptions(model=str(directory), allow_difference=True, **how), Session(note=notes.append))
    assert f"{plan.predicted_bytes:,} bytes with the layers that predict tokens ahead" in " ".join(notes)
    assert not [
        warning for warning in said if "leaves out" in str(warning.message) or "not use" in str(warning.message)
    ]
