"""Schemas of the API's requests and responses, for validation and OpenAPI. `Grounding.to_json` defines a result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["ground", "span"]
Results = list[dict[str, Any]]
RESULTS = "One grounding per query (`unknown_words` lists words of the query that the model does not know)"
PROBLEMS = {400: "malformed", 401: "no valid key", 404: "not found", 408: "too slow", 409: "wrong state",
            413: "too large", 415: "unsupported type", 422: "invalid", 429: "busy", 503: "unavailable"}  # fmt: skip


def problems(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the errors of a route, whose bodies are a `model`."""
    return {code: {"model": model, "description": text} for code, text in PROBLEMS.items()}


class Problem(BaseModel):
    """An HTTP error."""

    error: str = Field(description="One paragraph of text; its wording may change.")
    code: str = Field(description="Stable dotted code for programs.")


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


class NewJob(BaseModel):
    """Queries about one video."""

    model_config = ConfigDict(extra="forbid")
    video: str = Field(max_length=100, description="Id of a video.")
    queries: list[str] = Field(json_schema_extra={"minItems": 1}, description="Sentences that say what to find.")
    task: Task = Field("ground", description="When and where (`ground`), or only when (`span`).")
    allow_none: bool = Field(True, description="Whether the answer may be that it is not in the video.")
    stream: int | None = Field(None, ge=0, description="Video stream of the file, by its index; by default the best.")
    deadline_s: float | None = Field(
        None, gt=0, description="Time limit in seconds, waiting included; by default the server's maximum."
    )


class Job(BaseModel):
    """A job and its status."""

    id: str
    video: str
    queries: list[str]
    task: Task
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(None, description="Number of jobs before it in the queue; null outside the queue.")
    progress: dict[str, Any] | None = Field(None, description="The newest stage, done and total of the runtime.")
    results: Results | None = Field(None, description=f"{RESULTS}, when done.")
    error: str | None = Field(None, description="Why it failed.")
    code: str | None = None


class Grounded(BaseModel):
    """The answers to one request."""

    video: Video
    results: Results = Field(description=f"{RESULTS}, in their order.")


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
