"""The exceptions a user can meet. Each carries the exit code of the process and, where one helps, a hint."""


class LighthouseError(Exception):
    """A fault: something failed that the user did not cause.

    Args:
        message: one line that says what is wrong.
        hint: one line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class UserError(LighthouseError):
    """The user's mistake; the process exits with 2 and no traceback."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be read, or that asks for something impossible."""


class RunError(UserError):
    """A run that is missing, already there, or in the wrong stage for the command."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or belongs to another model."""


class TrainingError(LighthouseError):
    """Training cannot go on: a loss or a gradient is not finite, or the accelerator's memory is full."""


class StorageError(LighthouseError):
    """A checkpoint that could not be written: the disk is full, or fails."""


class DataError(UserError):
    """Training data that is missing or cannot be read."""


class ExportError(LighthouseError):
    """An exported model that does not agree with its checkpoint."""
