# SPDX-License-Identifier: Apache-2.0
"""Language recipes from the command's functions down: every method trains, resumes to the same bits, is scored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_text import BERT, GPT2
from tutelage.core.error import UserError
from tutelage.models.load import load
from tutelage.report.metric import Metric
from tutelage.run.assemble import assemble
from tutelage.run.check import check
from tutelage.run.distill import distill
from tutelage.run.evaluate import evaluate
from tutelage.run.export import export
from tutelage.run.inspect import inspect
from tutelage.run.recipe import Recipe, parse

CAUSAL = {"model": "hf:gpt2", **GPT2}
MASKED = {"model": "hf:bert", **BERT}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "distillm": (CAUSAL, {"task": 1.0, "distillm": 1.0}),
    "gkd": (CAUSAL, {"task": 0.0, "gkd": {"weight": 1.0, "feeder": {"new_tokens": 4}}}),
    "minillm": (CAUSAL, {"task": 0.5, "minillm": {"weight": 1.0, "feeder": {"new_tokens": 4, "repeats": 3}}}),
    "distilbert": (MASKED, {"task": 2.0, "distilbert": 1.0}),
    "tinybert": (MASKED, {"task": 1.0, "tinybert": {"weight": 1.0, "heads": 2}}),
    "minilm": (MASKED, {"task": 1.0, "minilm": {"weight": 1.0, "relation_heads": 2}}),
}


@pytest.fixture(autouse=True)
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 40, encoding="utf-8")


def tiny(method: str, **train: Any) -> Recipe:
    network, objective = OBJECTIVES[method]
    text = {"length": 16, **({"masking": 0.2} if network is MASKED else {})}
    return parse(
        {
            "task": "language",
            "teacher": {**network, "fit": {"train": {"steps": 2}}},
            "student": network,
            "data": {"source": "text:book.txt", "batch_size": 4, "text": text},
            "objective": objective,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "train": {"steps": 4, "save_every": "2 steps", "log_every": 1, **train},
        }
    )


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_resumed_run_ends_with_the_same_bits(method: str) -> None:
    recipe = tiny(method)
    whole = distill(recipe, Path("whole"), quiet=True)
    distill(recipe, Path("part"), quiet=True)
    for name in ("result.json", "student.json", "student.safetensors", "checkpoints/step_000000004.safetensors"):
        Path("part", name).unlink()
    resumed = distill(recipe, Path("part"), quiet=True)
    assert resumed.scores == whole.scores
    assert resumed.student is not None
    assert whole.student is not None
    state = resumed.student.module.state_dict()
    for name, tensor in whole.student.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert Metric.of("perplexity").higher is False
    assert evaluate(Path("whole"))["perplexity"] == pytest.approx(whole.scores["perplexity"])
    inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    assert torch.equal(load("run:whole")(inputs), whole.student(inputs))
    assert "perplexity" in Path("whole/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["distillm", "minillm"])
def test_gradient_accumulation_runs(method: str) -> None:
    found = distill(tiny(method, steps=2, save_every=None, accumulate=2), Path("run"), quiet=True)
    assert found.scores["perplexity"] < 259


def test_a_teacher_of_another_vocabulary() -> None:
    recipe = tiny("distillm").model_dump(mode="json")
    recipe["teacher"] = {**CAUSAL, "vocab_size": 100}
    with pytest.raises(
        UserError, match=r"^hf:gpt2 reads 100 tokens, the data has 259: teacher, student and data need one"
    ):
        distill(parse(recipe), Path("run"), quiet=True)


def test_a_teacher_of_images() -> None:
    recipe = tiny("distillm").model_dump(mode="json")
    recipe["teacher"] = {"model": "tutelage:resnet8"}
    with pytest.raises(UserError, match=r"^model 'tutelage:resnet8' takes images, and the data is text"):
        distill(parse(recipe), Path("run"), quiet=True)


def test_a_task_of_classes_on_text() -> None:
    recipe = tiny("distillm").model_dump(mode="json")
    recipe |= {"task": {"name": "classification"}, "teacher": None, "objective": {"task": 1.0}}
    with pytest.raises(UserError):
        distill(parse(recipe), Path("run"), quiet=True)


def test_texts_of_language_on_images() -> None:
    recipe = tiny("distillm").model_dump(mode="json")
    recipe |= {"teacher": None, "objective": {"task": 1.0}, "student": {"model": "tutelage:resnet8"}}
    recipe["data"] = {"source": "digits"}
    with pytest.raises(UserError, match=r"^language needs a target \[B, L\] for logits \[B, L, V\]"):
        distill(parse(recipe), Path("run"), quiet=True)


def test_a_student_of_text_is_inspected_and_exported() -> None:
    distill(tiny("distillm", steps=1, save_every=None), Path("run"), quiet=True)
    found = inspect("run:run")
    assert found.takes == "16 tokens of 259, next token"
    assert found.gives == (1, 16, 259)
    assert found.roles["q[0]"].shape == (1, 16, 8)
    assert export(Path("run"), "safetensors").path.exists()
    with pytest.raises(UserError, match=r"^a language model is not exported as onnx yet: choose safetensors$"):
        export(Path("run"), "onnx")
    with pytest.raises(
        UserError, match=r"^GPT2LMHeadModel reads tokens, `input_ids` and `attention_mask`, and no pixels$"
    ):
        load("run:run")(torch.zeros(1, 3, 8, 8))


def test_a_check_says_what_the_models_read() -> None:
    made = assemble(tiny("gkd").model_copy(update={"teacher": None, "objective": {"task": 1.0}}))
    assert check(made).inputs == {"student": "16 tokens of 259, next token"}
