# SPDX-License-Identifier: Apache-2.0
import pytest

from tutelage.core.error import UserError, check_words, nearest


def test_the_nearest_word_or_all_of_them() -> None:
    assert nearest("tempreature", ["form", "temperature"]) == "; did you mean temperature?"
    assert nearest("x", ["form", "temperature"]) == "; valid: form, temperature"
    assert nearest("x", []) == ""
    assert nearest("x", map(str, range(30))).endswith(", ...")


def test_an_unknown_word_is_named_with_its_place() -> None:
    check_words({"form": 1}, ["form"], "data")
    check_words([], [], "data")
    with pytest.raises(UserError, match=r"^data\.pose\.froms is not known; did you mean form\?$"):
        check_words(["form", "froms"], iter(["form", "number"]), "data.pose")
