"""A model for the Python backend of Triton Inference Server: requests about videos, answered by one `Grounder`.

Triton's dynamic batcher passes several requests at once. They are grouped by video, so that a video is read and encoded
once, and each group is one `ground_many`. A request that fails gets its own error; the others get their answers. Knows
nothing of the server's API: `model.py` of the repository passes `triton_python_backend_utils`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.opened_video import OpenedVideo
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import BridgeError, Interrupted, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions

BOX_COLUMNS = ("time_s", "left", "top", "right", "bottom", "presence")  # of BOXES; rows after the last box are NaN


@dataclass(frozen=True)
class Options:
    """The `parameters` of config.pbtxt; see `repository.Serving`."""

    bundle: str = "bundle"  # folder in the model's version folder
    backend: str = "auto"
    variant: str = ""
    media: str = ""
    heads: str = ""
    mode: str = "auto"
    grammar: bool = True
    max_tokens: int = 4096
    open_videos: int = 4
    deadline_s: float = 0.0  # 0 for never

    @classmethod
    def read(cls, parameters: Mapping[str, Mapping[str, str]]) -> Options:
        """Read the options from `model_config["parameters"]`; unknown ones belong to Triton and are ignored."""
        values = {name: entry.get("string_value", "") for name, entry in parameters.items()}
        kinds: dict[str, Any] = {
            "grammar": lambda value: value == "true", "max_tokens": int, "open_videos": int, "deadline_s": float,
        }  # fmt: skip
        known = cls.__dataclass_fields__
        return cls(**{name: kinds.get(name, str)(value) for name, value in values.items() if name in known})


@dataclass
class _Query:
    """One query of a request, and its outcome once it is known."""

    request: Any
    video: str | bytes
    text: str
    allow_none: bool
    outcome: Grounding | Exception | None = None

    def result(self) -> Grounding:
        """Return the answer, or raise the error."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


class GroundingModel:
    """Base class of TritonPythonModel in `model.py`. Triton calls `initialize`, `execute` and `finalize`."""

    utils: Any  # the module `triton_python_backend_utils`, which exists only inside the server
    folder: Path  # version folder of the model, which contains the bundle

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle. Triton reports an error and does not serve the model then."""
        self._options = options = Options.read(json.loads(args["model_config"]).get("parameters", {}))
        if args.get("model_instance_kind") == "GPU":
            _use_gpu(int(args["model_instance_device_id"]))
        self._open: OrderedDict[str, OpenedVideo] = OrderedDict()
        bundle, variant = self.folder / options.bundle, options.variant or None
        text = TextOptions(mode=options.mode, grammar=options.grammar, max_tokens=options.max_tokens)
        heads = options.heads or None
        self._grounder = Grounder.load(bundle, backend=options.backend, variant=variant, heads=heads, text=text)
        self.utils.Logger.log_info(f"{args.get('model_name')}: {self._grounder.target or 'loaded'}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request, in their order."""
        batch = [self._read(request) for request in requests]
        groups: dict[tuple[str | bytes, bool], list[_Query]] = {}
        for query in (query for read in batch if isinstance(read, list) for query in read):
            groups.setdefault((query.video, query.allow_none), []).append(query)
        for (video, allow_none), queries in groups.items():
            self._answer(video, queries, allow_none)
        return [self._response(request, read) for request, read in zip(requests, batch, strict=True)]

    def finalize(self) -> None:
        """Close videos and engines."""
        for video in self._open.values():
            video.close()
        self._open.clear()
        self._grounder.close()

    def _read(self, request: Any) -> list[_Query] | Exception:
        """Return the queries of a request, or its error. Its arrays belong to Triton: invalid after `execute`."""
        try:
            if request.is_cancelled():
                raise Interrupted("call.cancelled", "the client cancelled the request before it started")
            queries = self._input(request, "QUERY")
            if queries is None:
                raise QueryError("query.empty", "the input QUERY is missing; expected one text per query")
            videos, contents = self._input(request, "VIDEO"), self._input(request, "VIDEO_BYTES")
            if (videos is None) == (contents is None):
                raise VideoError("video.bad_source", "give either VIDEO, a path, or VIDEO_BYTES, a file")
            allow_none = self._input(request, "ALLOW_NONE")
            sources: list[str | bytes] = (
                [bytes(content) for content in contents] if videos is None else [self._path(_text(v)) for v in videos]
            )
            allowed = [True] * len(queries) if allow_none is None else [bool(value) for value in allow_none]
            if not len(sources) == len(queries) == len(allowed):
                raise QueryError("query.wrong_count", f"{len(queries)} queries but {len(sources)} videos; give as many")
            rows = zip(sources, queries, allowed, strict=True)
            return [_Query(request, video, _text(query), allow) for video, query, allow in rows]
        except Exception as error:  # noqa: BLE001  # any error belongs to this request alone
            return error

    def _input(self, request: Any, name: str) -> Any:
        """Return an input [batch, 1] as [batch]; None if it is missing."""
        tensor = self.utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().reshape(-1)

    def _path(self, name: str) -> str:
        """Resolve a path below the media folder. Raises VideoError without one, or if the path leaves it."""
        if not self._options.media:
            raise VideoError("server.no_media_folder", "this server has no media folder; send the file as VIDEO_BYTES")
        media = Path(self._options.media).resolve()
        path = (media / name).resolve()
        if not path.is_relative_to(media):
            raise VideoError("video.outside_media", f"VIDEO {name!r} is outside the media folder; give a path below it")
        return str(path)

    def _answer(self, source: str | bytes, queries: list[_Query], allow_none: bool) -> None:
        """Ground all queries about a video in one call; if that fails, each in its own call."""
        options: dict[str, Any] = {
            "cancel": lambda: all(query.request.is_cancelled() for query in queries),
            "deadline_s": self._options.deadline_s or None,
        }
        try:
            with self._video(source, options) as video:
                try:
                    answers = video.ground_many([query.text for query in queries], allow_none=allow_none, **options)
                    for query, answer in zip(queries, answers, strict=True):
                        query.outcome = answer
                except Interrupted:
                    raise
                except Exception:  # noqa: BLE001  # any error of one query must not fail the others
                    for query in queries:
                        try:
                            query.outcome = video.ground(query.text, allow_none=allow_none, **options)
                        except Exception as error:  # noqa: BLE001  # as above
                            query.outcome = error
        except Exception as error:  # noqa: BLE001  # the video cannot be opened, or the call was stopped
            for query in queries:
                query.outcome = error

    @contextlib.contextmanager
    def _video(self, source: str | bytes, options: Mapping[str, Any]) -> Iterator[OpenedVideo]:
        """Yield an opened video, which an earlier batch may have left open for the same file."""
        if isinstance(source, bytes):
            with tempfile.NamedTemporaryFile(prefix="bridge-stg-") as file:
                file.write(source)
                file.flush()
                with contextlib.closing(self._grounder.open(file.name, **options)) as video:
                    yield video
            return
        key = _key(source)
        if key not in self._open:
            self._open[key] = self._grounder.open(source, **options)
        self._open.move_to_end(key)
        try:
            yield self._open[key]
        finally:
            while len(self._open) > self._options.open_videos:
                self._open.popitem(last=False)[1].close()

    def _response(self, request: Any, read: list[_Query] | Exception) -> Any:
        try:
            if isinstance(read, Exception):
                raise read
            arrays, requested = outputs([query.result() for query in read]), set(request.requested_output_names())
            tensors = [self.utils.Tensor(name, array) for name, array in arrays.items() if name in requested]
            return self.utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:  # noqa: BLE001  # any error belongs to this request alone
            return self.utils.InferenceResponse(error=self._error(error))

    def _error(self, error: Exception) -> Any:
        kind = self.utils.TritonError
        text = f"{error} [{error.code}]" if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}"
        if isinstance(error, Interrupted):
            return kind(text, kind.CANCELLED)
        if isinstance(error, (VideoError, QueryError)):
            return kind(text, kind.INVALID_ARG)
        self.utils.Logger.log_error(text)
        return kind(text, kind.INTERNAL)


def outputs(answers: Sequence[Grounding]) -> dict[str, np.ndarray]:
    """Return the outputs of b answers: RESULT object [b, 1], FOUND bool [b, 1], SPAN [b, 2], BOXES [b, N, 6].

    N is the largest number of boxes of an answer, at least 1; missing values are NaN.
    """
    most = max([1, *(len(answer.boxes) for answer in answers if answer.boxes is not None)])
    span = np.full((len(answers), 2), np.nan, np.float32)
    boxes = np.full((len(answers), most, len(BOX_COLUMNS)), np.nan, np.float32)
    results = np.empty((len(answers), 1), np.object_)  # bytes of a fixed length would lose zeros at the end
    for row, answer in enumerate(answers):
        results[row, 0] = json.dumps(answer.to_json(), ensure_ascii=False).encode()
        if answer.span is not None:
            span[row] = answer.span
        if (found := answer.boxes) is not None:
            columns = (found.times[:, None], found.boxes, found.presence[:, None])
            boxes[row, : len(found)] = np.concatenate(columns, axis=1)
    found_each = np.array([answer.found for answer in answers], bool).reshape(-1, 1)
    return {"RESULT": results, "FOUND": found_each, "SPAN": span, "BOXES": boxes}


def _text(value: Any) -> str:
    """Decode a string of Triton. Raises QueryError if it is not UTF-8."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise QueryError("query.bad_characters", f"a string is not UTF-8 ({error})") from error


def _key(path: str) -> str:
    """Identify the content of a file by path, size and modification time."""
    try:
        stat = os.stat(path)
    except OSError:
        return path  # opening the file raises the error
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _use_gpu(device: int) -> None:
    """Hide all other GPUs from this process. Triton counts those of CUDA_VISIBLE_DEVICES; an instance is a process."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
