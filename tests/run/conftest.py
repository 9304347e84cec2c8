# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let every run lie in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
