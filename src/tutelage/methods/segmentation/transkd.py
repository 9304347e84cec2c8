# SPDX-License-Identifier: Apache-2.0
"""Match a segmentation transformer's stage maps and its patch embeddings.

The student's maps are joined from the deepest stage upward by gates over channels before they are compared; its patch
embeddings go through a linear layer. Two further forms mix global and local views into the deepest embedding, or give
every embedding an assistant. The released mixer starts from uninitialised memory; here its two scalars start at 0.5.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge, check_grid, check_maps, check_statistics, fusion_layers
from tutelage.core.error import UserError, nearest
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import channelwise_divergence, hierarchical_distance, mean_square

CARD = Card(
    name="TransKD",
    title="TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation",
    authors="Liu, Yang, Roitberg, Zhang, Peng, Liu, Wang, Stiefelhagen",
    year=2022,
    venue="IEEE Transactions on Intelligent Transportation Systems",
    paper="arxiv:2202.13393",
    code="github:RuipingL/TransKD@39ab795",
    code_licence=None,
    claims="Maps and patch embeddings together replace the pre-training of small segmentation transformers.",
    reads={"student": ("stages[*]", "patch_embed[*]"), "teacher": ("stages[*]", "patch_embed[*]")},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("vision/transkd_base", "vision/transkd_gl_ea"),
)

OBJECTIVE = {"task": 1.0, "transkd": {"weight": 1.0}}

Form = Literal["base", "gl", "ea"]
MapLoss = Literal["hcl", "cwd"]
EmbeddingLoss = Literal["mse", "cwd"]
WORDS = {"form": Form, "map_loss": MapLoss, "embedding_loss": EmbeddingLoss}
HIDDEN, REDUCTION = 32, 16  # width of a gate: the middle width / 16, at least 32
MIXER_START = 0.5  # of the mixer's two scalars
PIXEL_CHANNELS = 3
ASSISTANT_STEP = 0.1  # the assistant's scalars start at 0.1, 0.2, ...


@full_precision
def transkd(
    fused_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    teacher_embeddings: Sequence[Tensor],
    *,
    patch_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0),
    map_loss: MapLoss = "hcl",
    embedding_loss: EmbeddingLoss = "mse",
    temperature: float = 1.0,
    keep: Sequence[Tensor | None] = (),
    keep_tokens: Sequence[Tensor | None] = (),
) -> dict[str, Tensor]:
    """Return the distances of stage maps and of patch embeddings.

        map       = sum_i HCL(s_i, t_i)                       or  sum_i CWD(s_i, t_i)
        embedding = sum_i w_i mean( (e_i(s) - e_i(t))^2 )     or  sum_i w_i CWD(e_i(s), e_i(t))
        CWD(a, b) = T^2 / (B C) sum_bc KL( softmax_p(b_bc / T) || softmax_p(a_bc / T) )

    with HCL the mean squared distance at several scales and p the positions of a map or the tokens.

    Convention:
        - KL runs from teacher to student; no gradient is asked of the teacher
        - averaged over everything in a stage, summed over stages

    Args:
        fused_maps: `[B, C, H, W]` a stage, the student's after fusion; any float dtype, compared in float32 or wider.
        teacher_maps: `[B, C, H, W]` a stage.
        embeddings: `[B, N, C]` a stage, the student's after its linear layers.
        teacher_embeddings: `[B, N, C]` a stage.
        patch_weights: w_i, one a stage.
        map_loss: `hcl`, or `cwd` (channel-wise distillation).
        embedding_loss: `mse`, or `cwd`.
        temperature: of `cwd`, > 0.
        keep: `[B, H, W]` bool a stage, the places that are compared; None, or nothing at all, keeps all.
        keep_tokens: `[B, N]` bool a stage, the same of embeddings.

    Returns:
        `map` and `embedding`: scalars, float32 or wider; their sum is the loss. Without rows connected zeros.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> ones, zeros = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> parts = transkd([ones], [zeros], [ones[0]], [zeros[0]], patch_weights=[0.5])
        >>> parts["map"], parts["embedding"]
        (tensor(1.), tensor(0.5000))

    Reference: Liu et al., TransKD, IEEE T-ITS 2024 (arXiv 2022).
    """
    maps = [_alike(one, other, "maps") for one, other in zip(fused_maps, teacher_maps, strict=True)]
    tokens = [_alike(one, other, "embeddings") for one, other in zip(embeddings, teacher_embeddings, strict=True)]
    places, spots = keep or [None] * len(maps), keep_tokens or [None] * len(tokens)
    if map_loss == "hcl":
        levels = [hierarchical_distance(*pair, left) for pair, left in zip(maps, places, strict=True)]
    else:
        levels = [_channelwise(*pair, temperature, left) for pair, left in zip(maps, places, strict=True)]
    if embedding_loss == "mse":
        apart = [mean_square((one - other).mT, left) for (one, other), left in zip(tokens, spots, strict=True)]
    else:
        apart = [
            _channelwise(one.mT, other.mT, temperature, left) for (one, other), left in zip(tokens, spots, strict=True)
        ]
    weighted = [weight * value for weight, value in zip(patch_weights, apart, strict=True)]
    return {"map": torch.stack(levels).sum(), "embedding": torch.stack(weighted).sum()}


def _alike(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise UserError(
            f"transkd compares {what} of one shape: the student's is {list(student.shape)}, "
            f"the teacher's {list(teacher.shape)}"
        )
    return student, teacher


def _channelwise(student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None) -> Tensor:
    rows = channelwise_divergence(student, teacher, temperature, keep)
    return rows.sum() / max(rows.numel(), 1)


class Fusion(nn.Module):
    """One stage of the selective fusion: joins the student's map with what the deeper stages made.

    Args:
        width: of the student's map.
        middle: of what is handed upward.
        goal: width of the teacher's map.
        gated: whether there is a deeper stage.
    """

    def __init__(self, width: int, middle: int, goal: int, gated: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = fusion_layers(width, middle, goal)
        self.gated = gated
        if gated:
            hidden = max(middle // REDUCTION, HIDDEN)
            self.fc = nn.Sequential(nn.Conv2d(middle, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
            self.fc1 = nn.Sequential(nn.Conv2d(middle, hidden, 1, bias=False), nn.ReLU())
            self.fcs = nn.ModuleList(nn.Conv2d(hidden, middle, 1) for _ in range(2))

    def forward(self, student_map: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the fused map at the teacher's width, and what is handed upward."""
        check_statistics(student_map.narrow(1, 0, 1), self.training, "transkd")
        joined = self.conv1(student_map)
        if self.gated and deeper is not None:
            deeper = F.interpolate(deeper, joined.shape[2:], mode="nearest")
            gate = self.gate((joined + deeper).mean((2, 3), keepdim=True))
            joined = gate * joined + (1 - gate) * deeper
        return self.conv2(joined), joined

    def gate(self, mean: Tensor) -> Tensor:
        """Return the share of the stage's own map: the softmax over both branches, of two a sigmoid."""
        if len(mean) > 1:
            hidden, idle = self.fc(mean), (self.fc1,)
        else:  # batch norm has no variance of one value
            hidden, idle = self.fc1(mean), (self.fc,)
        own, other = (fc(hidden) for fc in self.fcs)
        # what did not run stays connected: processes wait for the gradient of every weight
        zero = sum(0.0 * weight.sum() for part in idle for weight in part.parameters())
        return torch.sigmoid(own - other + zero)


class Mixer(nn.Module):
    """Global and local views of an embedding: attention over its tokens, and a gated convolution along them.

    Args:
        width: of the embedding.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"transkd: the deepest embedding's width {width} has no {heads} equal heads; set `heads`")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.conv1, self.conv2 = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.attention, self.convolution = (nn.Parameter(torch.full((1,), MIXER_START)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a [B, N, C] embedding with both views added."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        along = tokens.mT
        gated = (self.conv1(along) * torch.sigmoid(self.conv2(along))).mT
        mixed: Tensor = self.attention * seen + self.convolution * gated + tokens
        return mixed


class Patches(nn.Module):
    """An overlapping patch embedding of its own: a convolution of stride s and kernel 2 s - 1, then a layer norm.

    Args:
        width: of the input.
        goal: of the embedding.
        stride: s.
    """

    def __init__(self, width: int, goal: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, goal, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(goal)

    def forward(self, given: Tensor) -> Tensor:
        """Return `[B, N, C]` tokens of a `[B, C, H, W]` map."""
        tokens: Tensor = self.norm(self.proj(given).flatten(2).mT)
        return tokens


@final
class TransKD(Term):
    """Term form of :func:`transkd`: selective fusion of the maps, linear layers for the embeddings.

    Args:
        form: `base`; `gl`, the deepest embedding through a mixer of global and local views; `ea`, every embedding
            with an assistant that embeds the stage's input at the teacher's width.
        patch_weights: see :func:`transkd`, from shallow to deep.
        map_loss: see :func:`transkd`.
        embedding_loss: see :func:`transkd`.
        temperature: see :func:`transkd`.
        middle: width of what the fusions hand on.
        heads: of the mixer's attention.
        patch_stride: of the first patch embedding, for the assistant.
        student_taps: stage maps of the student, from shallow to deep.
        teacher_taps: stage maps of the teacher, on the same grids.
        student_patches: patch embeddings of the student, from shallow to deep.
        teacher_patches: patch embeddings of the teacher.
        pixel_tap: pixels as the student's first patch embedding is given them, for the assistant; the further ones
            see the student's maps.
    """

    def __init__(
        self,
        *,
        form: Form = "base",
        patch_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0),
        map_loss: MapLoss = "hcl",
        embedding_loss: EmbeddingLoss = "mse",
        temperature: float = 1.0,
        middle: int = 64,
        heads: int = 8,
        patch_stride: int = 4,
        student_taps: Places = ("stages[*]",),
        teacher_taps: Places = ("stages[*]",),
        student_patches: Places = ("patch_embed[*]",),
        teacher_patches: Places = ("patch_embed[*]",),
        pixel_tap: str | Mapping[str, Any] | Tap = "patch_embed[0].pre",
    ) -> None:
        super().__init__()
        for name, given in (("form", form), ("map_loss", map_loss), ("embedding_loss", embedding_loss)):
            if given not in get_args(WORDS[name]):
                raise UserError(f"{name} {given!r} is not known{nearest(str(given), get_args(WORDS[name]))}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if min(middle, heads, patch_stride) < 1:
            raise UserError(f"middle, heads and patch_stride are at least 1, not {middle}, {heads} and {patch_stride}")
        self.form: Form = form
        self.map_loss: MapLoss = map_loss
        self.embedding_loss: EmbeddingLoss = embedding_loss
        self.temperature, self.middle, self.heads = temperature, middle, heads
        self.patch_weights, self.patch_stride = tuple(patch_weights), patch_stride
        self.layers = Layers.parse(student_taps, teacher_taps)
        self.tokens = Layers.parse(student_patches, teacher_patches)
        self.pixels: tuple[Tap, ...] = (Tap.parse(pixel_tap),) if form == "ea" else ()

    @property
    def reads(self) -> Reads:
        """Stage maps and patch embeddings of both models, and for the form `ea` the student's pixels."""
        student = self.layers.student + self.tokens.student + self.pixels
        return Reads(student, self.layers.teacher + self.tokens.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the fusions, the linear layers, and what the form adds.

        Raises:
            UserError: if a tap is no map or no embedding, if grids or numbers of tokens differ, or if the weights
                are not one a stage.
        """
        assert teacher is not None
        self.maps, self.embeddings = self.layers.pairs(student, teacher), self.tokens.pairs(student, teacher)
        if len(self.patch_weights) != len(self.embeddings):
            raise UserError(
                f"patch_weights has {len(self.patch_weights)} numbers, and {len(self.embeddings)} patch embeddings "
                "are compared: give one each"
            )
        maps = [(student[one], teacher[other]) for one, other in self.maps]
        tokens = [(student[one], teacher[other]) for one, other in self.embeddings]
        for one, other in maps:
            check_maps(one, other, "transkd")
            check_grid(one, other, "transkd")
        for one, other in tokens:
            if one.ndim != 3 or other.ndim != 3 or one.shape[1] != other.shape[1]:
                raise UserError(
                    f"transkd compares patch embeddings [B, N, C] of equally many tokens, not {list(one.shape)} and "
                    f"{list(other.shape)}"
                )
        deep = enumerate(reversed(maps))
        self.skfs = nn.ModuleList(
            Fusion(one.shape[1], self.middle, other.shape[1], number > 0).to(one.device)
            for number, (one, other) in deep
        )
        self.linears = nn.ModuleList(bridge(one, other, always=True) for one, other in tokens)
        if self.form == "gl":
            self.mixer = Mixer(tokens[-1][0].shape[2], self.heads).to(tokens[-1][0].device)
        if self.form == "ea":
            if len(maps) != len(tokens):
                raise UserError(f"form ea: {len(maps)} stage maps for {len(tokens)} patch embeddings; tap one each")
            widths = (PIXEL_CHANNELS, *(one.shape[1] for one, _ in maps[:-1]))
            steps = (round(one.shape[2] / after.shape[2]) for (one, _), (after, _) in pairwise(maps))
            self.patches = nn.ModuleList(
                Patches(width, other.shape[2], stride).to(other.device)
                for width, (_, other), stride in zip(widths, tokens, (self.patch_stride, *steps), strict=True)
            )
            shares = ASSISTANT_STEP * torch.arange(1.0, 2 * len(tokens) + 1)
            self.shares = nn.Parameter(shares.to(tokens[0][0].device))

    def fuse(self, student: Signals) -> list[Tensor]:
        """Return the student's fused maps, from shallow to deep."""
        fused: list[Tensor] = []
        handed: Tensor | None = None
        for fusion, (name, _) in zip(self.skfs, reversed(self.maps), strict=True):
            out, handed = fusion(student[name], handed)
            fused.insert(0, out)
        return fused

    def embed(self, student: Signals) -> list[Tensor]:
        """Return the student's embeddings at the teacher's widths."""
        tokens = [student[name] for name, _ in self.embeddings]
        if self.form == "gl":
            tokens[-1] = self.mixer(tokens[-1])
        projected: list[Tensor] = [linear(own) for linear, own in zip(self.linears, tokens, strict=True)]
        if self.form != "ea":
            return projected
        maps = [student[name] for name, _ in self.maps[:-1]]
        pixels = student[self.pixels[0].name].expand(-1, PIXEL_CHANNELS, -1, -1)
        inputs = [pixels.to(tokens[0].dtype), *maps]
        assistants = [patches(given) for patches, given in zip(self.patches, inputs, strict=True)]
        for own, other in zip(projected, assistants, strict=True):
            if own.shape != other.shape:
                raise UserError(
                    f"form ea: an assistant makes {other.shape[1]} tokens where the embedding has {own.shape[1]}; "
                    "set `patch_stride` to the stride of the first patch embedding"
                )
        count = len(projected)
        return [
            self.shares[number] * own + self.shares[number + count] * other
            for number, (own, other) in enumerate(zip(projected, assistants, strict=True))
        ]

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `map` and `embedding`."""
        maps = [teacher[name] for _, name in self.maps]
        tokens = [teacher[name] for _, name in self.embeddings]
        grids = {height * width: (height, width) for height, width in (one.shape[2:] for one in maps)}
        return transkd(
            self.fuse(student),
            maps,
            self.embed(student),
            tokens,
            patch_weights=self.patch_weights,
            map_loss=self.map_loss,
            embedding_loss=self.embedding_loss,
            temperature=self.temperature,
            keep=[known(batch, one) for one in maps],
            keep_tokens=[known(batch, one, grids.get(one.shape[1])) for one in tokens],
        )
