"""How numbers are written."""

import pytest

from pipeline.web.columns import shown, shown_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (0.014512, "0.0145"), (0.00004, "0.000040"), (64.26, "64.3"), (1234.5, "1,234"),
     (0.926, "0.926"), (0.99739, "0.99739"), (1.0, "1.00"), (-0.5, "−0.500"), (-1e-9, "0.000000")],
)  # fmt: skip
def test_three_digits_count(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_an_interval_has_the_digits_of_its_number() -> None:
    assert shown_interval((0.0363, 0.04701), 0.0419) == "[0.0363, 0.0470]"
    assert shown_interval((-0.00012, 0.2), 0.0) == "[0.000, 0.200]"
    assert shown_interval((0.0, 0.0), 0.0) == "[0, 0]"
    assert shown_interval(None, 1.0) == ""
