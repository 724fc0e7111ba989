"""The exceptions of the project, each with a stable code. The CLI prints message and code, and exits with status 2."""

from __future__ import annotations


class BridgeError(Exception):
    """Base of every error that the user can fix: the message names the cause, what was expected and what to do.

    Attributes:
        code: stable dotted identifier, such as `video.no_stream`; listed in docs/troubleshooting.md.
        message: one paragraph of text; its wording may change between releases.
    """

    def __init__(self, code: str, message: str) -> None:
        message = " ".join(message.splitlines())  # texts of other packages in it may have several lines
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class BundleError(BridgeError):
    """A bundle is damaged, incomplete, of an unknown schema, or names files outside its folder."""


class CheckpointError(BridgeError):
    """A checkpoint folder cannot be read, or its tensors do not fit its config."""


class VideoError(BridgeError):
    """A video, image or stream cannot be read, or does not fit the model."""


class QueryError(BridgeError):
    """A query or a first box is not valid input for the model."""


class AnnotationError(BridgeError):
    """An annotation file cannot be read, or one of its lines or fields does not follow the format."""


class EngineError(BridgeError):
    """A backend is missing, does not support a graph, or failed while running it."""


class HostError(BridgeError):
    """The system has no more memory, threads, files or disk space for this process, or cannot read a file."""


class Interrupted(BridgeError):
    """A call was stopped by its deadline or by its `cancel` signal."""
