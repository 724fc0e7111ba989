"""Sessions that are opened in another thread: calls wait, errors surface at the call, closing leaves nothing open."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.backends.pending import PendingSession, open_in_order
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises

GRAPH: Any = "language_model (standard)"


class Opened:
    def __init__(self) -> None:
        self.closed = False

    def infer(self, feeds: Any, *, cache: Any = None) -> Any:
        return feeds, cache

    def allocate_cache(self, *, batch: int, capacity: int) -> Any:
        return batch, capacity

    def close(self) -> None:
        self.closed = True


def opened_in_order(*openers: Any) -> Any:
    return open_in_order({str(i): (GRAPH, open_it) for i, open_it in enumerate(openers)}).values()


def test_a_call_waits_for_its_own_session_only() -> None:
    go = threading.Event()
    first, second = opened_in_order(Opened, lambda: go.wait(5) and Opened())
    assert first.infer({"a": 1}, cache="kv") == ({"a": 1}, "kv")  # while the second is still being opened
    go.set()
    assert second.allocate_cache(batch=2, capacity=9) == (2, 9)
    assert second.graph == GRAPH


def test_what_the_opening_raised_is_raised_by_every_call_and_not_by_closing() -> None:
    def reject() -> Any:
        raise EngineError("engine.rejected_graph", "rejects the graph")

    broken, behind = opened_in_order(reject, Opened)
    for _ in range(2):
        with raises("engine.rejected_graph"):
            broken.infer({})
    behind.wait()
    broken.close()


def test_closing_waits_for_the_one_being_opened_and_spares_the_rest() -> None:
    go, opened = threading.Event(), Opened()
    made: list[str] = []
    first, second = opened_in_order(lambda: go.wait(5) and opened, lambda: made.append("second") or Opened())
    closing = threading.Thread(target=second.close)
    closing.start()
    time.sleep(0.05)
    threading.Timer(0.05, go.set).start()
    first.close()
    assert opened.closed
    closing.join(5)
    assert made == []
    with raises("engine.closed"):
        second.infer({})


def test_a_bundle_opened_in_the_background_answers_the_same(bundle_path: Any) -> None:
    bundle = Bundle.load(bundle_path)
    later, now = (open_sessions(bundle, backend="onnxruntime", threads=1, wait=wait) for wait in (False, True))
    assert later.target == now.target and set(later) == set(now)
    for name, session in later.items():
        assert isinstance(session, PendingSession) and session.graph == now[name].graph
        assert session.preferences == now[name].preferences and session.preferences.prefill_chunk == 256
        graph = session.graph
        sizes = {"B": 1, "L": 2, "K": 1, "S": 8}
        caches = [each.allocate_cache(batch=1, capacity=8) for each in (session, now[name])]
        feeds = {
            tensor.name: np.ones(
                [sizes.get(str(dim), dim if isinstance(dim, int) else 2) for dim in tensor.dims], tensor.dtype
            )
            for tensor in graph.inputs
            if tensor.name not in graph.cache.past_names
        }
        feeds |= {name: np.zeros_like(feeds[name]) for name in ("cache_position", "output_index") if name in feeds}
        found = [each.infer(feeds, cache=cache) for each, cache in zip((session, now[name]), caches, strict=True)]
        for output in found[0]:
            np.testing.assert_array_equal(found[0][output], found[1][output])
        session.close()
        with raises("engine.closed"):
            session.infer(feeds)
        now[name].close()
