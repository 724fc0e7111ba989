"""Train a demo checkpoint by the stages of `recipe.yaml`, with the trainer of `train`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bridge_stg.checkpoint.checkpoint import load_checkpoint, load_config, save_checkpoint
from bridge_stg.demo.held_out import score_rendered_scenes
from bridge_stg.demo.tiny_model import demo_config, write_demo_tokenizer
from bridge_stg.demo.training.batches import BatchMaker
from bridge_stg.demo.training.grounding import GroundingTask
from bridge_stg.demo.training.vision import VisionTask, vision_batch
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.training.data.micro_batch import MicroBatch
from bridge_stg.training.folder import begin_run, require_apart, training_folder
from bridge_stg.training.loop.distribution import Processes
from bridge_stg.training.loop.trainer import Run, StageTrainer
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.parts import trained_parameters
from bridge_stg.training.recipe import TrainingRecipe, read_recipe

RECIPE = Path(__file__).with_name("recipe.yaml")
EVALUATED = 10  # clips


def demo_recipe(steps: Mapping[str, int | None], *, seed: int = 0) -> TrainingRecipe:
    """Return the demo's recipe with the stages that `steps` names, and their numbers of steps; None: the recipe's."""
    recipe = read_recipe(RECIPE)
    chosen = [stage for stage in recipe.stages if stage.name in steps]
    stages = tuple(dataclasses.replace(stage, steps=steps[stage.name] or stage.steps) for stage in chosen)
    return dataclasses.replace(recipe, stages=stages, seed=seed)


@dataclass(frozen=True)
class MicroBatches:
    """The trainer's micro-batches, made by a function of the place; picklable if that is."""

    make: Callable[[int], Any]

    def __call__(self, place: int) -> MicroBatch:
        """Return the micro-batch of a place."""
        return MicroBatch(self.make(place))


@dataclass(frozen=True)
class DemoStage:
    """What a stage of the demo needs in addition to its recipe.

    Attributes:
        task: the loss of a batch.
        batches: returns the batch of a step, independent of earlier steps; runs in a worker process.
        score: returns the metrics of a validation; None: the stage has none.
    """

    task: ClipTask
    batches: Callable[[int], Any]
    score: Callable[[Grounder], Mapping[str, float]] | None = None


class DemoTraining:
    """A training of a demo model, whose states and logs are in the folder `OUT-training`.

    It seeds torch, so that new weights made afterwards follow from the recipe's seed.

    Args:
        out: folder of the checkpoint.
        recipe: stages, validation and seed.
        write_tokenizer: writes the model's tokenizer.json to a path.
        start: demo checkpoint with bridge heads to start from, or None.
        resume: whether to continue from saved states.

    Attributes:
        start: the model of that checkpoint, or None.

    Raises:
        CheckpointError: a training by another recipe or from another checkpoint is to be resumed, or the checkpoint
            cannot be read or is not the demo's.
    """

    def __init__(
        self, out: Path, recipe: TrainingRecipe, write_tokenizer: Callable[[Path], None], *, start: Path | None,
        resume: bool,
    ) -> None:  # fmt: skip
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.out, self.recipe, self.resume = Path(out), recipe, resume
        self.folder = training_folder(self.out)
        self.start, identity = None, recipe.to_dict()
        if start is not None:
            require_apart(self.out, start)
            if load_config(start).backbone != demo_config().backbone:
                raise CheckpointError("checkpoint.wrong_model_type", f"{start}: is not a checkpoint of the demo model")
            self.start = load_checkpoint(start).float()
            identity["start"] = file_sha256(start / "model.safetensors")
        begin_run(self.folder, identity, resume=resume)
        self.tokenizer_path = self.folder / "tokenizer.json"
        write_tokenizer(self.tokenizer_path)
        self.tokenizer = Tokenizer.from_file(self.tokenizer_path)
        torch.manual_seed(recipe.seed)

    def train(self, model: BridgeSTG, stages: Mapping[str, DemoStage]) -> Path:
        """Train the stages one after the other; write the checkpoint and return its folder.

        `stages` has what each stage needs by its name.

        Raises:
            TrainingStopped: a signal ended the training; calling again continues it.
            BridgeError: a saved state does not fit the model, or the loss diverged.
        """
        recipe = self.recipe
        run = Run(
            self.folder, Processes("cpu"), seed=recipe.seed, resume=self.resume, save_every_s=recipe.save_every_s,
            log_every=recipe.log_every,
        )  # fmt: skip
        for stage in recipe.stages:
            own = stages[stage.name]
            task = own.task.train()
            task.bf16 = recipe.precision == "bf16"
            StageTrainer(
                stage, task, trained_parameters(task, stage), MicroBatches(own.batches), run,
                validation=recipe.validation,
                validate=None if own.score is None else partial(_validate, model, own.score),
            ).train()  # fmt: skip
        save_checkpoint(model.eval(), self.out, self.tokenizer_path)
        return self.out


def _validate(model: BridgeSTG, score: Callable[[Grounder], Mapping[str, float]], _: int) -> Mapping[str, float]:
    return score(torch_grounder(model.eval()))


def train_demo(
    out: Path, recipe: TrainingRecipe, *, start: Path | None = None, resume: bool = True, tiny: bool = False
) -> Path:
    """Train the demo model, write its checkpoint to the folder `out`, and return it.

    Args:
        out: folder of the checkpoint, see `DemoTraining`.
        recipe: `demo_recipe` with the stages vision and grounding; its seed is that of new weights and every batch.
        start: demo checkpoint to start from; None: train from scratch.
        resume: whether to continue from saved states.
        tiny: whether batches have two clips, and no stage is validated, for tests.

    Raises:
        TrainingStopped: a signal ended the training; calling again continues it.
        BridgeError: see `DemoTraining`; a saved state does not fit the model, or the loss diverged.
    """
    training = DemoTraining(out, recipe, write_demo_tokenizer, start=start, resume=resume)
    model = training.start or BridgeSTG(demo_config(), training.tokenizer)
    patches, clips = (1000, 2) if tiny else (9000, 8)
    grounding = BatchMaker(model.spec, training.tokenizer_path, recipe.seed, clips=clips)
    score = None if tiny else partial(score_rendered_scenes, count=EVALUATED)
    return training.train(
        model,
        {
            "vision": DemoStage(VisionTask(model), partial(vision_batch, model.spec, recipe.seed, patches=patches)),
            "grounding": DemoStage(GroundingTask(model), grounding, score),
        },
    )
