"""Export a Qwen3ForCausalLM folder with transformers' exporter: python hf_export.py FOLDER OUT {fp32,int8}.

Writes OUT/prefill/model.onnx and OUT/decode/model.onnx, fused into onnxruntime's CPU operators. The exporter drops
`logits_to_keep` from the arguments of `generate`, which would make prefill compute the logits of all tokens; it is
added again. int8 is the exporter's dynamic quantization with onnxruntime, one scale per channel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM
from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation

EXAMPLE_TOKENS = 16


def main(folder: Path, out: Path, precision: str) -> None:
    """Export both graphs, each with its weights."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(EXAMPLE_TOKENS)[None]
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if precision == "int8" else None
    config = OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, (part, inputs) in decompose_for_generation(model, prompt).items():
        exported = OnnxExporter().export(part, {**inputs, "logits_to_keep": 1}, config)
        exported.save_pretrained(out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
