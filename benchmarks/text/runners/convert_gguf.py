"""Convert a folder to GGUF in f32 and q8_0 with llama.cpp's own converter: python convert_gguf.py FOLDER OUT.

The converter is part of llama-cpp-python's source distribution, which pip downloads. It knows tokenizers by a hash of
ids and rejects others; here it is told that the folder's tokenizer splits text as Qwen's does.
"""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path


def sources(folder: Path) -> Path:
    """Download the installed version's sources; return the folder of llama.cpp."""
    version = metadata.version("llama-cpp-python")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "--dest", str(folder), f"llama-cpp-python=={version}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def main(model: Path, out: Path) -> None:
    """Write model-KIND.gguf and mmproj-KIND.gguf for each kind."""
    converter = sources(out / "sources")
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda *_: "qwen2"
    for kind in ("f32", "q8_0"):
        for name, options in (("model", []), ("mmproj", ["--mmproj"])):
            target = out / f"{name}-{kind}.gguf"
            sys.argv = ["convert", str(model), "--outtype", kind, "--outfile", str(target), *options]
            runpy.run_path(str(converter / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
