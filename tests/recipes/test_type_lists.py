"""Plans like another file: the same types tensor by tensor, tied outputs, and refusals that name the tensor."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from dynquant.encoding.ggml import GgmlEncoder
from dynquant.errors import CheckpointError, PlanError
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.type_lists import like_types, read_types
from tests.helpers.exports import export_gguf
from tests.helpers.gguf_writing import finish
from tests.helpers.llama_quantize import TinyModel, llama_model, read_tensors

UNTIED = llama_model(layers=2, experts=4)
TIED = llama_model(layers=2, experts=4, tied=True)
KINDS = {"ffn_down_exps": "Q4_0", "ffn_gate_inp": "F16", "attn_q": "IQ4_NL", "token_embd": "Q5_0", "output.": "Q8_0"}


def write_like(path: Path, model: TinyModel, **changes: str) -> Path:
    """A quantized GGUF of zeros whose types are those of `KINDS`, else Q8_0 for matrices and F32 for vectors."""
    writer = gguf.GGUFWriter(path, model.hyper.arch)
    for name, shape in model.shapes.items():
        wanted = next((kind for part, kind in KINDS.items() if part in name), "Q8_0" if len(shape) > 1 else "F32")
        kind = gguf.GGMLQuantizationType[changes.get(name.split(".")[-2], wanted)]
        blocks, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((*shape[:-1], shape[-1] // blocks * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


@pytest.fixture
def model(tmp_path):
    return open_model(UNTIED.write(tmp_path / "untied.gguf"))


@pytest.fixture
def tied_model(tmp_path):
    return open_model(TIED.write(tmp_path / "tied.gguf"))


def planned(path, model):
    return plan_from_types(model, like_types(path, model), recipe=f"like {path.name}", exact=True)


def types_of(path):
    return {name: kind for name, (kind, _) in read_tensors(path).items()}


def test_every_tensor_gets_the_type_of_the_file_and_the_export_has_it(model, tmp_path):
    like = write_like(tmp_path / "like.gguf", UNTIED)
    plan = planned(like, model)
    assert {entry.name: entry.type for entry in plan.entries} == types_of(like)
    router = next(entry for entry in plan.entries if "gate_inp" in entry.name)
    assert (router.type, router.reason) == ("F16", "like like.gguf")
    assert {e.reason for e in plan.entries if e.type != "F32"} == {"like like.gguf"}
    export_gguf(model, plan, None, tmp_path / "out.gguf", encoder=GgmlEncoder())
    assert types_of(tmp_path / "out.gguf") == types_of(like)


def test_a_split_file_and_a_plan_are_followed(model, tmp_path):
    like = write_like(tmp_path / "like.gguf", UNTIED)
    plan = planned(like, model)
    plan.save(tmp_path / "plan.json")
    parts = export_gguf(model, plan, None, tmp_path / "part.gguf", encoder=GgmlEncoder(), split_max_bytes=700_000)
    assert len(parts) > 1
    for path in (parts[0], tmp_path / "plan.json"):
        assert [(e.name, e.type) for e in planned(path, model).entries] == [(e.name, e.type) for e in plan.entries]


def test_a_tied_file_gives_the_output_the_type_of_its_embedding(model, tmp_path):
    plan = planned(write_like(tmp_path / "like.gguf", TIED), model)
    output = next(entry for entry in plan.entries if entry.name == "output.weight")
    assert (output.type, output.reason) == ("Q5_0", "like like.gguf, which ties its output to the token embedding")


@pytest.mark.parametrize("output, expected", [("Q8_0", "Q8_0"), ("Q4_0", "Q5_0")])
def test_a_tied_model_takes_the_more_precise_of_embedding_and_output(tied_model, tmp_path, output, expected):
    plan = planned(write_like(tmp_path / "like.gguf", UNTIED, output=output), tied_model)
    embedding = next(entry for entry in plan.entries if entry.name == "token_embd.weight")
    assert embedding.type == expected
    assert ("ties to this tensor" in embedding.reason) == (expected == "Q8_0")


def test_missing_extra_and_misshapen_tensors_are_named(model, tmp_path):
    without = {name: shape for name, shape in UNTIED.shapes.items() if "attn_k" not in name}
    path = write_like(tmp_path / "less.gguf", dataclasses.replace(UNTIED, shapes=without))
    with pytest.raises(PlanError, match=r"untied has the tensor `blk\.0\.attn_k\.weight` and 1 more, which less\.gguf"):
        like_types(path, model)
    path = write_like(
        tmp_path / "more.gguf", dataclasses.replace(UNTIED, shapes=UNTIED.shapes | {"extra.weight": (32,)})
    )
    with pytest.raises(PlanError, match=r"more\.gguf has the tensor `extra\.weight`, which untied does not have"):
        like_types(path, model)
    wide = UNTIED.shapes | {"blk.1.ffn_up_exps.weight": (4, 256, 256)}
    path = write_like(tmp_path / "wide.gguf", dataclasses.replace(UNTIED, shapes=wide))
    with pytest.raises(PlanError, match=r"`blk\.1\.ffn_up_exps\.weight` in the shape \[4, 256, 256\].*\[4, 512, 256\]"):
        like_types(path, model)


def test_types_outside_the_registry_are_named(model, tmp_path):
    path = write_like(tmp_path / "like.gguf", UNTIED, attn_v="I8")
    with pytest.raises(PlanError, match=r"like\.gguf stores `blk\.0\.attn_v\.weight` as I8"):
        like_types(path, model)


def test_types_of_a_fork_are_named_by_their_number(model, tmp_path):
    path = write_like(tmp_path / "like.gguf", UNTIED)
    name = b"blk.0.attn_v.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at] == gguf.GGMLQuantizationType.Q8_0
    data[at] = 144
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"`blk\.0\.attn_v\.weight` in the type number 144.*ik_llama"):
        like_types(path, model)


def test_a_plan_and_its_file_list_the_same(model, tmp_path):
    plan = planned(write_like(tmp_path / "like.gguf", UNTIED), model)
    plan.save(tmp_path / "plan.json")
    (file,) = export_gguf(model, plan, None, tmp_path / "out.gguf", encoder=GgmlEncoder())
    of_plan, of_file = read_types(tmp_path / "plan.json"), read_types(file)
    assert of_plan.tensors == of_file.tensors and of_plan.arch == of_file.arch
    assert of_plan.file_bytes == of_file.file_bytes
