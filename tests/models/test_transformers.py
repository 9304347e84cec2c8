# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.readings import noise, readings, stages
from tutelage.core.error import UserError
from tutelage.models.load import load

transformers: Any = pytest.importorskip("transformers")

SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 32, "patch_size": 8},
}


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("deit", 2)])
def test_blocks_are_the_hidden_states(kind: str, prefix: int) -> None:
    model = load({"model": f"hf:{kind}", **SMALL}, num_classes=5, seed=0)
    taps, output = readings(model, noise(32))
    with torch.no_grad():
        own = model.module(pixel_values=model.input.prepare(noise(32), {}), output_hidden_states=True)  # type: ignore[union-attr]
    assert torch.equal(output.logits, own.logits)
    assert len(own.hidden_states) == 4
    for number in range(2):
        assert torch.equal(taps[f"blocks[{number}]"], own.hidden_states[number + 1][:, prefix:])
        assert torch.equal(taps[f"cls[{number}]"], own.hidden_states[number + 1][:, 0])
    attention = model.module.get_submodule(f"{kind}.layers.1.attention")
    norm = model.module.get_submodule(f"{kind}.layers.1.layernorm_before")
    for role in "qkv":
        expected = attention.get_submodule(f"{role}_proj")(norm(own.hidden_states[1]))
        assert torch.allclose(taps[f"{role}[1]"], expected, atol=1e-5)
    assert taps["tokens"].shape == taps["patch_embed[0]"].shape == (2, 16, 16)
    assert torch.equal(model.lend("classifier")(taps["pooled"]), own.logits)


def test_stages_of_a_convolutional_model() -> None:
    options = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "layer_type": "basic"}
    model = load({"model": "hf:resnet", **options}, num_classes=5, in_channels=1, seed=0)
    taps, _ = readings(model, noise(64, channels=1))
    with torch.no_grad():
        images = model.input.prepare(noise(64, channels=1), {})  # type: ignore[union-attr]
        own = model.module(pixel_values=images, output_hidden_states=True).hidden_states
    assert torch.equal(taps["map"], own[-1])
    for role, expected in zip(stages(model)[1:], own[1:], strict=True):
        assert torch.equal(taps[role], expected)
    assert torch.equal(taps["stages[1].pre"].relu(), taps["stages[1]"])


def test_a_folder_with_weights_gives_them_and_its_names(tmp_path: Path) -> None:
    names = ("cat", "dog", "eel")
    model = load({"model": "hf:vit", **SMALL}, num_classes=3, class_names=names, seed=0)
    model.module.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = load(f"hf:{tmp_path / 'saved'}")
    assert again.class_names == names
    assert all(
        torch.equal(one, other) for one, other in zip(model.module.parameters(), again.module.parameters(), strict=True)
    )
    assert again.module.training is False


def test_a_folder_of_a_configuration_alone_is_built_anew(tmp_path: Path) -> None:
    transformers.ViTConfig(**SMALL, num_labels=3).save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}", num_classes=4)
    assert model(noise(32)).logits.shape == (2, 4)
    assert model.class_names == ()


def test_normalization_is_that_of_the_image_processor(tmp_path: Path) -> None:
    model = load({"model": "hf:vit", **SMALL}, num_classes=3)
    assert model.input is not None
    assert model.input.mean == (0.5, 0.5, 0.5)
    model.module.save_pretrained(tmp_path)  # type: ignore[operator]
    settings = (
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    (tmp_path / "preprocessor_config.json").write_text(settings)
    again = load(f"hf:{tmp_path}")
    assert again.input is not None
    assert again.input.mean == (0.1, 0.2, 0.3)
    assert again.input.std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:vitt", "'hf:vitt' is neither a folder nor a type of image classifier; did you mean vit?"),
        (
            "hf:google/vit-base-patch16-224",
            (
                "'hf:google/vit-base-patch16-224' is neither a folder nor a type of image classifier; "
                "`weights: pretrained` fetches it from the hub"
            ),
        ),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load(spec)


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"hf:{tmp_path}: ")):
        load(f"hf:{tmp_path}")
