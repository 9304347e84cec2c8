# SPDX-License-Identifier: Apache-2.0
import pytest

from tutelage.report.number import MINUS, MISSING, count, fixed, interval, milliseconds, percent, signed, size


@pytest.mark.parametrize(
    ("value", "deviation", "text"),
    [(0.93412, None, "93.4"), (1.0, 0.0, "100.0 ± 0.0"), (0.5, 0.0123, "50.0 ± 1.2"), (None, None, MISSING)],
)
def test_accuracies_are_percent_with_one_decimal(value: float | None, deviation: float | None, text: str) -> None:
    assert percent(value, deviation) == text


def test_a_missing_number_is_a_dash_whatever_its_kind() -> None:
    assert {fixed(None), percent(None), signed(None), count(None), size(None), milliseconds(None)} == {MISSING}


def test_negative_numbers_have_a_minus_sign_not_a_hyphen() -> None:
    assert fixed(-0.5, digits=1) == f"{MINUS}0.5"
    assert signed(-0.31) == f"{MINUS}0.3"


@pytest.mark.parametrize("value", [0.0, 0.04, -0.04, -0.0])
def test_what_rounds_to_zero_has_no_sign(value: float) -> None:
    assert signed(value) == "0.0"


def test_an_end_of_an_interval_reads_as_zero_only_if_it_is() -> None:
    assert interval(0.04, 1.0) == "+0.04 to +1.00"
    assert interval(0.0, 1.0) == "0.0 to +1.0"
    assert interval(-1.0, -0.0004) == f"{MINUS}1.0000 to {MINUS}0.0004"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9994, "9.99 k"),
        (9996, "10.0 k"),
        (99_960, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (11_689_512, "11.7 M"),
        (3_670_000_000_000_000, "3670 T"),
    ],
)
def test_counts_have_three_digits_across_prefixes(number: int, text: str) -> None:
    assert count(number) == text


def test_bytes_use_powers_of_1000() -> None:
    assert (size(999), size(1024), size(46_827_520)) == ("999 B", "1.02 kB", "46.8 MB")


def test_times_carry_their_interquartile_range() -> None:
    assert milliseconds(1.234, 0.05) == "1.23 (0.05)"
    assert milliseconds(0.0) == "0"
