# SPDX-License-Identifier: Apache-2.0
"""Where the answers about a sample and a view lie."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tutelage.core.error import UserError
from tutelage.core.stored import STORED
from tutelage.data.answers import MANIFEST, Answers, digest, file_name, fingerprint, manifest, write_manifest
from tutelage.data.digits import digits
from tutelage.data.loader import Loader, Replay

SAMPLES, VIEWS, ROWS = 7, 3, 4  # 21 rows in 6 files, some of which cross two views


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a store in which the answer about sample s at turn v is 100 v + s."""
    turn, sample = torch.arange(VIEWS)[:, None], torch.arange(SAMPLES)
    every = (100 * turn + sample).flatten().float()
    files = {}
    for number, part in enumerate(every.split(ROWS)):
        path = tmp_path / file_name(number)
        save_file({"logits": part[:, None] + torch.zeros(2), "map": part[:, None].bfloat16()}, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    asked = {"seed": 5, "views": VIEWS, "rows": ROWS, "num_classes": 2, "data": {"samples": SAMPLES}}
    write_manifest(tmp_path, {**asked, "files": files})
    return tmp_path


def test_every_row_is_found_in_whatever_order(folder: Path) -> None:
    answers = Answers.open(folder)
    turn, ids = torch.cartesian_prod(torch.arange(VIEWS), torch.arange(SAMPLES)).unbind(1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    found = answers.rows(ids[order], turn[order])
    assert torch.equal(found["logits"][:, 0], (100 * turn + ids)[order].float())
    assert found["map"].dtype == torch.bfloat16
    one = answers.rows(torch.tensor([3, 3]), torch.tensor([2, 2]))
    assert one["logits"].tolist() == [[203.0, 203.0]] * 2
    assert answers.first(3)["logits"][:, 0].tolist() == [0.0, 1.0, 2.0]
    assert answers.num_classes == 2


def test_a_loader_shows_the_same_views_again_in_an_order_of_its_own() -> None:
    train, _ = digits()
    asked: list[tuple[int, int]] = []

    def answered(ids: torch.Tensor, turn: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.extend(zip(ids.tolist(), turn.tolist(), strict=True))
        return {"turn": turn}

    loaders = [Loader(train, 500, seed=seed, train=True, replay=Replay(5, 2, answers=answered)) for seed in (0, 1)]
    seen = [
        {(int(i), int(v)) for batch in loader.epoch(epoch) for i, v in zip(batch.index, batch.view, strict=True)}
        for loader in loaders
        for epoch in (0, 1, 2)
    ]
    assert seen[0] == seen[2] == seen[3] == seen[5]  # epochs 0 and 2 of either seed
    assert seen[1] == seen[4]
    assert not seen[0] & seen[1]
    first, other = (next(iter(loader.epoch(0))) for loader in loaders)
    assert not torch.equal(first.index, other.index)
    assert first.extra[STORED]["turn"].tolist() == [0] * 500
    assert {turn for _, turn in asked} == {0, 1}


def test_samples_in_their_order() -> None:
    train, _ = digits()
    loader = Loader(train, 500, seed=3, train=True, drop_last=False, replay=Replay(3, 2, ordered=True))
    assert torch.cat([batch.index for batch in loader.epoch(1)]).tolist() == list(range(len(train)))


def test_a_manifest_that_is_damaged_or_missing_is_said(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"store.json is damaged \(.*\): remove the folder and store again"):
        manifest(folder)
    with pytest.raises(UserError, match=r"none holds no stored answers"):
        Answers.open(folder / "none")


def test_files_that_are_not_what_they_were_are_named(folder: Path) -> None:
    path = folder / file_name(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{path} has {len(whole) - 1} bytes, not {len(whole)}"):
        Answers.open(folder)
    path.write_bytes(b"\xff" * len(whole))
    answers = Answers.open(folder)
    with pytest.raises(UserError, match=rf"{path} cannot be read"):
        answers.rows(torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(UserError, match=rf"{path} is damaged"):
        answers.verify()


def test_a_set_is_told_by_names_and_content() -> None:
    train, validation = digits()
    assert fingerprint(train) == fingerprint(train) == json.loads(json.dumps(fingerprint(train)))
    assert fingerprint(train) != fingerprint(validation)
    assert len(fingerprint(train)["content"]) == 32
