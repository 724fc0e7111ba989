"""Serve the whole chain as a runner: this runtime on a bundle, or the torch model, eager or compiled.

Usage: python benchmarks/speed/run_chain.py ours|torch_eager|torch_compile (requests on stdin; see peers/protocol.py)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speed.chain_rows import ChainRows
from speed.peers.protocol import Loaded, Model, PeerError, serve

# isort: split
from bridge_stg.runtime import Grounder


def load_ours(model: Model, precision: str, threads: int) -> Loaded:
    """Load this project's bundle in a precision."""
    grounder = Grounder.load(model.bundles[precision], threads=threads)
    variants = {} if grounder.target is None else dict(grounder.target.variants)
    words = f"{precision}; variants {', '.join(f'{k} {v}' for k, v in variants.items())}"
    return Loaded(ChainRows(grounder, grounder.sessions).rows(), words, ("onnxruntime", "numpy"))


def load_torch(model: Model, precision: str, threads: int, *, compiled: bool = False) -> Loaded:
    """Load the checkpoint as a torch model in fp32."""
    if precision != "fp32":
        raise PeerError(f"precision {precision}: torch is the reference and runs in fp32 only")
    import torch

    from bridge_stg.checkpoint.checkpoint import load_checkpoint
    from bridge_stg.model.torch_session import torch_grounder

    torch.set_num_threads(threads)
    loaded = load_checkpoint(model.checkpoint)
    words = "fp32, eager"
    if compiled:
        words = "fp32, torch.compile (inductor) of the three parts, dynamic shapes"
        # Keep compiled code: compiling a model of 24 layers takes minutes.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(model.folder.resolve().parent / "inductor"))
        compile_parts(loaded)
    grounder = torch_grounder(loaded)
    return Loaded(ChainRows(grounder, grounder.sessions).rows(), words, ("torch", "transformers", "numpy"))


def compile_parts(model: object) -> None:
    """Compile the three parts with dynamic shapes, so that a new size does not recompile them."""
    import torch

    torch._dynamo.config.cache_size_limit = 64  # noqa: SLF001 - torch has no public setting
    for name in ("vision_encoder", "language_model", "spatial_decoder"):
        getattr(model, name).compile(dynamic=True)


KINDS = {
    "ours": load_ours,
    "torch_eager": load_torch,
    "torch_compile": lambda model, precision, threads: load_torch(model, precision, threads, compiled=True),
}

if __name__ == "__main__":
    serve(KINDS[sys.argv[1]])
