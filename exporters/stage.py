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
from dynquant.calibration.stage import CalibrationOptions, StatsFile, run_calibration
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.checkpoint_directory import SHARD_BYTES
from dynquant.checkpoints.gguf_layout import recorded_encoder
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.remote import EncoderChoice, RemoteEncoding, StoredFiles
from dynquant.encoding.stream import encoder_version, guidance_of, load_encoder
from dynquant.errors import ExportError, PlanError
from dynquant.exporters.closing_pass import TuneOptions, too_large_to_tune, tune
from dynquant.exporters.compressed_stage import Exported, export_for_vllm
from dynquant.exporters.gguf import export_gguf
from dynquant.exporters.gguf_patch import write_patched
from dynquant.exporters.mmproj import check_parts, with_mmproj_type, write_parts
from dynquant.exporters.safetensors import export_safetensors
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.open import open_and_announce, open_language_model
from dynquant.formats.quant_types import quant_type
from dynquant.inputs.text import pack_windows, read_text
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_from_types
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


def export(
    path: str,
    output: Path,
    session: Session = SILENT,
    *,
    format: str = "gguf",
    plan_path: Path | None = None,
    preset: str | None = None,
    stats_path: Path | None = None,
    calibration: CalibrationOptions | None = None,
    encoder: str = "dynquant",
    split_max_size: str | None = None,
    resume: bool = True,
    base_gguf: Path | None = None,
    tune_tokens: int | None = None,
    max_memory: str | None = None,
    ray: str | None = None,
    ship_weights: bool = False,
    mmproj_type: str | None = None,
) -> Exported:
    """Write the files of a plan, or of a preset without a plan file.

    `tune_tokens` is the length of the closing pass, 0 for none; None lets the encoder and the memory decide.
    `max_memory` bounds what encoding takes, as `8GiB`. `ray` is the address of a cluster that encodes; with
    `ship_weights` its workers read no files. A vision-language model gets a second GGUF file, mmproj-OUTPUT, whose
    matrices have the types of the plan or all `mmproj_type`.
    """
    limits = _limits(max_memory)
    if ship_weights and not ray:
        raise ExportError("--ship-weights says how a Ray cluster gets its input; give its address with --ray.")
    if format == "compressed-tensors":
        given = {"--tune": tune_tokens, "--base-gguf": base_gguf, "--max-memory": max_memory, "--ray": ray}
        for option in (option for option, value in given.items() if value):
            raise ExportError(f"{option} is for GGUF files and packed safetensors; leave it out.")
        return export_for_vllm(
            path, output, session, plan_path=plan_path, preset=preset, stats_path=stats_path, calibration=calibration,
            split_max_size=split_max_size, resume=resume,
        )  # fmt: skip
    if format not in FORMATS:
        raise ExportError(f"There is no export format `{format}`; use one of {', '.join(FORMATS)}.")
    if (plan_path is None) == (preset is None):
        raise PlanError("Give either --plan FILE or --preset NAME.")
    with open_ray(ray) if ray else nullcontext() as pool:
        model = open_and_announce(path, session, base_gguf=base_gguf)
        if model.has_vision and format == "gguf":
            check_parts(model, session)
            if ray:
                raise ExportError("--ray does not encode vision-language models as GGUF yet; leave it out.")
        cluster = None if pool is None else _Cluster(pool, session.device, base_gguf, ship_weights)
        chosen = load_encoder(encoder, chosen_device(session.device) if cluster is None else cluster.device)
        if plan_path is not None:
            made = Plan.load(plan_path)
            stats = stats_of_plan(made.stats_hash, stats_path or plan_path.parent / STATS_NAME)
            protected = _protected(plan_path.with_name(SUPER_NAME))
        else:
            options = calibration or CalibrationOptions()
            made, stats = _plan_of_preset(model, str(preset), stats_path, options, output, session)
            protected = {}
        if mmproj_type is not None:
            if format != "gguf":
                raise ExportError("--mmproj-type is for GGUF files; leave it out.")
            made = with_mmproj_type(model, made, mmproj_type, stats and stats.stats)
        moments = _moments_of(stats, chosen, session)
        writer = _Writer(
            model, made, stats and stats.stats, stats and stats.path, chosen, moments, protected,
            parse_size(split_max_size) if split_max_size else None, resume, format, limits, cluster, session,
        )  # fmt: skip
        options = _closing_pass(model, chosen, moments, tune_tokens, limits, session)
        if model.has_vision and format == "gguf":
            files = write_parts(model, made, stats and stats.stats, moments, output, writer.write_part)
        else:
            files = writer.write(output) if options is None else _write_tuned(writer, output, options, session)
    return Exported(files, made.num_weights)


@dataclass(frozen=True)
class _Cluster:
    """Cluster on which parts are encoded with --ray; `asked` is --device, of the workers."""

    pool: RayPool
    asked: str | None
    base_gguf: Path | None
    ship_weights: bool

    @property
    def device(self) -> str:
        asked = self.asked or ("cuda" if self.pool.has_gpus else "cpu")
        return "cuda" if asked.startswith("cuda") else asked  # Ray numbers the GPUs


@dataclass(frozen=True)
class _Writer:
    """Everything that decides the bytes of an export but its name."""

    model: Model
    plan: Plan
    stats: CalibrationStats | None
    stats_path: Path | None
    encoder: Encoder
    moments: SecondMoments | None
    protected: Mapping[str, tuple[ProtectedWeight, ...]]
    split_max_bytes: int | None
    resume: bool
    format: str
    limits: PartLimits
    cluster: _Cluster | None
    session: Session

    def write(self, output: Path, *, stored: GGUFSource | None = None) -> list[Path]:
        """Write in the format that was asked for; with `stored`, from the bytes of a GGUF file of the same plan."""
        if self.format == "gguf":
            return self.write_gguf(output)
        with self.session.stage("Finished tensors are kept.") as progress:
            return export_safetensors(
                self.model, self.plan, self.stats, output,
                encoder=self.encoder, moments=self.moments, protected=self.protected, threads=self.session.threads,
                shard_max_bytes=self.split_max_bytes or SHARD_BYTES, resume=self.resume, progress=progress,
                stored=stored, limits=self.limits, elsewhere=self.elsewhere,
            )  # fmt: skip

    def write_part(
        self, part: ModelPart, plan: Plan, stats: CalibrationStats | None, moments: SecondMoments | None, output: Path
    ) -> list[Path]:
        """Write one file of a model that has several; llama.cpp reads no split mmproj."""
        limit = None if part.is_projector else self.split_max_bytes
        own = replace(self, model=part.model, plan=plan, stats=stats, moments=moments, split_max_bytes=limit)
        return own.write_gguf(output)

    def write_gguf(self, output: Path) -> list[Path]:
        with self.session.stage("Finished tensors are kept.") as progress:
            return export_gguf(
                self.model, self.plan, self.stats, output,
                encoder=self.encoder, moments=self.moments, protected=self.protected, threads=self.session.threads,
                split_max_bytes=self.split_max_bytes, resume=self.resume, progress=progress,
                limits=self.limits, elsewhere=self.elsewhere,
            )  # fmt: skip

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


def _closing_pass(
    model: Model,
    encoder: Encoder,
    moments: SecondMoments | None,
    tokens: int | None,
    limits: PartLimits,
    session: Session,
) -> TuneOptions | None:
    """Return the options of the closing pass, or None; by default it runs with the encoder that uses second moments."""
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
    elif tokens is None and (too_large := too_large_to_tune(model, limits.memory)):
        reason = too_large
    elif tokens is None and len(moments.tokens) <= TuneOptions().held_out_windows:
        reason = "the calibration text is too short"
    if reason is None:
        return TuneOptions() if tokens is None else TuneOptions(tokens=tokens)
    if tokens is not None:
        raise ExportError(f"The closing pass (--tune {tokens}) cannot run: {reason}. Export with --tune 0.")
    session.note(f"no closing pass: {reason}")
    return None


def _write_tuned(writer: _Writer, output: Path, options: TuneOptions, session: Session) -> list[Path]:
    """Export under another name, tune, and write the result; a run that was stopped goes on where it was."""
    assert writer.moments is not None
    untuned = output.with_name(f".{output.stem}.untuned-{writer.identity[:12]}.gguf")
    written = sorted(untuned.parent.glob(f"{untuned.stem}-*-of-*.gguf")) or [untuned] * untuned.exists()
    if not written or not writer.resume:
        written = writer.write_gguf(untuned)
    target = (
        output if writer.format == "gguf" else output.with_name(f".{output.stem}.tuned-{writer.identity[:12]}.gguf")
    )
    files = tune_file(
        writer.model, written[0], writer.moments.tokens, options, target, session, encoder=writer.encoder.name
    )
    if writer.format != "gguf":
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
        tuned = tune(model, hf_model, source, windows, options, progress=progress)
    change = f"{tuned.kl_before:.4f} -> {tuned.kl_after:.4f} nats on {options.held_out_windows} windows held out"
    if tuned.replacements:
        session.note(f"closing pass on {tuned.tokens:,} tokens: KL {change}")
        encoder = f"{encoder}+tune"
    else:
        session.note(
            f"the closing pass on {tuned.tokens:,} tokens did not clearly help (KL {change}); scales stay as encoded"
        )
    return write_patched(source, output, tuned.replacements, encoder=encoder)


def tune_command(
    path: Path,
    reference: str,
    output: Path,
    options: TuneOptions,
    session: Session,
    *,
    text: str | None = None,
    window: int = 512,
) -> list[Path]:
    """Tune any GGUF file whose original is a Hugging Face checkpoint."""
    if output.exists() and output.samefile(path):
        raise ExportError(f"{output} is the file that is being read; write the tuned one to another name.")
    model = open_language_model(reference, session)
    tokenizer = load_tokenizer(model)
    tokens = options.tokens + options.held_out_windows * window
    found = read_text(text, seed=options.seed, max_tokens=tokens)
    windows = pack_windows(found, tokenizer, window=window, max_tokens=tokens)
    encoder = recorded_encoder(GGUFSource(path))
    return tune_file(model, path, windows, options, output, session, encoder=encoder.removesuffix("+tune"))


def _moments_of(stats: StatsFile | None, encoder: Encoder, session: Session) -> SecondMoments | None:
    """The second moments that belong to the statistics, for an encoder that uses them; says so when there are none."""
    if stats is None or not encoder.uses_hessians:
        return None
    moments = stats.moments
    if moments is None:
        where = path_beside(stats.path)
        session.note(f"there is no {where}: encoding without error feedback (calibrate with --hessians to have it)")
    return moments


def _protected(path: Path) -> dict[str, tuple[ProtectedWeight, ...]]:
    """The super weights that `plan` found, by tensor."""
    found: dict[str, tuple[ProtectedWeight, ...]] = {}
    for one in load_super_weights(path):
        found[one.name] = (*found.get(one.name, ()), ProtectedWeight(one.row, one.col, one.expert))
    return found


def _plan_of_preset(
    model: Model,
    preset: str,
    stats_path: Path | None,
    calibration: CalibrationOptions,
    output: Path,
    session: Session,
) -> tuple[Plan, StatsFile | None]:
    """Return plan and statistics; calibrates only when a type uses statistics and none were given."""
    types = preset_types(preset, model)
    recipe = Target(preset=preset).recipe
    path = stats_path or output.with_suffix(".stats.safetensors")
    if stats_path is None and not any(quant_type(name).uses_imatrix for name, _ in types.values()):
        return plan_from_types(model, types, recipe=recipe), None
    if stats_path is None and not path.is_file():
        session.note(f"no --stats given: calibrating on {calibration.text or 'the built-in text'} into {path}")
        run_calibration(model, calibration, path, session)
    stats = StatsFile(path).of(model)
    return plan_from_types(model, types, recipe=recipe, stats=stats.stats, stats_hash=stats.hash), stats
