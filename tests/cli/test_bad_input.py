# SPDX-License-Identifier: Apache-2.0
"""Whatever a user gets wrong gives one clear line on standard error, exit code 2, and nothing half-written."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_recipe import MODEL, Told, metrics, recipe, tree, tutelage
from tutelage.tasks.classification import Classification
from tutelage.train import checkpoint

CAPSYS = pytest.CaptureFixture[str]
FLAGS = ["--student", "python:model.py:small", "--data", "digits", "--set", "train.epochs=0.1"]
TEACHER = ["--teacher", "python:model.py:small"]


def refused(capsys: CAPSYS, *arguments: str | Path) -> str:
    """Return the one line that a command says, having changed no file."""
    before = tree()
    told = tutelage(capsys, *arguments)
    assert tree() == before
    assert (told.code, told.out) == (2, [])
    assert len(told.err) == 1, told.err
    assert told.err[0].startswith("tutelage: ")
    return told.err[0].removeprefix("tutelage: ")


def stopped(told: Told) -> str:
    """Return the one line with which a run ended that had begun."""
    assert (told.code, told.out) == (2, [])
    assert [line.startswith("tutelage: ") for line in told.err].count(True) == 1
    assert not any("Traceback" in line for line in told.err)
    return told.err[-1].removeprefix("tutelage: ")


# --- what is asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("train", [], "give a recipe, or --student and --data (and --teacher): see tutelage distill --help"),
        ("train", ["nowhere"], "no recipe 'nowhere'; valid: "),
        ("train", ["tuor"], "no recipe 'tuor'; did you mean tour?"),
        ("train", ["tour.yml"], "no recipe 'tour.yml'; did you mean tour?"),
        ("distill", ["demo"], "recipe 'demo' is ambiguous: "),
        ("distill", ["kd/demo"], "kd/demo is not one run, but arms over seeds: give it to tutelage compare"),
        ("distill", FLAGS, "give a --teacher, or a --method that needs none; tutelage train is for a student alone"),
        ("distill", [*FLAGS, "--method", "mgd"], "--method mgd needs a --teacher"),
        ("distill", [*FLAGS, "--method", "uskd+mgd+kd"], "--method mgd+kd needs a --teacher"),
        ("distill", [*FLAGS, *TEACHER, "--method", "kdd"], "unknown method 'kdd'; did you mean kd?"),
        ("distill", [*FLAGS, *TEACHER, "--method", "uskd"], "--method uskd reads no teacher; leave --teacher out"),
        ("distill", ["tour", "--method", "kd"], "--method belongs to the quick form; a recipe has its objective"),
        ("train", [*FLAGS, "--set", "train.epohcs=3"], "command line: train.epohcs: unknown key; did you mean epochs?"),
        ("train", [*FLAGS, "--set", "trian.epochs=3"], "command line: trian: unknown key; did you mean train?"),
        ("train", [*FLAGS, "--set", "train.epochs"], "--set takes section.key=value, not 'train.epochs'"),
        ("train", [*FLAGS, "--set", "train.milestones=[1,"], "--set train.milestones=[1,: the value is not YAML"),
        ("train", [*FLAGS, "--set", "optimizer.mometum=1"], "optimizer.mometum: unknown option of adamw; valid: "),
        (
            "train",
            [*FLAGS, "--set", "optimizer.name=sdg"],
            "optimizer.name: unknown optimizer 'sdg'; did you mean sgd?",
        ),
        (
            "train",
            [*FLAGS, "--set", "task=clasification"],
            "task: unknown task 'clasification'; did you mean classification",
        ),
        (
            "train",
            [*FLAGS, "--set", "task.label_smothing=1"],
            "task.label_smothing: unknown option of classification; did you mean label_smoothing?",
        ),
        ("train", [*FLAGS, "--set", "train.device=gpu"], "device 'gpu' is not known to torch"),
        ("train", [*FLAGS, "--set", "train.device=cpu", "--set", "train.precision=fp16"], "precision fp16 needs a GPU"),
        ("train", [*FLAGS, "--set", "data.labels=5"], "data.labels must keep between 10 (one a class) and 1197, not 5"),
        ("train", [*FLAGS, "--out", "model.py"], "model.py is a file; choose another --out"),
        ("train", [*FLAGS, "--out", "."], ". is not empty and holds no run; choose another --out"),
    ],
)
def test_a_command(capsys: CAPSYS, verb: str, arguments: list[str], said: str) -> None:
    Path("model.py").write_text(MODEL)
    assert refused(capsys, verb, *arguments).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objektive": {}}, "tiny.yaml: objektive: unknown key; did you mean objective?"),
        ({"train.epohcs": 3}, "tiny.yaml: train.epohcs: unknown key; did you mean epochs?"),
        ({"train.epochs": 3}, "tiny.yaml: train: give the length once: epochs or steps"),
        ({"teacher.mode": "evil"}, "tiny.yaml: teacher.mode: 'evil' is not known; did you mean eval?"),
        ({"teacher.fit": {"trian": {}}}, "tiny.yaml: teacher.fit.trian: unknown key; did you mean train?"),
        ({"teacher.fit": {"train": {"epohcs": 1}}}, "teacher.fit: train.epohcs: unknown key; did you mean epochs?"),
        ({"teacher.fit": {"optimizer": {"beta": 1}}}, "teacher.fit: optimizer.beta: unknown option of adamw; did you"),
        ({"objective.kdd": 1.0}, "objective.kdd: unknown method 'kdd'; did you mean kd?"),
        ({"objective.kd.tempreature": 2}, "objective.kd.tempreature: unknown option of kd; did you mean temperature?"),
        ({"objective.kd.weigth": 2}, "objective.kd.weigth: unknown option of kd; did you mean weight?"),
        ({"objective.kd.form": "klx"}, "objective.kd.form: 'klx' is not known; did you mean kl?"),
        ({"objective.kd.temperature": 0}, "objective.kd: temperature must be > 0, not 0.0"),
        ({"objective.kd.weight": "much"}, "objective.kd.weight: a weight is a number or a schedule, not 'much'"),
        (
            {"objective.kd.weight": {"linaer": [0, 1]}},
            "objective.kd.weight: unknown word 'linaer' in a schedule; did you",
        ),
        ({"objective.task": "all"}, "objective.task: a weight is a number or a schedule, not 'all'"),
        ({"objective.kd.teacher": "techer"}, "objective.kd.teacher: no source 'techer'; did you mean teacher?"),
        ({"objective.kd.student": 3}, "objective.kd.student: should be the name of a source, not 3"),
        ({"objective": {"task": 1.0}}, "teacher: no term of the objective reads it; leave it out, or add a term"),
        ({"objective": {"task": 0.0}, "teacher": None}, "nothing learns: no loss with a weight reaches a parameter"),
        ({"teacher": None}, "objective.kd: KD needs a teacher, and none was given"),
        ({"student.model": "python:model.py:smal"}, "model.py has no function 'smal'; did you mean small?"),
        ({"student.model": "python:modle.py:small"}, "model 'python:modle.py:small': no file modle.py"),
        ({"student.widht": 3}, "model.py:small takes no 'widht'; did you mean width?"),
        ({"student.model": "tutelage:resnet9"}, "unknown model 'tutelage:resnet9'; did you mean resnet8?"),
        (
            {"student.model": "tutelge:resnet8"},
            "model 'tutelge:resnet8' is not known: write KIND:NAME; did you mean tut",
        ),
        ({"student.weights": "nowhere.pt"}, "weights: no file nowhere.pt"),
        ({"data.source": "digit"}, "data.source 'digit' is neither a folder nor a known kind; did you mean digits?"),
        ({"data.labelled_per_batch": 8}, "data.labelled_per_batch: the set holds no unlabelled sample"),
        ({"base": "nowhere"}, "tiny.yaml: base: no recipe 'nowhere'; valid: "),
        ({"base": "kd/demo"}, "tiny.yaml: base: 'kd/demo' has a base itself; one level only"),
    ],
)
def test_a_recipe(capsys: CAPSYS, changes: dict[str, Any], said: str) -> None:
    sections = {key: value for key, value in changes.items() if "." not in key}
    path = recipe({key: value for key, value in changes.items() if "." in key}, **sections)
    assert said in refused(capsys, "distill", path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a.yaml: a recipe is a mapping of sections"),
        (b"- a", "a.yaml: a recipe is a mapping of sections"),
        (b"student: a\ntrain: {}\nstudent: b", "a.yaml, line 3, column 1: key 'student' is written twice"),
        (b"train:\n\tepochs: 3", "a.yaml, line 2, column 1: found character '\\t' that cannot start any token"),
        (b"student: [a", "a.yaml, line 1, column 12: expected ',' or ']', but got '<stream end>'"),
        (b"student: a", "a.yaml: data: missing; train: missing"),
        (b"\xff\xfea", "a.yaml cannot be read: it is no text"),
    ],
)
def test_a_file(capsys: CAPSYS, content: bytes, said: str) -> None:
    Path("a.yaml").write_bytes(content)
    assert refused(capsys, "train", "a.yaml") == said


# --- what does not fit together ----------------------------------------------------------------------------


def test_a_method_that_cannot_read_the_models_roles(capsys: CAPSYS) -> None:
    flat = {"model": "python:model.py:flat"}
    said = "(objective: mgd): Flat has no role 'map'; its roles: pooled"
    assert refused(capsys, "distill", recipe(student=flat)) == f"student {said}"
    assert refused(capsys, "distill", recipe(teacher=flat)) == f"teacher {said}"
    tap = {"objective.mgd.student_tap": "layer1"}
    assert refused(capsys, "distill", recipe(tap)).startswith("student (objective: mgd): no module or role 'layer1' in")


def test_a_method_that_cannot_read_the_tasks_signals(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "logits", lambda task, output: None)
    said = refused(capsys, "distill", recipe())
    assert "(objective: kd" in said
    assert said.endswith("a term reads logits, and the task 'classification' has none")


def test_batch_norm_on_single_samples(capsys: CAPSYS) -> None:
    said = refused(capsys, "distill", recipe({"student.norm": True, "data.batch_size": 1}))
    assert said.startswith("batch norm cannot train on a batch of 1 here (")
    assert said.endswith("use a batch size of at least 2, or drop the last incomplete batch")


def test_weights_that_do_not_fit(capsys: CAPSYS) -> None:
    given = {"0.weight": torch.zeros(4, 1, 3, 3), "6.weigth": torch.zeros(10, 4), "6.bias": torch.zeros(11)}
    save_file(given, "other.safetensors")
    said = refused(capsys, "distill", recipe({"student.weights": "other.safetensors"}))
    for key in ("0.bias", "6.weight", "6.weigth", "6.bias is [11], not [10]"):
        assert key in said


def test_a_folder_that_belongs_to_another_recipe(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe({"train.steps": 2}), "--out", "run")
    changed = recipe({"train.steps": 3, "objective.kd.temperature": 2}, teacher={"model": "python:model.py:small"})
    assert refused(capsys, "distill", changed, "--out", "run") == (
        "run holds a run of another recipe (teacher.width was 6, objective.kd.temperature was absent, train.steps was "
        "2); choose another --out, or remove the folder"
    )


# --- what happens on the way -------------------------------------------------------------------------------


def test_a_loss_that_is_lost(capsys: CAPSYS) -> None:
    rate = {"decay": "multistep", "milestones": [0.4], "gamma": 1e28}  # an epoch has twelve steps
    settings = {"steps": 12, "log_every": 2, "save_every": "1 steps", **rate}
    wild = recipe(optimizer={"name": "sgd", "lr": 0.01}, objective={"task": 1.0}, teacher=None, train=settings)
    said = stopped(tutelage(capsys, "distill", wild, "--out", "run"))
    names = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert said == (
        f"the loss of task is not finite at step 7: lower optimizer.lr, clip gradients (train.clip), or "
        f"lower the weight of the term; the last finite checkpoint is run/checkpoints/{names[-1]}"
    )
    for name in names:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(f"run/checkpoints/{name}").values())
    assert not Path("run/student.safetensors").exists()
    assert not Path("run/result.json").exists()
    assert [line["step"] for line in metrics("run")] == [2, 4, 6]


def test_a_loss_that_is_lost_from_the_start(capsys: CAPSYS) -> None:
    wild = recipe({"optimizer.lr": 1e30})
    assert "not finite on the first batches" in refused(capsys, "distill", wild)


def half_run(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave a run that was stopped after its first checkpoint."""
    path = recipe({"train.save_every": "2 steps"})
    with monkeypatch.context() as patched:
        patched.setattr("tutelage.train.loop.Shelf.put", interrupted(after=1))
        assert tutelage(capsys, "distill", path, "--out", "run").code == 130
    return path


def interrupted(after: int) -> Any:
    """Return a `Shelf.put` that is interrupted once so many checkpoints lie there."""
    put = checkpoint.Shelf.put

    def puts(shelf: checkpoint.Shelf, step: int, state: Any) -> None:
        if len(shelf.paths()) == after:
            raise KeyboardInterrupt
        put(shelf, step, state)

    return puts


def test_a_damaged_checkpoint(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    path = half_run(capsys, monkeypatch)
    newest = Path("run/checkpoints/step_000000002.safetensors")
    newest.write_bytes(newest.read_bytes()[:-9])
    before = tree("run")
    said = stopped(tutelage(capsys, "distill", path, "--out", "run"))
    assert said.startswith(f"{newest} is damaged, or no checkpoint of this program (")
    assert said.endswith("remove it: the run goes on from the one before, or from the start")
    assert tree("run") == before
    newest.unlink()
    assert tutelage(capsys, "distill", path, "--out", "run").code == 0
    tutelage(capsys, "distill", path, "--out", "straight")
    assert Path("run/student.safetensors").read_bytes() == Path("straight/student.safetensors").read_bytes()
    assert metrics("run") == metrics("straight")


def test_a_checkpoint_that_does_not_fit(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    path = half_run(capsys, monkeypatch)
    newest = Path("run/checkpoints/step_000000002.safetensors")
    state = checkpoint.load(newest)
    weights = state["distiller"]
    weights["students.student.6.weigth"] = weights.pop("students.student.6.weight")
    weights["students.student.0.bias"] = torch.zeros(9)
    checkpoint.save(newest, state)
    before = tree("run")
    assert stopped(tutelage(capsys, "distill", path, "--out", "run")) == (
        f"{newest} does not fit: 1 missing (students.student.6.weight); 1 unknown (students.student.6.weigth); 1 of "
        "another shape (students.student.0.bias: [9], not [4])"
    )
    assert tree("run") == before


def test_a_truncated_line_of_metrics(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    path = half_run(capsys, monkeypatch)
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "to')
    assert tutelage(capsys, "distill", path, "--out", "run").code == 0
    assert [line["step"] for line in metrics("run", "train")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["recipe.yaml", "result.json"])
def test_a_damaged_record_of_a_run(capsys: CAPSYS, name: str) -> None:
    path = recipe()
    tutelage(capsys, "distill", path, "--out", "run")
    Path("run", name).write_text("{]")
    assert refused(capsys, "distill", path, "--out", "run").startswith(f"run/{name}")


def test_a_place_that_cannot_be_written(capsys: CAPSYS) -> None:
    path = recipe()
    said = refused(capsys, "distill", path, "--out", "model.py/run")
    assert said == "could not write model.py/run/recipe.yaml: Not a directory"


# --- a full disk -------------------------------------------------------------------------------------------


def test_a_disk_that_fills_at_a_checkpoint(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        if "000000004" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    path = recipe({"train.save_every": "2 steps"})
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fills)
        said = stopped(tutelage(capsys, "distill", path, "--out", "run"))
    full = Path("run/checkpoints/step_000000004.safetensors")
    assert said == f"could not write {full}: the disk is full; make room, then give the same command again"
    assert [file.name for file in full.parent.iterdir()] == ["step_000000002.safetensors"]
    assert tutelage(capsys, "distill", path, "--out", "run").code == 0
    tutelage(capsys, "distill", path, "--out", "straight")
    assert Path("run/student.safetensors").read_bytes() == Path("straight/student.safetensors").read_bytes()


def test_a_disk_that_is_really_full() -> None:
    """A run on a file system of 64 KiB, which its own checkpoints fill."""
    recipe({"student.width": 40}, train={"steps": 8, "save_every": "1 steps", "log_every": 1})
    Path("small").mkdir()
    run = "from tutelage.cli import main; main(['distill', 'tiny.yaml', '--out', 'small/run'])"
    script = (
        "mount -t tmpfs -o size=64k none small || exit 77\n"
        f'"{sys.executable}" -c "{run}"; code=$?\n'
        "find small -type f; exit $code"
    )
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=90,
        )
    except FileNotFoundError:
        pytest.skip("the system has no unshare")
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()[-80:]}")
    lines = done.stderr.splitlines()
    assert done.returncode == 2, lines
    assert [line for line in lines if line.startswith("tutelage: ")] == lines[-1:]
    assert lines[-1].startswith("tutelage: could not write small/run/")
    assert lines[-1].endswith(": the disk is full; make room, then give the same command again")
    assert not [name for name in done.stdout.splitlines() if "partial" in name or "student.safetensors" in name]
