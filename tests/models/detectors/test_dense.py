# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from tutelage.models.detectors.dense import Padded, apart, decode, encode, focal, matched, overlap, top


def by_hand(iou: Tensor, high: float, low: float, own: bool) -> list[int]:
    found = []
    for anchor in iou.T.tolist():
        best = max(anchor)
        found.append(anchor.index(best) if best >= high else (-1 if best < low else -2))
    for box, row in enumerate(iou.tolist()):
        if max(row) <= 0:
            continue
        for anchor, value in enumerate(row):
            if value == max(row):
                column = iou[:, anchor].tolist()
                found[anchor] = box if own else column.index(max(column))
                if own:
                    break
    return found


def test_matching_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    for own in (False, True):
        for _ in range(20):
            iou = torch.rand(3, 7, generator=draw) * 0.8
            assert matched(iou[None], 0.5, 0.4, own=own)[0].tolist() == by_hand(iou, 0.5, 0.4, own)


def test_rows_that_fill_up_are_never_learnt() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    none = {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long)}
    known = Padded.of([{"boxes": boxes, "labels": torch.tensor([2])}, none])
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [20.0, 20.0, 28.0, 28.0]])
    for own in (False, True):
        assert matched(overlap(known, anchors), 0.5, 0.4, own=own).tolist() == [[0, -1], [-1, -1]]


def test_focal_loss_is_torchvisions() -> None:
    logits, target = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    torch.testing.assert_close(focal(logits, target), sigmoid_focal_loss(logits, target))


def test_codes_go_both_ways() -> None:
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 9, 2, generator=draw) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand(2, 9, 2, generator=draw) * 40], dim=2)
    anchors = torch.tensor([10.0, 10.0, 40.0, 30.0]).expand(9, 4)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(decode(encode(boxes, anchors, weights), anchors, weights), boxes)


def test_the_best_and_what_is_left_of_them() -> None:
    scores = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])
    best, place, labels = top(scores, 3, 0.15)
    assert (best.tolist(), place.tolist(), labels.tolist()) == (
        [[scores[0, 0, 0].item(), scores[0, 1, 1].item(), scores[0, 1, 0].item()]],
        [[0, 1, 1]],
        [[0, 1, 0]],
    )
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 1, 1]]])
    found = apart(
        boxes, torch.tensor([[0.5, 0.9, 0.8, 0.0]]), torch.tensor([[0, 0, 1, 1]]), iou=0.5, most=9, more=boxes[..., :1]
    )
    assert found[0]["scores"].tolist() == torch.tensor([0.9, 0.8]).tolist()
    assert found[0]["labels"].tolist() == [0, 1]
    assert found[0]["more"].shape == (2, 1)
