"""Which HTTP error a client gets for an exception."""

from __future__ import annotations

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from bridge_stg.server.http.errors import api_error, client_input
from bridge_stg.server.http.schemas import VideoSource


def test_invalid_input_is_the_clients_error() -> None:
    with pytest.raises(RequestValidationError) as caught, client_input():
        VideoSource.model_validate_json("{}")
    error = api_error(caught.value)
    assert (error.status_code, error.code) == (422, "server.invalid_request") and "source" in error.detail


def test_a_validation_error_of_the_server_itself_is_a_bug() -> None:
    with pytest.raises(ValidationError) as caught:
        VideoSource.model_validate_json("{}")
    error = api_error(caught.value)
    assert (error.status_code, error.code) == (500, "server.internal") and "source" not in error.detail
