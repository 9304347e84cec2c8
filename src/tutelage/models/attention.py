# SPDX-License-Identifier: Apache-2.0
"""Where a block's queries, keys and values are made."""

from tutelage.core import Tap
from tutelage.models.trace import Call

#: Names of the layers that give queries, keys and values, by architecture.
PROJECTIONS = (
    *(("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
    *(("q_lin", "k_lin", "v_lin"), ("q", "k", "v")),
)
#: Names of one layer that gives queries, keys and values side by side, in three equal parts.
FUSED = ("c_attn", "qkv")


def projections(block: Call) -> dict[str, Tap]:
    """Return the places of `q`, `k` and `v` in a block: `[B, L, *]`, heads side by side; empty if it has none.

    A block with several attention layers has them in the last of those.
    """
    inner = {call.path.rpartition(".")[2]: call for call in block.walk() if not call.inner}
    for names in PROJECTIONS:
        if all(name in inner for name in names):
            return {role: Tap(inner[name].path) for role, name in zip("qkv", names, strict=True)}
    fused = next((inner[name] for name in FUSED if name in inner), None)
    if fused is None or fused.given is None or fused.given.ndim != 3 or fused.given.shape[-1] % 3:
        return {}
    return {role: Tap(fused.path, part=(number, 3)) for number, role in enumerate("qkv")}
