"""`ort-cpu` of the vision encoder: visual tokens of as many groups as a call wants, feature maps of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.export.graph.optional_tokens import make_tokens_optional
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import TOKEN_GROUPS
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.chain.vision_pass import coarse_tokens, fine_maps
from bridge_stg.runtime.errors import EngineError

ROWS, COLUMNS, GROUPS = 4, 6, 3
NAME = "vision_encoder"


def opened(bundle: Bundle, variant: str) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle.graph_path(NAME, variant), bundle.graph(NAME, variant), threads=1)


@pytest.fixture(scope="module")
def sessions(exported: Bundle) -> Iterator[tuple[OnnxRuntimeSession, OnnxRuntimeSession]]:
    with opened(exported, "standard") as standard, opened(exported, "ort-cpu") as optional:
        yield standard, optional


@pytest.fixture(scope="module")
def feeds(exported: Bundle) -> dict[str, np.ndarray]:
    vision = exported.manifest.spec.vision
    shape = (GROUPS, vision.temporal_patch_size, ROWS * vision.patch_size, COLUMNS * vision.patch_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return {"frames": frames, **vision_tables(vision, ROWS, COLUMNS)}


@pytest.mark.parametrize("wanted", [None, 0, 1, GROUPS])
def test_tokens_of_the_first_groups_and_maps_of_all(sessions: Any, feeds: Any, wanted: int | None) -> None:
    standard, optional = sessions
    expected = standard.infer(feeds)
    found = optional.infer(feeds if wanted is None else {**feeds, TOKEN_GROUPS: np.array([wanted])})
    each = expected["visual_tokens"].shape[1] // GROUPS
    tokens = expected["visual_tokens"][:, : each * (GROUPS if wanted is None else wanted)]
    assert found["visual_tokens"].shape == tokens.shape
    np.testing.assert_allclose(found["visual_tokens"], tokens, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["feature_map"], expected["feature_map"], rtol=1e-4, atol=1e-5)


def test_the_fine_pass_asks_for_no_tokens(exported: Bundle, sessions: Any, feeds: Any, monkeypatch: Any) -> None:
    spec, calls = exported.manifest.spec, []
    for session in sessions:
        infer = session.infer
        monkeypatch.setattr(session, "infer", lambda given, infer=infer: calls.append(given) or infer(given))
    maps = [fine_maps(s, spec, feeds["frames"][:, 0], report=lambda *_: None) for s in sessions]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-5)
    assert [given.get(TOKEN_GROUPS) is not None for given in calls] == [False, True]
    coarse_tokens(sessions[1], spec, feeds["frames"], report=lambda *_: None)
    assert TOKEN_GROUPS not in calls[-1]


def test_what_has_no_such_input_refuses_it(sessions: Any, feeds: Any) -> None:
    with pytest.raises(EngineError, match="has no input 'token_groups'"):
        sessions[0].infer({**feeds, TOKEN_GROUPS: np.zeros(1, np.int64)})


def test_other_graphs_stay(exported: Bundle) -> None:
    for name in ("language_model", "spatial_decoder"):
        model = ir.load(exported.graph_path(name, "standard"))
        before = [node.op_type for node in model.graph]
        assert not make_tokens_optional(model) and [node.op_type for node in model.graph] == before
