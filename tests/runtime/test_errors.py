"""Errors carry a code and a message, also across processes."""

from __future__ import annotations

import pickle

import pytest

from bridge_stg.runtime import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BridgeError)]


@pytest.mark.parametrize("kind", KINDS)
def test_code_and_message_survive_pickling(kind: type[errors.BridgeError]) -> None:
    error = kind("video.no_stream", "a.mp4 has no video stream")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind and str(one) == one.message == "a.mp4 has no video stream"
        assert one.code == "video.no_stream"


def test_a_message_is_one_line() -> None:
    assert str(errors.BridgeError("a.b", "it failed (first\nsecond)")) == "it failed (first second)"
