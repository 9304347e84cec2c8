# SPDX-License-Identifier: Apache-2.0
"""Weights that lie on a hub, with the download replaced by small files here: nothing is fetched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from models.readings import noise
from tutelage.core import Model
from tutelage.core.error import UserError
from tutelage.models.load import load, rebuild

SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 32, "patch_size": 8},
}


def save(module: torch.nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, file)


def same(one: torch.nn.Module, other: torch.nn.Module, leave: str = "never") -> bool:
    theirs = other.state_dict()
    return all(
        torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items() if not key.startswith(leave)
    )


@pytest.fixture
def timm_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what timm asked its hub for; the hub is a folder, `tmp_path/owner/name`."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from timm.models import _hub

    asked: list[str] = []

    def download(repo_id: str, filename: str, **more: Any) -> str:
        asked.append(f"{repo_id}/{filename}")
        file = tmp_path / repo_id / filename
        if not file.is_file():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(file)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    return asked


def test_timms_own_weights(timm_hub: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet")
    save(theirs, tmp_path / "timm/test_resnet.r160_in1k/model.safetensors")
    load("timm:test_resnet.r160_in1k", num_classes=1000)
    assert timm_hub == []
    whole = load({"model": "timm:test_resnet.r160_in1k", "weights": "pretrained"}, num_classes=1000, seed=1)
    assert timm_hub == ["timm/test_resnet.r160_in1k/model.safetensors"]
    assert same(whole.module, theirs)
    other = load({"model": "timm:test_resnet.r160_in1k", "weights": "pretrained"}, num_classes=5, seed=1)
    assert same(other.module, theirs, leave="fc")
    assert other(noise(64)).shape == (2, 5)


def test_timms_weights_that_cannot_be_had(timm_hub: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"^timm:test_resnet: its weights cannot be had \(.*\); give a file as `weights`$"
    ):
        load({"model": "timm:test_resnet", "weights": "pretrained"}, num_classes=5)


def test_a_timm_model_of_someone_elses(timm_hub: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=4, drop_rate=0.3)
    save(theirs, tmp_path / "someone/theirs/model.safetensors")
    mean = [0.1, 0.2, 0.3]
    config = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "model_args": {"drop_rate": 0.3},
        "pretrained_cfg": {"mean": mean, "std": mean, "input_size": [3, 64, 64], "num_classes": 4, "classifier": "fc"},
    }
    (tmp_path / "someone/theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^timm:hf-hub:someone/theirs lies on the hub; `weights: pretrained` fetches"):
        load("timm:hf-hub:someone/theirs")
    assert timm_hub == []
    model = load({"model": "timm:hf-hub:someone/theirs", "weights": "pretrained"}, num_classes=4)
    assert same(model.module, theirs)
    assert model.input is not None
    assert model.input.mean == tuple(mean)
    shutil.rmtree(tmp_path / "someone")
    again_without_the_hub(model, theirs)


def again_without_the_hub(model: Model, theirs: torch.nn.Module) -> None:
    """A student that began with weights of a hub is built from its record alone."""
    again = rebuild(json.loads(json.dumps(model.source)))
    again.module.load_state_dict(theirs.state_dict())
    images = noise(64)
    assert again.input == model.input
    for one in (again, model):
        one.module.eval()
    with torch.no_grad():
        first, second = again(images), model(images)
    logits = [getattr(found, "logits", found) for found in (first, second)]
    assert torch.equal(*logits)


def test_torchvisions_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5()
    asked: list[str] = []

    def download(url: str, *given: Any, **more: Any) -> Any:
        asked.append(url)
        return theirs.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    load("torchvision:shufflenet_v2_x0_5", num_classes=1000)
    assert asked == []
    whole = load({"model": "torchvision:shufflenet_v2_x0_5", "weights": "pretrained"}, num_classes=1000)
    assert [url.rpartition("/")[2][:18] for url in asked] == ["shufflenetv2_x0.5-"]
    assert same(whole.module, theirs)
    other = load({"model": "torchvision:shufflenet_v2_x0_5", "weights": "pretrained"}, num_classes=5)
    assert same(other.module, theirs, leave="fc")
    assert other(noise(64)).shape == (2, 5)


@pytest.fixture
def transformers_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what transformers asked its hub for; the hub is a folder, `tmp_path/owner/name`."""
    pytest.importorskip("transformers")
    from transformers.utils import hub

    asked: list[str] = []
    real = hub.cached_files

    def cached(path_or_repo_id: str, filenames: list[str], **more: Any) -> Any:
        asked.append(f"{path_or_repo_id}/{filenames[0]}")
        return real(str(tmp_path / path_or_repo_id), filenames, **more)

    monkeypatch.setattr(hub, "cached_files", cached)
    return asked


def test_transformers_weights(transformers_hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = load({"model": "hf:vit", **SMALL}, num_classes=3, class_names=("cat", "dog", "eel"), seed=0).module
    theirs.save_pretrained(tmp_path / "someone/theirs")  # type: ignore[operator]
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3}
    (tmp_path / "someone/theirs/preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="`weights: pretrained` fetches it from the hub"):
        load("hf:someone/theirs")
    assert transformers_hub == []
    capsys.readouterr()
    model = load({"model": "hf:someone/theirs", "weights": "pretrained"})
    assert "someone/theirs/model.safetensors" in transformers_hub
    assert same(model.module, theirs)
    assert model.class_names == ("cat", "dog", "eel")
    assert model.input is not None
    assert model.input.mean == (0.1, 0.2, 0.3)
    other = load({"model": "hf:someone/theirs", "weights": "pretrained"}, num_classes=5, in_channels=1)
    assert same(other.module, theirs, leave="classifier")
    assert capsys.readouterr() == ("", "")
    assert other(noise(32, channels=1)).logits.shape == (2, 5)
    shutil.rmtree(tmp_path / "someone")
    again_without_the_hub(model, theirs)
    assert rebuild(other.source)(noise(32, channels=1)).logits.shape == (2, 5)


def test_what_the_transformers_hub_has_not(transformers_hub: list[str]) -> None:
    with pytest.raises(UserError, match=r"^hf:someone/nothing: "):
        load({"model": "hf:someone/nothing", "weights": "pretrained"})
