"""Features and tokens as the user names them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.interp import naming
from pipeline.interp.naming import Place


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3/1021", Place(3, 1021)),
        (" 0/12 ", Place(0, 12)),
        ("3/1021@4", Place(3, 1021, 4)),
        ("3/1021@last", None),
        ("3/", None),
        ("-1/2", None),
        ("1/2/3", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_a_feature_is_layer_and_index_and_perhaps_a_position(text: str, found: Place | None) -> None:
    assert naming.place(text) == found


def test_features_are_a_list_or_a_file_and_stay_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("2/7\n0/1\n")
    assert naming.features("[2/7, 0/1]", "x") == naming.features("2/7,0/1", "x") == [(2, 7), (0, 1)]
    assert naming.features(str(file), "x") == [(2, 7), (0, 1)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[1/2,3]", "x: '3' names no feature; write LAYER/INDEX, such as 1/17"),
        ("[1/2@3]", "x: '1/2@3' names no feature"),
        ("nowhere.txt", r"x=nowhere.txt is no file and no list; write \[0/12,1/7\]"),
    ],
)
def test_what_names_no_feature_is_said(ids: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        naming.features(ids, "x")


def test_features_that_there_are_not_are_named() -> None:
    naming.check_there([(0, 0), (2, 10)], 3, 11)
    with pytest.raises(UserError, match=r"^x: there is no feature 3/0, 0/11; layers are 0 to 2, features 0 to 10$"):
        naming.check_there([(3, 0), (1, 1), (0, 11)], 3, 11, "x: ")
    with pytest.raises(UserError, match=r"^there is no feature -1/0;"):
        naming.check_there([(-1, 0)], 3, 11)


class Tokenizer:
    """Words of a text with the space before them, as a byte-pair tokenizer has them; what it does not know is 0."""

    unk_token_id = 0
    known = ("?", "to", " Paris", " in", "#3")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        words = re.findall(r" ?\S+", text)
        return {"input_ids": [self.known.index(word) if word in self.known else 0 for word in words]}


LM: Any = SimpleNamespace(name="tiny", vocab_size=5, tokenizer=Tokenizer())


@pytest.mark.parametrize(
    ("text", "token"),
    [("to", 1), ("Paris", 2), (" Paris", 2), ("#3", 3), (" #0", 0), ("#4", 4)],
)
def test_a_token_is_its_text_with_or_without_a_space_or_its_number(text: str, token: int) -> None:
    assert naming.token(LM, text, "x") == token


@pytest.mark.parametrize(
    ("text", "why"),
    [("Rome", "is no token"), ("#5", "is no token"), ("to Paris in", "is 3 tokens"), ("", "is 0 tokens")],
)
def test_what_is_no_single_token_is_said(text: str, why: str) -> None:
    with pytest.raises(
        UserError, match=f'^x: "{text}" {why} of model=tiny; give one token as it stands in a text, or #'
    ):
        naming.token(LM, text, "x")
