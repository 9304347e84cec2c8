# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
import torch

from gloo_pool import GlooPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    """Two ranks, started by the first test that asks and shared by all."""
    pool = GlooPool(tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()
