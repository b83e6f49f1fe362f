"""The stage that writes files: what belongs to a plan or preset is gathered, the exporter runs, scales are tuned."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from dynquant.analysis.errors.measure import ErrorMeter
from dynquant.analysis.errors.stage import written_errors
from dynquant.analysis.errors.written import WrittenErrors
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.stage import StatsFile, statistics_at
from dynquant.checkpoints.gguf_layout import TUNED, mmproj_path, recorded_encoder
from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import mtp_layers
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.remote import EncoderChoice, RemoteEncoding, StoredFiles
from dynquant.encoding.stream import load_encoder
from dynquant.errors import ExportError, PlanError
from dynquant.evaluation.agreement.same_computation import SameComputation, check_computation, check_written
from dynquant.exporters.asymmetric.stream import asymmetric
from dynquant.exporters.closing_pass import (
    TuneOptions,
    cannot_run,
    check_can_tune,
    check_windows,
    closing_pass_of,
    obstacle,
    tune_file,
    tune_options,
)
from dynquant.exporters.compressed_tensors import check_is_compressed, check_is_free, export_compressed_tensors
from dynquant.exporters.gguf import check_is_not_read, check_parts, export_gguf, with_mmproj_type
from dynquant.exporters.modelfile import write_modelfile
from dynquant.exporters.options import ExportOptions, TuneFileOptions, stats_of_preset
from dynquant.exporters.output import Encoding, Exported
from dynquant.exporters.safetensors import export_safetensors
from dynquant.exporters.tuning.export import TunedFormat, export_tuned
from dynquant.families.complete_gguf import check_complete
from dynquant.families.linear_layers import LinearCheckpoint, linear_checkpoint
from dynquant.families.model_kind import check_same_kind
from dynquant.families.open import check_original, locate_model, open_and_announce, open_language_model, open_pruned
from dynquant.families.tokenizers.chat_template import format_of_metadata, lint
from dynquant.formats.quant_types import quant_type
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.inputs.model_inputs import check_context
from dynquant.inputs.text import MIX, pack_windows, read_text
from dynquant.options import check_ending, check_folder_name
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_for_vllm, plan_from_types, plan_of_rest, uniform_schemes
from dynquant.recipes.folder import load_super_weights, stats_of_plan
from dynquant.recipes.plan import Plan, plan_file
from dynquant.recipes.presets import preset_types
from dynquant.resources import chosen_device, parse_size
from dynquant.running.cluster import RayPool, StoredModel, TaskNeeds, open_ray
from dynquant.running.load import load_tokenizer
from dynquant.session import SILENT, Session
from dynquant.storage.file_kinds import but_is
from dynquant.storage.file_names import ERRORS_NAME, STATS_NAME, SUPER_NAME, path_beside
from dynquant.storage.lock import locked
from dynquant.storage.work_files import check_work, remove_work

PROCESS_BYTES = 1 << 30
"""Host memory of an export without its tensors: Python with its libraries, the tokenizer, an encoder's search."""


def export(options: ExportOptions, session: Session = SILENT) -> Exported:
    """Write the files of a plan, or of a preset without a plan file, for llama.cpp, transformers or vLLM.

    A vision-language model gets a second GGUF file, mmproj-OUTPUT, whose matrices have the types of the plan or all
    `mmproj_type`.
    """
    if options.plan is not None:
        options = options.changed_to({"plan": plan_file(options.plan)})
    _check(options)
    with locked(options.output):
        exported = _exported(options, session)
        remove_work(options.output)
    return exported


def _exported(options: ExportOptions, session: Session) -> Exported:
    is_vllm = options.format == "compressed-tensors"
    plan = None if options.plan is None else Plan.load(options.plan, "vllm" if is_vllm else "gguf")
    with open_ray(options.ray) if options.ray else nullcontext() as pool:
        model, compared = _opened(options, plan, session)
        checkpoint = linear_checkpoint(model, options.tensor_parallel, options.group_size) if is_vllm else None
        if model.has_vision and options.format == "gguf":
            check_parts(model, session)
            if pool is not None:
                raise ExportError("--ray does not encode vision-language models as GGUF yet; leave it out.")
        device = chosen_device(session.device) if pool is None else pool.device(session.device)
        # Schemes are searched as this encoder searches types; there is no other for them.
        encoder = load_encoder("dynquant" if is_vllm else options.encoder, device)
        if plan is None or options.plan is None:
            _check_runs(model, encoder, options)
            plan, stats = _plan_of_preset(model, checkpoint, options, session)
            for line in plan.remarks():
                session.note(line)
            protected = {}
        else:
            stats = stats_of_plan(plan.stats_hash, options.stats or options.plan.parent / STATS_NAME)
            protected = _protected(options.plan.with_name(SUPER_NAME), plan)
            if not options.mtp:
                plan = _without_layers_ahead(model, plan, stats, session)
        if options.mmproj_type is not None:
            plan = with_mmproj_type(model, plan, options.mmproj_type, stats and stats.stats)
        encoding = Encoding(
            model=model,
            plan=plan,
            encoder=encoder,
            stats=stats and stats.stats,
            moments=_moments_of(stats, plan, session) if encoder.uses_hessians else None,
            protected=protected,
            limits=_limits(options.max_memory),
            blocks=options.blocks,
            resume=options.resume,
            session=session,
        )
        tuning = closing_pass_of(encoding, options.tune, options.closing)  # refused before anything is written
        if pool is not None:
            encoding = replace(encoding, elsewhere=_on_cluster(encoding, pool, options, stats and stats.path))
        is_here = not is_vllm and pool is None and options.blocks is None and not options.asymmetric
        errors = _written_errors(encoding, options, stats) if is_here else None
        encoding = replace(encoding, errors=errors)
        with errors or nullcontext(), asymmetric(encoding, options.asymmetric, options.output) as encoding:
            files = _write(encoding, checkpoint, options, tuning)
            if errors is not None:
                errors.save(session)
    if options.modelfile:
        files.append(write_modelfile(files, session))
    if options.format == "gguf" and compared is None and model.is_converted:
        how = {"allow_difference": options.allow_difference, "max_memory": options.max_memory}
        check_written(model, files[0], session, **how)
    return Exported(files, plan.num_weights)


def _check_runs(model: Model, encoder: Encoder, options: ExportOptions) -> None:
    """Refuse, before calibration, what runs the original and cannot."""
    has_moments = options.stats is not None or options.calibration.hessians != "none"
    reason = obstacle(model, encoder, has_moments=has_moments)
    if reason is not None and (options.tune or options.asymmetric):
        raise cannot_run(reason, options.tune, options.asymmetric)


def _without_layers_ahead(model: Model, plan: Plan, stats: StatsFile | None, session: Session) -> Plan:
    """Return the plan of a model without its layers that predict tokens ahead, and say both predicted sizes."""
    rest = plan_of_rest(model, plan, stats and stats.stats)
    if len(rest.entries) < len(plan.entries):
        session.note(
            f"the plan is of {plan.predicted_bytes:,} bytes with the layers that predict tokens ahead; without them "
            f"{rest.predicted_bytes:,} bytes are predicted"
        )
    return rest


def _write(
    encoding: Encoding, checkpoint: LinearCheckpoint | None, options: ExportOptions, tuning: TuneOptions | None
) -> list[Path]:
    split = parse_size(options.split_max_size) if options.split_max_size else None
    if checkpoint is not None:
        kind = TunedFormat(partial(export_compressed_tensors, encoding, checkpoint, shard_max_bytes=split))
    else:
        packed = partial(export_safetensors, encoding, shard_max_bytes=split)
        convert = packed if options.format == "safetensors" else None
        kind = TunedFormat(partial(export_gguf, encoding, split_max_bytes=split), ".gguf", convert)
    if tuning is None:
        return (kind.convert or kind.write)(options.output)
    return export_tuned(encoding, kind, options.output, tuning, split, options.blocks)


def _written_errors(encoding: Encoding, options: ExportOptions, stats: StatsFile | None) -> WrittenErrors | None:
    """Return what measures this export for the table beside its plan; None without such a table."""
    if options.plan is None or stats is None:
        return None
    meter = ErrorMeter(encoding.model, stats.stats, encoding.encoder, moments=encoding.used_moments)
    types = {entry.name: entry.type for entry in encoding.plan.entries}
    try:
        errors = written_errors(options.plan.with_name(ERRORS_NAME), meter, stats, types, options.output)
    except PlanError as error:
        encoding.session.note(f"exact errors are not entered into the table beside the plan. {error}")
        return None
    return errors and errors.begin(encoding.identity("any"))


def _opened(options: ExportOptions, plan: Plan | None, session: Session) -> tuple[Model, SameComputation | None]:
    """Return the model with the layers and experts that the plan names, and how llama.cpp compares with transformers
    on it."""
    if options.format == "compressed-tensors":
        model = open_language_model(options.model, session)
    else:
        mtp = options.mtp and (plan is None or bool(mtp_layers(entry.name for entry in plan.entries)))
        model = open_and_announce(options.model, session, base_gguf=options.base_gguf, mtp=mtp)
    if options.format == "gguf":
        check_is_not_read(options.output, getattr(model.source, "files", ()))
    folder = None if options.plan is None else options.plan.parent
    if plan is not None and folder is not None:
        model = open_pruned(model, plan.pruned, folder, session)
    if options.format == "compressed-tensors":
        return model, None
    for finding in lint(format_of_metadata(model.metadata)):
        if finding.is_fault:
            session.note(finding.text)
    how = {"allow_difference": options.allow_difference, "max_memory": options.max_memory}
    return model, check_computation(model, session, folder=folder, **how)


def _check(options: ExportOptions) -> None:
    """Refuse options that do not go together, before anything is opened."""
    _limits(options.max_memory)
    if options.ship_weights and not options.ray:
        raise ExportError("--ship-weights says how a Ray cluster gets its input; give its address with --ray.")
    if options.format == "gguf":
        check_ending(options.output, ".gguf", "--output")
        for file in (options.output, mmproj_path(options.output)):
            check_work(file)
    else:
        check_folder_name(options.output, "--output")
    if options.mmproj_type is not None and options.format != "gguf":
        raise ExportError("--mmproj-type is for GGUF files; leave it out.")
    if options.modelfile and (options.format != "gguf" or options.split_max_size):
        raise ExportError("--modelfile is for a GGUF model in one file, which is what Ollama reads; leave it out.")
    for source in ("plan", "stats"):
        if getattr(options, source) is not None:
            options.calibration.refuse_unused(f"--{source} has or names statistics, so nothing is calibrated.")
    if options.asymmetric and options.ray:
        raise ExportError("--asymmetric encodes each tensor after those before it, and --ray side by side; drop one.")
    if options.format != "compressed-tensors":
        options.refuse_unused("it goes with --format compressed-tensors.", "tensor_parallel", "group_size")
    else:
        options.refuse_unused("schemes of vLLM have an encoder of their own.", "encoder")
        flags = ("asymmetric", "base_gguf", "ray")
        options.refuse_unused("layers that predict tokens ahead stay as they are stored.", "mtp")
        if flag := next((flag for flag in flags if getattr(options, flag)), None):
            raise ExportError(f"--{flag.replace('_', '-')} is for GGUF files and packed safetensors; leave it out.")
    if options.tune == 0 or (options.tune is None and options.encoder != "dynquant"):
        options.closing.refuse_unused("the closing pass runs with --encoder dynquant, and without --tune 0.")
    if (options.plan is None) == (options.preset is None):
        plan, preset = "--plan FILE", "--preset NAME"
        if options.format == "compressed-tensors":
            plan, preset = "--plan FILE (of `dynquant plan --for vllm`)", "--preset uniform-SCHEME"
        raise PlanError(f"Give either {plan} or {preset}.")
    if options.fallback and options.preset is None:
        raise PlanError("--fallback goes with --preset; a plan says itself which types its tensors have.")
    if options.format == "compressed-tensors":
        check_is_free(options.output)


def _on_cluster(encoding: Encoding, pool: RayPool, options: ExportOptions, stats: Path | None) -> RemoteEncoding:
    """Return what encodes parts on the workers of a cluster."""
    encoder, memory = encoding.encoder, encoding.limits.memory
    on_gpu = encoder.uses_hessians and pool.device(encoding.session.device) == "cuda"
    cpus = encoding.session.threads or 1
    model, has_moments = StoredModel.of(encoding.model), encoding.moments is not None
    files = StoredFiles(model, stats and stats.resolve(), has_moments, tuple(encoding.protected.items()))
    return RemoteEncoding(
        pool,
        EncoderChoice.of(encoder, "cuda" if on_gpu else "cpu", cpus),
        TaskNeeds(cpus, int(on_gpu), 0 if memory is None else PROCESS_BYTES + memory),
        files,
        encoding.tensors if options.ship_weights else None,
        encoding.checks,
    )


def _limits(max_memory: str | None) -> PartLimits:
    """Return limits that leave room for the process itself; refuse less memory than that takes."""
    if max_memory is None:
        return PartLimits()
    allowed = parse_size(max_memory)
    if allowed <= PROCESS_BYTES:
        raise ExportError(
            f"--max-memory {max_memory} is less than the {PROCESS_BYTES:,} bytes that the program takes without a "
            "tensor. Allow more."
        )
    return PartLimits(allowed - PROCESS_BYTES)


def tune(options: TuneFileOptions, session: Session = SILENT) -> list[Path]:
    """Tune any GGUF file or compressed-tensors checkpoint whose original is a Hugging Face checkpoint."""
    path, output = options.file, options.output
    file = None
    if path.is_dir():
        check_folder_name(output, "--output")
        check_is_compressed(path)
        check_is_free(output)
    else:
        if not is_gguf(path):
            if not path.exists():
                raise ExportError(f"There is no directory {path}. Check the path.")
            raise ExportError(f"{path} is neither a directory nor a GGUF file{but_is(path)}. Check the path.")
        check_ending(output, ".gguf", "--output")
        check_work(output)
        file = GGUFSource(path)
        check_is_not_read(output, file.files)
    check_same_kind(path, locate_model(options.reference), "Give the model that the file was made from as --reference.")
    model = open_language_model(options.reference, session)
    check_original(path, model)
    tokens = options.tokens + TuneOptions.held_out_tokens * 5 // 4
    text = read_text(options.text, seed=session.seed, max_tokens=tokens)
    windows = pack_windows(text, load_tokenizer(model), window=options.window, max_tokens=tokens)
    check_windows(windows, text.name, options.window)
    steps = {"tokens": options.tokens, "step_tokens": options.step_tokens, "seed": session.seed}
    tuning = tune_options(options.closing, windows, chosen_device(session.device), **steps)
    check_context(model, windows.shape[1])
    encoder = ""
    if file is not None:
        check_complete(file)
        encoder = recorded_encoder(file).removesuffix(TUNED)
    with locked(output):
        files = tune_file(model, path, windows, tuning, output, session, encoder=encoder).files
        remove_work(output)
    return files


def _moments_of(stats: StatsFile | None, plan: Plan, session: Session) -> SecondMoments | None:
    """Return the second moments that belong to the statistics; say so when there are none, or others than the plan was
    made with."""
    if stats is None:
        return None
    where, moments = path_beside(stats.path), stats.moments
    if moments is None:
        session.note(f"there is no {where}: encoding without error feedback (calibrate with --hessians to have it)")
    elif plan.hessians not in (None, moments.kind):
        session.note(
            f"the plan was made with {plan.hessians} second moments, and {where} has those of {moments.kind}: the KL "
            f"of the plan is not that of this file. Plan again with --hessians {plan.hessians} to have them back"
        )
    return moments


def _protected(path: Path, plan: Plan) -> dict[str, tuple[ProtectedWeight, ...]]:
    """Return the super weights that `plan` found, by tensor. Raises PlanError: they are those of other statistics."""
    protected: dict[str, tuple[ProtectedWeight, ...]] = {}
    file = load_super_weights(path)
    if file.stats_hash and plan.stats_hash and file.stats_hash != plan.stats_hash:
        raise PlanError(
            f"The super weights in {path} were found with statistics {file.stats_hash[:12]}, and the plan beside it "
            f"was made with {plan.stats_hash[:12]}. Give the file the plan's own folder, delete it, or plan again."
        )
    for weight in file.super_weights:
        scalar = ProtectedWeight(weight.row, weight.col, weight.expert)
        protected[weight.name] = (*protected.get(weight.name, ()), scalar)
    return protected


def _plan_of_preset(
    model: Model, checkpoint: LinearCheckpoint | None, options: ExportOptions, session: Session
) -> tuple[Plan, StatsFile | None]:
    """Return plan and statistics; calibrates only when a type uses statistics and none were given."""
    preset, output = str(options.preset), options.output
    target = Target(preset=preset, fallback=options.fallback, serves=None if checkpoint is None else "vllm")
    if checkpoint is None:
        types = preset_types(preset, model, fallbacks=target.fallbacks)
        uses_stats = any(quant_type(name).uses_imatrix for name, _ in types.values())
    else:
        types = uniform_schemes(preset, checkpoint)
        uses_stats = any(SCHEMES[name].is_quantized for name, _ in types.values())
    stats = None
    if uses_stats or options.stats is not None:
        if options.stats is not None:
            stats = StatsFile(options.stats).of(model)
        else:
            path = stats_of_preset(output)
            calibration = replace(options.calibration, max_memory=options.max_memory)
            if options.tune:
                check_can_tune(model, options.tune, calibration, session.seed)
            session.note(f"no --stats given: those of {calibration.text or MIX}, in {path}")
            stats = statistics_at(path, model, calibration, session)
    elif unused := options.calibration.changed():
        session.note(f"{' and '.join(unused)} did nothing: no type of {preset} uses statistics")
    recipe, stats_hash = target.recipe, stats and stats.hash
    if checkpoint is not None:
        return plan_for_vllm(model, checkpoint, types, recipe=recipe, stats_hash=stats_hash), stats
    plan = plan_from_types(model, types, recipe=recipe, stats=stats and stats.stats, stats_hash=stats_hash)
    return plan, stats
