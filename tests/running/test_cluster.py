"""Encoding on a Ray cluster: the bytes of a local export, whatever dies; refusals that say what to do."""

import sys
from dataclasses import replace

import pytest
import torch

from dynquant.analysis.errors.measure import ErrorMeter, build_error_table
from dynquant.analysis.errors.remote import measure_on
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.calibration.run import StatisticsOptions, collect_statistics, provenance_of, text_inputs
from dynquant.calibration.sharded import calibrate_in_shards, cut
from dynquant.encoding.parts import PartLimits, WeightChecks
from dynquant.encoding.remote import EncoderChoice, RemoteEncoding, StoredFiles
from dynquant.encoding.stream import Guidance, TensorEncoder, load_encoder
from dynquant.errors import CheckpointError, ClusterError, ExportError
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import quant_type
from dynquant.running.cluster import RayPool, StoredModel, TaskNeeds, open_ray
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import ignore_progress
from tests.helpers.commands import run
from tests.helpers.exports import export_gguf
from tests.helpers.packed_models import plan_of

GGML = load_encoder("ggml")
LIMITS = PartLimits(3 << 20)


def needs_ray():
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'dynquant-toolchain[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each on this machine; tests may remove the second and must add another."""
    needs_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def pool(cluster):
    with open_ray(cluster.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan(moe_model):
    return plan_of(moe_model, "Q4_0", recipe="preset uniform-q4_0")


@pytest.fixture(scope="module")
def local(moe_model, plan, tmp_path_factory):
    return export_gguf(moe_model, plan, None, tmp_path_factory.mktemp("local") / "a.gguf", encoder=GGML)[0].read_bytes()


def encoding(pool: RayPool, opened, *, shipped: bool = False, **changes) -> RemoteEncoding:
    files = StoredFiles(StoredModel.of(opened))
    files = replace(files, model=replace(files.model, **changes))
    sent = TensorEncoder(opened, Guidance(), GGML) if shipped else None
    return RemoteEncoding(pool, EncoderChoice.of(GGML, "cpu", 1), TaskNeeds(), files, sent)


@pytest.mark.nightly
def test_a_node_that_dies_half_way_changes_no_byte(cluster, pool, moe_model, plan, local, tmp_path):
    doomed = list(cluster.worker_nodes)
    assert len(doomed) == 1

    def kill_half_way(_stage, done, total, **_):
        if done > total / 2 and doomed:
            cluster.remove_node(doomed.pop(), allow_graceful=False)

    try:
        (path,) = export_gguf(
            moe_model, plan, None, tmp_path / "a.gguf",
            encoder=GGML, limits=LIMITS, elsewhere=encoding(pool, moe_model), progress=kill_half_way,
        )  # fmt: skip
    finally:
        cluster.add_node(num_cpus=1)
    assert not doomed and path.read_bytes() == local


@pytest.mark.nightly
def test_workers_sum_the_weights_that_they_encode_and_the_command_compares_them(pool, moe_model):
    name = next(name for name in moe_model.source.names() if name.endswith("ffn_down_exps.weight"))
    shape = tuple(moe_model.source.info(name).shape)
    parts = LIMITS.parts(name, shape, quant_type("Q4_0"))
    assert len(parts) > 1
    same = {name: f"{checksum(moe_model.source.load(name)):016x}"}

    def encoded(expected):
        remote = replace(encoding(pool, moe_model), checks=WeightChecks(expected, moe_model.name))
        return sum(blocks.numel() for _, blocks in remote(parts))

    assert encoded(same) == encoded({}) == quant_type("Q4_0").tensor_bytes(shape)
    with pytest.raises(
        ExportError, match=rf"{name}. in textbook-moe-16m changed since the plan was made: .* was 0{{16}}"
    ):
        encoded({name: "0" * 16})


@pytest.mark.nightly
def test_shipped_weights_give_the_same_bytes_without_files(pool, moe_model, plan, local, tmp_path):
    remote = encoding(pool, moe_model, shipped=True, path=tmp_path / "not there")
    (path,) = export_gguf(moe_model, plan, None, tmp_path / "a.gguf", encoder=GGML, limits=LIMITS, elsewhere=remote)
    assert path.read_bytes() == local


@pytest.mark.nightly
def test_another_checkpoint_or_version_on_a_node_is_refused_and_what_is_done_kept(pool, moe_model, plan, tmp_path):
    for changes, words in [({"path": tmp_path / "none"}, "--ship-weights"), ({"fingerprint": "0"}, "checkpoint")]:
        with pytest.raises(ClusterError, match=words):
            remote = encoding(pool, moe_model, **changes)
            export_gguf(moe_model, plan, None, tmp_path / "a.gguf", encoder=GGML, limits=LIMITS, elsewhere=remote)
        assert (tmp_path / "a.gguf.journal").is_file()
    other = EncoderChoice("ggml", "cpu", 1, version="0.0")
    with pytest.raises(ClusterError, match=r"Install the same versions"):
        remote = RemoteEncoding(pool, other, TaskNeeds(), encoding(pool, moe_model).files)
        next(iter(remote(LIMITS.parts("output_norm.weight", (256,), plan.entries[0].quant_type))))


@pytest.mark.nightly
def test_an_error_table_of_a_cluster_is_the_local_one_and_goes_on(cluster, pool, moe_model, text, one_thread, tmp_path):
    stats = measured(moe_model, text, "none").stats
    stats.save(tmp_path / "stats.safetensors")
    files = StoredFiles(StoredModel.of(moe_model), tmp_path / "stats.safetensors")
    remote = measure_on(pool, EncoderChoice.of(GGML, "cpu", 1), files)
    doomed = list(cluster.worker_nodes)

    def table(progress=ignore_progress, **options):
        return build_error_table(
            ErrorMeter(moe_model, stats, GGML), ("Q4_0", "Q8_0"), stats_hash="s", progress=progress, **options
        )

    def stop(_stage, done, total, **_):
        if done > total / 3:
            raise StoppedError

    def kill(_stage, done, total, **_):
        if done > total / 2 and doomed:
            cluster.remove_node(doomed.pop(), allow_graceful=False)

    with pytest.raises(StoppedError), ErrorJournal(tmp_path / "errors.json", {}) as journal:
        table(stop, elsewhere=remote, journal=journal)
    try:
        with ErrorJournal(tmp_path / "errors.json", {}) as journal:
            assert journal.num_parts
            found = table(kill, elsewhere=remote, journal=journal)
    finally:
        cluster.add_node(num_cpus=1)
    assert not doomed and found.model_dump_json() == table().model_dump_json()


class StoppedError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.nightly
def test_results_keep_the_order_of_items_when_asked(pool):
    found = list(pool.run(_wait_and_square, [5, 1, 4, 2, 3], TaskNeeds(), ordered=True))
    assert found == [(5, 25), (1, 1), (4, 16), (2, 4), (3, 9)]
    with pytest.raises(CheckpointError, match="item 7"):
        list(pool.run(_refuse, [7], TaskNeeds()))


@pytest.mark.nightly
def test_needs_that_no_node_has_are_refused(pool):
    with pytest.raises(ClusterError, match="3 CPU"):
        next(pool.run(_refuse, [1], TaskNeeds(cpus=3)))
    with pytest.raises(ClusterError, match="1 GPU"):
        next(pool.run(_refuse, [1], TaskNeeds(gpus=1)))


def _wait_and_square(number: int) -> int:
    torch.manual_seed(number)
    return number * number


def _refuse(item: int) -> None:
    raise CheckpointError(f"item {item} cannot be read")


@pytest.mark.nightly
def test_the_command_gives_the_bytes_of_a_local_export(cluster, small_moe, tmp_path):
    preset = ("--preset", "uniform-q8_0", "--encoder", "ggml", "--tune", "0")
    arguments = ("export", small_moe, *preset, "-f", "safetensors")
    here = run(*arguments, "-o", tmp_path / "here")
    there = run(*arguments, "-o", tmp_path / "there", "--ray", cluster.address, "--max-memory", "1.01GiB")
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    folders = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("here", "there")]
    assert folders[0] == folders[1]


@pytest.fixture(scope="module")
def text(moe_model):
    """32 windows of 32 tokens: two shards of sums, and one of three windows that are held back."""
    inputs = text_inputs(moe_model, None, tokens=1024, window=32)
    return inputs, provenance_of(moe_model, inputs, tokens=1024, seed=0)


def measured(moe, text, hessians: str, pool: RayPool | None = None, progress=ignore_progress):
    return calibrate_in_shards(
        moe, *text, StatisticsOptions(hessians, (1 << 30, 1 << 30)), pool=pool, progress=progress
    )


@pytest.fixture
def one_thread():
    """That of Ray's workers: products of more threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.nightly
def test_calibration_keeps_its_bytes_when_a_node_dies(cluster, pool, moe_model, text, one_thread, tmp_path):
    doomed = list(cluster.worker_nodes)

    def kill(_stage, _done, _total, **_):
        if doomed:
            cluster.remove_node(doomed.pop(), allow_graceful=False)

    here = measured(moe_model, text, "gradients")
    try:
        there = measured(moe_model, text, "gradients", pool, kill)
    finally:
        cluster.add_node(num_cpus=1)
    assert not doomed
    for found, name in ((here, "here"), (there, "there")):
        found.stats.save(tmp_path / f"{name}.stats")
        found.moments.save(tmp_path / f"{name}.moments")
    for kind in ("stats", "moments"):
        assert (tmp_path / f"here.{kind}").read_bytes() == (tmp_path / f"there.{kind}").read_bytes()


@pytest.mark.nightly
def test_shards_add_up_to_the_one_sum(moe_model, text):
    inputs, provenance = text
    sharded = measured(moe_model, text, "activations")
    hf_model = load_hf(moe_model)
    whole = collect_statistics(
        hf_model, inputs, names=weight_inputs(moe_model, hf_model), provenance=provenance,
        options=StatisticsOptions("activations"),
    )  # fmt: skip
    assert sharded.stats.provenance == whole.stats.provenance == sharded.moments.provenance
    assert sharded.stats.aliases == whole.stats.aliases and sharded.stats.inputs.keys() == whole.stats.inputs.keys()
    assert torch.equal(sharded.moments.tokens, whole.moments.tokens)
    for key, found in whole.stats.inputs.items():
        merged = sharded.stats.inputs[key]
        assert torch.equal(merged.counts, found.counts)
        torch.testing.assert_close(merged.in_sum2, found.in_sum2, rtol=1e-5, atol=0)
        torch.testing.assert_close(sharded.moments.sums[key], whole.moments.sums[key], rtol=1e-4, atol=1e-3)
        assert (merged.samples is None) == (found.samples is None)
        if found.samples is not None:
            assert torch.equal(merged.samples, found.samples)
            assert torch.equal(merged.sample_counts, found.sample_counts)
        if found.max_in is not None:
            assert torch.equal(merged.max_in_channel, found.max_in_channel)


def test_shards_are_cut_by_window_number(text):
    inputs, provenance = text
    shards = cut(inputs, provenance, 0.1)
    assert [len(shard.inputs) for shard in shards] == [16, 13, 3] and [s.is_held for s in shards] == [0, 0, 1]
    assert torch.equal(torch.cat([shard.inputs.windows for shard in shards]), inputs.windows)
    assert len({shard.provenance.seed for shard in shards}) == 3
    assert [len(shard.inputs) for shard in cut(inputs[:2], provenance, 0.1)] == [1, 1]


def test_no_cluster_at_an_address_is_refused(small_moe, tmp_path):
    needs_ray()
    done = run("export", small_moe, "--preset", "uniform-q8_0", "-o", tmp_path / "a.gguf", "--ray", "127.0.0.1:1")
    assert done.returncode == 1 and "There is no Ray cluster at 127.0.0.1:1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_shipping_without_a_cluster_and_too_little_memory_are_refused(small_moe, tmp_path):
    arguments = ("export", small_moe, "--preset", "uniform-q8_0", "-o", tmp_path / "a.gguf")
    shipped, tight = run(*arguments, "--ship-weights"), run(*arguments, "--max-memory", "512MiB")
    assert shipped.returncode == 1 and "give its address with --ray" in shipped.stderr
    assert tight.returncode == 1 and "--max-memory 512MiB is less than" in tight.stderr
    assert not list(tmp_path.iterdir())


def test_without_ray_the_way_to_install_it_is_named(monkeypatch, small_moe, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run("export", small_moe, "--preset", "uniform-q8_0", "-o", tmp_path / "a.gguf", "--ray", "auto")
    assert done.returncode == 1 and "dynquant-toolchain[ray]" in done.stderr
