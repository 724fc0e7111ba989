"""Which HTTP error a client gets for an exception."""

from __future__ import annotations

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from bridge_stg.runtime.errors import VideoError
from bridge_stg.server.http.errors import ApiError, api_error, client_input
from bridge_stg.server.http.schemas import VideoSource


def test_invalid_input_is_the_clients_error() -> None:
    with pytest.raises(RequestValidationError) as caught, client_input():
        VideoSource.model_validate_json("{}")
    error = api_error(caught.value)
    assert (error.status_code, error.code) == (422, "server.invalid_request") and "source" in error.detail


@pytest.mark.parametrize(
    "error", [VideoError("video.unreadable", "a.mp4 is damaged"), ApiError(422, "video.damaged", "")]
)
def test_a_shortage_of_the_server_is_not_the_clients_error(error: Exception) -> None:
    error.__cause__ = OSError(24, "Too many open files", "/private/a.mp4")
    found = api_error(error)
    assert (found.status_code, found.code) == (503, "host.too_many_files") and "private" not in found.detail
    assert found.headers is not None and int(found.headers["Retry-After"]) > 0


def test_a_validation_error_of_the_server_itself_is_a_bug() -> None:
    with pytest.raises(ValidationError) as caught:
        VideoSource.model_validate_json("{}")
    error = api_error(caught.value)
    assert (error.status_code, error.code) == (500, "server.internal") and "source" not in error.detail
