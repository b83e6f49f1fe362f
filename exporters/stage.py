"""The stage that writes files: what belongs to a plan or preset is gathered, the exporter runs, scales are tuned."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments, path_beside
from dynquant.calibration.stage import StatsFile, run_calibration
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import recorded_encoder
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.remote import EncoderChoice, RemoteEncoding, StoredFiles
from dynquant.encoding.stream import encoder_version, guidance_of, load_encoder
from dynquant.errors import ExportError, PlanError
from dynquant.exporters.closing_pass import TuneOptions, too_large_to_tune
from dynquant.exporters.closing_pass import tune as train
from dynquant.exporters.compressed_config import transformers_problem
from dynquant.exporters.compressed_tensors import Rounding, export_compressed_tensors
from dynquant.exporters.gguf import check_parts, export_gguf, with_mmproj_type, write_patched
from dynquant.exporters.options import ExportOptions, TuneFileOptions
from dynquant.exporters.output import Encoding, Exported
from dynquant.exporters.safetensors import export_safetensors
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_and_announce, open_language_model
from dynquant.formats.quant_types import quant_type
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.inputs.text import pack_windows, read_text
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_for_vllm, plan_from_types, uniform_schemes
from dynquant.recipes.folder import STATS_NAME, SUPER_NAME, load_super_weights, stats_of_plan
from dynquant.recipes.plan import Plan
from dynquant.recipes.presets import preset_types
from dynquant.resources import chosen_device, parse_size
from dynquant.running.cluster import RayPool, TaskNeeds, open_ray
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import SILENT, Session

PROCESS_BYTES = 1 << 30
"""Host memory of an export without its tensors: Python with its libraries, the tokenizer, an encoder's search."""
FORMATS = ("gguf", "safetensors", "compressed-tensors")


def export(options: ExportOptions, session: Session = SILENT) -> Exported:
    """Write the files of a plan, or of a preset without a plan file.

    A vision-language model gets a second GGUF file, mmproj-OUTPUT, whose matrices have the types of the plan or all
    `mmproj_type`.
    """
    _check(options)
    if options.format == "compressed-tensors":
        return _export_schemes(options, session)
    with open_ray(options.ray) if options.ray else nullcontext() as pool:
        model = open_and_announce(options.model, session, base_gguf=options.base_gguf)
        if model.has_vision and options.format == "gguf":
            check_parts(model, session)
            if options.ray:
                raise ExportError("--ray does not encode vision-language models as GGUF yet; leave it out.")
        cluster = pool and _Cluster(pool, session.device, options.base_gguf, options.ship_weights)
        encoder = load_encoder(options.encoder, cluster.device if cluster else chosen_device(session.device))
        plan, stats, protected = _plan_and_statistics(model, options, session)
        if options.mmproj_type is not None:
            plan = with_mmproj_type(model, plan, options.mmproj_type, stats and stats.stats)
        moments = _moments_of(stats, session) if encoder.uses_hessians else None
        writer = _Writer(
            options=options,
            session=session,
            model=model,
            plan=plan,
            stats=stats and stats.stats,
            stats_path=stats and stats.path,
            encoder=encoder,
            moments=moments,
            protected=protected,
            cluster=cluster,
        )
        tuning = _closing_pass(writer)
        files = writer.write(options.output) if tuning is None else _write_tuned(writer, tuning)
    return Exported(files, plan.num_weights)


def _export_schemes(options: ExportOptions, session: Session) -> Exported:
    """Write the compressed-tensors checkpoint of a plan for vLLM, or of a preset without a plan file.

    Raises:
        PlanError, StatsError, EncodeError, ExportError: see `export_compressed_tensors`.
    """
    output = options.output
    if (options.plan is None) == (options.preset is None):
        raise PlanError("Give either --plan FILE (of `dynquant plan --for vllm`) or --preset uniform-SCHEME.")
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists already; export to another name, or remove it first.")
    loaded = Plan.load(options.plan, "vllm") if options.plan is not None else None
    model = open_language_model(options.model, session)
    checkpoint = linear_checkpoint(model)
    if loaded is not None and options.plan is not None:
        plan, stats = loaded, stats_of_plan(loaded.stats_hash, options.stats or options.plan.parent / STATS_NAME)
    else:
        types = uniform_schemes(str(options.preset), checkpoint)
        stats = _calibrated(model, types, options, session)
        recipe = f"preset {options.preset}"
        plan = plan_for_vllm(model, checkpoint, types, recipe=recipe, stats_hash=stats and stats.hash)
    moments = _moments_of(stats, session)
    rounding = None if stats is None else Rounding.under(stats.stats, moments)
    files = export_compressed_tensors(
        model,
        plan,
        checkpoint,
        output,
        rounding=rounding,
        shard_max_bytes=parse_size(options.split_max_size) if options.split_max_size else None,
        resume=options.resume,
        session=session,
    )
    problem = transformers_problem(plan)
    if problem is not None:
        session.note(f"vLLM loads this checkpoint, transformers does not: {problem}")
    return Exported(files, plan.num_weights)


def _calibrated(model: Model, types: dict[str, Choice], options: ExportOptions, session: Session) -> StatsFile | None:
    if not any(SCHEMES[name].is_quantized for name, _ in types.values()):
        return None
    path = options.stats or options.output.with_name(f"{options.output.name}.stats.safetensors")
    if not path.is_file():
        _calibrate_beside(path, model, options, session)
    return StatsFile(path).of(model)


def _calibrate_beside(path: Path, model: Model, options: ExportOptions, session: Session) -> None:
    """Write the statistics that a preset needs."""
    calibration = replace(options.calibration, max_memory=options.max_memory)
    session.note(f"no --stats given: calibrating on {calibration.text or 'the built-in text'} into {path}")
    run_calibration(model, calibration, path, session)


def _check(options: ExportOptions) -> None:
    """Refuse options that do not go together, before anything is opened."""
    _limits(options.max_memory)
    if options.ship_weights and not options.ray:
        raise ExportError("--ship-weights says how a Ray cluster gets its input; give its address with --ray.")
    if options.format not in FORMATS:
        raise ExportError(f"There is no export format `{options.format}`; use one of {', '.join(FORMATS)}.")
    if options.format == "compressed-tensors":
        flags = {
            "--tune": options.tune,
            "--base-gguf": options.base_gguf,
            "--max-memory": options.max_memory,
            "--ray": options.ray,
        }
        for flag in (flag for flag, value in flags.items() if value):
            raise ExportError(f"{flag} is for GGUF files and packed safetensors; leave it out.")
        return
    if (options.plan is None) == (options.preset is None):
        raise PlanError("Give either --plan FILE or --preset NAME.")
    if options.mmproj_type is not None and options.format != "gguf":
        raise ExportError("--mmproj-type is for GGUF files; leave it out.")


def _plan_and_statistics(
    model: Model, options: ExportOptions, session: Session
) -> tuple[Plan, StatsFile | None, Mapping[str, tuple[ProtectedWeight, ...]]]:
    """Return a plan, the statistics that it was made from, and its super weights."""
    if options.plan is None:
        return *_plan_of_preset(model, options, session), {}
    plan = Plan.load(options.plan)
    stats = stats_of_plan(plan.stats_hash, options.stats or options.plan.parent / STATS_NAME)
    return plan, stats, _protected(options.plan.with_name(SUPER_NAME))


@dataclass(frozen=True)
class _Cluster:
    """Cluster on which parts are encoded with --ray; `asked` is --device, of the workers."""

    pool: RayPool
    asked: str | None
    base_gguf: Path | None
    ship_weights: bool

    @property
    def device(self) -> str:
        return self.pool.device(self.asked)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Everything that decides the bytes of an export but its name."""

    options: ExportOptions
    session: Session
    model: Model
    plan: Plan
    stats: CalibrationStats | None
    stats_path: Path | None
    encoder: Encoder
    moments: SecondMoments | None
    protected: Mapping[str, tuple[ProtectedWeight, ...]]
    cluster: _Cluster | None

    def write(self, output: Path, *, stored: GGUFSource | None = None) -> list[Path]:
        """Write in the format that was asked for; with `stored`, from the bytes of a GGUF file of the same plan."""
        if self.options.format == "gguf":
            return self.write_gguf(output)
        return export_safetensors(self.encoding, output, shard_max_bytes=self.split_max_bytes, stored=stored)

    def write_gguf(self, output: Path) -> list[Path]:
        return export_gguf(self.encoding, output, split_max_bytes=self.split_max_bytes)

    @property
    def encoding(self) -> Encoding:
        return Encoding(
            model=self.model,
            plan=self.plan,
            encoder=self.encoder,
            stats=self.stats,
            moments=self.moments,
            protected=self.protected,
            limits=self.limits,
            elsewhere=self.elsewhere,
            resume=self.options.resume,
            session=self.session,
        )

    @property
    def split_max_bytes(self) -> int | None:
        size = self.options.split_max_size
        return parse_size(size) if size else None

    @property
    def limits(self) -> PartLimits:
        return _limits(self.options.max_memory)

    @property
    def elsewhere(self) -> RemoteEncoding | None:
        """Encoding on the cluster, or None without one."""
        if self.cluster is None:
            return None
        on_gpu = self.encoder.uses_hessians and self.cluster.device == "cuda"
        cpus = self.session.threads or 1
        memory = PROCESS_BYTES + self.limits.memory if self.limits.memory is not None else 0
        files = StoredFiles.of(
            self.model,
            base_gguf=self.cluster.base_gguf,
            stats=self.stats_path,
            use_moments=self.moments is not None,
            protected=self.protected,
        )
        guidance = guidance_of(self.stats, self.moments, self.protected)
        return RemoteEncoding(
            self.cluster.pool,
            EncoderChoice.of(self.encoder, "cuda" if on_gpu else "cpu", cpus),
            TaskNeeds(cpus, int(on_gpu), memory),
            files,
            (self.model, guidance, self.encoder) if self.cluster.ship_weights else None,
        )

    @property
    def identity(self) -> str:
        moments = self.moments.identity if self.moments else "none"
        content = [self.plan.hash, moments, self.encoder.name, encoder_version(self.encoder), __version__]
        return hashlib.sha256(json.dumps([*content, self.split_max_bytes]).encode()).hexdigest()


def _limits(max_memory: str | None) -> PartLimits:
    """Parts that leave room for the process itself.

    Raises:
        ExportError: less memory than the process takes.
    """
    if max_memory is None:
        return PartLimits()
    allowed = parse_size(max_memory)
    if allowed <= PROCESS_BYTES:
        raise ExportError(
            f"--max-memory {max_memory} is less than the {PROCESS_BYTES:,} bytes that the program takes without a "
            "tensor. Allow more."
        )
    return PartLimits(allowed - PROCESS_BYTES)


def _closing_pass(writer: _Writer) -> TuneOptions | None:
    """Return what the closing pass should do, or None; by default it runs with the encoder that uses second moments."""
    model, moments, tokens = writer.model, writer.moments, writer.options.tune
    if tokens == 0 or (tokens is None and moments is None):
        return None
    reason = None
    if model.has_vision:
        reason = "it trains on text alone, and the model sees pictures"
    elif moments is None:
        reason = "there are no second moments, whose text it would train on; calibrate with --hessians"
    elif model.hf_directory is not None and not isinstance(model.source, ConvertedSource):
        reason = "the model is not of a family that dynquant converts itself"
    elif tokens is None and model.hf_directory is None:
        reason = "the original is a GGUF file, which transformers may load in another form (`--tune N` tries)"
    elif tokens is None and (too_large := too_large_to_tune(model, writer.limits.memory)):
        reason = too_large
    elif tokens is None and len(moments.tokens) <= TuneOptions().held_out_windows:
        reason = "the calibration text is too short"
    if reason is None:
        return TuneOptions() if tokens is None else TuneOptions(tokens=tokens)
    if tokens is not None:
        raise ExportError(f"The closing pass (--tune {tokens}) cannot run: {reason}. Export with --tune 0.")
    writer.session.note(f"no closing pass: {reason}")
    return None


def _write_tuned(writer: _Writer, tuning: TuneOptions) -> list[Path]:
    """Export under another name, tune, and write the result; a run that was stopped goes on where it was."""
    assert writer.moments is not None
    output, is_gguf = writer.options.output, writer.options.format == "gguf"
    untuned = output.with_name(f".{output.stem}.untuned-{writer.identity[:12]}.gguf")
    written = sorted(untuned.parent.glob(f"{untuned.stem}-*-of-*.gguf")) or [untuned] * untuned.exists()
    if not written or not writer.options.resume:
        written = writer.write_gguf(untuned)
    target = output if is_gguf else output.with_name(f".{output.stem}.tuned-{writer.identity[:12]}.gguf")
    files = tune_file(
        writer.model, written[0], writer.moments.tokens, tuning, target, writer.session, encoder=writer.encoder.name
    )
    if not is_gguf:
        written += files
        files = writer.write(output, stored=GGUFSource(files[0]))
    for file in written:
        file.unlink()
    return files


def tune_file(
    model: Model,
    path: Path,
    windows: torch.Tensor,
    options: TuneOptions,
    output: Path,
    session: Session,
    *,
    encoder: str,
) -> list[Path]:
    """Tune the scales and norms of a GGUF file of `model` on token ids [n, window], and write the result."""
    source = GGUFSource(path)
    hf_model = load_hf(model, dtype=torch.float32, device=chosen_device(session.device))
    with session.stage("Encoded tensors are kept; the closing pass starts again.") as progress:
        tuned = train(model, hf_model, source, windows, options, progress=progress)
    change = f"{tuned.kl_before:.4f} -> {tuned.kl_after:.4f} nats on {options.held_out_windows} windows held out"
    if tuned.replacements:
        session.note(f"closing pass on {tuned.tokens:,} tokens: KL {change}")
        encoder = f"{encoder}+tune"
    else:
        session.note(
            f"the closing pass on {tuned.tokens:,} tokens did not clearly help (KL {change}); scales stay as encoded"
        )
    return write_patched(source, output, tuned.replacements, encoder=encoder)


def tune(options: TuneFileOptions, session: Session = SILENT) -> list[Path]:
    """Tune any GGUF file whose original is a Hugging Face checkpoint."""
    path, output = options.file, options.output
    if output.exists() and output.samefile(path):
        raise ExportError(f"{output} is the file that is being read; write the tuned one to another name.")
    tuning = TuneOptions(tokens=options.tokens, step_tokens=options.step_tokens, seed=session.seed)
    model = open_language_model(options.reference, session)
    tokens = tuning.tokens + tuning.held_out_windows * options.window
    text = read_text(options.text, seed=tuning.seed, max_tokens=tokens)
    windows = pack_windows(text, load_tokenizer(model), window=options.window, max_tokens=tokens)
    encoder = recorded_encoder(GGUFSource(path)).removesuffix("+tune")
    return tune_file(model, path, windows, tuning, output, session, encoder=encoder)


def _moments_of(stats: StatsFile | None, session: Session) -> SecondMoments | None:
    """Return the second moments that belong to the statistics; say so when there are none."""
    if stats is None:
        return None
    moments = stats.moments
    if moments is None:
        where = path_beside(stats.path)
        session.note(f"there is no {where}: encoding without error feedback (calibrate with --hessians to have it)")
    return moments


def _protected(path: Path) -> dict[str, tuple[ProtectedWeight, ...]]:
    """Return the super weights that `plan` found, by tensor."""
    protected: dict[str, tuple[ProtectedWeight, ...]] = {}
    for weight in load_super_weights(path):
        scalar = ProtectedWeight(weight.row, weight.col, weight.expert)
        protected[weight.name] = (*protected.get(weight.name, ()), scalar)
    return protected


def _plan_of_preset(model: Model, options: ExportOptions, session: Session) -> tuple[Plan, StatsFile | None]:
    """Return plan and statistics; calibrates only when a type uses statistics and none were given."""
    preset = str(options.preset)
    types = preset_types(preset, model)
    recipe = Target(preset=preset).recipe
    path = options.stats or options.output.with_suffix(".stats.safetensors")
    if options.stats is None and not any(quant_type(name).uses_imatrix for name, _ in types.values()):
        return plan_from_types(model, types, recipe=recipe), None
    if options.stats is None and not path.is_file():
        _calibrate_beside(path, model, options, session)
    stats = StatsFile(path).of(model)
    return plan_from_types(model, types, recipe=recipe, stats=stats.stats, stats_hash=stats.hash), stats
