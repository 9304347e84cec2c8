# SPDX-License-Identifier: Apache-2.0
"""Distillation in a plain PyTorch loop: a teacher, then a student that sees fifty labels and the teacher's answers.

python examples/plain_pytorch.py
"""

import torch
from torch import Tensor, nn

from tutelage import Batch, Distiller, Objective
from tutelage.data.digits import digits
from tutelage.methods.logits.kd import KD
from tutelage.tasks.classification import Classification

TRAIN, VALIDATION = digits()
TASK = Classification(num_classes=10)


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def fit(
    student: nn.Module, objective: Objective, labels: Tensor, steps: int, teacher: nn.Module | None = None
) -> float:
    sample = Batch.of(TRAIN.images[:2], labels[:2])
    distiller = Distiller(student, objective, task=TASK, teacher=teacher, sample=sample)
    optimizer = torch.optim.AdamW(distiller.param_groups(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=order)
        batch = Batch.of(TRAIN.images[rows], labels[rows], index=rows)
        signals = distiller.observe(batch)  # the teacher, without gradient
        losses = distiller(batch, signals)  # student forward and every term
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step(losses)
    distiller.close()  # hooks are gone, the student is the module it was
    student.eval()
    with torch.no_grad():
        return float((student(VALIDATION.images).argmax(1) == VALIDATION.targets).float().mean())


def main(steps: int = 300) -> dict[str, float]:
    torch.manual_seed(0)
    few = torch.full_like(TRAIN.targets, -1)  # -1 stands for no label
    few[:50] = TRAIN.targets[:50]
    teacher, student = network(32), network(8)
    scores = {"teacher": fit(teacher, Objective(), TRAIN.targets, steps)}
    scores["student"] = fit(student, Objective(task=0.1, kd=0.9 * KD(temperature=4.0)), few, steps, teacher)
    return scores


if __name__ == "__main__":
    print(main())
