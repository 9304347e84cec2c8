# SPDX-License-Identifier: Apache-2.0
"""A term with a memory: contrast the student's answer with the teacher's, against a bank of older ones."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Facts, Outcome, Reads, Signals, Tap, Term


class Queue(Term):
    """Cross-entropy of each row's own teacher vector among a queue of the last ones.

    Args:
        size: vectors in the queue, the newest first.
    """

    bank: Tensor

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.size = size

    @property
    def reads(self) -> Reads:
        return Reads((Tap("logits"),), (Tap("logits"),))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        assert teacher is not None
        self.register_buffer("bank", torch.zeros(self.size, teacher.logits.shape[1]))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Outcome:
        assert teacher is not None
        own = (student.logits * teacher.logits).sum(1, keepdim=True)
        others = student.logits @ self.bank.to(own.dtype).T
        rows = torch.cat([own, others], dim=1)
        loss = F.cross_entropy(rows, torch.zeros_like(batch.index))
        return Outcome({"contrast": loss}, kept={"vectors": teacher.logits.detach(), "index": batch.index})

    def commit(self, kept: Any) -> None:
        joined = torch.cat([kept["vectors"].flip(0).to(self.bank.dtype), self.bank])
        self.bank.copy_(joined[: self.size])
