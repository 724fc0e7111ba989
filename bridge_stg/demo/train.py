"""Train the demo checkpoint from scratch: first the vision encoder, then all other parts.

Both stages are resumable and log to `log.jsonl`.
"""

from __future__ import annotations

import os
from pathlib import Path

VISION_STEPS, GROUNDING_STEPS = 3000, 3500
EVALUATION_CLIPS = 10


def train_demo(
    out: Path, *, seed: int = 0, resume: bool = True, vision_steps: int | None = None,
    grounding_steps: int | None = None, tiny: bool = False,
) -> Path:  # fmt: skip
    """Train the demo model, write its checkpoint to the folder `out`, and return it.

    The seed is that of the weights and of every batch. States are saved in `<out>-training/`, from which `resume`
    continues. `tiny` makes batches of two clips, for tests. Raises BridgeError if a saved state does not fit the model,
    or the loss is no longer finite.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from bridge_stg.checkpoint.checkpoint import save_checkpoint
    from bridge_stg.demo.held_out import score_rendered_scenes
    from bridge_stg.demo.tiny_model import demo_config, write_demo_tokenizer
    from bridge_stg.demo.train_grounding import train_grounding
    from bridge_stg.demo.train_vision import train_vision
    from bridge_stg.model.model import BridgeSTG
    from bridge_stg.model.torch_session import torch_grounder
    from bridge_stg.runtime.chain.prompt import Tokenizer

    out = Path(out)
    folder = out.with_name(out.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    write_demo_tokenizer(tokenizer)
    torch.manual_seed(seed)
    model = BridgeSTG(demo_config(), Tokenizer.from_file(tokenizer))

    def evaluate(_: int) -> dict[str, float]:
        scores = score_rendered_scenes(torch_grounder(model.eval()), EVALUATION_CLIPS)
        model.train()
        return scores

    patches, clips = (1000, 2) if tiny else (9000, 8)
    train_vision(
        model.vision_encoder, model.spec, folder, seed=seed, steps=vision_steps or VISION_STEPS, resume=resume,
        patches=patches,
    )  # fmt: skip
    train_grounding(
        model, folder, tokenizer, seed=seed, steps=grounding_steps or GROUNDING_STEPS, resume=resume, clips=clips,
        every=None if tiny else evaluate,
    )  # fmt: skip
    save_checkpoint(model.eval(), out, tokenizer)
    return out
