"""A Ray cluster as a place where independent tasks run. Ray is imported when a pool is opened, and not before.

A task is a picklable callable of one item whose result depends on nothing else, so that where and how often it runs
does not matter: Ray runs it again when its worker or node is lost, also when that takes a result nobody had fetched.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dynquant.checkpoints.model import Model
from dynquant.errors import ClusterError, DynquantError
from dynquant.families.common.settings import Settings, differing_settings
from dynquant.families.open import open_model

Item = TypeVar("Item")
Result = TypeVar("Result")

AUTO = "auto"
_RETRIES = 8
"""A task that kills its worker as often as this, by its memory for instance, is given up."""


@dataclass(frozen=True)
class TaskNeeds:
    """Share of a node that one task occupies; `memory` in bytes, 0 for not said."""

    cpus: int = 1
    gpus: int = 0
    memory: int = 0


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint that every worker opens for itself; paths are absolute and must be seen by all nodes."""

    path: Path
    fingerprint: str
    settings: Settings = field(hash=False)
    base_gguf: Path | None = None

    @classmethod
    def of(cls, model: Model) -> "StoredModel":
        base = model.base_gguf and model.base_gguf.resolve()
        return cls(model.path.resolve(), model.fingerprint, model.settings, base)

    def open(self, way_out: str = "Put it on storage that every node has at the same path.") -> Model:
        """Open the model in a worker, or raise ClusterError when its node cannot read it or has another one there."""
        host = socket.gethostname()
        try:
            model = open_model(self.path, base_gguf=self.base_gguf)
        except DynquantError as error:
            raise ClusterError(f"{host} cannot read what the command works on: {error} {way_out}") from error
        if model.fingerprint != self.fingerprint:
            raise ClusterError(
                f"{host} has another checkpoint at {self.path} (fingerprint {model.fingerprint[:12]} "
                f"instead of {self.fingerprint[:12]}). {way_out}"
            )
        if difference := differing_settings(self.settings, model.settings):
            raise ClusterError(f"{host} has another configuration at {self.path}: {difference}. {way_out}")
        return model


class RayPool:
    """Runs tasks on the cluster that this process is connected to; see `open_ray`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def device(self, asked: str | None) -> str:
        """Return the device of workers: what was asked for, else a GPU where the cluster has one."""
        device = asked or ("cuda" if self._ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")
        return "cuda" if device.startswith("cuda") else device  # Ray numbers the GPUs

    def run(
        self,
        task: Callable[[Any], Result],
        items: Iterable[Item],
        needs: TaskNeeds,
        *,
        ordered: bool = False,
        load: Callable[[Item], Any] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Each item with the result of `task`, in the order of items or as they are done.

        Twice as many tasks are submitted as can run. With `load`, tasks get `load(item)`, which is then put into the
        object store when the task is submitted. Where nobody takes the rest, what is submitted runs on until the pool
        closes: cancelling a task whose result is on its way aborts the whole process (a check in Ray 2.60's
        task_manager.cc).

        Raises:
            ClusterError: no node can run such a task, or it was lost with its worker again and again.
            DynquantError: what the task itself raised.
        """
        slots = self._slots(needs)
        # The task travels as an argument, through the object store: once to a node, and not once with every item.
        remote = self._ray.remote(lambda task, item: task(item)).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory or None, max_retries=_RETRIES
        )
        shared, rest = self._ray.put(task), iter(items)
        pending: dict[Any, Item] = {}
        while True:
            while len(pending) < 2 * slots and (item := next(rest, None)) is not None:
                pending[remote.remote(shared, load(item) if load else item)] = item
            if not pending:
                return
            done = next(iter(pending)) if ordered else self._ray.wait(list(pending), num_returns=1)[0][0]
            result = self._result(done)
            yield pending.pop(done), result

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DynquantError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"A task was lost with its worker {_RETRIES + 1} times ({type(error).__name__}): nodes died, or it "
                "takes more memory than they have. Add nodes, or give --max-memory so that fewer run on a node; what "
                "is done is kept."
            ) from error

    def _slots(self, needs: TaskNeeds) -> int:
        """Return the number of such tasks that the cluster runs at a time, at least one."""
        asked = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}
        count = 0
        for node in self._ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            count += min(int(has.get(name, 0) // amount) for name, amount in asked.items() if amount)
        if not count:
            resources = ", ".join(f"{amount:,} {name}" for name, amount in asked.items() if amount)
            raise ClusterError(
                f"No node of the Ray cluster has {resources} for a task. Give smaller --threads or --max-memory, "
                "another --device, or add a node that has."
            )
        return count


@contextmanager
def open_ray(address: str) -> Iterator[RayPool]:
    """Context manager: a pool on the cluster at `address`; with `auto`, on the one that Ray finds or starts here.

    Raises ClusterError when Ray is not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a model leaves the cluster
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--ray needs Ray: pip install 'dynquant-toolchain[ray]', on every node.") from error
    try:
        if address != AUTO:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=None if address == AUTO else address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"There is no Ray cluster at {address} ({error}). Start one with `ray start --head`, join nodes with "
            "`ray start --address HOST:6379`, and give --ray HOST:6379; or use --ray auto on this machine."
        ) from error
    try:
        yield RayPool(ray)
    finally:
        ray.shutdown()
