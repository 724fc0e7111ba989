"""What the API takes and gives, for its OpenAPI page. A grounding's layout is that of `Grounding.to_json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["ground", "span"]


class Problem(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="One paragraph for people.")
    code: str = Field(description="A short name for programs.")


class VideoSource(BaseModel):
    """A video of the server's media folder."""

    model_config = ConfigDict(extra="forbid")
    source: str = Field(max_length=1000, description="Its name below the folder that the operator gave.")


class Video(BaseModel):
    """A video that the server holds."""

    id: str
    name: str
    kind: Literal["video", "image"]
    media_type: str
    duration_s: float = Field(description="0 of an image.")
    width: int = Field(description="As it is shown, in pixels.")
    height: int
    frames: int
    expires_at: str = Field(description="When it is deleted unless it is used before.")


class NewJob(BaseModel):
    """Queries about one video."""

    model_config = ConfigDict(extra="forbid")
    video: str = Field(max_length=100, description="The id of a video.")
    queries: list[str] = Field(min_length=1, description="What to find, in words.")
    task: Task = Field("ground", description="When and where (`ground`), or only when (`span`).")
    allow_none: bool = Field(True, description="Whether the answer may be that it is not in the video.")
    deadline_s: float | None = Field(None, gt=0, description="Seconds, waiting included; the server's most otherwise.")


class Job(BaseModel):
    """How a job stands."""

    id: str
    video: str
    queries: list[str]
    task: Task
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(None, description="Jobs that wait before it; null if it does not wait.")
    progress: dict[str, Any] | None = Field(None, description="stage, done and total, as the runtime told them last.")
    results: list[dict[str, Any]] | None = Field(None, description="One grounding a query, when done.")
    error: str | None = Field(None, description="Why it failed.")
    code: str | None = None


class Grounded(BaseModel):
    """The answers to one request."""

    video: Video
    results: list[dict[str, Any]] = Field(description="One grounding a query, in their order.")


class LiveSource(BaseModel):
    """One live source."""

    name: str
    watched: bool
    queries: list[str] = Field(description="What it is asked now.")


class LiveSources(BaseModel):
    """The sources that may be watched."""

    live: list[LiveSource]


class Queue(BaseModel):
    """How busy the server is."""

    waiting: int
    running: int
    most_waiting: int


class Health(BaseModel):
    """Whether the server works, and what it is."""

    status: Literal["ok", "stopping"]
    version: str
    bundle: str
    backend: str
    verified: bool
    queue: Queue
    limits: dict[str, float]
