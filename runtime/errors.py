"""The one exception family of the project. The CLI turns each into one paragraph and exit code 2."""

from __future__ import annotations


class BridgeError(Exception):
    """Something that a person can mend: the message names it, what was expected and what to do."""


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
