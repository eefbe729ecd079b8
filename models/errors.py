"""The one error tree. It sits in the bottom layer so that every layer may raise it.

Every message says what failed, where, what was found, what was expected, and the next step.
"""


class RefineryError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(RefineryError, ValueError):
    """A setting is unknown, missing or out of range: fix the config and run again."""


class AssetError(RefineryError):
    """A file the work depends on (weights, a template) is missing, wrong or unsafe to load."""


class SampleError(RefineryError):
    """One sample cannot be processed: it becomes a failed row and the shard goes on.

    Attributes:
        kind: short machine-readable reason for the ``error_kind`` column (e.g. ``"decode"``).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.kind, str(self))


class ShardError(RefineryError):
    """A whole shard cannot be read or written. It is retried, then quarantined with this reason."""


class LedgerError(RefineryError):
    """The run directory disagrees with the request: another config or input, a broken part."""
