# SPDX-License-Identifier: Apache-2.0
"""Distillation under the Trainer of Lightning: the step of the library inside `training_step`.

pip install 'tutelage[examples]'; python examples/lightning_trainer.py
"""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import Batch, Distiller, Live, Losses, Objective
from tutelage.data.digits import digits
from tutelage.methods.logits.kd import KD
from tutelage.models.load import load
from tutelage.tasks.classification import Classification


class Distillation(lightning.LightningModule):
    """The Distiller is the one child; the teacher stands beside it, outside of what is trained and saved."""

    def __init__(self, student: nn.Module, teacher: nn.Module, sample: Batch) -> None:
        super().__init__()
        objective = Objective(task=0.1, kd=0.9 * KD(temperature=4.0))
        self.distiller = Distiller(student, objective, task=Classification(10), teacher=Live(teacher), sample=sample)
        self.losses: Losses | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.param_groups(), lr=3e-3)

    def on_fit_start(self) -> None:
        for network in self.distiller.teachers["teacher"].networks():
            network.to(self.device)

    def training_step(self, pair: tuple[Tensor, Tensor], number: int) -> Tensor:
        batch = Batch.of(*pair)
        self.losses = self.distiller(batch, self.distiller.observe(batch))
        self.log_dict(self.losses.parts, prog_bar=True)
        return self.losses.total

    def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
        assert self.losses is not None
        self.distiller.after_step(self.losses)


def main(steps: int = 300) -> nn.Module:
    train, _ = digits()
    loader = DataLoader(TensorDataset(train.images, train.targets), batch_size=64, shuffle=True, drop_last=True)
    student = load("tutelage:resnet8", num_classes=10, in_channels=1)
    teacher = load("tutelage:resnet20", num_classes=10, in_channels=1)  # of yours: one that was trained
    sample = Batch.of(train.images[:2], train.targets[:2])
    model = Distillation(student.module, teacher.module, sample)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(model, loader)
    model.distiller.close()
    return student.module


if __name__ == "__main__":
    main()
