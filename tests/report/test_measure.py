# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Model
from tutelage.core.error import UserError
from tutelage.report import measure as home
from tutelage.report.measure import Measures, measure, multiply_accumulates, rows, table, weight_bytes

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.embed(ids).mean(1)))
        return scores


def test_parameters_and_bytes_count_tied_weights_once() -> None:
    found = measure(Tied(), torch.zeros(1, 3, dtype=torch.int64), batch=2, repeats=3)
    assert found.parameters == 7 * 4 + 2 * 4
    assert found.size == 4 * (7 * 4 + 2 * 4 + 2 * 4) + 8  # with running mean and variance, and an int64 counter


def test_bytes_follow_the_dtype_and_leave_out_what_is_not_saved() -> None:
    module = nn.Linear(3, 5).half()
    module.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert weight_bytes(module) == 2 * (15 + 5)


@pytest.mark.parametrize(
    ("module", "shape", "by_hand"),
    [
        (nn.Linear(6, 5), (1, 6), 6 * 5),
        (nn.Linear(6, 5), (1, 4, 6), 4 * 6 * 5),
        (nn.Conv2d(8, 16, 3, padding=1), (1, 8, 6, 7), 16 * 8 * 9 * 6 * 7),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), (1, 8, 6, 6), 16 * 8 * 9 * 3 * 3),
        (nn.Conv2d(8, 16, 3, groups=4), (1, 8, 6, 6), 16 * 2 * 9 * 4 * 4),
        (nn.Conv2d(8, 8, 5, groups=8, padding=2), (1, 8, 6, 6), 8 * 25 * 6 * 6),
        (nn.Conv1d(3, 4, 2), (1, 3, 9), 4 * 3 * 2 * 8),
        (nn.ConvTranspose2d(8, 16, 3), (1, 8, 6, 6), 8 * 16 * 9 * 6 * 6),
        (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), (1, 6), 0),
        (nn.LSTM(8, 16, batch_first=True), (1, 5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, batch_first=True), (1, 5, 8), 5 * 3 * 16 * (8 + 16)),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            (1, 10, 16),
            10 * 16 * 48 + 2 * 10 * 10 * 16 + 10 * 16 * 16 + 2 * 10 * 16 * 32,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_multiply_accumulates_are_those_counted_by_hand(
    module: nn.Module, shape: tuple[int, ...], by_hand: int
) -> None:
    assert multiply_accumulates(module.eval(), torch.randn(shape)) == by_hand


def test_macs_are_of_one_sample_whatever_the_sample_holds() -> None:
    found = measure(nn.Linear(6, 5), torch.randn(9, 6), batch=4, repeats=3)
    assert (found.macs, found.batch) == (30, 4)


def test_counting_leaves_the_kernels_as_they_were() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        multiply_accumulates(nn.Linear(6, 5), torch.randn(1, 7))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_a_model_prepares_its_own_input() -> None:
    model = Model(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)),
        input=InputSpec(size=(8, 8), mean=(0.5,), std=(0.5,)),
    )
    assert measure(model, torch.rand(1, 1, 16, 16), batch=2, repeats=3).macs == 3 * 8 * 8 * 2


def test_training_flags_and_gradients_are_untouched() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), Spy(), nn.BatchNorm1d(3))
    module[1].eval()
    flags = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure(module, torch.randn(2, 3), batch=2, repeats=3)
    assert set(seen) == {(False, False)}
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_flags_come_back_after_an_error() -> None:
    module = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError):
        measure(module, torch.randn(1, 4))
    assert module.training


def clocked(monkeypatch: pytest.MonkeyPatch, times: Iterator[float]) -> list[int]:
    """Let the clock give these times, and note the batch sizes it was asked about."""
    asked: list[int] = []

    def clock(model: Model, inputs: Tensor, device: torch.device) -> float:
        asked.append(len(inputs))
        return next(times)

    monkeypatch.setattr(home, "_host_clock", clock)
    return asked


def test_latency_is_median_and_interquartile_range_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one, many = rng.lognormal(size=21), rng.lognormal(size=21)
    cold = [1e6] * 4
    asked = clocked(monkeypatch, iter([*cold, *one.tolist(), *cold, *many.tolist()]))
    found = measure(nn.Linear(3, 2), torch.randn(1, 3), batch=8, repeats=21, warmup=4)
    assert asked == [1] * 25 + [8] * 25
    for times, median, width in (
        (one, found.latency, found.latency_iqr),
        (many, found.batch_latency, found.batch_latency_iqr),
    ):
        low, middle, high = np.percentile(times, [25, 50, 75])
        assert (median, width) == pytest.approx((middle, high - low))


def test_a_slow_model_is_timed_three_times_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clocked(monkeypatch, itertools.repeat(1.0))
    measure(nn.Linear(3, 2), torch.randn(1, 3), batch=2, repeats=1000, warmup=1000, seconds=0.0)
    assert asked == [1] * 4 + [2] * 4


def test_the_host_clock_counts_milliseconds() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x

    found = measure(Slow(), torch.zeros(1, 3), batch=2, repeats=3, warmup=1)
    assert 20 <= found.latency < 200
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())


def test_rows_are_repeated_in_turn() -> None:
    sample = {"ids": torch.tensor([[1], [2], [3]])}
    assert rows(sample, 5, CPU)["ids"].flatten().tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (torch.zeros(0, 3), {}, "at least one row"),
        ([1, 2], {}, "a tensor or a mapping of tensors, not list"),
        (torch.zeros(1, 3), {"batch": 0}, "batch must be at least 1"),
        (torch.zeros(1, 3), {"repeats": 2}, "repeats at least 3"),
    ],
)
def test_what_cannot_be_measured_is_said(sample: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(nn.Linear(3, 2), sample, **options)


def test_measures_go_through_json() -> None:
    found = measure(nn.Linear(3, 2), torch.zeros(1, 3), batch=2, repeats=3)
    assert Measures(**json.loads(json.dumps(found.plain()))) == found


def test_the_table_writes_every_measure_with_its_unit() -> None:
    one = Measures(11_689_512, 1_814_073_344, 46_827_520, 19.84, 0.91, 32, 455.1, 12.2, "cpu", 2)
    shown = table({"student": one})
    assert shown.cells == [["student", "11.7 M", "1.81 G", "46.8 MB", "19.8 (0.9)", "455 (12)"]]
    assert shown.columns[-1] == "batch of 32 (ms)"
    assert shown.note.endswith("on cpu, 2 threads.")
    assert table({}).rows == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events of a GPU")
def test_events_time_what_the_device_does() -> None:
    weight = nn.Linear(4096, 4096, device="cuda")
    found = measure(weight, torch.zeros(1, 4096), batch=8192, repeats=9)
    assert 0 < found.latency < found.batch_latency
    assert found.device == torch.cuda.get_device_name()
