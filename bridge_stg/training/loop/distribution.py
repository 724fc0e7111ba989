"""One or several training processes, on CPU or CUDA: weights replicated (DDP) or sharded (FSDP2) over them.

Parameters keep their names. Gradients are means over the processes, each of which must compute one for every trained
weight. Must not know what is trained.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

LOST = re.compile(r"Connection (closed|reset)|Broken pipe|Socket closed|NCCL|ProcessGroup")
"""In errors of torch about another process that has ended."""


class Processes:
    """The processes of a training, and this one among them.

    Args:
        device: `auto` (CUDA if it is available), `cpu` or `cuda`.
        tracker: one of `TRACKERS`, None for none.
        folder: where TensorBoard's files are written.
        shard: whether weights are sharded; None: as chosen with `accelerate launch --use_fsdp`.

    Raises:
        BridgeError: there is no such device, the tracker is not installed, or the processes cannot be connected.
    """

    def __init__(
        self, device: str = "auto", *, tracker: str | None = None, folder: Path | None = None, shard: bool | None = None
    ) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise BridgeError("training.no_device", f"--device {device}: expected auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise BridgeError("training.no_device", "--device cuda: torch finds no CUDA device here; choose cpu")
        by_accelerate = os.environ.pop("ACCELERATE_USE_FSDP", "false")  # its own FSDP does not run on a CPU
        self.shard = by_accelerate.lower() in ("true", "1") if shard is None else shard
        if tracker is not None and not TRACKERS[tracker]():  # accelerate would ignore it silently
            message = f"--tracker {tracker}: the package is not installed; install it with `pip install {tracker}`"
            raise BridgeError("training.no_tracker", message)
        try:
            self.accelerator = Accelerator(
                cpu=device == "cpu",
                mixed_precision="no",  # tasks use autocast themselves
                log_with=tracker,
                project_dir=folder,
            )
        except (ValueError, RuntimeError) as error:
            found = " ".join(str(error).split())[:300]
            message = (
                f"the processes of the training cannot be connected ({found}); start them with `accelerate launch`"
            )
            hint = "or torchrun; for one process, unset WORLD_SIZE, RANK and LOCAL_RANK"
            raise BridgeError("training.bad_launch", f"{message} {hint}") from error

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return cast(torch.device, self.accelerator.device)

    @property
    def rank(self) -> int:
        """The rank of this process, from 0."""
        return cast(int, self.accelerator.process_index)

    @property
    def count(self) -> int:
        """The number of processes."""
        return cast(int, self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return cast(bool, self.accelerator.is_main_process)

    def distribute(self, module: nn.Module, units: Iterable[nn.Module]) -> nn.Module:
        """Return a module, on the device, whose gradients are means over the processes.

        With sharding, each process has a shard of each weight, and gathers the weights of one of `units` at a time.
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

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which backward passes add gradients without exchanging them, except the `last`.

        Sharded gradients are exchanged in every pass: otherwise each process would keep those of all weights.
        """
        if not (last or self.count == 1 or isinstance(module, FSDPModule)):
            return cast(AbstractContextManager[Any], module.no_sync())  # type: ignore[operator]
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        return cast(Tensor, self.accelerator.reduce(values.to(self.device), "mean"))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks; a value must be picklable."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def reporting_ended(self) -> Iterator[None]:
        """Raise BridgeError `training.process_ended` for torch's errors about another process that has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not LOST.search(str(error)):
                raise
            message = f"process {self.rank}: another of the {self.count} processes of this training has ended"
            hint = "its own message names the cause; the same command continues from the last saved state"
            raise BridgeError("training.process_ended", f"{message}; {hint}") from error

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the trackers, and disconnect the processes; else their threads may abort the interpreter's exit."""
        if self.count > 1:
            # The thread of gloo that finished the last collective needs the GIL to release its tensors. This thread
            # would wait for it with the GIL held if the group were freed first.
            time.sleep(0.2)
        self.accelerator.end_training()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, with the shards of all processes; all processes must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor on the device of a parameter, sharded as the parameter is if the shapes are equal."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Give this process all weights until the end of the block, for calls that the other processes do not make."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()
