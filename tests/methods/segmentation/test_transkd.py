# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import MethodCase, Tensors, gaussian
from oracles import transkd as oracle
from tutelage.core import Batch, Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.segmentation.transkd import Fusion, Mixer, TransKD, transkd

Arrays = dict[str, NDArray[Any]]
WEIGHTS = (0.5, 1.0)


def tensors_of(seed: int, widths: tuple[int, ...], rows: int = 6, side: int = 4, scale: float = 1.0) -> Tensors:
    """Stage maps of sides `side`, `side / 2`, ... and the embeddings of as many tokens."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, width in enumerate(widths):
        edge = side >> stage
        shapes[f"stages[{stage}]"] = (rows, width, edge, edge)
        shapes[f"patch_embed[{stage}]"] = (rows, edge * edge, width)
    return gaussian(seed, shapes, scale)


def case(**options: Any) -> MethodCase:
    settings = {"middle": 4, "patch_weights": WEIGHTS, **options}
    return MethodCase(
        term=lambda: TransKD(**settings),
        student=lambda seed: tensors_of(seed, (4, 6)),
        teacher=lambda seed: tensors_of(seed + 1000, (6, 8), scale=2.0),
    )


def built(student: Tensors, teacher: Tensors, **options: Any) -> tuple[TransKD, Signals, Signals]:
    """A term built for these tensors, in float64."""
    term, sides = TransKD(**options), (Signals(None, student), Signals(None, teacher))
    term.build(sides[0].detach(), sides[1], Facts())
    return term.double(), *sides


def named(maps: list[Tensor], embeddings: list[Tensor]) -> Tensors:
    found = {f"stages[{number}]": one for number, one in enumerate(maps)}
    return found | {f"patch_embed[{number}]": one for number, one in enumerate(embeddings)}


def given_pixels(student: Signals, pixels: Tensor) -> Signals:
    """What an assistant reads beside maps and embeddings."""
    return Signals(None, {**student.taps, "patch_embed[0].pre": pixels})


def blank(pixels: Tensor) -> Batch:
    return Batch.of(pixels, torch.full((len(pixels),), -1))


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    return base(arrays) if claim.endswith("base") else forms(arrays)


def numbered(arrays: Arrays, stem: str) -> list[Tensor]:
    names = sorted((n for n in arrays if re.fullmatch(rf"{stem}\d+", n)), key=lambda n: int(n.removeprefix(stem)))
    return [torch.tensor(arrays[name], dtype=torch.float64) for name in names]


def weights_of(arrays: Arrays, prefix: str) -> Tensors:
    """The case's weights under the term's names."""
    found: Tensors = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            own = re.sub(r"embed(\d+)_linearproject", lambda m: f"linears.{int(m[1]) - 1}", own)
            own = re.sub(r"patch_embed(\d+)", lambda m: f"patches.{int(m[1]) - 1}", own)
            found[own] = torch.tensor(array, dtype=torch.float64)
    return found


def load(term: TransKD, weights: Tensors) -> None:
    """Load all of a term's weights; statistics of batch norms keep what they start with."""
    own = {name: value for name, value in term.state_dict().items() if name in dict(term.named_parameters())}
    assert own.keys() == weights.keys()
    term.load_state_dict(weights, strict=False)


def base(arrays: Arrays) -> dict[str, Any]:
    free = {name: numbered(arrays, f"student_{name}") for name in ("map", "embed")}
    for tensor in free["map"] + free["embed"]:
        tensor.requires_grad_()
    teacher_maps, teacher_embeddings = numbered(arrays, "teacher_map"), numbered(arrays, "teacher_embed")
    weights = weights_of(arrays, "w.")
    term, student, teacher = built(
        named(free["map"], free["embed"]),
        named(teacher_maps, teacher_embeddings),
        middle=len(weights["skfs.0.conv1.0.weight"]),
        patch_weights=arrays["pea_weights"].tolist(),
    )
    load(term, weights)
    pixels = torch.zeros(len(free["map"][0]), 3, 1, 1)
    parts = term(student, teacher, blank(pixels))
    (parts["map"] + parts["embedding"]).backward()
    fused, embedded = term.fuse(student), term.embed(student)
    answer: dict[str, Any] = {"loss_hcl": parts["map"], "loss_pea": parts["embedding"]}
    answer |= {f"csf_out{stage}": one for stage, one in enumerate(fused)}
    answer |= {f"pea_out{stage}": one for stage, one in enumerate(embedded)}
    answer |= {f"grad_student_{name}{i}": one.grad for name, side in free.items() for i, one in enumerate(side)}
    for name in arrays:
        if match := re.fullmatch(r"loss_cwd_T([\d.]+)", name):
            found = transkd(
                fused,
                teacher_maps,
                embedded,
                teacher_embeddings,
                patch_weights=term.patch_weights,
                map_loss="cwd",
                temperature=float(match[1]),
            )
            answer[name] = found["map"]
        if match := re.fullmatch(r"loss_embed_cwd_T([\d.]+)_stage(\d+)", name):
            stage = slice(int(match[2]), int(match[2]) + 1)
            found = transkd(
                fused[stage],
                teacher_maps[stage],
                embedded[stage],
                teacher_embeddings[stage],
                patch_weights=[1.0],
                embedding_loss="cwd",
                temperature=float(match[1]),
            )
            answer[name] = found["embedding"]
    return answer


def forms(arrays: Arrays) -> dict[str, Any]:
    return mixer_of(arrays) | assistant_of(arrays)


def mixer_of(arrays: Arrays) -> dict[str, Any]:
    tokens = torch.tensor(arrays["stage4_embedding"], dtype=torch.float64).requires_grad_()
    goal = torch.tensor(arrays["teacher_stage4_embedding"], dtype=torch.float64)
    maps = torch.zeros(len(tokens), 1, 2, 2, dtype=torch.float64)
    heads = int(arrays["num_heads_stage4"])
    term, student, teacher = built(
        named([maps], [tokens]), named([maps], [goal]), form="gl", heads=heads, patch_weights=[1.0]
    )
    given = weights_of(arrays, "w.")
    renamed = {"atten_weight": "mixer.attention", "conv_weight": "mixer.convolution"}
    weights = {re.sub(r"^linears\.\d+", "linears.0", renamed.get(name, name)): one for name, one in given.items()}
    weights = {re.sub(r"^attn4\.|^(?=conv\d)", "mixer.", name): one for name, one in weights.items()}
    load(term, weights | {name: one for name, one in term.state_dict().items() if name in fusion_weights(term)})
    loss = term(student, teacher, blank(maps))["embedding"]
    loss.backward()
    (projected,) = term.embed(student)
    return {"loss": loss, "grad_stage4_embedding": tokens.grad, "glmixer_projected": projected}


def fusion_weights(term: TransKD) -> set[str]:
    return {name for name, _ in term.named_parameters() if name.startswith("skfs.")}


def assistant_of(arrays: Arrays) -> dict[str, Any]:
    embeddings, maps = numbered(arrays, "ea_student_embed"), numbered(arrays, "ea_student_map")
    weights = weights_of(arrays, "ea.")
    strides = [(weights[f"patches.{i}.proj.weight"].shape[2] + 1) // 2 for i in range(len(embeddings))]
    grid = [-(-side // strides[-1]) for side in maps[-1].shape[2:]]
    maps.append(torch.zeros(len(maps[-1]), embeddings[-1].shape[2], *grid, dtype=torch.float64))
    goals = [one.new_zeros(*one.shape[:2], len(weights[f"linears.{i}.weight"])) for i, one in enumerate(embeddings)]
    term, student, _ = built(
        named(maps, embeddings),
        named(maps, goals),
        form="ea",
        patch_stride=strides[0],
        patch_weights=[1.0] * len(embeddings),
    )
    shares = {name: one for name, one in weights.items() if name.startswith("fuse_weights.")}
    weights = {name: one for name, one in weights.items() if name not in shares}
    weights["shares"] = torch.cat([shares[f"fuse_weights.{i}"] for i in range(len(shares))])
    load(term, weights | {name: one for name, one in term.state_dict().items() if name in fusion_weights(term)})
    found = term.embed(given_pixels(student, torch.tensor(arrays["ea_image"], dtype=torch.float64)))
    return {f"ea_out{stage}": one for stage, one in enumerate(found)}


# the equation, worked out by loops


def drawn(rows: int, side: int, widths: tuple[int, ...], seed: int) -> Tensors:
    return {name: one.double() for name, one in tensors_of(seed, widths, rows, side).items()}


def under_their_names(term: TransKD) -> dict[str, NDArray[np.float64]]:
    """The term's weights as the oracle calls them."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, weight in term.state_dict().items():
        array = weight.double().numpy()
        if name == "shares":
            found |= {f"fuse_weights.{k}": array[k : k + 1] for k in range(len(array))}
        name = re.sub(r"^linears\.(\d+)", lambda m: f"embed{int(m[1]) + 1}_linearproject", name)
        name = re.sub(r"^patches\.(\d+)", lambda m: f"patch_embed{int(m[1]) + 1}", name)
        name = re.sub(r"^mixer\.(qkv|proj)", r"attn4.\1", name).removeprefix("mixer.")
        found[{"attention": "atten_weight", "convolution": "conv_weight"}.get(name, name)] = array
    return found


def arrays_of(tensors: Tensors, stem: str) -> list[NDArray[np.float64]]:
    return [one.numpy() for name, one in tensors.items() if name.startswith(stem)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    stages=st.integers(1, 3),
    middle=st.integers(1, 5),
    temperature=st.floats(0.5, 4),
)
@pytest.mark.parametrize("form", ["base", "gl", "ea"])
def test_equals_the_loops(form: Any, seed: int, rows: int, stages: int, middle: int, temperature: float) -> None:
    side, coefficients = 8, (0.1, 0.5, 1.0)[:stages]
    student = drawn(rows, side, (2, 4, 6)[:stages], seed)
    teacher = drawn(rows, side, (3, 4, 5)[:stages], seed + 1)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"form": form, "middle": middle, "heads": 2, "patch_stride": 2}
    term, ours, theirs = built(student, teacher, patch_weights=coefficients, **options)
    pixels = torch.randn(rows, 3, 2 * side, 2 * side, dtype=torch.float64)
    parts = term(given_pixels(ours, pixels), theirs, blank(torch.zeros_like(pixels)))
    weights = under_their_names(term)
    maps, goals = arrays_of(student, "stages"), arrays_of(teacher, "stages")
    fused = oracle.csf(maps, weights)
    tokens, ends = arrays_of(student, "patch_embed"), arrays_of(teacher, "patch_embed")
    if form == "ea":
        inputs = [pixels.numpy(), *maps[:-1]]
        embedded = oracle.assisted(tokens, inputs, weights, [2] * stages)
    else:
        if form == "gl":
            tokens[-1] = oracle.mixed(tokens[-1], weights, 2)
        embedded = [oracle.linear(one, weights, number + 1) for number, one in enumerate(tokens)]
    assert parts["map"].item() == pytest.approx(oracle.hcl(fused, goals), rel=1e-9)
    assert parts["embedding"].item() == pytest.approx(oracle.pea(embedded, ends, coefficients), rel=1e-9)
    found = transkd(
        [torch.tensor(one) for one in fused],
        list(theirs.taps.values())[::2],
        [torch.tensor(one) for one in embedded],
        list(theirs.taps.values())[1::2],
        patch_weights=coefficients,
        map_loss="cwd",
        embedding_loss="cwd",
        temperature=temperature,
    )
    assert found["map"].item() == pytest.approx(oracle.cwd(fused, goals, temperature), rel=1e-9)
    by_channel = [
        c * oracle.cwd([one.transpose(0, 2, 1)], [other.transpose(0, 2, 1)], temperature)
        for c, one, other in zip(coefficients, embedded, ends, strict=True)
    ]
    assert found["embedding"].item() == pytest.approx(sum(by_channel), rel=1e-9)


@pytest.mark.parametrize("words", [{}, {"map_loss": "cwd", "embedding_loss": "cwd", "temperature": 2.0}])
def test_gradcheck(words: dict[str, Any]) -> None:
    goals = drawn(2, 4, (2, 3), 1)
    maps, tokens = list(goals.values())[::2], list(goals.values())[1::2]

    def loss(*own: Tensor) -> Tensor:
        parts = transkd(own[:2], maps, own[2:], tokens, patch_weights=WEIGHTS, **words)
        return parts["map"] + parts["embedding"]

    free = list(drawn(2, 4, (2, 3), 2).values())
    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in free[::2] + free[1::2]])


@pytest.mark.parametrize("form", ["base", "gl", "ea"])
def test_gradcheck_through_the_layers(form: Any) -> None:
    student = {name: one.requires_grad_() for name, one in drawn(2, 4, (2, 4), 3).items()}
    options: dict[str, Any] = {"form": form, "middle": 3, "heads": 2, "patch_stride": 2}
    term, _, theirs = built(student, drawn(2, 4, (3, 5), 4), patch_weights=WEIGHTS, **options)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def loss(*free: Tensor) -> Tensor:
        signals = given_pixels(Signals(None, dict(zip(student, free, strict=True))), pixels)
        parts = term(signals, theirs, blank(pixels))
        total: Tensor = parts["map"] + parts["embedding"]
        return total

    assert torch.autograd.gradcheck(loss, list(student.values()), fast_mode=True)


# limits and identities


def test_equal_maps_and_embeddings_cost_nothing() -> None:
    given = list(drawn(2, 4, (2, 3), 0).values())
    for loss in ("hcl", "cwd"):
        parts = transkd(given[::2], given[::2], given[1::2], given[1::2], patch_weights=WEIGHTS, map_loss=loss)
        assert parts["map"].abs() < 1e-12
        assert parts["embedding"] == 0


def test_channelwise_distances_forget_what_is_added_to_a_channel() -> None:
    one, other = drawn(2, 4, (2,), 0), drawn(2, 4, (2,), 1)
    words: dict[str, Any] = {"patch_weights": [1.0], "map_loss": "cwd", "embedding_loss": "cwd"}
    goals = [other["stages[0]"]], [other["patch_embed[0]"]]
    maps, tokens = one["stages[0]"], one["patch_embed[0]"]
    before = transkd([maps], goals[0], [tokens], goals[1], **words)
    after = transkd([maps + torch.randn(2, 2, 1, 1)], goals[0], [tokens + torch.randn(2, 1, 2)], goals[1], **words)
    for part in ("map", "embedding"):
        torch.testing.assert_close(after[part], before[part])


def test_the_gate_is_a_softmax_over_two_branches() -> None:
    torch.manual_seed(0)
    fusion = Fusion(3, 4, 5, gated=True)
    mean = torch.randn(6, 4, 1, 1)
    hidden = fusion.fc(mean)
    both = torch.stack([fc(hidden) for fc in fusion.fcs], dim=1).softmax(dim=1)
    torch.testing.assert_close(fusion.gate(mean), both[:, 0])


def test_a_single_image_passes_the_gate_without_batch_norm() -> None:
    term = case().built()
    student, teacher = case().tensors()
    batch, (one, other) = case().rows(torch.tensor([2]), student, teacher)
    assert one is not None
    case().loss(term, one, other, batch).backward()
    for name, weight in term.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()) != name.startswith("skfs.1.fc."), name


def test_a_mixer_whose_scalars_are_zero_changes_nothing() -> None:
    mixer, tokens = Mixer(4, 2), torch.randn(2, 9, 4)
    assert not torch.equal(mixer(tokens), tokens)
    with torch.no_grad():
        for scalar in (mixer.attention, mixer.convolution):
            assert scalar.item() == 0.5
            scalar.zero_()
    assert torch.equal(mixer(tokens), tokens)


def test_the_assistants_shares_start_at_a_tenth_and_grow() -> None:
    term = case(form="ea", patch_stride=2).built()
    assert isinstance(term, TransKD)
    torch.testing.assert_close(term.shares.detach(), torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_models_of_different_depth_meet_at_the_end() -> None:
    student, teacher = drawn(2, 8, (2, 3, 4), 0), drawn(2, 4, (5, 6), 1)
    term, _, _ = built(student, teacher, patch_weights=WEIGHTS)
    assert term.maps == (("stages[1]", "stages[0]"), ("stages[2]", "stages[1]"))
    assert term.embeddings[0] == ("patch_embed[1]", "patch_embed[0]")


def test_gray_pixels_reach_the_assistant() -> None:
    term, student, _ = built(
        drawn(2, 4, (2, 3), 0), drawn(2, 4, (3, 4), 1), form="ea", patch_stride=2, patch_weights=WEIGHTS
    )
    gray = torch.randn(2, 1, 8, 8)
    found = (term.embed(given_pixels(student, seen)) for seen in (gray, gray.repeat(1, 3, 1, 1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    maps, tokens = torch.zeros(0, 2, 3, 3, requires_grad=True), torch.zeros(0, 9, 2, requires_grad=True)
    for words in ({}, {"map_loss": "cwd", "embedding_loss": "cwd"}):
        parts = transkd([maps], [maps.detach()], [tokens], [tokens.detach()], patch_weights=[1.0], **words)  # type: ignore[arg-type]
        assert parts["map"] == 0
        assert parts["embedding"] == 0
        assert torch.autograd.grad(parts["map"] + parts["embedding"], [maps, tokens])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ["hcl", "cwd"])
def test_half_precision_extremes(dtype: torch.dtype, loss: Any) -> None:
    student = torch.full((2, 3, 4, 4), 1e4, dtype=dtype)
    student[:, :, 0] = -1e4
    tokens = student.flatten(2).mT.contiguous()
    words: dict[str, Any] = {"map_loss": loss, "embedding_loss": "mse" if loss == "hcl" else "cwd"}
    free = student.requires_grad_(), tokens.detach().requires_grad_()
    parts = transkd([free[0]], [-student.detach()], [free[1]], [-free[1].detach()], patch_weights=[1.0], **words)
    total = parts["map"] + parts["embedding"]
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert all(one.isfinite().all() for one in torch.autograd.grad(total, free))


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "bas"}, "form 'bas' is not known; did you mean base?"),
        ({"map_loss": "hlc"}, "map_loss 'hlc' is not known; did you mean hcl?"),
        ({"embedding_loss": "mes"}, "embedding_loss 'mes' is not known; did you mean mse?"),
        ({"temperature": 0.0}, "temperature must be > 0, not 0.0"),
        ({"middle": 0}, "middle, heads and patch_stride are at least 1, not 0, 8 and 4"),
        (
            {"student_patches": "patch_embed"},
            "student_taps: expected a list of roles or module paths, not 'patch_embed'",
        ),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        TransKD(**options)


def changed(role: str, *shape: int) -> Tensors:
    return {**drawn(2, 4, (2, 3), 0), role: torch.zeros(shape, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("student", "options", "said"),
    [
        pytest.param(
            changed("stages[0]", 2, 2),
            {},
            "transkd compares maps [B, C, H, W], not [2, 2] and [2, 2, 4, 4]",
            id="vector",
        ),
        pytest.param(
            changed("stages[0]", 2, 2, 8, 8),
            {},
            "transkd compares maps of one grid: the student's is (8, 8), the teacher's (4, 4); "
            "tap layers of equal stride",
            id="grid",
        ),
        pytest.param(
            changed("patch_embed[1]", 2, 5, 3),
            {},
            "transkd compares patch embeddings [B, N, C] of equally many tokens, not [2, 5, 3] and [2, 4, 3]",
            id="tokens",
        ),
        pytest.param(
            drawn(2, 4, (2, 3), 0),
            {"patch_weights": (1.0,)},
            "patch_weights has 1 numbers, and 2 patch embeddings are compared: give one each",
            id="weights",
        ),
        pytest.param(
            drawn(2, 4, (2, 3), 0),
            {"form": "gl", "heads": 2},
            "transkd: the deepest embedding's width 3 has no 2 equal heads; set `heads`",
            id="heads",
        ),
        pytest.param(
            drawn(2, 4, (2, 3), 0),
            {"form": "ea", "student_taps": ["stages[0]"], "teacher_taps": ["stages[0]"]},
            "form ea: 1 stage maps for 2 patch embeddings; tap one each",
            id="stages",
        ),
    ],
)
def test_signals_that_do_not_fit(student: Tensors, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        built(student, drawn(2, 4, (2, 3), 1), **{"patch_weights": WEIGHTS, **options})


def test_a_wrong_stride_is_told() -> None:
    term, ours, theirs = built(drawn(2, 4, (2, 3), 0), drawn(2, 4, (2, 3), 1), form="ea", patch_weights=WEIGHTS)
    said = "form ea: an assistant makes 4 tokens where the embedding has 16; set `patch_stride` to the stride of the"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        term(given_pixels(ours, torch.zeros(2, 3, 8, 8)), theirs, blank(torch.zeros(2, 3, 8, 8)))


def test_shapes_that_would_broadcast() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    said = "transkd compares maps of one shape: the student's is [2, 1, 4, 4], the teacher's [2, 3, 4, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        transkd([maps[:, :1]], [maps], [], [], patch_weights=[])
