"""Fake of `triton_python_backend_utils`, and a server that calls a Python model as the backend's README describes.

It enforces the rules of the README and the real module: responses are InferenceResponse objects, one per request and
none used twice; tensors are numpy arrays without str dtypes; outputs have the names, dtypes and dims of config.pbtxt; a
response has either an error or tensors; error codes are those of TritonError; arrays of requests are invalid after
`execute` has returned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

NUMPY = {"TYPE_BOOL": np.bool_, "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str) and code in range(8)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray) or array.dtype.type in (np.str_, np.void):
            raise TritonModelException("Tensor dtype used for numpy_array is not support by Python backend.")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        if output_tensors is not None and type(output_tensors) is not list:
            raise TritonModelException('"output_tensors" must be a list.')
        if error is not None and not isinstance(error, TritonError):
            raise TritonModelException("error must be a TritonError")
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    def __init__(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *, cancelled: bool = False) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self._outputs, self._cancelled = list(outputs), cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def request_id(self) -> str:
        return ""

    def is_cancelled(self) -> bool:
        return self._cancelled


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_info(cls, message: str) -> None:
        assert isinstance(message, str)
        cls.lines.append(message)

    log_warn = log_error = log_verbose = log_info


def as_module() -> ModuleType:
    """Return the module under its own name, for `sys.modules`."""
    module = ModuleType("triton_python_backend_utils")
    for thing in (TritonModelException, TritonError, Tensor, InferenceResponse, InferenceRequest, Logger):
        setattr(module, thing.__name__, thing)
    setattr(module, "get_input_tensor_by_name", get_input_tensor_by_name)  # noqa: B010
    return module


class Server:
    """Server that loads a model class with a config, passes batches to it, and checks its responses."""

    def __init__(self, model: type, config: Mapping[str, Any], repository: str, *, kind: str = "CPU") -> None:
        self.config = config
        self.model: Any = model()
        self.model.initialize(
            {
                "model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": "0",
                "model_repository": repository, "model_version": "1", "model_name": str(config["name"]),
            }
        )  # fmt: skip

    def request(self, *, cancelled: bool = False, **inputs: Any) -> InferenceRequest:
        """Return a request with one value per query in each input; texts are bytes, as over HTTP and gRPC."""
        arrays = {}
        for entry in self.config["input"]:
            if entry["name"] not in inputs:
                assert entry.get("optional"), f"Triton rejects a request without {entry['name']}"
                continue
            values = inputs.pop(entry["name"])
            array = np.empty((len(values), *map(int, entry["dims"])), NUMPY[entry["data_type"]])
            array[:, 0] = [value.encode() if isinstance(value, str) else value for value in values]
            arrays[entry["name"]] = array
        assert not inputs, f"the config has no input {list(inputs)}"
        names = [entry["name"] for entry in self.config["output"]]
        assert max(len(array) for array in arrays.values()) <= int(self.config["max_batch_size"])
        return InferenceRequest(arrays, names, cancelled=cancelled)

    def infer(self, *requests: InferenceRequest) -> list[InferenceResponse]:
        """Run one batch as the dynamic batcher would pass it."""
        responses: list[InferenceResponse] = self.model.execute(list(requests))
        assert isinstance(responses, list) and len(responses) == len(requests)
        assert len({id(response) for response in responses}) == len(responses)
        for request, response in zip(requests, responses):
            assert isinstance(response, InferenceResponse)
            if not response.has_error():
                self._check(request, response)
            for tensor in request.inputs():  # the server reuses this memory
                tensor.as_numpy()[...] = b"gone" if tensor.as_numpy().dtype == np.object_ else 0
        return responses

    def _check(self, request: InferenceRequest, response: InferenceResponse) -> None:
        rows = len(request.inputs()[0].as_numpy())
        tensors = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert set(tensors) == set(request.requested_output_names())
        for entry in self.config["output"]:
            array = tensors[entry["name"]]
            assert array.dtype == NUMPY[entry["data_type"]], entry["name"]
            dims = [int(dim) for dim in entry["dims"]]
            assert array.shape[0] == rows and array.ndim == 1 + len(dims)
            assert all(dim in (-1, size) for dim, size in zip(dims, array.shape[1:])), entry["name"]
