"""Check errors by their code and the values that they name, not by their wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bridge_stg.runtime.errors import BridgeError


@contextmanager
def raises(
    code: str, *values: object, kind: type[BridgeError] = BridgeError
) -> Iterator[pytest.ExceptionInfo[BridgeError]]:
    """Expect a `BridgeError` with this code whose message names each of the values."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    for value in values:
        assert str(value) in str(caught.value), f"{value!r} is not in: {caught.value}"
