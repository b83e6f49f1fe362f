"""Imports point one way, the side folders stay inside the package, and importing dynquant stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"dynquant": ROOT / "dynquant", "dynquant.kernels": ROOT / "kernels",
           "dynquant.analysis": ROOT / "analysis", "dynquant.exporters": ROOT / "exporters"}  # fmt: skip

# A module may import from its own rank and from lower ones.
RANKS = [
    ["errors", "eval_statistics", "strict_json", "progress", "process_usage", "interrupt"],
    ["devices", "distribution"],
    ["vision_names"],
    ["quant_types", "architecture"],
    ["codecs"],
    ["safetensors_header", "stored_values"],
    ["stored_experts", "tensor_merge"],
    ["encoding", "tensor_source", "statistics", "layers", "llama_runner", "gguf_header", "serving_schemes"],
    ["gguf_source", "activation_rounding", "mtmd_runner"],
    ["model", "importance"],
    ["second_moments"],
    ["families"],
    ["checkpoint", "packed_model"],
    [
        "hf_loading",
        "checkpoint_weights",
        "calibration_text",
        "expert_hooks",
        "linear_hooks",
        "input_recorder",
        "imatrix",
        "fisher",
        "hf_quantizer",
        "held_out",
        "training_data",
        "training_options",
        "trl_support",
    ],
    ["moment_recorder", "gguf_model", "hidden_states"],
    ["collector", "layer_stream"],
    ["staged_passes", "memory_limit"],
    ["calibration", "live_weights"],
    ["streamed_calibration", "vision"],
    ["plan", "llama_presets", "presets", "allocate", "memory_budget", "serving_layers"],
    ["serving_plan", "machine"],
    ["artifacts", "parts"],
    ["quantize", "tuning", "packed_vision"],
    ["ray_pool"],
    ["remote_encoding", "sharded_calibration"],
    ["lora"],
    ["hf_registration"],
    ["encoded_store", "layer_replay"],
    ["rendered_model", "scored_pictures"],
    ["exporters", "plan_building", "inspect_file", "serving_building"],
    ["type_lists", "recipe_text", "recipe_parser", "plan_diff"],
    ["analysis", "planner", "serving_planner"],
    ["eval_text", "logit_runners", "reference_cache", "multiple_choice", "eval_report"],
    ["evaluate"],
    ["packed_base", "teacher_cache", "sampled_text", "distillation", "training_run"],
    ["finetune", "heal"],
    ["run_record"],
    ["progress_text"],
    ["progress_display"],
    ["console"],
    ["plan_report"],
    ["vision_choice"],
    ["plan_target"],
    ["plan_choice", "plan_search"],
    ["search_stage", "vision_workflow", "vision_search", "vision_export", "vision_runners"],
    ["calibration_stage", "error_stage"],
    ["workflow", "vision_evaluate"],
    ["serving_workflow"],
    ["export_workflow"],
    ["commands", "compare", "training_commands"],
    ["compare_encoders"],
    ["cli_options"],
    ["cli_training"],
    ["cli"],
    ["__main__"],
]
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def unit(module: str) -> str:
    """`dynquant.codecs.decode` -> `codecs`; `dynquant` itself has no unit."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_to_lower_ranks(module):
    own = RANK_OF.get(unit(module))
    for name in imported_names(modules()[module]):
        assert name.split(".")[0] not in ("kernels", "analysis", "exporters"), f"{module} imports {name} by folder name"
        other = unit(name)
        if name.startswith("dynquant.") and other in RANK_OF and own is not None and other != unit(module):
            assert RANK_OF[other] <= own, f"{module} must not import {name}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_has_a_rank(module):
    assert module == "dynquant" or unit(module) in RANK_OF or unit(module) == "kernels"


def test_installed_packages_match_the_folders():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert listed == on_disk


def test_importing_dynquant_loads_no_heavy_package():
    heavy = ("torch", "transformers", "llama_cpp", "matplotlib", "ray")
    code = f"import sys, dynquant; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_no_machine_path_or_registry_in_tracked_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / name for name in tracked if Path(name).suffix in (".py", ".md", ".toml", ".txt", ".json", "")]
    assert texts
    for path in texts:
        if path.is_file() and path.stat().st_size < 400_000:
            text = path.read_text(errors="ignore")
            assert str(ROOT.parent) + "/" not in text, path
            assert "pypi" + ".org" not in text, path
