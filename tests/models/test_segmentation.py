# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tutelage.core import Batch, Distiller, Live, Model, Objective
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.methods.features.cwd import CWD
from tutelage.methods.segmentation.transkd import TransKD
from tutelage.models.load import load
from tutelage.models.segmenters.espnet import ESPNet
from tutelage.models.segmenters.pspnet import PSPNet
from tutelage.models.source import listed
from tutelage.models.weights import OtherClassesError
from tutelage.tasks.segmentation import Segmentation

FACTS: dict[str, Any] = {
    "task": "segmentation",
    "num_classes": 5,
    "in_channels": 3,
    "image_size": (64, 64),
    "class_names": tuple("abcde"),
}
SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SEGFORMER = {
    "model": "hf:segformer",
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
UPERNET = {
    "model": "hf:upernet",
    "backbone_config": SWIN,
    "hidden_size": 16,
    "auxiliary_channels": 8,
    "auxiliary_in_channels": 32,
}
MASK2FORMER = {
    "model": "hf:mask2former",
    "backbone_config": SWIN,
    **dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32),
    **dict.fromkeys(("dim_feedforward", "encoder_feedforward_dim"), 16),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_attention_heads"), 2),
    "num_queries": 6,
    "train_num_points": 64,
}
TINY = {"model": "tutelage:pspnet", "backbone": "tiny8", "width": 16}
#: Every kind of segmenter: what builds it, the stride of its scores, the number of its stages.
MODELS: dict[str, tuple[str | dict[str, Any], int, int]] = {
    "pspnet": (TINY, 8, 2),
    "pspnet-timm": ({"model": "timm:resnet10t", "width": 16}, 8, 4),
    "pspnet-mobilenet": ({"model": "timm:mobilenetv3_small_050", "width": 16, "output_stride": 16}, 16, 4),
    "deeplabv3-own": ({"model": "tutelage:deeplabv3", "backbone": "tiny8", "width": 16, "rates": [2, 4]}, 8, 2),
    "espnet": ({"model": "tutelage:espnet", "p": 1, "q": 1}, 1, 3),
    "lraspp": ("torchvision:lraspp_mobilenet_v3_large", 8, 2),
    "deeplabv3-mobilenet": ("torchvision:deeplabv3_mobilenet_v3_large", 16, 2),
    "deeplabv3": ("torchvision:deeplabv3_resnet50", 8, 4),
    "fcn": ("torchvision:fcn_resnet50", 8, 4),
    "segformer": (SEGFORMER, 4, 4),
    "upernet": (UPERNET, 4, 4),
    "mask2former": (MASK2FORMER, 4, 4),
}
SECOND = (
    "deeplabv3-own",
    "pspnet",
    "pspnet-timm",
    "pspnet-mobilenet",
    "deeplabv3-mobilenet",
    "deeplabv3",
    "fcn",
    "upernet",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")


def made(name: str, seed: int = 0) -> Model:
    if MODELS[name][0] in (SEGFORMER, UPERNET, MASK2FORMER):
        pytest.importorskip("transformers")
    return load(MODELS[name][0], **FACTS, seed=seed)


def pixels(rows: int = 2, side: int = 64) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


def truth(side: int = 64) -> Tensor:
    return torch.randint(-1, 5, (2, side, side), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_every_segmenter_answers_and_is_tapped(name: str) -> None:
    _, stride, stages = MODELS[name]
    model = made(name)
    recorder = Recorder(model.module, model.roles)
    task = Segmentation(5)
    for training in (True, False):
        model.module.train(training)
        with recorder:
            output = model(pixels())
        taps = recorder.release()
        logits = task.logits(output)
        assert logits.shape == (2, 5, 64 // stride, 64 // stride)
        assert (getattr(output, "auxiliary", None) is not None) == (training and name in SECOND)
    assert isinstance(output, Tensor)
    assert [role for role in taps if role.startswith("stages")] == [f"stages[{n}]" for n in range(stages)]
    maps = [taps[f"stages[{number}]"] for number in range(stages)] + [taps["map"]]
    assert all(one.ndim == 4 and one.shape[2] == one.shape[3] for one in maps)
    sides = [one.shape[2] for one in maps[:-1]]
    assert sides == sorted(sides, reverse=True)
    assert isinstance(model.lend("classifier"), nn.Module)
    assert model.class_names == tuple("abcde")
    assert model.input is not None
    assert model.input.size is None
    recorder.close()


@pytest.mark.parametrize("name", MODELS)
def test_every_segmenter_is_teacher_and_student(name: str) -> None:
    teacher, student = made(name, seed=1), made(name, seed=2)
    task = Segmentation(5)
    side = 32 if name in ("deeplabv3", "fcn") else 64  # the large ones take their time
    batch = Batch.of(pixels(side=side), truth(side), labelled=truth(side) >= 0)
    objective = Objective(cwd=CWD(student_tap="logits", teacher_tap="logits"), scores=CWD())
    distiller = Distiller({"student": student}, objective, task=task, teacher=Live(teacher, "eval"), sample=batch)
    distiller.train()
    losses = distiller(batch, distiller.observe(batch))
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.parts["cwd"] > 0
    grads = [one.grad for one in student.module.parameters() if one.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(bool(grad.any()) for grad in grads if grad is not None)
    assert all(one.grad is None for one in teacher.module.parameters())
    scores = task.score([(distiller.answer(batch), batch)])
    assert 0 <= scores["miou"] <= 1
    distiller.close()


@pytest.mark.parametrize("name", ["lraspp", "deeplabv3-mobilenet", "fcn", "upernet"])
def test_scores_enlarged_are_those_of_the_library(name: str) -> None:
    model = made(name)
    model.module.eval()
    assert model.input is not None
    with torch.no_grad():
        seen = model.input.prepare(pixels(), {})
        whole = model.module(pixel_values=seen).logits if name == "upernet" else model.module(seen)["out"]
        found = nn.functional.interpolate(model(pixels()), (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, whole)


def test_scores_of_mask2former_are_those_it_is_evaluated_by() -> None:
    model = made("mask2former")
    model.module.eval()
    assert model.input is not None
    with torch.no_grad():
        raw = model.module(pixel_values=model.input.prepare(pixels(), {}))
        found = model(pixels()).exp()
    for row in range(2):
        for kind in range(5):
            classes = raw.class_queries_logits[row].softmax(-1)[:, kind]
            shares = raw.masks_queries_logits[row].sigmoid()
            torch.testing.assert_close(found[row, kind], sum(c * m for c, m in zip(classes, shares, strict=True)))


def test_ignored_pixels_and_images_leave_the_loss_of_queries_as_it_was() -> None:
    model, task = made("mask2former"), Segmentation(5)
    model.module.train()
    output: Any = model(pixels())
    target = truth()
    target[0] = -1
    losses = []
    for noise in (0.0, 100.0):
        other = output.masks.clone()
        other[0] += noise
        torch.manual_seed(0)
        changed = type(output)(output.logits, output.module, output.classes, other, output.earlier)
        losses.append(task.loss(changed, Batch.of(pixels(), target, labelled=target >= 0)))
    first, second = losses
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert set(first) == {"class", "mask", "dice"}
    assert all(torch.equal(first[part], second[part]) for part in first)
    nothing = task.loss(output, Batch.of(pixels(), torch.full_like(target, -1), labelled=target > 9))
    assert isinstance(nothing, dict)
    assert not sum(nothing.values())


def test_tokens_of_segformer() -> None:
    model = made("segformer")
    recorder = Recorder(model.module, model.roles)
    with recorder:
        model(pixels())
    taps = recorder.release()
    assert [role for role in taps if role.startswith("blocks")] == [f"blocks[{number}]" for number in range(5)]
    assert taps["blocks[2]"].shape == (2, 64, 16)
    assert [taps[f"patch_embed[{number}]"].shape[1] for number in range(4)] == [256, 64, 16, 4]
    assert model.input is not None
    torch.testing.assert_close(taps["patch_embed[0].pre"], model.input.prepare(pixels(), {}))
    assert torch.equal(taps["patch_embed[1].pre"], taps["stages[0]"])


def test_the_assistant_of_transkd_sees_what_the_student_sees() -> None:
    student, teacher = made("segformer", seed=1), made("segformer", seed=2)
    batch = Batch.of(pixels(), truth(), labelled=truth() >= 0)
    objective = Objective(transkd=TransKD(form="ea", middle=4))
    distiller = Distiller(
        {"student": student}, objective, task=Segmentation(5), teacher=Live(teacher, "eval"), sample=batch
    )
    assert distiller(batch, distiller.observe(batch)).parts["transkd.embedding"] > 0
    distiller.close()


@pytest.mark.parametrize("name", ["segformer", "upernet", "mask2former"])
def test_a_folder_of_transformers(tmp_path: Path, name: str) -> None:
    model = made(name)
    model.module.save_pretrained(tmp_path)  # type: ignore[operator]
    again = load(f"hf:{tmp_path}", **FACTS)
    model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels()), model(pixels()))
    assert again.class_names == tuple("abcde")
    assert again.roles == model.roles
    other = {**FACTS, "num_classes": 3, "class_names": tuple("xyz")}
    fewer = load({"model": f"hf:{tmp_path}", "head": "fresh"}, **other)
    assert fewer(pixels()).shape[1] == 3


def test_first_classes_of_a_model_with_more() -> None:
    spec = {"model": "tutelage:espnet", "p": 1, "q": 1, "num_classes": 12, "outputs": 5}
    model, whole = load(spec, **FACTS, seed=0), load({**spec, "outputs": 12}, **FACTS, seed=0)
    model.module.eval()
    whole.module.eval()
    with torch.no_grad():
        assert torch.equal(model(pixels()), whole(pixels())[:, :5])
    with pytest.raises(UserError, match="outputs counts the first classes of a model with 12, not 13"):
        load({**spec, "outputs": 13}, **FACTS)


@pytest.mark.parametrize("spec", [TINY, "torchvision:lraspp_mobilenet_v3_large", SEGFORMER])
def test_a_runs_student_is_built_again(tmp_path: Path, spec: Any) -> None:
    student = load(spec, **FACTS, seed=3)
    (tmp_path / "student.json").write_text(json.dumps({**student.source, "task": "segmentation"}))
    save_file(student.module.state_dict(), tmp_path / "student.safetensors")
    again = load(f"run:{tmp_path}", task="segmentation")
    student.module.eval()
    again.module.eval()
    with torch.no_grad():
        assert torch.equal(student(pixels()), again(pixels()))
    assert again.roles == student.roles
    assert again.class_names == tuple("abcde")


def test_weights_and_classes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(PSPNet(7, backbone="tiny8", width=16).state_dict(), file)
    with pytest.raises(UserError, match="are for 7 classes, and 5 are wanted; `head: fresh`"):
        load({**TINY, "weights": str(file)}, **FACTS)
    model = load({**TINY, "weights": str(file), "head": "fresh"}, **FACTS)
    assert torch.equal(
        model.module.state_dict()["bottleneck.0.weight"], torch.load(file, weights_only=True)["bottleneck.0.weight"]
    )


def test_published_weights_for_other_classes_need_a_fresh_head(monkeypatch: pytest.MonkeyPatch) -> None:
    published = load("torchvision:lraspp_mobilenet_v3_large", **{**FACTS, "num_classes": 21}).module.state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: published)
    spec = {"model": "torchvision:lraspp_mobilenet_v3_large", "weights": "pretrained"}
    with pytest.raises(OtherClassesError, match="are for 21 classes, and 5 are wanted; `head: fresh`"):
        load(spec, **FACTS)
    model = load({**spec, "head": "fresh"}, **FACTS)
    key = "classifier.cbr.0.weight"
    assert torch.equal(model.module.state_dict()[key], published[key])
    assert load(spec, **{**FACTS, "num_classes": 21})(pixels()).shape[1] == 21


def test_a_folder_of_transformers_for_other_classes_needs_a_fresh_head(tmp_path: Path) -> None:
    whole = made("segformer")
    whole.module.save_pretrained(tmp_path)  # type: ignore[operator]
    six = {**FACTS, "num_classes": 6, "class_names": tuple("abcdef")}
    with pytest.raises(OtherClassesError, match="are for 5 classes, and 6 are wanted; `head: fresh`"):
        load(f"hf:{tmp_path}", **six)
    fresh = load({"model": f"hf:{tmp_path}", "head": "fresh"}, **six)
    key = "decode_head.linear_fuse.weight"
    assert torch.equal(fresh.module.state_dict()[key], whole.module.state_dict()[key])
    assert torch.equal(load(f"hf:{tmp_path}", **FACTS)(pixels()), whole(pixels()))


def test_roles_and_pixels_may_be_said() -> None:
    pixels_ = {"size": 32, "mean": [0.5] * 3, "std": [1.0] * 3}
    model = load({**TINY, "roles": {"map": "stages.0", "classifier": "bottleneck"}, "input": pixels_}, **FACTS)
    assert model.roles["map"].where == "stages.0"
    assert model.modules["classifier"] == "bottleneck"
    assert model.input is not None
    assert (model.input.size, model.input.mean) == ((32, 32), (0.5, 0.5, 0.5))


def test_a_seed_decides_the_weights() -> None:
    before = torch.get_rng_state()
    states = [load(TINY, **FACTS, seed=seed).module.state_dict() for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    keys = [key for key, value in states[0].items() if value.ndim == 4]
    assert all(torch.equal(states[0][key], states[1][key]) for key in keys)
    assert not torch.equal(states[0][keys[0]], states[2][keys[0]])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tutelage:pspnt", "unknown segmenter 'tutelage:pspnt'; did you mean pspnet?"),
        ("torchvision:deeplabv3", "unknown segmenter 'torchvision:deeplabv3'; did you mean deeplabv3_resnet"),
        ("torchvision:resnet18", "unknown segmenter 'torchvision:resnet18'"),
        ("timm:resnet10tt", "timm:resnet10tt: unknown backbone 'timm:resnet10tt'; did you mean resnet10t?"),
        ({**TINY, "widht": 3}, "tutelage:pspnet: PSPNet.__init__() got an unexpected keyword argument 'widht'"),
        ({**TINY, "output_stride": 4}, "tutelage:pspnet: output_stride is 8, 16 or 32, not 4"),
        ({**TINY, "weights": "pretrained"}, "tutelage:pspnet comes without weights"),
        ({**TINY, "pretrained": True}, "tutelage:pspnet: backbone 'tiny8' comes without weights"),
        ({**TINY, "input": {"men": 1}}, "input.men is not known; did you mean mean?"),
        ({"model": "timm:resnet10t", "decoder": "psp"}, "timm:resnet10t: decoder 'psp' is not known; did you mean psp"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224: backbone timm:vit_tiny_patch16_224 gives no maps of"),
        ("hf:vit", "'hf:vit' is neither a folder nor a type of segmenter"),
        ({"model": "hf:upernet", "backbone_config": {"depth": 1}}, "backbone_config needs model_type"),
    ],
)
def test_what_is_wrong_is_said(spec: Any, message: str) -> None:
    if str(spec).startswith("hf:") or (isinstance(spec, dict) and spec["model"].startswith("hf:")):
        pytest.importorskip("transformers")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load(spec, **FACTS)


def test_constructors_are_found_in_their_folder() -> None:
    found = listed("segmenters")
    assert found["pspnet"] is PSPNet
    assert found["espnet"] is ESPNet


def test_a_users_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n\ndef net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2, 1), nn.Conv2d(4, num_classes, 1))\n"
    )
    model = load({"model": f"python:{file}:net", "roles": {"map": "0"}}, **FACTS)
    assert model(pixels()).shape == (2, 5, 32, 32)
    assert model.roles["map"].where == "0"
