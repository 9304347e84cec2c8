# SPDX-License-Identifier: Apache-2.0
"""A run of a few steps on random images, small enough to be repeated in every test of the loop."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.core import Batch, Distiller, Facts, Feeder, Model, Objective, ranks
from tutelage.data.loader import Loader
from tutelage.data.samples import Arrays, class_words
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.kd import KD
from tutelage.models.adapt import adapt
from tutelage.tasks.classification import Classification
from tutelage.train.average import Average
from tutelage.train.checkpoint import Shelf
from tutelage.train.log import Log
from tutelage.train.loop import Loop
from tutelage.train.optimizer import build as build_optimizer
from tutelage.train.rate import Rate
from tutelage.train.runtime import Precision, Runtime

SAMPLES = 40


def network(width: int, seed: int, *, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """Return a convolution, an activation, pooling and a linear layer; without batch norm unless asked."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(width, 4),
    )


def adapted(module: nn.Module) -> Model:
    """Return a network with its roles."""
    return adapt(module, torch.zeros(2, 1, 8, 8), class_names=class_words(range(4)))


def samples(count: int = SAMPLES) -> Arrays:
    """Return random images of four classes."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    return Arrays(images, torch.arange(count) % 4, class_words(range(4)), "random")


def kd_mgd() -> Objective:
    """Return the task's loss with KD and MGD, one of which draws random numbers."""
    return Objective(task=0.5, kd=0.5 * KD(), mgd=0.1 * MGD(mask="channel", mask_ratio=0.3))


def alone() -> Objective:
    """Return the task's loss alone."""
    return Objective(task=1.0)


def tiny_loop(
    folder: Path | None = None,
    *,
    objective: Objective | None = None,
    student: nn.Module | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    steps: int = 6,
    ema: float | None = None,
    precision: Precision = "float32",
    optimizer: Mapping[str, Any] | None = None,
    rate: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    feeders: tuple[Feeder, ...] = (),
    **settings: Any,
) -> Loop:
    """Return a loop that is ready to run: KD and MGD with AdamW, unless said otherwise.

    Args:
        folder: of records and checkpoints; None writes nothing.
        objective: fresh.
        student: without batch norm by default.
        batch_size: of a micro-batch, over all ranks.
        accumulate: micro-batches of a step.
        steps: of the run.
        ema: decay of the moving average.
        precision: of the autocast region.
        optimizer: options beside the name, `adamw` by default.
        rate: fields of the `Rate`.
        evaluate: scores of the student.
        feeders: of the Distiller.
        settings: further fields of the `Loop`.
    """
    objective = kd_mgd() if objective is None else objective
    reads_teacher = any(entry.term.reads.teacher for entry in objective.entries.values())
    batches = Loader(samples(), batch_size, seed=3, train=True, rank=ranks.rank(), world_size=ranks.world_size())
    per_epoch = -(-batches.steps_per_epoch // accumulate)
    torch.manual_seed(4)
    distiller = Distiller(
        adapted(network(4, seed=1) if student is None else student),
        objective,
        task=Classification(4),
        teacher=adapted(network(6, seed=2)) if reads_teacher else None,
        sample=Batch.of(samples().images[:2], torch.tensor([0, 1])),
        facts=Facts(4, class_words(range(4)), SAMPLES, None, per_epoch, steps, seed=7),
        feeders=feeders,
    )
    options = {"name": "adamw", "lr": 0.01, **(optimizer or {})}
    saves = folder is not None and settings.get("save_every")
    return Loop(
        distiller=distiller,
        batches=batches,
        optimizer=build_optimizer(options.pop("name"), distiller.param_groups(), **options),
        rate=Rate(**{"decay": "cosine", "steps_per_epoch": per_epoch, "total_steps": steps, **(rate or {})}),
        total_steps=steps,
        seed=7,
        runtime=Runtime("cpu", precision),
        log=Log(folder / "metrics.jsonl" if folder else None, quiet=True),
        accumulate=accumulate,
        average=Average(distiller.student, ema) if ema is not None else None,
        shelf=Shelf(folder / "checkpoints") if folder and saves else None,
        evaluate=partial(evaluate, distiller.student) if evaluate else None,
        **{"log_every": 1, **settings},
    )


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    """Return copies of everything that is trained, and of the buffers."""
    found: dict[str, torch.Tensor] = loop.distiller.state_dict()
    return {name: tensor.clone() for name, tensor in found.items()}


class Stop(Exception):  # noqa: N818, it is no error: it stands for a kill
    """Ends a run in its middle."""


class StopsAt:
    """A loader that is cut off before a batch, counted over all epochs.

    Args:
        batches: the loader.
        number: of batches that are given.
    """

    def __init__(self, batches: Any, number: int) -> None:
        self.batches, self.left = batches, number
        self.steps_per_epoch: int = batches.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the loader's batches until the cut."""
        for batch in self.batches.epoch(epoch, start):
            if not self.left:
                raise Stop
            self.left -= 1
            yield batch
