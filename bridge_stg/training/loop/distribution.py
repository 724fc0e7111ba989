"""One or several processes, on CPU or CUDA: started by accelerate, weights replicated (DDP) or sharded (FSDP2).

Parameters keep their names. Gradients are means over the processes, each of which must compute one for every trained
weight. Must not know what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bridge_stg.runtime.errors import BridgeError

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


class Processes:
    """The processes of a training, and this one among them.

    Args:
        device: `auto` (CUDA if it is available), `cpu` or `cuda`.
        tracker: one of `TRACKERS`, None for none.
        folder: where TensorBoard's files are written.
        shard: whether weights are sharded; None: as chosen with `accelerate launch --use_fsdp`.

    Raises:
        BridgeError: there is no such device, or the tracker is not installed.
    """

    def __init__(
        self, device: str = "auto", *, tracker: str | None = None, folder: Path | None = None, shard: bool | None = None
    ) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise BridgeError("training.no_device", f"--device {device}: expected auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise BridgeError("training.no_device", "--device cuda: torch finds no CUDA device here; choose cpu")
        chosen = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in (
            "true",
            "1",
        )  # accelerate has no FSDP on CPU
        self.shard = chosen if shard is None else shard
        if tracker is not None and not TRACKERS[tracker]():  # accelerate leaves it out without a word
            message = f"--tracker {tracker}: is not installed; install it with `pip install {tracker}`"
            raise BridgeError("training.no_tracker", message)
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no",
            log_with=tracker,
            project_dir=folder,  # tasks cast by themselves
        )

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return cast(torch.device, self.accelerator.device)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return cast(int, self.accelerator.process_index)

    @property
    def count(self) -> int:
        """The number of processes."""
        return cast(int, self.accelerator.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return cast(bool, self.accelerator.is_main_process)

    def spread(self, module: nn.Module, units: Iterable[nn.Module]) -> nn.Module:
        """Return a module, on the device, whose gradients are means over the processes.

        With sharding, each process holds a part of each weight, and gathers those of one of `units` at a time.
        """
        module = module.to(self.device)
        if self.count == 1:
            return module
        if not self.shard:
            return self.accelerator.prepare_model(module)  # type: ignore[no-any-return]
        mesh = init_device_mesh(self.device.type, (self.count,))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which backward passes add gradients without exchanging them, except the `last`.

        Sharded gradients are exchanged in every pass: otherwise each process would keep those of all weights.
        """
        if not (last or self.count == 1 or isinstance(module, FSDPModule)):
            return cast(AbstractContextManager[Any], module.no_sync())  # type: ignore[operator]
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        return cast(Tensor, self.accelerator.reduce(values.to(self.device), "mean"))

    def gathered(self, value: Any) -> list[Any]:
        """Return a picklable value of each process, in the order of their numbers."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, on the CPU; all processes must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor on the device of a parameter, and in parts like those of a parameter of its shape."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def gathering(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which this process has all weights, for calls that the other processes do not make."""
    return _Gathered([m for m in module.modules() if isinstance(m, FSDPModule)])


class _Gathered(AbstractContextManager[None]):
    def __init__(self, sharded: list[FSDPModule]) -> None:
        self.sharded = sharded

    def __enter__(self) -> None:
        for module in self.sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def __exit__(self, *error: object) -> None:
        root = self.sharded[:1]
        for module in self.sharded:
            module.set_reshard_after_forward(module not in root, recurse=False)
            module.reshard()
