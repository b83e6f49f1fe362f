"""A family of files from one command: its names, card and numbers, what is made again and what not, and its push."""

import json
import re
import shutil
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
from huggingface_hub import constants

from dynquant.analysis.sensitivity import unit_kl
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import text_inputs
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.inspect import inspect
from dynquant.encoding.stream import TensorEncoder
from dynquant.errors import HubError, LibraryError
from dynquant.evaluation.evaluate import evaluate
from dynquant.evaluation.options import EvalOptions, TaskOptions
from dynquant.exporters.gguf import write_patched
from dynquant.families.open import open_model
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.selecting.text import Extent, selection_windows
from dynquant.planning.stage import make_plan, make_plans
from dynquant.planning.target import Target
from dynquant.publishing import stage
from dynquant.publishing.card import _how_made, _of_quantized
from dynquant.publishing.hub import push
from dynquant.publishing.options import ReleaseOptions, ReleaseTasks
from dynquant.publishing.record import Release, ReleasedFile, ReleaseRun
from dynquant.running.load import load_tokenizer
from dynquant.session import SILENT, Session
from dynquant.storage.atomic import file_hash
from tests.helpers.commands import linked_copy, refused, succeed
from tests.helpers.hub_stand_in import Repository, hub_stand_in

OPTIONS = (
    "--tokens", 4096, "--window", 128, "--hessians", "none", "--encoder", "ggml", "--types", "q2_k,q3_k,q4_k,q6_k",
    "--max-tokens", 512,
)  # fmt: skip
REPO = "somebody/tiny-GGUF"


def files_in(folder):
    """Names of the sizes of a release."""
    return sorted(file.name for file in folder.glob("*bpw.gguf"))


def shown(folder):
    """The card of a release, of whose spaces some keep a line together."""
    return (folder / "README.md").read_text().replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def text(tmp_path_factory, small_moe):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text((small_moe.parent / "demo_text.txt").read_text()[:4000])
    return path


@pytest.fixture(scope="module")
def released(tiny_moe, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "out"
    succeed("release", tiny_moe, "--bpw", "3.4,5", *OPTIONS, "--text", text, "-o", folder)
    return folder


@pytest.fixture
def again(released, tmp_path):
    """A copy of the release, by hard links."""
    return linked_copy(released, tmp_path / "out")


def test_a_size_has_its_file_its_card_and_its_way_to_the_hub(tiny_moe, text, tmp_path):
    few = ("--tokens", 512, "--types", "q4_k,q6_k", "--max-tokens", 256, "--prompts", 2, "--new-tokens", 4)
    call = ("release", tiny_moe, "--bpw", "5", *OPTIONS, *few, "--text", text, "-o", tmp_path)
    with hub_stand_in() as hub:
        succeed(*call, "--push", REPO, "--yes")
        sent = hub.repositories[REPO].files
    (name,) = files_in(tmp_path)
    assert {name, "README.md", "release.json", f"{tiny_moe.name}-imatrix.gguf"} <= sent.keys()
    report = json.loads((tmp_path / "evaluation" / f"{name}.json").read_text())
    kl, alike = report["texts"][0]["kl"]["mean"], report["generated"][0]["shared_tokens"]
    assert f"{kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]" in shown(tmp_path)
    assert "| divergence@4 | loops (original 0.0%) |" in shown(tmp_path)
    assert f"| {alike['value']:.1f} [{alike['low']:.1f}, {alike['high']:.1f}] |" in shown(tmp_path)


@pytest.mark.nightly
def test_names_say_the_dominant_type_and_the_real_bits(released, tiny_moe):
    record = json.loads((released / "release.json").read_text())
    assert {row["name"] for row in record["files"]} == {*files_in(released)} and len(record["files"]) == 2
    for name in files_in(released):
        summary = inspect(released / name)
        stem, dominant, bits = re.fullmatch(r"(.+)-(\w+)-dq-(\d+\.\d\d)bpw\.gguf", name).groups()
        weights = {}
        for tensor in summary.tensors:
            weights[tensor.type] = weights.get(tensor.type, 0) + tensor.num_weights
        assert dominant == max(weights, key=weights.get) and stem == tiny_moe.name
        size, count = (released / name).stat().st_size, sum(weights.values())
        assert float(bits) == pytest.approx(8 * size / count, abs=0.005)
        assert (released / name).with_suffix(".Modelfile").read_text().startswith(f"FROM ./{name}\n")
    assert (released / f"{tiny_moe.name}-imatrix.gguf").is_file()


@pytest.mark.nightly
def test_the_card_has_the_numbers_of_eval(released, tiny_moe, text):
    card = shown(released)
    for name in files_in(released):
        asked = TaskOptions(text=(text,), max_tokens=512)
        options = EvalOptions(candidate=str(released / name), reference=str(tiny_moe), asked=asked)
        measured = evaluate(options).texts[0]
        row = next(line for line in card.splitlines() if line.startswith(f"| [{name}]"))
        kl, top1, ratio = measured.kl.mean, measured.kl.top1_agreement, measured.perplexity_ratio
        assert f"{kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]" in row
        assert f"{top1.value:.1%} [{top1.low:.1%}, {top1.high:.1%}]" in row
        assert f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" in row
    assert "Every file fits on a graphics card of 8 GB, with `-ngl 3`" in card


@pytest.mark.nightly
def test_only_what_is_missing_is_made_and_blocks_are_encoded_once(again, tiny_moe, text, monkeypatch):
    first, second = files_in(again)
    kept, content = (again / first).stat().st_mtime_ns, (again / second).read_bytes()
    (again / second).unlink()
    record = json.loads((again / "release.json").read_text())
    whole = record["files"]
    record["files"] = [row for row in whole if row["name"] != second]  # as if it had been killed before it was entered
    del record["settings"]["--effort"]  # as if it had no such option yet
    (again / "release.json").unlink()
    (again / "release.json").write_text(json.dumps(record))
    encoded = []
    plain = TensorEncoder.tensor
    monkeypatch.setattr(
        TensorEncoder, "tensor", lambda self, name, stored: encoded.append(stored) or plain(self, name, stored)
    )
    call = ("release", tiny_moe, "--bpw", "3.4,5", *OPTIONS, "--text", text, "-o", again)
    succeed(*call)
    assert (again / first).stat().st_mtime_ns == kept
    assert (again / second).read_bytes() == content
    assert json.loads((again / "release.json").read_text())["files"] == whole
    assert all(stored.is_float for stored in encoded)
    succeed(*call, "--prompts", 2, "--new-tokens", 4)
    assert "divergence@4" in (again / "README.md").read_text()
    assert "--effort" in refused(*call, "--effort", "high")


@pytest.mark.nightly
def test_a_size_and_a_published_recipe_are_added(again, released, tiny_moe, text, tmp_path, monkeypatch):
    small, large = ((released / name).read_bytes() for name in files_in(released))
    with hub_stand_in() as hub:
        hub.repositories["some/body"] = Repository(files={"low/published.gguf": small})
        hub.repositories["some/other"] = Repository(files={"published.gguf": large})
        call = ("release", tiny_moe, "--bpw", "4", *OPTIONS, "--text", text, "-o", again)
        likes = ("--like", "some/body/low/published.gguf", "--like", "some/other/published.gguf")
        monkeypatch.setattr("dynquant.publishing.hub._HEADER_BYTES", 1 << 20)
        succeed(*call, *likes, "--packed")
        assert hub.sent <= 2 << 20 < len(small)  # headers alone
        assert "no file here" in refused(*call, "--like", "some/body")
        assert "Entry Not Found" in refused(*call, "--like", "some/body/other.gguf")
    names = files_in(again)
    assert len(names) == 3 and set(files_in(released)) < set(names)
    card = (again / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith(("| [", "| *"))]
    assert len(rows) == 5
    likes = [row.split("|")[5:] for row in rows if row.startswith("| *like published.gguf, types ")]
    same = [row.split("|")[5:] for name in files_in(released) for row in rows if name in row]
    assert sorted(likes) == sorted(same)  # the same types, so the same numbers
    assert len(list(again.glob("*bpw/model.safetensors"))) == 1
    assert "--bpw 3.4,5 " in card and "--bpw 4 " in card


@pytest.mark.nightly
def test_what_does_not_belong_together_is_refused(again, tiny_moe, tiny_text, text, tmp_path):
    call = ("release", tiny_moe, *OPTIONS, "--text", text, "-o", again)
    assert "holds a release of" in refused(
        "release", tiny_text("llama"), "--bpw", 3, *OPTIONS, "--text", text, "-o", again
    )
    assert "--tokens" in refused(*call, "--bpw", 3, "--tokens", 2048)
    assert re.search("other --name .* differ in nothing but their sizes", refused(*call, "--bpw", 3, "--name", "any"))
    assert "not --sizes and --bpw" in refused(*call, "--bpw", 3, "--sizes", "2:4")
    assert "not none" in refused(*call)
    assert "twice" in refused(*call, "--bpw", "3,3.0")
    assert "is no range" in refused(*call, "--sizes", "4:2")
    assert "--kv-type q5 is not known" in refused(*call, "--bpw", 3, "--context", 4096, "--kv-type", "q5")
    assert "bpw 1.1: The budget of" in refused(*call, "--bpw", "3.4,1.1")
    first = ("release", tiny_moe, *OPTIONS, "--text", text, "-o", tmp_path / "first", "--bpw", 1.1)
    assert all("The budget of" in refused(*first, "--tokens", tokens) for tokens in (4096, 2048))  # no file was made
    assert "no-such.jsonl" in refused(
        "release", tiny_moe, "--bpw", 3, "--calibration", "no-such.jsonl", "-o", tmp_path / "n"
    )
    assert "is no repository" in refused(*call, "--bpw", 3, "--push", "name")
    assert "--yes would do nothing" in refused(*call, "--bpw", 3, "--yes")
    assert not (tmp_path / "first").exists() and not (tmp_path / "n").exists()
    short = tmp_path / "short.txt"
    short.write_text("A few words only. " * 20)
    first = ("release", tiny_moe, "--bpw", 3, "--calibration", short, "-o", tmp_path / "s")
    assert "too few to calibrate" in refused(*first)


@pytest.mark.nightly
def test_a_text_shorter_than_tokens_is_calibrated_on_but_for_what_is_measured(tiny_moe, small_moe, tmp_path):
    call = ("release", tiny_moe, "--bpw", 5, *OPTIONS, "--calibration", small_moe.parent / "demo_text.txt")
    succeed(*call, "--tokens", 524_288, "--max-tokens", 2048, "-o", tmp_path)
    given = CalibrationStats.load(tmp_path / "work" / "stats.safetensors").provenance
    assert 2048 <= given.num_tokens < given.max_tokens < 524_288
    (report,) = (tmp_path / "evaluation").glob("*.json")
    assert json.loads(report.read_text())["texts"][0]["name"] == "behind-demo_text.txt"
    assert f"--tokens {given.max_tokens} " in shown(tmp_path)
    succeed(*call, "--tokens", 524_288, "--max-tokens", 1024, "-o", tmp_path)


@pytest.mark.parametrize("kind", ["file", "data set"])
def test_plans_are_chosen_all_over_what_calibration_left_and_files_measured_behind(tiny_moe, tmp_path, kind):
    if kind == "data set":
        pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"Document {number} tells of {number + 1} things. " * 30}) for number in range(400)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    text = str(tmp_path / "set" / "train.jsonl" if kind == "file" else tmp_path / "set")
    calibration, model = CalibrationOptions(text=text, tokens=8192, window=256), open_model(str(tiny_moe))
    asked = ReleaseOptions(model=str(tiny_moe), output=tmp_path, bpw=("3",), calibration=calibration, select=True)
    calibrated = text_inputs(model, text, tokens=8192, window=256).windows
    spans, tokenizer = set(), load_tokenizer(model)
    for most in (1024, 4096):
        divided, behind = stage._divided(replace(asked, asked=ReleaseTasks(max_tokens=most)), model, SILENT)
        search = divided.of_plans.search
        found, same = selection_windows(model, search, calibration, Extent(8192, 256, 0))
        assert torch.equal(same, calibrated) and divided.calibration == calibration and found.windows.shape == (16, 256)
        texts = (" ".join(tokenizer.batch_decode(windows)) for windows in (same, found.windows))
        numbers = [set(re.findall(r"Document (\d+) tells", part)) for part in (*texts, behind.text)]
        assert all(numbers) and not numbers[2] & (numbers[0] | numbers[1])
        assert search.selection_span > 2 * search.selection_tokens, "pieces are not side by side"
        spans.add(divided.selection_span)
    assert len(spans) == 1, "a later run that measures more chooses alike"


@pytest.mark.nightly
def test_a_push_is_shown_then_sent_and_goes_on_where_the_hub_refused(again, tiny_moe, text):
    call = ("release", tiny_moe, "--bpw", "3.4,5", *OPTIONS, "--text", text, "-o", again, "--push", REPO)
    with hub_stand_in() as hub:
        shown = succeed(*call)
        assert not hub.repositories and "would go: repeat this with --yes" in shown
        hub.commits_left = 2
        assert "Storage quota exceeded" in refused(*call, "--yes")
        assert len(hub.repositories[REPO].commits) == 2
        hub.commits_left = 1000
        succeed(*call, "--yes")
        repository = hub.repositories[REPO]
        assert {*files_in(again), "README.md", "release.json"} <= repository.files.keys()
        assert all((again / name).read_bytes() == content for name, content in repository.files.items())
        assert len(repository.commits) == len(repository.files) == len(set(repository.commits))
        assert not any(name.startswith("work") for name in repository.files)
        assert "0 files" in succeed(*call, "--yes")
        assert len(repository.commits) == len(repository.files)
    with hub_stand_in() as hub, patch.object(constants, "HF_HUB_OFFLINE", True):
        assert f"Reading {REPO} failed" in refused(*call, "--yes")
        assert "would go: repeat this" in succeed(*call)


@pytest.mark.parametrize("name", ["README.md", "work/mine.plan.json"])
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(tiny_moe, tmp_path, name):
    (tmp_path / "work").mkdir()
    (tmp_path / name).write_text("mine")
    assert f"{name} that no release wrote" in refused("release", tiny_moe, "--bpw", 3, "-o", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_refusal_leaves_a_folder_with_the_name_of_the_work_as_it_is(tiny_moe, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes").write_text("mine")
    assert "bpw 0.2" in refused("release", tiny_moe, "--bpw", 0.2, "--tokens", 600, "-o", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["work/notes"]


def test_that_llama_cpp_is_missing_is_said_before_anything_is_planned(tiny_moe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "llama_cpp", Mock(side_effect=LibraryError("Neither is installed.")))
    assert "Neither is installed." in refused("release", tiny_moe, "--bpw", 3, "--text", text, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_file_has_the_bytes_of_its_command_whatever_other_sizes_there_are(tiny_moe, text, tmp_path):
    def hashes(folder):
        return {row.request: row.files[row.name] for row in Release.load(folder).files}

    few = ("release", tiny_moe, *OPTIONS, "--text", text, "--max-tokens", 256, "--tokens", 1024, "--select")
    succeed(*few, "--bpw", "3.4,5", "-o", tmp_path / "first")
    succeed(*few, "--bpw", "5,4.2", "-o", tmp_path / "first")
    record = Release.load(tmp_path / "first")
    assert [list(run.sizes.values()) for run in record.runs] == [[{"bpw": 3.4}, {"bpw": 5.0}], [{"bpw": 4.2}]]
    for number, run in enumerate(record.runs):  # the card's command, with this machine's paths
        words = {tiny_moe.name: tiny_moe, text.name: text, "first": tmp_path / f"again-{number}"}
        succeed("release", *(words.get(word, word) for word in run.command))
        again = hashes(tmp_path / f"again-{number}")
        assert again == {request: hashes(tmp_path / "first")[request] for request in run.sizes}
    lost = record.row("bpw 3.4")
    shutil.rmtree(tmp_path / "first" / "work")
    (tmp_path / "first" / lost.name).unlink()
    succeed(*few, "--bpw", "3.4", "-o", tmp_path / "first")
    assert file_hash(tmp_path / "first" / lost.name) == lost.files[lost.name]
    assert Release.load(tmp_path / "first").runs == record.runs


def test_a_command_is_kept_for_the_sizes_that_it_adds(tmp_path):
    options = ReleaseOptions(model="m", output=tmp_path, bpw=("3", "4"))
    assert options.asking_for(["bpw 3", "bpw 4"]) is options
    assert [target.recipe for target in options.asking_for(["bpw 4"]).targets] == ["bpw 4"]
    options = ReleaseOptions(model="m", output=tmp_path, fits=("8GB", "1GiB"), context=4096)
    request = options.targets[1].recipe
    assert [target.recipe for target in options.asking_for([request]).targets] == [request]


def test_the_card_names_the_files_that_the_closing_pass_has_changed(packed_moe, tmp_path):
    types = {"types": {"Q4_K": 1}, "bytes": 1, "bits_per_weight": 1.0, "plan_hash": ""}
    rows = [ReleasedFile(request=f"bpw {n}", name=f"{n}.gguf", files={f"{n}.gguf": "0"}, **types) for n in (3, 4)]
    record = Release(
        model="m", arch="a", fingerprint="f", num_weights=1, settings={}, files=rows,
        runs=(ReleaseRun(command=(), sizes={}, device="cpu", versions={"dynquant": "0"}),),
    )  # fmt: skip
    options = ReleaseOptions(model="m", output=tmp_path, bpw=("3", "4"))
    for encoders, words in {
        ("dynquant", "dynquant"): None,
        ("dynquant", "dynquant+tune"): " of 4.gguf",
        ("dynquant+tune", "dynquant+tune"): "",
    }.items():
        for row, encoder in zip(rows, encoders, strict=True):
            write_patched(GGUFSource(packed_moe.gguf), tmp_path / row.name, {}, encoder=encoder)
        expected = f"The closing pass tuned scales and norms{words} on the KL to the original. " * (words is not None)
        assert f"\n\n{expected}Made with dynquant 0 on cpu." in _how_made(record, options)


def test_the_card_says_where_the_original_is_quantized_itself(packed_moe, small_moe, tmp_path):
    model = open_model(packed_moe.gguf)
    size = f"{8 * packed_moe.gguf.stat().st_size / model.num_weights:.2f} bits per weight"
    assert f"{size}): all figures compare with it" in _of_quantized(model)
    succeed("export", small_moe, "--preset", "f16", "--encoder", "ggml", "--tune", 0, "-o", tmp_path / "f16.gguf")
    assert not _of_quantized(open_model(tmp_path / "f16.gguf")) and not _of_quantized(open_model(small_moe))


def test_more_effort_reaches_plans_and_files(tmp_path):
    options = ReleaseOptions(model="m", output=tmp_path, bpw=("3",), effort="high")
    plan, export = options.of_plans, options.of_export(tmp_path / "a.gguf", tmp_path / "plan.json")
    assert options.calibration.hessians == plan.calibration.hessians == "two-sided"
    assert plan.search.select and plan.search.rounds > 2 and export.tune is None and export.closing.patience > 3
    assert (
        ReleaseOptions(model="m", output=tmp_path, bpw=("3",), effort="high", tune=9).of_export(tmp_path, tmp_path).tune
        == 9
    )


def test_a_lost_connection_is_told_of(tmp_path):
    about = {"model": "a", "arch": "llama", "fingerprint": "", "num_weights": 1, "settings": {}}
    notes, told = [], f"Reading {REPO} failed"
    (tmp_path / "README.md").touch()
    with hub_stand_in(), patch.object(constants, "ENDPOINT", "http://127.0.0.1:9"):
        with pytest.raises(HubError, match=told):
            push(tmp_path, Release(**about), REPO, SILENT, is_real=True)
        (upload,) = push(tmp_path, Release(**about), REPO, Session(note=notes.append), is_real=False)
    assert upload == ("README.md", 0, False) and told in notes[0]


@pytest.mark.nightly
def test_sizes_that_are_planned_together_are_as_good_as_those_planned_alone(tiny_moe, tmp_path, monkeypatch):
    search = SearchOptions(select=True, probes=2, selection_tokens=512)
    calibration = CalibrationOptions(tokens=4096, window=128, hessians="none")
    asked = PlanOptions(model=str(tiny_moe), output=tmp_path, calibration=calibration, encoder="ggml", search=search)
    targets = [Target(bpw=bits, types=("q2_k", "q4_k", "q6_k")) for bits in (3.6, 5.0)]
    alone = [make_plan(replace(asked, target=target)) for target in targets]
    rounds = Mock(wraps=unit_kl.unit_worth)
    monkeypatch.setattr(unit_kl, "unit_worth", rounds)
    together = make_plans(asked, targets)
    assert rounds.call_count <= 2 + 1  # the smaller size goes on from the larger one's prices
    assert together[1].entries == alone[1].entries
    assert [plan.recipe for plan in together] == [plan.recipe for plan in alone]
    assert together[0].predicted_bytes <= 3.6 * alone[0].num_weights / 8
    assert together[0].selected_kl <= 1.1 * alone[0].selected_kl
