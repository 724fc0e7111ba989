"""A model of Triton Inference Server's Python backend: requests about videos, answered by one `Grounder`.

Triton's dynamic batcher hands over several requests at once. They are grouped by video, so that a video is read and
encoded once, and each group is one `ground_many`. A request that fails gets an error of its own; the others get their
answers. Knows nothing of the server: `model.py` in the repository gives it `triton_python_backend_utils`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.opened_video import OpenedVideo
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import BridgeError, Interrupted, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder

BOX_COLUMNS = ("time_s", "left", "top", "right", "bottom", "presence")
"""What the last dim of BOXES holds; rows behind a query's last box are NaN."""


@dataclass(frozen=True)
class Options:
    """What `parameters` of config.pbtxt say.

    `media` is the folder that VIDEO names files in; without one, videos come as VIDEO_BYTES only. `open_videos` are
    kept between batches, so that later queries on them cost no second reading.
    """

    bundle: str = "bundle"
    backend: str = "auto"
    variant: str = ""
    media: str = ""
    open_videos: int = 4
    deadline_s: float = 0.0

    @classmethod
    def read(cls, parameters: Mapping[str, Mapping[str, str]]) -> Options:
        """Take the options from `model_config["parameters"]`; unknown ones are the server's own and stay unread."""
        values = {name: entry.get("string_value", "") for name, entry in parameters.items()}
        kinds: dict[str, Any] = {"open_videos": int, "deadline_s": float}
        known = cls.__dataclass_fields__
        return cls(**{name: kinds.get(name, str)(value) for name, value in values.items() if name in known})


@dataclass
class _Asked:
    """One query of one request, and what became of it."""

    request: int
    video: str | bytes
    query: str
    allow_none: bool
    answer: Grounding | None = None
    error: BaseException | None = None


@dataclass
class _Request:
    """One request: its queries, or why it cannot be read."""

    request: Any
    asked: list[_Asked] = field(default_factory=list)
    error: BaseException | None = None


class GroundingModel:
    """The class that `model.py` calls TritonPythonModel. Triton calls `initialize`, `execute` and `finalize`.

    Attributes:
        utils: the module `triton_python_backend_utils`, which exists inside the server alone.
        folder: the model's version folder, in which the bundle lies.
    """

    utils: Any
    folder: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle. An error here is told by Triton, and the model is not served."""
        config = json.loads(args["model_config"])
        self._options = Options.read(config.get("parameters", {}))
        if args.get("model_instance_kind") == "GPU":
            _see_only(int(args["model_instance_device_id"]))
        self._open: OrderedDict[str, OpenedVideo] = OrderedDict()
        self._grounder = Grounder.load(
            self.folder / self._options.bundle, backend=self._options.backend, variant=self._options.variant or None
        )
        self.utils.Logger.log_info(f"{args.get('model_name')}: {self._grounder.target or 'loaded'}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch: one response a request, in their order."""
        batch = [self._read(place, request) for place, request in enumerate(requests)]
        groups: dict[tuple[str | bytes, bool], list[_Asked]] = {}
        for asked in (asked for read in batch for asked in read.asked):
            groups.setdefault((asked.video, asked.allow_none), []).append(asked)
        for (video, allow_none), group in groups.items():
            self._answer(video, group, allow_none, [batch[asked.request].request for asked in group])
        return [self._response(read) for read in batch]

    def finalize(self) -> None:
        """Close videos and engines."""
        for video in self._open.values():
            video.close()
        self._open.clear()
        self._grounder.close()

    def _read(self, place: int, request: Any) -> _Request:
        """Take the queries out of one request. Its arrays are Triton's, and gone when `execute` returns."""
        read = _Request(request)
        try:
            if request.is_cancelled():
                raise Interrupted("the client cancelled the request before it was begun")
            queries = self._input(request, "QUERY")
            if queries is None:
                raise QueryError("the input QUERY is missing; expected one text a query")
            videos = self._input(request, "VIDEO")
            contents = self._input(request, "VIDEO_BYTES")
            if (videos is None) == (contents is None):
                raise VideoError("give either VIDEO, a path below the server's media folder, or VIDEO_BYTES, a file")
            allow_none = self._input(request, "ALLOW_NONE")
            sources: list[str | bytes] = (
                [bytes(content) for content in contents] if videos is None else [self._path(_text(v)) for v in videos]
            )
            allowed = [True] * len(queries) if allow_none is None else [bool(value) for value in allow_none]
            if not len(sources) == len(queries) == len(allowed):
                raise QueryError(f"{len(queries)} queries about {len(sources)} videos; give as many of each")
            triples = zip(sources, queries, allowed, strict=True)
            read.asked = [_Asked(place, source, _text(query), allow) for source, query, allow in triples]
        except Exception as error:  # whatever it is, it is this request's alone
            read.error = error
        return read

    def _input(self, request: Any, name: str) -> Any:
        """Return an input [batch, 1] as [batch]; None if it was not given."""
        tensor = self.utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().reshape(-1)

    def _path(self, name: str) -> str:
        """Resolve a path below the media folder.

        Raises:
            VideoError: there is no media folder, or the path leaves it.
        """
        if not self._options.media:
            raise VideoError("this server has no media folder, so VIDEO names nothing; send the file as VIDEO_BYTES")
        media = Path(self._options.media).resolve()
        path = (media / name).resolve()
        if not path.is_relative_to(media):
            raise VideoError(f"VIDEO {name!r} leads out of the server's media folder; give a path below it")
        return str(path)

    def _answer(self, source: str | bytes, group: list[_Asked], allow_none: bool, requests: list[Any]) -> None:
        """Ground all queries of a group in one call; if one spoils it, each in a call of its own."""
        options: dict[str, Any] = {
            "cancel": lambda: all(request.is_cancelled() for request in requests),
            "deadline_s": self._options.deadline_s or None,
        }
        try:
            with self._video(source, options) as video:
                try:
                    answers = video.ground_many([a.query for a in group], allow_none=allow_none, **options)
                    for asked, answer in zip(group, answers, strict=True):
                        asked.answer = answer
                except Interrupted:
                    raise
                except Exception:
                    for asked in group:
                        try:
                            asked.answer = video.ground(asked.query, allow_none=allow_none, **options)
                        except Exception as error:
                            asked.error = error
        except Exception as error:  # the video cannot be opened, or the call was stopped
            for asked in group:
                asked.error = error

    @contextlib.contextmanager
    def _video(self, source: str | bytes, options: Mapping[str, Any]) -> Iterator[OpenedVideo]:
        """Give an opened video: one that an earlier batch left open, if it is the same file or the same bytes."""
        key = _key(source)
        video = self._open.pop(key, None)
        if video is None:
            with _as_file(source) as path:
                video = self._grounder.open(path, **options)
                if isinstance(source, bytes):  # its file goes away, so it is not kept open
                    with contextlib.closing(video):
                        yield video
                    return
        self._open[key] = video
        try:
            yield video
        finally:
            while len(self._open) > self._options.open_videos:
                self._open.popitem(last=False)[1].close()

    def _response(self, read: _Request) -> Any:
        error = read.error or next((asked.error for asked in read.asked if asked.error is not None), None)
        if error is not None:
            return self.utils.InferenceResponse(error=self._error(error))
        try:
            arrays = outputs([asked.answer for asked in read.asked if asked.answer is not None])
            wanted = set(read.request.requested_output_names())
            tensors = [self.utils.Tensor(name, array) for name, array in arrays.items() if name in wanted]
            return self.utils.InferenceResponse(output_tensors=tensors)
        except Exception as problem:
            return self.utils.InferenceResponse(error=self._error(problem))

    def _error(self, error: BaseException) -> Any:
        kind = self.utils.TritonError
        if isinstance(error, Interrupted):
            code = kind.CANCELLED
        elif isinstance(error, (VideoError, QueryError)):
            code = kind.INVALID_ARG
        else:
            code = kind.INTERNAL
            self.utils.Logger.log_error(f"{type(error).__name__}: {error}")
        return kind(f"{error}" if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}", code)


def outputs(answers: Sequence[Grounding]) -> dict[str, np.ndarray]:
    """Return the outputs of b answers: RESULT object [b, 1], FOUND bool [b, 1], SPAN [b, 2], BOXES [b, N, 6].

    N is the most boxes that one of them has, at least 1; what is not there is NaN.
    """
    most = max([1, *(len(answer.boxes) for answer in answers if answer.boxes is not None)])
    span = np.full((len(answers), 2), np.nan, np.float32)
    boxes = np.full((len(answers), most, len(BOX_COLUMNS)), np.nan, np.float32)
    for row, answer in enumerate(answers):
        if answer.span is not None:
            span[row] = answer.span
        if (found := answer.boxes) is not None:
            columns = (found.times[:, None], found.boxes, found.presence[:, None])
            boxes[row, : len(found)] = np.concatenate(columns, axis=1)
    results = [json.dumps(answer.to_json(), ensure_ascii=False).encode() for answer in answers]
    return {
        "RESULT": _column(results),
        "FOUND": np.array([[answer.found] for answer in answers], bool),
        "SPAN": span,
        "BOXES": boxes,
    }


def _column(values: Iterable[bytes]) -> np.ndarray:
    """Bytes as object [b, 1]: of fixed-length bytes numpy would cut zeros at the end."""
    listed = list(values)
    column = np.empty((len(listed), 1), np.object_)
    column[:, 0] = listed
    return column


def _text(value: Any) -> str:
    """A string as Triton hands it over. Raises QueryError where it is no UTF-8."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise QueryError(f"a text is not UTF-8 ({error}); send queries and paths in UTF-8") from error


def _key(source: str | bytes) -> str:
    """What tells a video from others: of a file its path, size and time, of bytes their hash."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        about = os.stat(source)
    except OSError:
        return source  # opening it says what is wrong
    return f"{source}:{about.st_size}:{about.st_mtime_ns}"


@contextlib.contextmanager
def _as_file(source: str | bytes) -> Iterator[str]:
    if isinstance(source, str):
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="bridge-stg-") as file:
        file.write(source)
        file.flush()
        yield file.name


def _see_only(device: int) -> None:
    """Leave this process one GPU. Triton numbers those that CUDA_VISIBLE_DEVICES leaves; each instance is a process."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
