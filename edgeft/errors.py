"""Errors that a user can act on: what was asked, what was found, and the next command."""


class EdgeftError(Exception):
    """Base of every error edgeft raises on purpose.

    `message` says what was asked, what was found and what is allowed; `hint` is the next thing to do.
    The command line prints both and exits with `exit_code` (2: it could not be done; 1: checked and failed).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(EdgeftError):
    """A flag, a configuration key or their combination is wrong."""


class DataError(EdgeftError):
    """Images or labels are missing, unreadable or do not match the classes."""


class ArtifactError(EdgeftError):
    """A run directory is missing, incomplete, edited or already in use."""


class UnsupportedError(EdgeftError):
    """A layer, format or model cannot be expressed in 8-bit fixed point or by a target."""


class TrainingError(EdgeftError):
    """Training cannot go on, for example because the loss is not finite."""


class MissingExtraError(EdgeftError):
    """An optional dependency is not installed."""


class VerificationError(EdgeftError):
    """Two computations that must give the same integers do not."""

    exit_code = 1
