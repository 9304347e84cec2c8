# SPDX-License-Identifier: Apache-2.0
"""Distillation under the Trainer of transformers: the Distiller is its model, `compute_loss` takes the step.

pip install 'tutelage[hf,examples]'; python examples/hf_trainer.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tutelage import Batch, Distiller, Losses, Objective
from tutelage.data.digits import digits
from tutelage.methods.logits.kd import KD
from tutelage.models.load import load
from tutelage.tasks.classification import Classification


class DistillationTrainer(Trainer):
    """Keeps the losses of a step until the optimizer has stepped."""

    losses: Losses

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **more: Any) -> Tensor:
        batch = Batch.of(inputs["images"], inputs["labels"])
        self.losses = model(batch, self.model.observe(batch))
        return self.losses.total


class AfterStep(TrainerCallback):
    """Tells the Distiller that the optimizer has stepped."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.trainer.model.after_step(self.trainer.losses)


def main(folder: str = "runs/hf_trainer", steps: int = 300) -> nn.Module:
    train, _ = digits()
    pairs = [{"images": image, "labels": label} for image, label in zip(train.images, train.targets, strict=True)]
    student = load("tutelage:resnet8", num_classes=10, in_channels=1)
    teacher = load("tutelage:resnet20", num_classes=10, in_channels=1)  # of yours: one that was trained
    distiller = Distiller(
        student,
        Objective(task=0.1, kd=0.9 * KD(temperature=4.0)),
        task=Classification(10),
        teacher=teacher,
        sample=Batch.of(train.images[:2], train.targets[:2]),
    )
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    optimizer = torch.optim.AdamW(distiller.param_groups(), lr=3e-3)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = DistillationTrainer(distiller, settings, train_dataset=pairs, optimizers=(optimizer, constant))
    trainer.add_callback(AfterStep(trainer))
    trainer.train()
    distiller.close()
    return student.module


if __name__ == "__main__":
    main()
