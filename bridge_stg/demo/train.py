"""Train the demo checkpoint from scratch: the vision encoder alone, then everything around it.

Both stages are resumable and log to `log.jsonl`. Knows nothing of what a stage computes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge_stg.model.model import BridgeSTG

VISION_STEPS, GROUNDING_STEPS = 3000, 3500
EVALUATION_CLIPS = 10


def train_demo(
    out: Path, *, seed: int = 0, resume: bool = True, vision_steps: int = VISION_STEPS,
    grounding_steps: int = GROUNDING_STEPS, tiny: bool = False,
) -> Path:  # fmt: skip
    """Train the demo model and write its checkpoint.

    Args:
        out: the checkpoint folder; states and the log go to `<out>-training/` beside it.
        seed: of the weights and of every batch.
        resume: go on from the saved states, if there are any.
        vision_steps: steps of the first stage.
        grounding_steps: steps of the second stage.
        tiny: batches of two clips, for tests.

    Returns:
        The checkpoint folder.

    Raises:
        BridgeError: a state does not fit, or the loss is no longer finite.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from bridge_stg.checkpoint.checkpoint import save_checkpoint
    from bridge_stg.demo.tiny_model import demo_config, write_demo_tokenizer
    from bridge_stg.demo.train_grounding import train_grounding
    from bridge_stg.demo.train_vision import train_vision
    from bridge_stg.model.model import BridgeSTG
    from bridge_stg.runtime.chain.prompt import Tokenizer

    out = Path(out)
    folder = out.with_name(out.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    write_demo_tokenizer(tokenizer)
    torch.manual_seed(seed)
    model = BridgeSTG(demo_config(), Tokenizer.from_file(tokenizer))
    patches, clips = (1000, 2) if tiny else (9000, 8)
    train_vision(
        model.vision_encoder, model.spec, folder, seed=seed, steps=vision_steps, resume=resume, patches=patches
    )
    train_grounding(
        model, folder, tokenizer, seed=seed, steps=grounding_steps, resume=resume, clips=clips,
        every=None if tiny else lambda step: quick_figures(model),
    )  # fmt: skip
    save_checkpoint(model.eval(), out, tokenizer)
    return out


def quick_figures(model: BridgeSTG) -> dict[str, float]:
    """Return m_tIoU and m_vIoU of the torch chain on a few held-out clips, to follow the training."""
    from bridge_stg.demo.held_out import figures_of_scenes
    from bridge_stg.model.torch_session import torch_grounder

    model.eval()
    try:
        return figures_of_scenes(torch_grounder(model), EVALUATION_CLIPS)
    finally:
        model.train()
