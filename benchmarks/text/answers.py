"""Compare text answers with transformers' greedy `generate`: the same weights, frames and prompt, side by side.

A random model of a published shape (with a small tokenizer that splits text as Qwen's does) is asked for the boxes in a
clip. transformers writes freely; this project writes the same tokens freely, which must be equal, then under the
grammar, without and with drafts. A tube is a list of boxes in all groups of frames. Counted are calls of the language
model and seconds from frames to the answer; the fastest of `--runs` counts. Results go to
benchmarks/results/text_answers.json.

Usage: python benchmarks/text/answers.py [--shape qwen3_vl_0_5b] [--frames 32] [--folder build/text] [--runs 2]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "large")]
QUERY = "the red car"


@click.command()
@click.option("--shape", default="qwen3_vl_0_5b", show_default=True)
@click.option("--frames", default=32, show_default=True, help="Frames of the clip; two are one group.")
@click.option("--tokens", default=100, show_default=True, help="Tokens of the free answers that are compared.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/text"), show_default=True)
@click.option("--runs", default=2, show_default=True)
def main(shape: str, frames: int, tokens: int, folder: Path, runs: int) -> None:
    """Make the model and its bundle if they are missing, measure, and write the results."""
    from bridge_stg.runtime.host.machine import describe

    model, bundle = folder / shape, folder / f"{shape}_bundle"
    if not (model / "config.json").is_file():
        write_model(shape, model)
    if not (bundle / "manifest.json").is_file():
        command = [sys.executable, "cli.py", "export", model, "--out", bundle, "--no-verify", "--variant", "standard"]
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    clip = [(i / 2, frame) for i, frame in enumerate(synthetic_images(frames))]
    rows = {**ours(bundle, clip, tokens, runs), "transformers": theirs(model, clip, tokens, runs)}
    free, reference = rows["free"], rows["transformers"]
    result = {
        "shape": shape, "precision": "fp32", "frames": frames, "tokens_compared": tokens,
        "equal_ids": free.pop("ids") == reference.pop("ids"), "rows": rows,
        "seconds_over_transformers": round(free["seconds"] / reference["seconds"], 3),
        "calls_per_token": round(rows["grammar, drafts"]["calls"] / rows["grammar, drafts"]["tokens"], 3),
        "machine": describe("torch", "transformers", "onnxruntime", "numpy"),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    (ROOT / "benchmarks" / "results" / "text_answers.json").write_text(text + "\n", encoding="utf-8")
    click.echo(text)


def synthetic_images(count: int) -> np.ndarray:
    """Return frames uint8 [count, 320, 448, 3] that change smoothly; 140 visual tokens per group."""
    y, x = np.mgrid[0:320, 0:448]
    shades = [np.stack([(x + 9 * i) % 256, (y + 5 * i) % 256, (x + y) % 256], -1) for i in range(count)]
    return np.stack(shades).astype(np.uint8)


def fastest(runs: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least seconds of several runs, and the result of the last one."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return round(min(seconds), 3), result


def ours(bundle: Path, clip: list[tuple[float, np.ndarray]], tokens: int, runs: int) -> dict[str, Any]:
    """Measure this project: free answers, answers under the grammar, and these with drafts."""
    from bridge_stg.runtime import Grounder, TextOptions

    rows: dict[str, Any] = {}
    with Grounder.load(bundle) as grounder:
        message = grounder.spec.text.tube.replace("{query}", QUERY)  # type: ignore[union-attr]
        seconds, text = fastest(runs, lambda: "".join(grounder.ask(clip, message, max_tokens=tokens)))
        rows["free"] = {"seconds": seconds, "tokens": tokens, "calls": tokens, "ids": text}
    for name, drafts in (("grammar", False), ("grammar, drafts", True)):
        with Grounder.load(bundle, text=TextOptions(mode="joint", drafts=drafts)) as grounder:
            seconds, result = fastest(runs, lambda g=grounder: g.ground(clip, QUERY, allow_none=False))  # type: ignore[misc]
            boxes = 0 if result.tube is None else len(result.tube)
            rows[name] = {"seconds": seconds, "boxes": boxes, **result.decoding}
    return rows


def theirs(model: Path, clip: list[tuple[float, np.ndarray]], tokens: int, runs: int) -> dict[str, Any]:
    """Measure transformers' `generate` in fp32, given patches of the same frames."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    from bridge_stg.checkpoint.checkpoint import BridgeSTGConfig
    from bridge_stg.checkpoint.plain_folder import plain_config
    from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings

    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config: BridgeSTGConfig = plain_config(model, values)
    spec, tokenizer = config.model_spec(), Tokenizer.from_file(model / "tokenizer.json")
    assert spec.text is not None
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()

    def answer() -> str:
        pixels = torch.from_numpy(np.stack([frame for _, frame in clip])).permute(0, 3, 1, 2).float() / 127.5 - 1
        patches, *grid = Qwen3VLVideoProcessor.patchify(None, pixels[None], 16, 2, 2)
        patches, count = patches[0], grid[1] * grid[2] // 4
        times = time_strings(np.arange(grid[0]) + 0.25, spec.prompt)
        shown = "".join(f"{time}<|vision_start|>{'<|video_pad|>' * count}<|vision_end|>" for time in times)
        message = spec.text.tube.replace("{query}", QUERY)  # type: ignore[union-attr]
        text = spec.prompt.head + shown + spec.text.video_turn.replace("{message}", message)  # type: ignore[union-attr]
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            made = network.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=patches,
                video_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=2 * (ids == tokenizer.id_of("<|video_pad|>")).long(),
                max_new_tokens=tokens, do_sample=False,
            )  # fmt: skip
        return tokenizer.decode(made[0, ids.shape[1] :].tolist())

    seconds, text = fastest(runs, answer)
    return {"seconds": seconds, "tokens": tokens, "calls": tokens, "ids": text}


def write_model(shape: str, folder: Path) -> None:
    """Write a random model of a shape as a plain folder."""
    import torch
    from shapes import SHAPES
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    from tests.bridge_stg.checkpoint.plain_folders import (
        TEMPLATES,
        preprocessor,
        qwen_tokenizer,
        token_id,
        tokenizer_config,
    )

    values = {key: value for key, value in SHAPES[shape].items() if key != "model_type"}
    tokens = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start",
              "vision_end_token_id": "vision_end"}  # fmt: skip
    values |= {key: token_id(f"<|{name}|>") for key, name in tokens.items()}
    values["text_config"] = {**values["text_config"], "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(Qwen3VLConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                # Strong attention would make all tokens alike after 24 layers, and every answer one repeated token.
                scale = 0.36 if "o_proj" in name else 1.2
                std = 0.1 if "embed" in name else scale / parameter[0].numel() ** 0.5
                torch.nn.init.normal_(parameter, std=std)
        # Rows without a token are small, as in trained models, so that answers are text.
        model.get_input_embeddings().weight[qwen_tokenizer().get_vocab_size() :] *= 0.1
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3_vl"], encoding="utf-8")
    sizes = preprocessor("qwen3_vl", tokens=16384) | {"processor_class": "Qwen3VLProcessor"}
    for kind, name in (("image", "Qwen2VLImageProcessorFast"), ("video", "Qwen3VLVideoProcessor")):
        file = folder / f"{'' if kind == 'image' else 'video_'}preprocessor_config.json"
        file.write_text(json.dumps(sizes | {f"{kind}_processor_type": name}), encoding="utf-8")


if __name__ == "__main__":
    main()
