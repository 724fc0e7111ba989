"""Schemas of the API's requests and responses, for validation and OpenAPI. `evaluation.schema` defines a result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, model_validator

from bridge_stg.evaluation import schema
from bridge_stg.runtime.chain.tasks import Task, track_from
from bridge_stg.server.http.document import QUERY_PATTERN, track_or_not

TaskName = Annotated[
    Literal["tube", "span", "image", "track"],
    BeforeValidator(lambda name: "tube" if name == "ground" else name),  # its former name, kept for one release
]
PROBLEMS = {
    400: "malformed", 401: "no valid key", 403: "page of another origin", 404: "not found", 408: "too slow",
    409: "wrong state", 410: "deleted", 413: "too large", 415: "unsupported type", 416: "outside of the file",
    422: "invalid", 429: "busy", 500: "error of the server", 503: "unavailable",
}  # fmt: skip
WRITING = (403, 408, 413, 415)
"""Errors of every method that changes something: its body is read."""
QUERYING = (*WRITING, 404, 409, 422, 429)
"""Errors of a request that waits for answers about a video."""


QueryText = Annotated[str, Field(json_schema_extra={"pattern": QUERY_PATTERN})]
"""A query, which `check_query` checks; the schema describes what it accepts."""


def _define(found: dict[str, Any]) -> None:
    """Replace a model's schema by that of a result."""
    found.clear()
    found.update(schema.inlined("result"), title="Result")


class Result(RootModel[dict[str, Any]]):
    """The answer to one query."""

    model_config = ConfigDict(json_schema_extra=_define)


class Problem(BaseModel):
    """An HTTP error."""

    error: str = Field(description="One paragraph of text; its wording may change.")
    code: str = Field(description="Stable dotted code for programs.")


def problems(*statuses: int, model: type[BaseModel] = Problem) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of errors of a route, whose bodies are a `model`."""
    return {status: {"model": model, "description": PROBLEMS[status]} for status in statuses}


class VideoSource(BaseModel):
    """A video of the server's media folder."""

    model_config = ConfigDict(extra="forbid")
    source: str = Field(max_length=1000, description="Path below the media folder of the operator.")


class Video(BaseModel):
    """A video that the server keeps."""

    id: str
    name: str
    kind: Literal["video", "image"]
    media_type: str
    duration_s: float = Field(description="Length in seconds; 0 for an image.")
    width: int = Field(description="Width in pixels, as displayed.")
    height: int
    frames: int
    expires_at: str = Field(description="Time at which it is deleted unless it is used before.")


def _numbers(value: Any) -> Any:
    """Return the numbers in the text of a form's field."""
    try:
        return list(map(float, value.split(","))) if isinstance(value, str) else value
    except ValueError:
        return value


def _state_task(found: dict[str, Any]) -> None:
    """State in a schema which fields belong to the task `track`."""
    found["oneOf"] = track_or_not({"type": "array"}, no_box={"type": "null"})


class NewJob(BaseModel):
    """Queries about one video."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_state_task)
    video: str = Field(max_length=100, description="Id of a video.")
    queries: list[QueryText] = Field(
        json_schema_extra={"minItems": 1},
        description="Sentences that say what to find; for `track` one, such as `the object`.",
    )
    task: TaskName = Field(
        "tube",
        description="`tube`: when and where; `span`: only when; `image`: where, in an image that shows it; `track`: "
        "where, from a box in the first frame.",
    )
    first_box: Annotated[list[float], Field(min_length=4, max_length=4), BeforeValidator(_numbers)] | None = Field(
        None,
        description="Of `track`: left, top, right, bottom in pixels of the first frame; in a form, with commas.",
    )
    allow_none: bool = Field(True, description="Whether the answer may be that it is not in the video.")
    stream: int | None = Field(None, ge=0, description="Video stream of the file, by its index; by default the best.")
    deadline_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Time limit in seconds, waiting included; by default the server's maximum.",
    )

    @model_validator(mode="after")
    def _check_track(self) -> NewJob:
        if (self.task == "track") != (self.first_box is not None):
            raise ValueError("`first_box` belongs to the task `track`, which needs it")
        if self.task == "track" and len(self.queries) > 1:
            raise ValueError("the task `track` takes one query")
        return self

    @property
    def runtime_task(self) -> Task:
        """The task for the runtime. Raises QueryError if the first box is invalid."""
        if self.first_box is not None:
            return track_from(self.first_box)
        return Task(self.task, allow_none=self.allow_none and self.task != "image")


class Queued(BaseModel):
    """The data of the event `queued`."""

    position: int | None = Field(description="Number of jobs before it in the queue; null outside the queue.")


class Progress(BaseModel):
    """The data of the event `progress`."""

    stage: str = Field(description="Stage of the runtime, such as `decode_video`.")
    done: float = Field(description="How much of it is done: frames, tokens or seconds.")
    total: float | None = Field(description="How much there is to do; null if it is not known.")


class Job(BaseModel):
    """A job and its status."""

    id: str
    video: str
    queries: list[str]
    task: TaskName
    first_box: list[float] | None = Field(None, description="Of `track`: the box in the first frame, as given.")
    allow_none: bool = Field(description="Whether the answer may be that it is not in the video.")
    stream: int | None = Field(None, description="The video stream that was requested; null: the best.")
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(None, description="Number of jobs before it in the queue; null outside the queue.")
    progress: Progress | None = Field(None, description="The newest progress of the runtime.")
    results: list[Result] | None = Field(None, description="One result per query, when done.")
    error: str | None = Field(None, description="Why it failed.")
    code: str | None = None


class Grounded(BaseModel):
    """The answers to one request."""

    video: Video
    results: list[Result] = Field(description="One result per query, in their order.")


class LiveSource(BaseModel):
    """One live source."""

    name: str
    watched: bool
    queries: list[str] = Field(description="The queries of all its clients.")


class LiveSources(BaseModel):
    """The sources that clients may watch."""

    live: list[LiveSource]


class Queue(BaseModel):
    """The load of the server."""

    waiting: int
    running: int
    most_waiting: int


class Sample(BaseModel):
    """A video that visitors of the page may try; `GET /v1/sample` returns it."""

    name: str
    query: str | None = Field(description="A query about it; null if not stated.")


class Health(BaseModel):
    """The state and the limits of the server."""

    status: Literal["ok", "stopping"]
    version: str
    bundle: str
    backend: str
    verified: bool
    trained: bool = Field(description="False: the bridging and spatial parts are random, so the answers mean nothing.")
    knows: str | None = Field(description="What the model was trained to find, in one sentence; null if not stated.")
    sample: Sample | None = Field(description="A video to try; null if there is none.")
    queue: Queue
    limits: dict[str, float]
