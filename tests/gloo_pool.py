# SPDX-License-Identifier: Apache-2.0
"""Processes that train together, kept alive for a whole session: starting them costs more than any check."""

import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

R = TypeVar("R")

#: Seconds after which a rank that hears nothing from the others gives up.
PATIENCE = 60


def _serve(line: Connection, rank: int, size: int, meeting: str) -> None:
    """Join the others, then do what comes over the line until it closes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            work, arguments = pickle.loads(line.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, work(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        line.send_bytes(pickle.dumps(answer))


class GlooPool:
    """Ranks of one gloo group. They start when first asked, and meet over a file, so no port is taken.

    Args:
        folder: where they meet.
        size: how many.
    """

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.size, self.starts = folder, size, 0
        self.lines: list[Connection] = []
        self.processes: list[SpawnProcess] = []

    def start(self) -> None:
        """Start the ranks."""
        context = get_context("spawn")
        self.starts += 1
        meeting = (self.folder / f"meeting{self.starts}").as_uri()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, meeting), daemon=True)
            process.start()
            there.close()
            self.lines.append(here)
            self.processes.append(process)

    def run(self, work: Callable[..., R], *arguments: Any) -> list[R]:
        """Return what `work(*arguments)` returns on each rank; `work` is a function of a module.

        Raises:
            AssertionError: with the traceback of each rank that failed; the next call starts new ranks.
        """
        if not self.lines:
            self.start()
        for line in self.lines:
            line.send_bytes(pickle.dumps((work, arguments)))
        answers: list[tuple[bool, Any]] = []
        for line in self.lines:
            heard = line.poll(2 * PATIENCE)
            answers.append(pickle.loads(line.recv_bytes()) if heard else (False, "no answer"))
        failed = [f"rank {rank}: {said}" for rank, (well, said) in enumerate(answers) if not well]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [said for _, said in answers]

    def close(self) -> None:
        """End the processes."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.terminate()
            process.join()
        self.lines, self.processes = [], []
