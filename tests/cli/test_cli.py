# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_recipe import metrics, recipe, tutelage
from tutelage.cli import app, verbs
from tutelage.train.loop import Loop

CAPSYS = pytest.CaptureFixture[str]
HEAVY = ("torch", "timm", "torchvision", "matplotlib", "sklearn")


@pytest.mark.parametrize("arguments", [["--help"], ["methods"]])
def test_reading_does_not_load_torch_and_takes_less_than_half_a_second(arguments: list[str]) -> None:
    program = (
        "import sys, time; begun = time.process_time()\n"
        "from tutelage.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert not end.code\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(time.process_time() - begun, *loaded, file=sys.stderr)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    waited = time.perf_counter() - begun
    seconds, *loaded = done.stderr.split()
    assert loaded == []
    assert float(seconds) < 0.5, f"{seconds} s of work, {waited:.2f} s on the clock"
    assert len(done.stdout.splitlines()) > 5


def test_every_file_is_a_verb_with_help_and_json(capsys: CAPSYS) -> None:
    assert {"demo", "distill", "evaluate", "methods", "train"} <= set(verbs())
    assert [command.name for command in app.registered_commands] == verbs()
    for verb in verbs():
        told = tutelage(capsys, verb, "--help")
        assert told.code == 0
        assert told.out[0].startswith(f"Usage: tutelage {verb} ")
        assert any("--json" in line for line in told.out), verb


def test_help_names_every_verb_in_a_whole_sentence(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "--help")
    listed = told.out[told.out.index("Commands:") + 1 :]
    assert [line.split()[0] for line in listed if line[2] != " "] == verbs()
    assert "..." not in "".join(listed)
    assert tutelage(capsys).out == told.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distil"], "no such command 'distil'; did you mean 'distill'?"),
        (["--nope"], "no such option: --nope; see tutelage --help"),
        (["methods", "kd", "mgd"], "got unexpected extra argument(s) (mgd); see tutelage methods --help"),
        (["evaluate"], "missing argument 'run'; see tutelage evaluate --help"),
        (["train", "--student"], "option '--student' requires an argument"),
    ],
)
def test_a_call_that_does_not_fit_is_one_line(capsys: CAPSYS, arguments: list[str], said: str) -> None:
    told = tutelage(capsys, *arguments)
    assert (told.code, told.out, told.err) == (2, [], [f"tutelage: {said}"])


def test_an_interrupt_says_how_to_go_on(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tutelage(capsys, "distill", recipe({"train.save_every": "1 steps"}), "--out", "straight")
    step = Loop.step

    def interrupted(loop: Loop, batches: object) -> object:
        if loop.distiller.step == 2:
            raise KeyboardInterrupt
        return step(loop, batches)  # type: ignore[arg-type]

    command = ["distill", "tiny.yaml", "--out", "cut"]
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "step", interrupted)
        told = tutelage(capsys, *command)
    assert told.code == 130
    assert told.out == []
    assert told.err[-1] == "tutelage: stopped; the command of a run, given again, goes on from its last checkpoint"
    assert tutelage(capsys, *command).out[:-2] == straight.out[:-2]
    assert metrics("cut") == metrics("straight")


def test_an_error_of_ours_keeps_its_traceback(capsys: CAPSYS) -> None:
    path = recipe(student={"model": "python:model.py:crashes"}, teacher=None, objective={"task": 1.0})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        tutelage(capsys, "distill", path)
    assert not Path("runs/tiny/student.safetensors").exists()


def test_a_crash_exits_with_one() -> None:
    program = (
        "from tutelage import methods; methods.catalogue = lambda: 1 / 0\n"
        "from tutelage.cli import main; main(['methods'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
