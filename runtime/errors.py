"""The exceptions of the project. Each has a stable code; the CLI prints one paragraph and exits with code 2."""

from __future__ import annotations


class BridgeError(Exception):
    """Base of every error that the user can fix: the message names the cause, what was expected and what to do.

    Attributes:
        code: stable dotted identifier, such as `video.no_stream`; listed in docs/troubleshooting.md.
        message: one paragraph of text; its wording may change between releases.
    """

    def __init__(self, code: str, message: str | None = None) -> None:
        if message is None:
            code, message = "unspecified", code
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class BundleError(BridgeError):
    """A bundle that is damaged, incomplete, of an unknown schema, or that points outside itself."""


class CheckpointError(BridgeError):
    """A checkpoint folder that cannot be read, or whose tensors do not fit its config."""


class VideoError(BridgeError):
    """A video, image or stream that cannot be read."""


class QueryError(BridgeError):
    """A query that the model cannot be asked."""


class AnnotationError(BridgeError):
    """An annotation file that cannot be read, or a line or field of it that is not as its format says."""


class EngineError(BridgeError):
    """A backend that is missing, refuses a graph, or fails while running it."""


class Interrupted(BridgeError):
    """A call that was stopped by its deadline or by its `cancel` signal."""
