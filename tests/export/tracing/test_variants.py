"""One trace becomes all variants of a graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.export.tracing import lowering
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.export.tracing.trace import trace_graph


def test_one_layer_is_traced_for_all_layers_of_all_variants(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, traced = lowering.operator_attention, list[Any]()

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        traced.append(module)
        return attend(module, *args, **options)

    monkeypatch.setattr(lowering, "operator_attention", counted)
    skeleton, store = open_skeleton(checkpoint)
    made = trace_graph("language_model", skeleton, store, ["primitive", "standard"])
    (primitive, _), (standard, _) = made
    of_primitive, of_standard = (Counter(node.op_type for node in model.graph) for _, model in made)
    layers = skeleton.spec.language.num_layers
    assert layers > len(traced) == 1
    assert (primitive.opset, standard.opset) == (18, 24)
    assert of_standard["Attention"] == of_primitive["Softmax"] == layers
    assert of_standard["TensorScatter"] == 2 * layers and not of_standard["Softmax"]
    assert not of_primitive["TensorScatter"] + of_primitive["Attention"] + of_primitive["RMSNormalization"]
