"""How pytest-xdist spreads files over workers."""

from collections.abc import Collection
from pathlib import PurePath

from xdist.scheduler import LoadFileScheduling


class FileScheduling(LoadFileScheduling):
    """A file is run by one worker, and the files whose names are `together` by the same one."""

    def __init__(self, config, log, together: Collection[str]) -> None:
        super().__init__(config, log)
        self._together = together

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "together" if PurePath(file).stem in self._together else file
