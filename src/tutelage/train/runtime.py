# SPDX-License-Identifier: Apache-2.0
"""Where and in which precision a run computes: one process, or several under DistributedDataParallel."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tutelage.core import Distiller, Losses, ranks
from tutelage.core.error import UserError

Precision = Literal["float32", "bf16", "fp16"]


class Runtime:
    """Device, precision and ranks.

    Args:
        device: such as `cpu` or `cuda`; None takes a GPU if there is one.
        precision: of the autocast region around the models; comparisons stay in float32.
    """

    def __init__(self, device: str | None = None, precision: Precision = "float32") -> None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.device(chosen, local) if chosen == "cuda" else torch.device(chosen)
        except RuntimeError as error:
            raise UserError(f"device {chosen!r} is not known to torch") from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda was asked for, but torch sees no GPU; use --set train.device=cpu")
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; use bf16 or float32 on a CPU")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the processes that `torchrun` started, if it did, for as long as the block lasts."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not several or distributed.is_initialized():
            yield
            return
        distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            distributed.destroy_process_group()

    @staticmethod
    def first(action: Callable[[], None]) -> None:
        """Do something on the first rank while the others wait.

        Raises:
            UserError: on every rank, if it is raised on the first.
        """
        if ranks.world_size() == 1:
            action()
            return
        distributed.barrier()
        said: list[str | None] = [None]
        if ranks.rank() == 0:
            try:
                action()
            except UserError as error:
                said = [str(error)]
        distributed.broadcast_object_list(said)
        if said[0] is not None:
            raise UserError(said[0])

    def wrap(self, distiller: Distiller) -> Callable[..., Losses]:
        """Return what to call for losses: the Distiller, or its DistributedDataParallel."""
        if ranks.world_size() == 1:
            return distiller
        # batch statistics are local: torch renamed the option that would overwrite them before each forward
        known = inspect.signature(DistributedDataParallel).parameters
        word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        devices = [self.device.index] if self.device.type == "cuda" else None
        local: dict[str, Any] = {word: False}
        return DistributedDataParallel(distiller, device_ids=devices, **local)

    def seed(self, key: int) -> None:
        """Seed the generators that dropout and its like draw from: the CPU's and this device's.

        `torch.manual_seed` also leaves word for devices that are not in use, with a stack trace each time.
        """
        torch.default_generator.manual_seed(key)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(key)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast region of the models."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    @staticmethod
    def unsynced(module: Callable[..., Losses], last: bool) -> AbstractContextManager[object]:
        """Return a region without gradient exchange, for all micro-batches but the last."""
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Run backward, scaled in fp16."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None
    ) -> Tensor | None:
        """Clip, step and clear the gradients; return the gradient norm before clipping if it was measured."""
        norm = None
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, clip)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
