# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
import torch

from gloo_pool import GlooPool

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of the pool in one process of `pytest -n 2 --dist loadgroup`: one pool is enough."""
    for item in items:
        check = getattr(item, "callspec", None)
        if "gloo" in getattr(item, "fixturenames", ()) or (check and check.params.get("name") == "ranks"):
            item.add_marker(pytest.mark.xdist_group("gloo"))


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    """Two ranks, started by the first test that asks and shared by all."""
    pool = GlooPool(tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()
