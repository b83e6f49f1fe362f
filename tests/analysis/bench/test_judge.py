"""The judge of methods: what its file of methods means, what it shares and never makes twice, what it reports."""

import json
import sys
from pathlib import Path

import pytest

from dynquant.analysis.bench import judge, model_report
from dynquant.errors import OptionError

METHODS = '[default]\nexport = "--tune 1024"\n[untuned]\nexport = "--tune 0"\n[coarse]\nplan = "--types q2_k,q4_k"\n'
JOINED = '[both]\nof = ["coarse", "untuned"]\n'


def test_methods_add_their_flags_to_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "methods.toml"
    path.write_text(METHODS + JOINED)
    methods = {method.name: method for method in judge.read_methods(path)}
    assert [*methods] == ["default", "stock", "untuned", "coarse", "both"]
    assert methods["both"].plan == ("--types", "q2_k,q4_k") and methods["both"].export[-2:] == ("--tune", "0")
    assert [method.name for method in judge.read_methods(path, ["both"])] == ["default", "both"]
    path.write_text('[folded]\nplan = "--fold-nothing"\n')
    with pytest.raises(OptionError, match=r"method folded: .*--fold-nothing"):
        judge.read_methods(path)


def test_the_methods_that_are_shipped_have_flags_of_today() -> None:
    assert {"default", "stock", "one-sided"} <= {method.name for method in judge.read_methods(judge.METHODS)}


def row(scale: float, right: list[bool]) -> dict:
    metrics = {"KL a.txt": {"value": scale, "low": scale, "high": scale}}
    metrics["letter (4 questions) accuracy"] = {"value": sum(right) / 4, "reference": 1.0}
    seconds, blocks = {"plan": 1.0, "export": scale}, {"a.txt": [64 * scale, 64 * scale * 1.1]}
    return {"bytes": 1000, "seconds": seconds, "metrics": metrics, "kl_blocks": blocks, "is_right": right}


def test_the_report_pairs_rows_with_the_default_of_their_size(tmp_path: Path) -> None:
    rows = {"small default": row(1.0, [True, True, False, False]), "small better": row(0.5, [True, True, True, False])}
    rows |= {"large default": row(1.0, [True] * 4), "large better": row(0.5, [True] * 4) | {"bytes": 990}}
    rows["large worse"] = {"refused": "it does not fit."}
    content = {"rows": rows, "recipes": {"small": 1000, "large": 1000}, "command": "--model m", "score": 128}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rows.json").write_text(json.dumps(content | {"device": "CPU", "at_once": 1}))
    lines = judge.report_of(tmp_path).splitlines()
    assert "| better | 2 | -50.0 % | -50.0 % | 2 | 0 | +12.5 | +0.0 | 0.75 |" in lines
    assert any(line.startswith("| large | better | 990 (-1.00%) | 0.5000") and "-50.0 %" in line for line in lines)
    assert "python -m dynquant.analysis.bench.judge --model m" in lines
    assert "Not measured: large worse: it does not fit." in lines


@pytest.mark.nightly
def test_a_judged_model_is_measured_once(small_moe: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    methods, output = tmp_path / "methods.toml", tmp_path / "judged"
    methods.write_text(METHODS)
    text = small_moe.parent / "demo_text.txt"
    (tmp_path / "report.md").write_text("# What people say\n\n")
    words = ["judge", "--model", small_moe, "-o", output, "--methods", methods, "--report", tmp_path / "report.md"]
    words += ["--recipes", "llama-q2_k,llama-q4_k_m", "--tokens", 4096, "--text", text, "--score", 512]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--side-by-side", "1"])
    judge.main()
    rows = json.loads((output / small_moe.name / "rows.json").read_text())["rows"]
    refused = {name: measured["refused"] for name, measured in rows.items() if "refused" in measured}
    assert len(rows) == 8 and [*refused] == ["llama-q4_k_m coarse"] and "largest possible" in refused.popitem()[1]
    for recipe in ("llama-q2_k", "llama-q4_k_m"):
        alike = {rows[f"{recipe} {name}"]["bytes"] for name in ("default", "untuned", "stock")}
        assert max(alike) <= 1.001 * min(alike)
        default, untuned = (rows[f"{recipe} {name}"] for name in ("default", "untuned"))
        assert default["seconds"]["plan"] == untuned["seconds"]["plan"]
        assert default["seconds"]["encode"] == untuned["seconds"]["encode"], (
            "the file before the closing pass is shared"
        )
    assert len([*output.glob("*/calibration-*/stats.safetensors")]) == 1
    capsys.readouterr()
    judge.main()
    assert "KL demo_text" not in capsys.readouterr().out, "a row was made again"
    said = (tmp_path / "report.md").read_text()
    assert said.startswith("# What people say") and said.count("## textbook-moe-16m") == 1


@pytest.mark.nightly
def test_a_report_of_a_model_has_answers_by_subject_and_plots(small_moe: Path, tiny_text, tmp_path: Path, monkeypatch):
    methods, folder = tmp_path / "methods.toml", small_moe.parent
    methods.write_text('[default]\nexport = "--tune 1024"\n')
    words = ["report", "--model", tiny_text("qwen2"), "-o", tmp_path / "judged", "--methods", methods]
    words += ["--recipes", "llama-q2_k", "--tokens", 4096, "--text", folder / "demo_text.txt", "--score", 512]
    words += ["--questions", folder / "demo_questions.jsonl", "--shots", folder / "demo_shots.jsonl", "--limit", 12]
    words += ["--prompts", 2, "--scoring", "letter,cloze", "--super-tokens", 256, "--report", tmp_path / "qwen.md"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--side-by-side", "1"])
    model_report.main()
    lines = (tmp_path / "qwen.md").read_text().splitlines()
    assert sum(line.startswith("| llama-q2_k | dynquant |") for line in lines) == 4
    assert any(line.startswith("| subject | questions | right % | q2_k dynquant | q2_k llama.cpp |") for line in lines)
    pictures = [line.partition("](")[2].rstrip(")") for line in lines if line.startswith("![")]
    assert len(pictures) == 3 and all((tmp_path / picture).stat().st_size for picture in pictures)
