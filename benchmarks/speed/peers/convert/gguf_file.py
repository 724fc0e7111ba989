"""Convert a Qwen3ForCausalLM folder to a GGUF file: python gguf_file.py FOLDER OUT {f32,q8_0,q4_0}.

The `gguf` package writes it in f32; llama.cpp quantizes that file to q8_0 or q4_0. It has no vocabulary, since the
runner feeds ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
from safetensors_file import tensors

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def write_f32(folder: Path, target: Path) -> None:
    """Write a Qwen3 folder as a GGUF file in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arch, layers = gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(arch, layers)
    for key, values in tensors(folder / "model.safetensors"):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SystemExit(f"{key}: not a tensor of a Qwen3 in GGUF")
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize an f32 file with llama.cpp, which chooses the type of each tensor."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {kind}")


def main(folder: Path, out: Path, kind: str) -> None:
    """Write OUT/model.gguf."""
    whole = out / "model.gguf" if kind == "f32" else out / "f32.gguf"
    write_f32(folder, whole)
    if kind != "f32":
        quantize(whole, out / "model.gguf", kind)
        whole.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
