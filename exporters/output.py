"""Parts that exporters share: inputs and their checks, the identity of the bytes, and what becomes of a failed run."""

from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dynquant import __version__
from dynquant.analysis.errors.written import WrittenErrors
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding import stream
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits, TensorPart, WeightChecks
from dynquant.encoding.store import EncodedStore, store_directory
from dynquant.errors import ClusterError, DynquantError, PlanError, StatsError, WriteError
from dynquant.recipes.plan import Plan
from dynquant.session import SILENT, Progress, Session
from dynquant.storage.resumable_output import Region, ResumableOutput


@dataclass(frozen=True)
class Exported:
    """Files that an export wrote, the model's first."""

    files: list[Path]
    num_weights: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(file.stat().st_size for file in self.files if file.suffix in (".gguf", ".safetensors"))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A plan on its way into blocks: all that decides the bytes of an export but its container, and how it runs.

    `stats` are those that the plan was made from, None if none; `moments` give encoders that use them hessians for
    error feedback, `protected` the super weights of each tensor. `limits` bound what is in memory at a time.
    """

    model: Model
    plan: Plan
    encoder: Encoder
    stats: CalibrationStats | None = None
    moments: SecondMoments | None = None
    protected: Mapping[str, tuple[ProtectedWeight, ...]] = field(default_factory=dict)
    limits: PartLimits = field(default_factory=PartLimits)
    elsewhere: stream.PartStream | None = None  # encodes on other machines
    asymmetric: int = 0  # tokens on which `elsewhere` runs the model as far as it is encoded
    blocks: Path | None = None  # folder of stores, from which blocks are taken that any other plan has brought there
    errors: WrittenErrors | None = None  # measures blocks as they are encoded
    resume: bool = True  # False starts an interrupted export over
    session: Session = SILENT

    @cached_property
    def used_moments(self) -> SecondMoments | None:
        return self.moments if self.encoder.uses_hessians else None

    @cached_property
    def guidance(self) -> stream.Guidance:
        return stream.guidance_of(self.stats, self.used_moments, self.protected)

    @property
    def tensors(self) -> stream.TensorEncoder:
        hears = {} if self.errors is None else {"on_encoded": self.errors.add}
        return stream.TensorEncoder(
            self.model, self.guidance, self.encoder, self.session.threads, self.checks, self.limits, **hears
        )

    @cached_property
    def checks(self) -> WeightChecks:
        return WeightChecks(self.plan.checksums, self.model.name)

    def check(self) -> None:
        """Refuse a plan of another model, and statistics that are not those of the plan.

        Raises:
            PlanError: the plan is not of this model, or was made without statistics, and there are some.
            StatsError: the statistics are missing, or of another checkpoint.
            EncodeError: a type without the statistics it needs.
        """
        stream.check_plan(self.model, self.plan)
        if self.stats is None and self.plan.stats_hash is not None:
            raise StatsError(
                f"The plan was made from calibration statistics ({self.plan.stats_hash[:12]}), and the same ones are "
                "needed to export it. Give the stats.safetensors that lies beside the plan."
            )
        if self.stats is not None:
            if self.plan.stats_hash is None:
                raise PlanError(
                    "The plan was made without calibration statistics, so its size and types do not hold with them. "
                    "Plan again with the statistics, or export without them."
                )
            self.stats.check_belongs_to(self.model.fingerprint, self.model.name, self.model.settings)
        stream.check_importance(self.model, self.plan, self.guidance.importance)

    def parts(self, *, whole: Collection[str] = ()) -> dict[str, list[TensorPart]]:
        """Return the parts of every tensor; those named in `whole` have one. Raises ExportError: the limits are too
        tight for a tensor."""
        return self.tensors.parts(self.plan, whole=whole, at_once=None if self.elsewhere is None else 1)

    def identity(self, header_hash: str) -> dict[str, str]:
        """Return what decides an export's bytes; an interrupted one goes on only under an equal identity."""
        return {
            "plan": self.plan.hash,
            "encoder": self.encoder.name,
            "encoder_version": stream.encoder_version(self.encoder),
            "dynquant_version": __version__,
            "header": header_hash,
            "hessians": self.used_moments.identity if self.used_moments is not None else "none",
        } | self._seldom()

    def _seldom(self) -> dict[str, str]:
        """Return what decides the bytes of some exports alone."""
        seldom = {"asymmetric": str(self.asymmetric)} if self.asymmetric else {}
        if self.guidance.output_hessian is not None and self.limits.memory is not None:
            seldom["memory"] = str(self.limits.memory)  # rows of two parts do not make up for each other
        return seldom

    def quantized(
        self, parts: Mapping[str, list[TensorPart]], skip: Collection[str], progress: Progress
    ) -> Generator[stream.QuantizedPart]:
        """Yield every part but those whose key or tensor name is in `skip`; closing it ends what is in work."""
        elsewhere = self.elsewhere
        if self.blocks is not None and elsewhere is None:
            belongs = (self.model, self.plan.stats_hash or "", self.encoder, self.used_moments)
            directory = store_directory(self.blocks, *belongs)
            how = {"threads": self.session.threads, "checks": self.checks, "limits": self.limits}
            elsewhere = EncodedStore(self.model, self.guidance, self.encoder, directory, **how).parts
        return self.tensors.quantize(self.plan, parts, elsewhere=elsewhere, progress=progress, skip=skip)

    @contextmanager
    def writing(
        self, sizes: Mapping[Path, int], regions: Mapping[str, Region], header_hash: str, **identity: str
    ) -> Iterator[tuple[ResumableOutput, Progress]]:
        """Context manager: a stage that fills an output; what is written of inputs that cannot be exported is removed.

        A full disk, a lost cluster or an interruption keeps it, so that the same call goes on. `identity` is what
        decides the bytes beside the encoding itself.
        """
        identity = self.identity(header_hash) | identity
        with (
            ResumableOutput(sizes, regions, identity, resume=self.resume) as target,
            self.session.stage("Finished tensors are kept.") as progress,
        ):
            try:
                yield target, progress
            except (WriteError, ClusterError):  # the inputs are sound: the same call can go on
                raise
            except DynquantError:
                target.discard()
                raise
