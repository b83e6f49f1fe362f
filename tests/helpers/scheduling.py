"""How pytest-xdist spreads files over workers."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from xdist.scheduler import LoadFileScheduling


class FileScheduling(LoadFileScheduling):
    """A file is run by one worker, and so are the files of a group in `together`, by their names."""

    def __init__(self, config, log, together: Mapping[str, Sequence[str]]) -> None:
        super().__init__(config, log)
        self._group_of = {name: group for group, names in together.items() for name in names}

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return self._group_of.get(PurePath(file).stem, file)
