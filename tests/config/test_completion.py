"""What the shell may put in place of an unfinished override."""

import pytest

from pipeline.config import complete


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "model=w", {"model=world"}),
        ([], "+exp", {"+experiment="}),
        ([], "+experiment=b", {"+experiment=batchtopk"}),
        ([], "optim.l", {"optim.lr="}),
        (["model=gpt2"], "dataset=", {"dataset=text", "dataset=world"}),
        (["no such"], "model=w", set()),
    ],
)
def test_overrides_are_completed(words: list[str], incomplete: str, expected: set) -> None:
    found = set(complete("train", words, incomplete))
    assert expected <= found
    assert expected or not found
