# SPDX-License-Identifier: Apache-2.0
"""What a score is called, which way is better, and how it is written."""

from dataclasses import dataclass
from typing import Self

from tutelage.report.number import fixed, interval, percent, signed


@dataclass(frozen=True)
class Metric:
    """One score of a task.

    Args:
        key: its name in `metrics.jsonl`.
        label: its name in a sentence.
        percent: it is a fraction, shown in percent; differences of it are in points.
        higher: more is better.
    """

    key: str
    label: str
    percent: bool = True
    higher: bool = True

    @classmethod
    def of(cls, key: str) -> Self:
        """Return what is known of a score by its key; an unknown one is a plain number, more being better."""
        label, fraction, higher = KNOWN.get(key, (key, False, True))
        return cls(key, label, fraction, higher)

    @property
    def head(self) -> str:
        """The head of a column."""
        return f"{self.label} (%)" if self.percent else self.label

    @property
    def unit(self) -> str:
        """What a difference is counted in: ` points`, or nothing."""
        return " points" if self.percent else ""

    @property
    def _scale(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def _digits(self) -> int:
        return 1 if self.percent else 3

    def show(self, value: float | None, deviation: float | None = None) -> str:
        """Return a value and its spread, without unit.

        Example:
            >>> Metric.of("top1").show(0.934, 0.003)
            '93.4 ± 0.3'
        """
        return percent(value, deviation) if self.percent else fixed(value, deviation, digits=self._digits)

    def difference(self, value: float | None) -> str:
        """Return a signed difference, without unit."""
        return signed(None if value is None else self._scale * value, digits=self._digits)

    def told(self, value: float | None) -> str:
        """Return a value in words.

        Example:
            >>> Metric.of("top1").told(0.934)
            'top-1 accuracy 93.4 %'
        """
        return f"{self.label} {self.show(value)}{' %' if self.percent else ''}"

    def interval(self, low: float, high: float) -> str:
        """Return both ends of an interval of a difference, without unit."""
        return interval(self._scale * low, self._scale * high, digits=self._digits)


KNOWN = {
    "top1": ("top-1 accuracy", True, True),
    "top5": ("top-5 accuracy", True, True),
    "agreement": ("agreement with the teacher", True, True),
    "ece": ("calibration error", True, False),
    "loss": ("loss", False, False),
    "perplexity": ("perplexity", False, False),
    "token_accuracy": ("token accuracy", True, True),
    "miou": ("mean IoU", True, True),
    "iou": ("IoU", True, True),
    "pixel_accuracy": ("pixel accuracy", True, True),
    "mean_accuracy": ("mean accuracy of a class", True, True),
    "boundary_iou": ("boundary IoU", True, True),
    "map": ("box mAP", True, True),
    "map50": ("box AP at 0.5", True, True),
    "map75": ("box AP at 0.75", True, True),
    "map_small": ("box mAP, small", True, True),
    "map_medium": ("box mAP, medium", True, True),
    "map_large": ("box mAP, large", True, True),
    "mask_map": ("mask mAP", True, True),
    "mask_map50": ("mask AP at 0.5", True, True),
    "mask_map75": ("mask AP at 0.75", True, True),
    "mask_map_small": ("mask mAP, small", True, True),
    "mask_map_medium": ("mask mAP, medium", True, True),
    "mask_map_large": ("mask mAP, large", True, True),
    "ap": ("keypoint AP", True, True),
    "ap50": ("keypoint AP at 0.5", True, True),
    "ap75": ("keypoint AP at 0.75", True, True),
    "ar": ("keypoint AR", True, True),
    "oks": ("keypoint similarity", True, True),
    "whole": ("whole-body AP", True, True),
    "body": ("body AP", True, True),
    "foot": ("foot AP", True, True),
    "face": ("face AP", True, True),
    "hand": ("hand AP", True, True),
    "left_hand": ("left-hand AP", True, True),
    "right_hand": ("right-hand AP", True, True),
}
#: Between the name of a score and the class that it is of, as in `iou/road`.
OF = "/"
