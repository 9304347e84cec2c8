# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data.pictures import tree
from data.test_cifar import binary_version, python_version
from data.test_idx import written
from tutelage.core.error import UserError
from tutelage.data.load import SOURCES, Spec, load


def test_digits() -> None:
    data = load("digits", seed=3)
    assert (len(data.train.samples), len(data.validation.samples), data.test) == (1197, 600, None)
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    assert data.train.seed == 3
    assert data.train.train
    assert not data.validation.train
    assert next(data.validation.epoch()).index.tolist() == list(range(64))


def test_a_folder_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "photos", {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    monkeypatch.chdir(tmp_path)
    for source in (str(root), f"folder:{root}", "./photos", "photos"):
        data = load({"source": source, "batch_size": 4})
        assert data.class_names == ("a", "b")
        assert data.test is not None
        assert next(data.train.epoch()).inputs.shape == (4, 3, 8, 8)
    grey = load({"source": str(root), "channels": 1, "batch_size": 4})
    assert next(grey.train.epoch()).inputs.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("edition", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, edition: str) -> None:
    data = load({"source": f"{edition}:{python_version(tmp_path, edition)}", "batch_size": 2, "augment": "cifar"})
    assert next(data.train.epoch()).inputs.shape == (2, 3, 32, 32)
    assert data.num_classes == (10 if edition == "cifar10" else 100)
    assert load(f"{edition}:{binary_version(tmp_path / 'binary', edition)}").num_classes == data.num_classes


def test_idx(tmp_path: Path) -> None:
    data = load({"source": f"idx:{written(tmp_path)}", "batch_size": 2, "image_size": 16})
    assert next(data.train.epoch()).inputs.shape == (2, 1, 16, 16)
    assert data.sample().inputs.shape == (2, 1, 16, 16)


def test_torchvision_and_hub_sets(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    written(tmp_path / "MNIST" / "raw")
    data = load({"source": f"torchvision:MNIST:{tmp_path}", "batch_size": 2})
    assert next(data.train.epoch()).inputs.shape == (2, 1, 28, 20)


def test_a_set_without_validation_gives_a_fixed_share(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [__import__("PIL.Image").Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(20)]
    rows = {"image": pictures, "label": [n % 2 for n in range(20)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    spec = {"source": f"hf:{tmp_path / 'set'}", "validation_share": 0.2, "batch_size": 4}
    first, second = load(spec, seed=0), load(spec, seed=1)
    assert first.validation.samples.targets.bincount().tolist() == [2, 2]
    assert len(first.train.samples) == 16
    reds = [int(first.validation.samples.read(n)[0, 0, 0]) for n in range(4)]
    assert reds == [int(second.validation.samples.read(n)[0, 0, 0]) for n in range(4)]
    assert not {int(first.train.samples.read(n)[0, 0, 0]) for n in range(16)} & set(reds)
    with pytest.raises(UserError, match=r"has no validation split: data.validation_share must lie in \(0, 1\), not 0"):
        load({**spec, "validation_share": 0})


@pytest.mark.parametrize(("labels", "count"), [(50, 50), (0.25, 299), (1.0, 1197), (1197, 1197), (None, 1197)])
def test_labels_are_kept_by_number_or_share(labels: int | float | None, count: int) -> None:
    targets = load({"source": "digits", "labels": labels}).train.samples.targets
    assert int((targets >= 0).sum()) == count
    sizes = targets[targets >= 0].bincount(minlength=10)
    assert sizes.max() - sizes.min() <= 0.04 * count + 1


def test_which_labels_are_kept_is_apart_from_the_runs_seed() -> None:
    def kept(seed: int, label_seed: int) -> Any:
        data = load({"source": "digits", "labels": 50, "label_seed": label_seed}, seed=seed)
        return (data.train.samples.targets >= 0).nonzero().flatten().tolist()

    assert kept(0, 0) == kept(1, 0)
    assert kept(0, 0) != kept(0, 1)
    truth = load("digits").train.samples.targets
    few = load({"source": "digits", "labels": 50}).train.samples.targets
    assert torch.equal(few[few >= 0], truth[few >= 0])


def test_further_images_without_labels(tmp_path: Path) -> None:
    root = tree(tmp_path / "photos", {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    more = tree(tmp_path / "more", {"x": 6}, seed=500)
    spec = {"source": str(root), "unlabelled": str(more), "batch_size": 4, "labelled_per_batch": 2}
    data = load(spec)
    assert data.train.samples.targets.tolist() == [0] * 4 + [1] * 4 + [-1] * 6
    batch = next(data.train.epoch())
    assert int(batch.labelled.sum()) == 2
    assert data.train.steps_per_epoch == 3
    assert data.facts(9).targets is data.train.samples.targets


def test_a_dry_run_sees_every_view() -> None:
    data = load({"source": "digits", "views": {"strong": ["flip"]}})
    sample = data.sample(3)
    assert sample.views["strong"].shape == sample.inputs.shape


def test_facts_and_sample() -> None:
    data = load({"source": "digits", "batch_size": 100, "augment": "digits", "image_size": 16})
    facts = data.facts(total_steps=60, seed=4, accumulate=4)
    assert (facts.num_classes, facts.num_samples, facts.steps_per_epoch, facts.total_steps) == (10, 1197, 3, 60)
    assert facts.class_names == data.class_names
    assert facts.seed == 4
    sample = data.sample(3)
    assert sample.inputs.shape == (3, 1, 16, 16)
    assert sample.target.tolist() == data.train.samples.targets[:3].tolist()


def test_augmentation_mixing_views_and_repeats_reach_the_training_batches_only() -> None:
    plain = load({"source": "digits", "batch_size": 32})
    spec = {
        **{"source": "digits", "batch_size": 32, "augment": "digits", "mixup": 0.4, "repeats": 2},
        "views": {"strong": ["affine", "erase"], "weak": "none"},
    }
    data = load(spec)
    batch = next(data.train.epoch())
    assert batch.target.shape == (32, 10)
    assert len(batch.index.unique()) == 16
    assert set(batch.views) == {"strong", "weak"}
    first = next(data.validation.epoch())
    assert torch.equal(first.inputs, next(plain.validation.epoch()).inputs)
    assert first.target.ndim == 1
    assert not first.views


def test_ranks_share_the_training_and_read_the_rest_whole() -> None:
    data = load({"source": "digits", "workers": 2, "on_error": "skip"}, rank=1, world_size=2)
    for loader, place in ((data.train, (1, 2)), (data.validation, (0, 1))):
        assert (loader.rank, loader.world_size) == place
        assert (loader.workers, loader.on_error) == (2, "skip")


def test_the_section_of_a_recipe_is_the_section_here() -> None:
    from tutelage.run.recipe import DataSection

    assert set(DataSection.model_fields) <= set(Spec.__dataclass_fields__)
    for word, part in DataSection.model_fields.items():
        if word != "source":
            assert part.get_default(call_default_factory=True) == getattr(Spec("digits"), word)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "digits", "bacth_size": 3}, "data.bacth_size is not known; did you mean batch_size?"),
        ({"batch_size": 3}, f"data.source is missing: {', '.join(SOURCES)}, or a folder"),
        ("digist", "data.source 'digist' is neither a folder nor a known kind; did you mean digits?"),
        ("cifar:x", "data.source 'cifar:x' is neither a folder nor a known kind; did you mean cifar10?"),
        ("./no", "data.source: the folder no does not exist"),
        ("cifar10", "data.source: write cifar10:PATH"),
        ("hf", "data.source: write hf:NAME"),
        ({"source": "digits", "labels": 9}, "data.labels must keep between 10 (one a class) and 1197, not 9"),
        ({"source": "digits", "labels": 1.5}, "data.labels must keep between 10 (one a class) and 1197, not 1796"),
        (
            {"source": "digits", "augment": "digit"},
            "augment: 'digit' is neither a list of steps nor a preset; did you mean digits?",
        ),
        ({"source": "digits", "unlabelled": "no"}, "data.unlabelled: the folder no does not exist"),
    ],
)
def test_what_is_wrong_is_said(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load(spec)


LATE: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "classification": ({"source": "digits", "labels": 50}, ["affine"], "none"),
    "detection": ({"source": "scenes", "detection": {"scenes": [8, 2], "side": 48}}, ["photometric"], "none"),
    "segmentation": ({"source": "scenes", "segmentation": {"scenes": [8, 2], "side": 48}}, {"color": 0.4}, "none"),
    "pose": ({"source": "figures", "pose": {"number": 8, "held_out": 2}}, {"scale": [0.5, 1.5]}, "none"),
}


@pytest.mark.parametrize("task", LATE)
def test_the_last_epochs_may_be_augmented_otherwise(task: str) -> None:
    spec, early, late = LATE[task]
    made = load({**spec, "batch_size": 4, "augment": early, "augment_late": {"epochs": 2, "augment": late}}, task=task)
    plain, moved = (load({**spec, "batch_size": 4, "augment": word}, task=task) for word in (late, early))
    made.train.epochs = 3
    for epoch, same, other in ((0, moved, plain), (1, plain, moved), (2, plain, moved)):
        found = next(made.train.epoch(epoch))
        assert torch.equal(found.inputs, next(same.train.epoch(epoch)).inputs)
        assert not torch.equal(found.inputs, next(other.train.epoch(epoch)).inputs)


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ({"epoch": 2, "augment": "none"}, "data.augment_late.epoch is not known; did you mean epochs?"),
        (2, "data.augment_late is a section of `epochs` and `augment`, not 2"),
        ({"epochs": True, "augment": "none"}, "data.augment_late.epochs counts the last epochs, at least 1, not True"),
        ({"epochs": 2}, "data.augment_late.augment is missing: what is done in the last epochs, such as none"),
        ({"epochs": 0, "augment": "none"}, "data.augment_late.epochs counts the last epochs, at least 1, not 0"),
        ({"augment": "none"}, "data.augment_late.epochs counts the last epochs, at least 1, not None"),
        ({"epochs": 2, "augment": ["flop"]}, "data.augment_late: augment: no step 'flop'; did you mean flip?"),
    ],
)
def test_a_wrong_end_is_named(late: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        load({"source": "digits", "augment_late": late})


def test_a_wrong_end_of_a_dense_task_is_named() -> None:
    with pytest.raises(
        UserError, match=re.escape("data.augment_late: augment.rotat is not known; did you mean rotate")
    ):
        load({"source": "figures", "augment_late": {"epochs": 1, "augment": {"rotat": 60}}}, task="pose")
