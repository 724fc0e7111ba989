"""Search what `Grounder.search` takes: check the queries, open the video, identify it for the state file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.chain.opened_video import Chain
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.errors import QueryError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.index.index import VisualIndex
from bridge_stg.runtime.live.source import LiveSource, open_live
from bridge_stg.runtime.search.indexed import IndexedVideo
from bridge_stg.runtime.search.occurrences import SearchResult
from bridge_stg.runtime.search.options import SearchOptions, video_length_s
from bridge_stg.runtime.search.reader import FileReader
from bridge_stg.runtime.search.search import Search
from bridge_stg.runtime.video.decoder import check_path
from bridge_stg.runtime.video.token_budget import Budget


def index_video(
    chain: Chain,
    video: str,
    limits: Limits,
    *,
    budget: Budget,
    stream: int | None,
    index: VisualIndex,
    fine: bool,
) -> tuple[float, int, bool]:
    """Store what the searches of a video file with the default windows decode and encode.

    Returns its length in seconds, its bytes in the index, and whether all was stored before.
    """
    cache = index.cache_of(video)
    before, as_tokens = cache.nbytes, chain.heads == "text"
    options, reader = SearchOptions(), FileReader(video, stream)
    with IndexedVideo(cache, reader, chain.spec, cuts=options.cuts, as_tokens=as_tokens) as indexed:
        length_s = video_length_s(video, stream)
        search = Search(chain, indexed.source, [], options, budget, length_s, {}, 0, indexed)
        seconds = search.index(limits, fine=fine)
        return seconds, cache.nbytes, indexed.facts is not None and cache.nbytes == before


def search_video(
    chain: Chain,
    video: str | os.PathLike[str] | Iterable[tuple[float, np.ndarray]] | LiveSource,
    queries: Sequence[str],
    options: Mapping[str, Any],
    limits: Limits,
    *,
    budget: Budget,
    stream: int | None,
    sessions: Mapping[str, Session],
    feature_budget_bytes: int,
    index: VisualIndex | None = None,
) -> list[SearchResult]:
    """Search a video within a running call; see `Grounder.search`. `options` are the fields of `SearchOptions`."""
    chosen = SearchOptions(**options)
    if isinstance(queries, str):
        raise QueryError("query.not_a_list", "search takes a list of queries; put a single one into a list")
    if not queries:
        raise QueryError("query.empty", "search takes one query or more")
    for query in queries:
        check_query(chain.spec.prompt, query)
    graphs = repr(sorted((name, repr(session.graph)) for name, session in sessions.items()))
    identity: dict[str, Any] = {
        "model": hashlib.sha256(f"{graphs} {chain.spec!r} {chain.heads}".encode()).hexdigest(),
        "max_visual_tokens": budget.visual_tokens,
        "stream": stream,
    }
    if isinstance(video, (str, os.PathLike)):
        status = os.stat(check_path(os.fspath(video)))
        video = os.path.abspath(video)  # so that it is no number of a camera
        identity |= {"video": video, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}
    length_s = video_length_s(video, stream)
    with ExitStack() as opened:
        indexed = None
        reader = FileReader(video, stream) if isinstance(video, str) else getattr(video, "reader", None)
        if index is not None and reader is not None and length_s is not None:
            as_tokens = chain.heads == "text"
            cache = index.cache_of(reader.path)
            indexed = opened.enter_context(
                IndexedVideo(cache, reader, chain.spec, cuts=chosen.cuts, as_tokens=as_tokens)
            )
        source = open_live(video, latest_wins=False, stream=stream) if indexed is None else indexed.source
        search = Search(chain, source, list(queries), chosen, budget, length_s, identity, feature_budget_bytes, indexed)
        return search.run(limits)
