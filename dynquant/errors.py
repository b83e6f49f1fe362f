"""Errors that a user can act on.

Every message is one paragraph: what was refused, where, which value, and the way out. The command line prints it
and exits with 1; anything else that escapes is a bug and keeps its traceback.
"""


class DynquantError(Exception):
    """Base of all refusals."""


class OptionError(DynquantError):
    """An option has a value that it cannot have, or does nothing beside the others."""


class CheckpointError(DynquantError):
    """A model directory or GGUF file is missing, truncated, corrupt or of an unsupported kind."""


class UnfitWeightsError(CheckpointError):
    """A checkpoint lacks weights that its configuration calls for, or has them in other shapes."""


class StatsError(DynquantError):
    """Calibration text or statistics cannot be used for this model."""


class PlanError(DynquantError):
    """A plan, preset or budget does not fit the model."""


class EncodeError(DynquantError):
    """A tensor cannot be encoded as asked (NaN, Inf, row length, missing importance matrix)."""


class WriteError(DynquantError):
    """A file cannot be written: no space, no permission, or no directory where its parent should be."""


class ExportError(WriteError):
    """A model cannot be exported as asked, or its output cannot be written."""


class EvaluationError(DynquantError):
    """Two models cannot be compared, or the evaluation data is unusable."""


class OtherGraphError(EvaluationError):
    """llama.cpp has other tensors in the graph of an architecture than a file of it holds: it loads no such file."""


class DataError(DynquantError):
    """Training data are missing, empty or malformed."""


class TrainingError(DynquantError):
    """A model cannot be trained as asked."""


class DeviceError(DynquantError):
    """A device that is not there."""


class AdapterError(DynquantError):
    """An adapter cannot be added to, loaded into, merged into or exported for this model."""


class ClusterError(DynquantError):
    """A Ray cluster cannot be used: it is not there, lacks what a task needs, or its nodes see other files."""


class LibraryError(DynquantError, ImportError):
    """The shared library of llama.cpp is not there, or is of a release that is not known."""


class WorkerError(DynquantError):
    """A process that worked beside this one was ended from outside."""


class HubError(DynquantError):
    """Hugging Face's Hub refuses, or does not answer."""


def hub_failures() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where the Hub refuses, or does not answer."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The first base is HTTPError of the HTTP library that it has, of which lost connections are as well.
    return (*HfHubHTTPError.__bases__, OSError, HFValidationError)


def reason(error: OSError) -> str:
    """Return what the system says, and of which path."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is no directory"
    path = f": {error.filename}" if error.filename else ""
    path += f" -> {error.filename2}" if error.filename2 else ""  # of a copy, else the source would seem to be at fault
    return f"{error.strerror or error}{path}"


def unreadable(path: object, error: Exception) -> str:
    """Return the paragraph for a file that the system does not let us read; empty when its content is at fault."""
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    return f"{path} cannot be read: {error.strerror}. Check the path, its permissions and its disk."
