# SPDX-License-Identifier: Apache-2.0
"""Arms over seeds, and the reports of what has run."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_recipe import Told, recipe, tree, tutelage
from tutelage.core.error import UserError
from tutelage.run.compare import asked

CAPSYS = pytest.CaptureFixture[str]


def compared(capsys: CAPSYS, *more: str) -> Told:
    path = recipe({"train.steps": 2}, objective={"task": 0.5, "kd": 0.5})
    return tutelage(capsys, "compare", path, "--methods", "kd", "--seeds", "0,1", "--out", "all", *more)


# --- compare -----------------------------------------------------------------------------------------------------


def test_the_student_alone_is_always_among_them(capsys: CAPSYS) -> None:
    told = compared(capsys)
    assert told.code == 0
    found = json.loads(Path("all/comparison.json").read_text())
    assert list(found["scores"]) == ["alone", "label smoothing", "kd"]
    assert all(set(scores) == {"0", "1"} for scores in found["scores"].values())
    assert found["runs"]["kd"] == {"0": "kd-0", "1": "kd-1"}
    (line,) = (line for line in told.err if line.startswith("kd, seed 1: top-1 accuracy "))
    assert line.endswith(" %")
    assert told.out[-1] == "all/report.html"
    for arm, scores in found["scores"].items():
        for seed, score in scores.items():
            result = json.loads(Path("all", found["runs"][arm][seed], "result.json").read_text())
            assert result["scores"]["top1"] == score


def test_labels_are_smoothed_where_the_task_can() -> None:
    for name, smoothed in (("kd/demo", True), ("skd/demo", True), ("pkd/demo", False), ("dwpose/demo", False)):
        (arms,) = asked([name], None, None, [])[0].values()
        assert ("label smoothing" in arms) == smoothed, name
        assert next(iter(arms)) == "alone"


def test_the_recipe_of_a_run_is_called_after_its_folder(capsys: CAPSYS) -> None:
    path = recipe({"train.steps": 1}, objective={"task": 0.5, "kd": 0.5})
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text(Path(path).read_text())
    assert tutelage(capsys, "compare", "mine/recipe.yaml", "--methods", "kd", "--seeds", "0", "--quiet").code == 0
    found = json.loads(Path("runs/compare-mine/comparison.json").read_text())
    assert found["title"] == "mine: 3 ways to train one student"


def test_arms_of_one_seed_begin_alike_and_seeds_differ(capsys: CAPSYS) -> None:
    compared(capsys, "--set", "optimizer.lr=1e-12", "--quiet")
    states = {name: load_file(f"all/{name}/student.safetensors") for name in ("alone-0", "kd-0", "kd-1")}
    assert torch.allclose(states["alone-0"]["0.weight"], states["kd-0"]["0.weight"], atol=1e-6)
    assert not torch.allclose(states["kd-0"]["0.weight"], states["kd-1"]["0.weight"], atol=1e-2)


def test_what_has_run_is_not_run_again(capsys: CAPSYS) -> None:
    first = compared(capsys, "--json").document
    before = {name: text for name, text in tree("all").items() if name.endswith(("metrics.jsonl", "safetensors"))}
    Path("all/kd-1/result.json").unlink()  # as if it had been stopped
    Path("all/comparison.json").unlink()
    second = compared(capsys, "--json").document
    assert first["scores"] == second["scores"]
    after = tree("all")
    assert all(after[name] == text for name, text in before.items())


def test_a_fault_of_one_arm_shows_before_any_trains(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "compare", recipe(), "--methods", "kd,mdg", "--out", "all")
    assert (told.code, told.err) == (2, ["tutelage: unknown method 'mdg'; did you mean mgd?"])
    flat = recipe(student={"model": "python:model.py:flat"})
    told = tutelage(capsys, "compare", flat, "--methods", "kd,mgd", "--out", "all")
    assert told.code == 2
    assert told.err[0].startswith("tutelage: arm 'mgd': ")
    assert "Flat has no role 'map'" in told.err[0]
    assert not Path("all").exists()


def test_methods_over_pairs_make_a_grid(capsys: CAPSYS) -> None:
    printed = {"kd": {"top1": 70.7}}
    path = recipe({"train.steps": 2}, "round.yaml", expected=printed)
    flat = recipe({"train.steps": 2}, "flat.yaml", expected=printed, student={"model": "python:model.py:flat"})
    told = tutelage(capsys, "compare", path, flat, "--methods", "kd,mgd", "--seeds", "0,1", "--out", "all")
    assert told.code == 0
    rows = [tuple(line.split()[:2]) for line in told.out if line.split()[:1] in (["round"], ["flat"])]
    assert rows[:7] == [
        *(("round", arm) for arm in ("alone", "label", "kd", "mgd")),
        *(("flat", arm) for arm in ("alone", "label", "kd")),
    ]
    assert "mgd does not fit flat: student (objective: mgd): Flat has no role 'map'" in " ".join(told.out)
    found = {pair: json.loads(Path(f"all/{pair}/comparison.json").read_text()) for pair in ("round", "flat")}
    assert list(found["round"]["scores"]) == ["alone", "label smoothing", "kd", "mgd"]
    assert (list(found["flat"]["left_out"]), found["round"]["left_out"]) == (["mgd"], {})
    assert found["flat"]["published"]["kd"] == pytest.approx(0.707)
    first = Path("all/report.html").read_text()
    Path("all/report.html").unlink()
    assert tutelage(capsys, "report", "all").out == ["all/report.html"]
    assert re.sub(r"\d", "0", Path("all/report.html").read_text()) == re.sub(r"\d", "0", first)
    assert [*tutelage(capsys, "report", "all", "--json").document["pairs"]] == ["round", "flat"]
    assert sum("| kd " in line for line in tutelage(capsys, "report", "all", "--to", "markdown").out) == 2
    Path("all/flat/comparison.json").unlink()
    assert tutelage(capsys, "report", "all").err[0].startswith("tutelage: all/flat/comparison.json")  # not the grid's
    Path("all/grid.json").write_text("{}")
    assert tutelage(capsys, "report", "all").err[0].startswith("tutelage: all/grid.json is damaged ('pairs')")


def test_recipes_of_one_name_are_called_after_their_folders() -> None:
    assert [*asked(["kd/demo", "mgd/demo"], "kd", "0", [])[0]] == ["kd-demo", "mgd-demo"]
    for name in ("one/x", "two/x"):
        Path(name).mkdir(parents=True)
        recipe(name=f"{name}/a.yaml")
    with pytest.raises(UserError, match=re.escape("not one/x/a.yaml, two/x/a.yaml")):
        asked(["one/x/a.yaml", "two/x/a.yaml"], "kd", "0", [])


@pytest.mark.parametrize(("seeds", "said"), [("a", "--seeds takes numbers"), ("0,x", "--seeds takes numbers")])
def test_seeds_are_numbers(capsys: CAPSYS, seeds: str, said: str) -> None:
    told = tutelage(capsys, "compare", recipe(), "--methods", "kd", "--seeds", seeds)
    assert told.code == 2
    assert said in told.err[0]


# --- report ------------------------------------------------------------------------------------------------------


def test_the_page_of_a_comparison_is_written_again(capsys: CAPSYS) -> None:
    compared(capsys, "--quiet")
    page = Path("all/report.html")
    before = page.read_text()
    page.write_text("lost")
    assert tutelage(capsys, "report", "all").out == ["all/report.html"]
    assert re.sub(r"\d", "0", page.read_text()) == re.sub(r"\d", "0", before)


def test_the_page_of_a_run_is_written_again(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe(), "--out", "run")
    page = Path("run/report.html")
    before = page.read_text()
    page.unlink()
    assert tutelage(capsys, "report", "run").out == ["run/report.html"]
    assert page.read_text() == before
    for word in ("agreement with the teacher", "Class by class", "top-1 accuracy"):
        assert word in before


@pytest.mark.parametrize(("form", "line"), [("markdown", "| kd "), ("latex", r"\begin{tabular}"), ("html", "<table>")])
def test_tables_for_a_paper(capsys: CAPSYS, form: str, line: str) -> None:
    compared(capsys, "--quiet")
    Path("all/report.html").unlink()
    told = tutelage(capsys, "report", "all", "--to", form)
    assert told.code == 0
    assert any(line in one for one in told.out)
    assert not Path("all/report.html").exists()  # printed, not written
    told = tutelage(capsys, "report", "all/kd-0", "--to", form)
    assert "agreement with the teacher" in "\n".join(told.out)


def test_reports_as_data(capsys: CAPSYS) -> None:
    compared(capsys, "--quiet")
    assert tutelage(capsys, "report", "all", "--json").document["metric"] == "top1"
    assert tutelage(capsys, "report", "all/kd-1", "--json").document["metric"] == "top1"


def test_reports_of_nothing(capsys: CAPSYS) -> None:
    assert tutelage(capsys, "report", "nowhere").err == [
        "tutelage: nowhere holds neither a finished run nor a comparison"
    ]
    tutelage(capsys, "train", recipe(), "--out", "run")
    told = tutelage(capsys, "report", "run", "--to", "word")
    assert (told.code, told.err) == (2, ["tutelage: --to 'word' is not known; valid: html, latex, markdown"])
    Path("run/result.json").write_text('{"scores": {}}')
    assert tutelage(capsys, "report", "run").err[0].startswith("tutelage: run/result.json is damaged")
    Path("all").mkdir()
    Path("all/comparison.json").write_text("{}")
    assert tutelage(capsys, "report", "all").err[0].startswith("tutelage: all/comparison.json is damaged ('scores')")


def test_arms_that_do_not_fit_together_are_told_of_the_way_out(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("tutelage.train.loop.Loop.running", full)
    told = compared(capsys)
    said = "tutelage: 3 arms side by side do not fit into memory: --apart runs one after another"
    assert (told.code, told.err[-1]) == (2, said)
    with pytest.raises(torch.OutOfMemoryError):
        compared(capsys, "--apart")


def test_one_after_another_gives_the_same(capsys: CAPSYS) -> None:
    together = compared(capsys, "--json").document
    Path("all").rename("before")
    apart = compared(capsys, "--json", "--apart").document
    assert apart["scores"] == together["scores"]
    for name in ("kd-0", "kd-1"):
        one, other = (load_file(f"{place}/{name}/student.safetensors") for place in ("all", "before"))
        assert all(torch.equal(one[key], other[key]) for key in one)
