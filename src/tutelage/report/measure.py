# SPDX-License-Identifier: Apache-2.0
"""Size and speed of a model: parameters, multiply-accumulates, bytes, milliseconds."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.report.number import count, milliseconds, size
from tutelage.report.table import Table


@dataclass(frozen=True)
class Measures:
    """Size and speed of one model on one device.

    Args:
        parameters: their number; a parameter used twice counts once.
        macs: multiply-accumulates of one sample, in matrix products and convolutions.
        size: of the weights with their buffers in bytes, as they would be saved.
        latency: median time of one sample alone, in milliseconds.
        latency_iqr: interquartile range of that time.
        batch: samples in the larger batch.
        batch_latency: median time of that whole batch, in milliseconds.
        batch_latency_iqr: interquartile range of that time.
        device: where it was timed.
        threads: that one CPU operation may use.
    """

    parameters: int
    macs: int
    size: int
    latency: float
    latency_iqr: float
    batch: int
    batch_latency: float
    batch_latency_iqr: float
    device: str
    threads: int

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain data; `Measures(**plain)` is the same again."""
        return asdict(self)


def measure(
    model: nn.Module | Model,
    sample: Any,
    *,
    batch: int = 32,
    repeats: int = 50,
    warmup: int = 5,
    seconds: float = 5.0,
) -> Measures:
    """Return size and speed of a model in eval mode, without gradient, with the threads as they are set.

    What is timed is the whole call, including the resizing and normalising a `Model` does for itself; the
    sample's rows are repeated to fill a batch. The model's training flags are as before afterwards.

    Args:
        model: on the device to measure on.
        sample: a tensor `[B, ...]` or a mapping of tensors; moved to the model's device.
        batch: samples of the larger batch.
        repeats: timed calls a batch size, at most.
        warmup: calls before them that are not timed, at most.
        seconds: for each batch size, after which no further call is begun; at least one warm-up and three
            timed calls are made.

    Raises:
        UserError: if the sample has no rows or the counts make no sense.

    Example:
        >>> found = measure(nn.Linear(3, 2), torch.zeros(1, 3), repeats=3)
        >>> found.parameters, found.macs, found.size
        (8, 6, 32)
    """
    if batch < 1 or repeats < 3:
        raise UserError(f"batch must be at least 1 and repeats at least 3, not {batch} and {repeats}")
    model = Model.of(model)
    device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    with evaluating(model.module), torch.no_grad():
        one, many = (rows(sample, number, device) for number in (1, batch))
        macs = multiply_accumulates(model, one)
        single, several = (_times(model, given, device, repeats, warmup, seconds) for given in (one, many))
    return Measures(
        parameters=sum(p.numel() for p in model.module.parameters()),
        macs=macs,
        size=weight_bytes(model.module),
        latency=single[0],
        latency_iqr=single[1],
        batch=batch,
        batch_latency=several[0],
        batch_latency_iqr=several[1],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
    )


def multiply_accumulates(model: nn.Module | Model, inputs: Any) -> int:
    """Return the multiply-accumulates of one call, half the operations that torch's counter finds.

    Counted are matrix products, convolutions and attention; additions, norms and activations are not. The
    counter does not see into fused kernels (it finds none in an encoder layer's fast path, nothing of
    attention on a CPU and none in oneDNN's recurrent layers), so the plain ones run while it counts.

    Args:
        model: in the mode to count in.
        inputs: what it is called with.
    """
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    counter = FlopCounterMode(display=False)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = fused
    return int(counter.get_total_flops()) // 2


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of everything in a state dict; a tensor under two names counts once."""
    found = {id(value): value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def rows(sample: Any, number: int, device: torch.device) -> Any:
    """Return so many rows of a sample on a device, repeated in turn where it has fewer.

    Raises:
        UserError: if it has none, or is neither a tensor nor a mapping of tensors.
    """
    if isinstance(sample, Mapping):
        return {name: rows(part, number, device) for name, part in sample.items()}
    if not isinstance(sample, Tensor):
        raise UserError(f"a sample to measure with is a tensor or a mapping of tensors, not {type(sample).__name__}")
    if sample.ndim == 0 or not len(sample):
        raise UserError("a sample to measure with needs at least one row")
    return sample.to(device)[torch.arange(number, device=device) % len(sample)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and every part of it back as it was."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _times(
    model: Model, inputs: Any, device: torch.device, repeats: int, warmup: int, seconds: float
) -> tuple[float, float]:
    """Return median and interquartile range of the time of a call, in milliseconds."""
    clock = _cuda_clock if device.type == "cuda" else _host_clock
    begun = time.perf_counter()
    for _ in range(max(warmup, 1)):
        clock(model, inputs, device)
        if time.perf_counter() - begun > seconds / 4:
            break
    found: list[float] = []
    while len(found) < repeats and (len(found) < 3 or time.perf_counter() - begun < seconds):
        found.append(clock(model, inputs, device))
    lower, median, upper = quantiles(found, n=4, method="inclusive")
    return median, upper - lower


def _host_clock(model: Model, inputs: Any, device: torch.device) -> float:
    start = time.perf_counter()
    model(inputs)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _cuda_clock(model: Model, inputs: Any, device: torch.device) -> float:
    """Return the time between two events on the device, each call waited for: latency, not throughput."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(inputs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def table(measures: Mapping[str, Measures], title: str = "Size and speed") -> Table:
    """Return one row a model.

    Args:
        measures: by the name to show.
        title: of the table.
    """
    batches = sorted({one.batch for one in measures.values()})
    word = f"batch of {batches[0]}" if len(batches) == 1 else "batch"
    columns = ("model", "parameters", "MACs", "weights", "one sample (ms)", f"{word} (ms)")
    lines = [
        (
            name,
            count(one.parameters),
            count(one.macs),
            size(one.size),
            milliseconds(one.latency, one.latency_iqr),
            milliseconds(one.batch_latency, one.batch_latency_iqr),
        )
        for name, one in measures.items()
    ]
    places = sorted(
        {f"{one.device}, {one.threads} thread{'s' if one.threads > 1 else ''}" for one in measures.values()}
    )
    note = f"MACs of one sample. Times: median (interquartile range) on {'; '.join(places)}." if places else ""
    return Table(columns, lines, title=title, note=note)
