# SPDX-License-Identifier: Apache-2.0
import getpass
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from tutelage.report.environment import environment, processor


def test_versions_threads_and_processor_are_given() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["Python"] == platform.python_version()
    assert found["tutelage"] == version("tutelage")
    assert found["threads"] == str(torch.get_num_threads())
    assert found["processor"]
    assert ("CUDA" in found) is torch.cuda.is_available()


def test_neither_machine_nor_user_is_named() -> None:
    said = " ".join(environment().values()).split()
    assert platform.node() not in said
    assert getpass.getuser() not in said
    assert str(Path.home()) not in said


def test_the_processor_is_read_from_the_system_or_guessed(tmp_path: Path) -> None:
    source = tmp_path / "cpuinfo"
    source.write_text("processor\t: 0\nmodel name\t: A Fine CPU @ 3 GHz\nmodel name\t: A Fine CPU @ 3 GHz\n")
    assert processor(source) == "A Fine CPU @ 3 GHz"
    source.write_text("model name\t:\n")
    assert processor(source) in (platform.processor(), platform.machine())
    assert processor(tmp_path / "missing") in (platform.processor(), platform.machine())
