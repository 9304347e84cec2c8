# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_cases import DEFAULT_ROOT, GoldenError, discover, golden_root


def write(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_classic(path: Path, cases: list[str], **changes: Any) -> Path:
    arrays: dict[str, Any] = {"manifest": np.array([json.dumps([{"case": c, "title": f"title {c}"} for c in cases])])}
    for number, case in enumerate(cases):
        arrays[f"{case}/s_logits"] = np.full(2, number, np.float64)
        arrays[f"{case}/loss"] = np.float64(number)
        arrays[f"{case}/hparams"] = np.array([json.dumps({"temperature": 4.0, "number": number})])
    arrays |= changes
    return write(path, **{name: array for name, array in arrays.items() if array is not None})


def test_core_has_one_case_a_file_and_its_meta_as_json(tmp_path: Path) -> None:
    meta = {"group": "mgd_seg", "case": "c5__odd", "temp": 2.0}
    logits = np.ones((2, 3), np.float32)
    path = write(tmp_path / "core" / "mgd_seg__c5__odd.npz", student=logits, loss=1.5, meta=json.dumps(meta))
    (case,) = discover(tmp_path)
    assert (case.id, case.claim, case.path) == ("core/mgd_seg/c5__odd", "core/mgd_seg", path)
    assert case.meta == meta
    assert set(case.arrays) == {"student", "loss"}
    assert case.arrays["student"].dtype == np.float32
    assert case.arrays["loss"] == 1.5


def test_classic_has_one_group_a_file_and_its_cases_in_the_manifest(tmp_path: Path) -> None:
    write_classic(tmp_path / "classic" / "ps_kd.npz", ["c1", "c10", "c0"])
    cases = discover(tmp_path)
    assert [case.id for case in cases] == ["classic/ps_kd/c1", "classic/ps_kd/c10", "classic/ps_kd/c0"]
    assert {case.claim for case in cases} == {"classic/ps_kd"}
    for number, case in enumerate(cases):
        assert set(case.arrays) == {"s_logits", "loss"}
        assert case.arrays["loss"] == number
        assert case.meta == {
            "group": "ps_kd",
            "case": case.name,
            "manifest": {"case": case.name, "title": f"title {case.name}"},
            "temperature": 4.0,
            "number": number,
        }


def test_vision_has_one_case_a_file_and_settings_as_arrays(tmp_path: Path) -> None:
    write(tmp_path / "vision" / "nd_loss.npz", temperature=2.0, **{"w.conv.weight": np.ones(3)})
    (case,) = discover(tmp_path)
    assert (case.id, case.claim) == ("vision/nd_loss/case", "vision/nd_loss")
    assert set(case.arrays) == {"temperature", "w.conv.weight"}
    assert case.meta == {"group": "nd_loss", "case": "case"}


def test_beyond_has_one_case_a_file_and_its_kind_in_the_name(tmp_path: Path) -> None:
    write(tmp_path / "beyond" / "krr_st__outer_step_12.npz", norm=np.array("bn"), flag=np.array(True), loss=1.0)
    (case,) = discover(tmp_path)
    assert (case.id, case.claim) == ("beyond/krr_st/outer_step_12", "beyond/krr_st")
    assert case.meta == {"group": "krr_st", "case": "outer_step_12", "kind": "outer_step"}
    assert str(case.arrays["norm"]) == "bn"
    assert case.arrays["flag"].dtype == bool


def test_folders_come_in_a_fixed_order_and_other_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "beyond" / "leaf__l2_0.npz", loss=1.0)
    write(tmp_path / "vision" / "pela.npz", loss=1.0)
    write(tmp_path / "core" / "kd__b.npz", loss=1.0, meta="{}")
    write(tmp_path / "core" / "kd__a.npz", loss=1.0, meta="{}")
    (tmp_path / "core" / "README.md").write_text("about")
    (tmp_path / "core" / "manifest.json").write_text("[]")
    ids = [case.id for case in discover(tmp_path)]
    assert ids == ["core/kd/a", "core/kd/b", "vision/pela/case", "beyond/leaf/l2_0"]


def test_arrays_are_read_anew_at_each_access(tmp_path: Path) -> None:
    write(tmp_path / "vision" / "pela.npz", x=np.zeros(2))
    (case,) = discover(tmp_path)
    case.arrays["x"][:] = 1
    assert not case.arrays["x"].any()


def test_the_root_is_the_environments_or_the_copy_beside_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_GOLDEN", str(tmp_path))
    assert golden_root() == tmp_path
    monkeypatch.setenv("TUTELAGE_GOLDEN", "")
    assert golden_root() == DEFAULT_ROOT
    monkeypatch.delenv("TUTELAGE_GOLDEN")
    assert golden_root() == DEFAULT_ROOT


@pytest.mark.parametrize("name", [".", "absent", "core"])
def test_a_root_without_cases_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "core").mkdir()
    with pytest.raises(GoldenError, match=r"no golden cases") as caught:
        discover(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("kd__a.npz", "lies in none of core, classic, vision, beyond"),
        ("other/kd__a.npz", "lies in none of core, classic, vision, beyond"),
        ("core/deeper/kd__a.npz", "lies in none of core, classic, vision, beyond"),
        ("core/kd_a.npz", "<group>__<case>.npz is expected"),
        ("core/__a.npz", "<group>__<case>.npz is expected"),
        ("core/kd__.npz", "<group>__<case>.npz is expected"),
        ("beyond/leaf_l2_0.npz", "<system>__<case>_<number>.npz is expected"),
        ("beyond/leaf__l2.npz", "<system>__<case>_<number>.npz is expected"),
        ("beyond/leaf__0.npz", "<system>__<case>_<number>.npz is expected"),
        ("beyond/leaf__l2_a.npz", "<system>__<case>_<number>.npz is expected"),
    ],
)
def test_an_unknown_file_is_named(tmp_path: Path, place: str, said: str) -> None:
    path = write(tmp_path / place, loss=1.0)
    with pytest.raises(GoldenError) as caught:
        discover(tmp_path)
    assert str(caught.value).startswith(f"{path}: unknown file, ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifest": None}, "has no manifest"),
        ({"manifest": np.array(["[oops"])}, "manifest is not JSON"),
        ({"manifest": np.array(['{"case": "c0"}'])}, "manifest is not a JSON list"),
        (
            {"manifest": np.array(['[{"title": "c0"}]'])},
            "manifest is not a JSON list of objects that have a case",
        ),
        ({"manifest": np.array(['[{"case": "c0"}, {"case": "c0"}]'])}, "manifest lists a case twice"),
        ({"manifest": np.array(['[{"case": "c0"}, {"case": "c7"}]'])}, "without arrays: c7"),
        ({"manifest": np.zeros(1)}, "manifest is float64 (1,), one string with JSON is expected"),
        ({"manifest": np.array(["[]", "[]"])}, "one string with JSON is expected"),
        ({"c9/loss": np.float64(1)}, "not in the manifest: c9"),
    ],
)
def test_a_bad_classic_file_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_classic(tmp_path / "classic" / "kd.npz", ["c0"], **changes)
    with pytest.raises(GoldenError) as caught:
        discover(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("hyper_parameters", "said"),
    [(None, "has no c0/hparams"), (np.array(["[1]"]), "c0/hparams is not a JSON object")],
)
def test_bad_hyper_parameters_are_named(tmp_path: Path, hyper_parameters: Any, said: str) -> None:
    path = write_classic(tmp_path / "classic" / "kd.npz", ["c0"], **{"c0/hparams": hyper_parameters})
    (case,) = discover(tmp_path)
    with pytest.raises(GoldenError) as caught:
        case.load()
    assert str(caught.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "has no meta"),
        ({"meta": "[1]"}, "meta is not a JSON object"),
        ({"meta": "{"}, "meta is not JSON"),
        ({"meta": 1.0}, "meta is float64 (), one string with JSON is expected"),
    ],
)
def test_bad_meta_is_named(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "core" / "kd__a.npz", loss=1.0, **arrays)
    (case,) = discover(tmp_path)
    with pytest.raises(GoldenError) as caught:
        case.load()
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    for folder, name in (("classic", "kd.npz"), ("vision", "pela.npz")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(GoldenError, match=r"cannot be read as \.npz without pickles") as caught:
            _ = discover(tmp_path)[0].arrays
        assert str(caught.value).startswith(f"{path}: ")
        path.unlink()


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "vision" / "pela.npz"
    path.parent.mkdir()
    with path.open("wb") as file:
        np.save(file, np.zeros(2))
    (case,) = discover(tmp_path)
    with pytest.raises(GoldenError, match="holds a single array"):
        case.load()


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vision" / "pela.npz", x=np.array([{}], dtype=object))
    (case,) = discover(tmp_path)
    with pytest.raises(GoldenError, match="without pickles") as caught:
        case.load()
    assert str(caught.value).startswith(f"{path}: ")


def test_every_file_of_the_repository_can_be_read() -> None:
    cases = discover(DEFAULT_ROOT)
    assert {case.folder for case in cases} == {"core", "classic", "vision", "beyond"}
    for case in cases:
        arrays, meta = case.load()
        assert arrays
        assert meta["case"] == case.name
        assert meta["group"] == case.group
