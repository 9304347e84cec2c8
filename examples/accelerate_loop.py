# SPDX-License-Identifier: Apache-2.0
"""Distillation with accelerate, which places, wraps and synchronises: `accelerate launch examples/accelerate_loop.py`.

pip install 'tutelage[examples]'
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import Batch, Distiller, Objective
from tutelage.data.digits import digits
from tutelage.methods.logits.kd import KD
from tutelage.models.load import load
from tutelage.tasks.classification import Classification


def main(steps: int = 300) -> nn.Module:
    accelerator = Accelerator()
    train, _ = digits()
    loader = DataLoader(TensorDataset(train.images, train.targets), batch_size=64, shuffle=True, drop_last=True)
    student = load("tutelage:resnet8", num_classes=10, in_channels=1)
    teacher = load("tutelage:resnet20", num_classes=10, in_channels=1)  # of yours: one that was trained
    distiller = Distiller(
        student,
        Objective(task=0.1, kd=0.9 * KD(temperature=4.0)),
        task=Classification(10),
        teacher=teacher,
        sample=Batch.of(train.images[:2], train.targets[:2]),
    )
    optimizer = torch.optim.AdamW(distiller.param_groups(), lr=3e-3)
    # only what is trained is prepared; the teacher stands beside it
    model, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    teacher.module.to(accelerator.device)
    while distiller.step < steps:
        for images, labels in loader:
            batch = Batch.of(images, labels)
            losses = model(batch, distiller.observe(batch))
            accelerator.backward(losses.total)
            optimizer.step()
            optimizer.zero_grad()
            distiller.after_step(losses)
            if distiller.step == steps:
                break
    distiller.close()
    return student.module


if __name__ == "__main__":
    main()
