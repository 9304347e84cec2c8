# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.readings import noise
from tutelage.core.error import UserError
from tutelage.models.load import load

SOURCE = """
from torch import nn
from tutelage.core import InputSpec, Model

class Net(nn.Module):
    def __init__(self, width, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3)
        self.act = nn.ReLU()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)))

def net(width=4, num_classes=2, in_channels=3):
    return Net(width, num_classes, in_channels)

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def anything(**options):
    return Net(options["width"], 2, 3)

def model(num_classes):
    return Model(Net(4, num_classes, 3), input=InputSpec(mean=(0.5,) * 3, std=(0.1,) * 3), class_names=("a", "b"))

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def test_it_is_called_with_options_and_what_it_takes_of_the_data(file: Path) -> None:
    model = load({"model": f"python:{file}:net", "width": 6}, num_classes=5, in_channels=1)
    assert model(noise(12, channels=1)).shape == (2, 5)
    assert model.roles["map"].where == "act"
    assert model.modules["classifier"] == "head"
    assert load(f"python:{file}:net")(noise(12)).shape == (2, 2)
    assert load({"model": f"python:{file}:anything", "width": 3}, num_classes=9)(noise(12)).shape == (2, 2)


def test_it_may_give_a_model(file: Path) -> None:
    model = load(f"python:{file}:model", num_classes=2)
    assert model.input is not None
    assert model.input.std == (0.1, 0.1, 0.1)
    assert model.class_names == ("a", "b")


def test_a_network_of_one_size_is_tried_on_the_datas(file: Path) -> None:
    model = load(f"python:{file}:fixed", in_channels=1, image_size=(8, 8))
    assert model(noise(8, channels=1)).shape == (2, 3)
    message = (
        f"model 'python:{file}:fixed' does not run on images of 64x64, 32x32 pixels with 1 channels (mat1 and mat2 "
        "shapes cannot be multiplied (1x4096 and 64x3)); say what it takes with `input: {size: [H, W], channels: C}`"
    )
    with pytest.raises(UserError) as error:
        load(f"python:{file}:fixed", in_channels=1)
    assert str(error.value).replace("addmm: ", "") == message  # newer torch names the operation
    sized = load({"model": f"python:{file}:fixed", "input": {"size": [8, 8], "channels": 1}}, in_channels=1)
    assert sized(noise(30, channels=1)).shape == (2, 3)


def test_it_can_be_copied_and_pickled(file: Path) -> None:
    module = load(f"python:{file}:net").module
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(noise(12)), copy.deepcopy(module)(noise(12)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "python:{file}"}, "model 'python:{file}': write python:FILE.py:FUNCTION"),
        ({"model": "python:no.py:net"}, "model 'python:no.py:net': no file no.py"),
        ({"model": "python:{file}:nett"}, "{file} has no function 'nett'; did you mean net?"),
        ({"model": "python:{file}:net", "wdith": 3}, "{file}:net takes no 'wdith'; did you mean width?"),
        ({"model": "python:{file}:number"}, "{file}:number gave int, not a torch.nn.Module"),
    ],
)
def test_what_is_wrong_is_said(file: Path, spec: dict[str, Any], message: str) -> None:
    spec["model"] = spec["model"].replace("{file}", str(file))
    with pytest.raises(UserError, match=f"^{re.escape(message.replace('{file}', str(file)))}$"):
        load(spec)


@pytest.mark.parametrize("content", ["def net(:", "import no_such_module"])
def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path} cannot be imported: ")):
        load(f"python:{path}:net")


def test_other_errors_of_the_file_are_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text("def net():\n    raise ZeroDivisionError('inside')\n")
    with pytest.raises(ZeroDivisionError, match="inside"):
        load(f"python:{path}:net")
