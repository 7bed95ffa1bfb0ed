"""Edits as they are written, and as they act on features in sparse form."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.core.pattern import from_mask
from pipeline.errors import UserError
from pipeline.interp.steering.feature_edits import (
    Compiled,
    Edit,
    Place,
    Where,
    features,
    parse,
    pieces,
    read,
    read_supernodes,
    where,
)

T, L, F = 7, 3, 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/3@4=0", Edit(1, 3, Where((4,)), 0.0, 0.0)),
        ("0/10@-1*2", Edit(0, 10, Where((6,)), 2.0, 0.0)),
        ("2/5=3.0", Edit(2, 5, Where((1, 2, 3, 4, 5, 6), new=True), 0.0, 3.0)),
        (" 2/5 @ last + -1.5 ", Edit(2, 5, Where((6,)), 1.0, -1.5)),
        ("2/5@2:4*-1", Edit(2, 5, Where((2, 3)), -1.0, 0.0)),
        ("2/5@:3=1", Edit(2, 5, Where((1, 2)), 0.0, 1.0)),
        ("2/5@-2:=1", Edit(2, 5, Where((5, 6)), 0.0, 1.0)),
        ("2/5@5,1,-1,5=1", Edit(2, 5, Where((1, 5, 6)), 0.0, 1.0)),
        ("2/5@prompt=1", Edit(2, 5, Where((1, 2, 3, 4, 5, 6)), 0.0, 1.0)),
        ("2/5@new=1e-2", Edit(2, 5, Where((), new=True), 0.0, 0.01)),
        ("2/5@last,new=1", Edit(2, 5, Where((6,), new=True), 0.0, 1.0)),
    ],
    ids=str,
)
def test_an_edit_says_which_feature_where_and_how(text: str, expected: Edit) -> None:
    assert list(parse(text, T, L, F)) == [expected]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1/3@4", r"'1/3@4': not of the form .*; write 1/342@4=0"),
        ("1/3@4=", r"not of the form"),
        ("1/3@4=x", r"'x' is no number; give one"),
        ("1/3@4=nan", r"'nan' is no number"),
        ("1/3@7=0", r"@7: the prompt has 7 tokens; give 1 to 6, or -1"),
        ("1/3@-8=0", r"@-8: the prompt has 7 tokens"),
        ("1/3@0=0", r"@0: position 0 has no features.*; give 1 to 6"),
        ("1/3@-7=0", r"position 0 has no features"),
        ("1/3@0:1=0", r"@0:1 names no position .* but 0"),
        ("1/3@4:9=0", r"@4:9: the prompt has 7 tokens; give"),
        ("1/3@first=0", r"@first: no position; give a number, 2:6, last"),
        ("3/3@4=0", r"there is no feature 3/3; layers are 0 to 2, features 0 to 10"),
        ("2/11@4=0", r"there is no feature 2/11;"),
        ("France@4=0", r"'France' names no feature; write LAYER/INDEX, or a name in supernodes=FILE"),
    ],
)
def test_what_is_no_edit_is_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        list(parse(text, T, L, F))


def test_a_group_is_edited_by_its_name(tmp_path: Path) -> None:
    groups = {"say Paris": [Place(0, 1), Place(2, 3, 5)], "b": [Place(1, 1)]}
    everywhere = Where((1, 2, 3, 4, 5, 6), new=True)
    assert list(parse("say Paris*0", T, L, F, groups)) == [
        Edit(0, 1, everywhere, 0.0, 0.0),
        Edit(2, 3, Where((5,)), 0.0, 0.0),
    ]
    assert {edit.where for edit in parse("say Paris@2=1", T, L, F, groups)} == {Where((2,))}
    assert list(features("b, say Paris,2/2", L, F, groups)) == [Place(1, 1), Place(0, 1), Place(2, 3, 5), Place(2, 2)]
    named = {"of, <unk>, is": [Place(0, 4)], "of": [Place(0, 5)]}
    assert list(features("of, <unk>, is,2/2, of", L, F, named)) == [Place(0, 4), Place(2, 2), Place(0, 5)]
    [piece, other] = read("of, <unk>, is@3*0,of@1=2")
    assert list(parse(piece, T, L, F, named)) == [Edit(0, 4, Where((3,)), 0.0, 0.0)]
    assert list(parse(other, T, L, F, named)) == [Edit(0, 5, Where((1,)), 0.0, 2.0)]
    with pytest.raises(UserError, match=r"'say Rome' names no feature.*; the supernodes are say Paris, b"):
        list(parse("say Rome=0", T, L, F, groups))


@pytest.mark.parametrize(
    "content",
    [
        {"say Paris": ["0/1", "2/3@5"], "b": ["1/1"]},
        {"qParams": {"supernodes": [["say Paris", "0_1_4", "2_3_5"], ["b", "1_1_2", "E_26_2", "3_17_6"]]}},
        [["say Paris", "0_1_4", "2_3_5"], ["b", "1_1_2"]],
        {"supernodes": [{"label": "say Paris", "nodes": ["0_1_4", "2_3_5"]}, {"label": "b", "nodes": ["1_1_2"]}]},
    ],
)
def test_groups_are_read_from_the_forms_they_come_in(tmp_path: Path, content: object) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(content))
    found = read_supernodes(file, L)
    assert list(found) == ["say Paris", "b"]
    assert [place[:2] for place in found["say Paris"]] == [(0, 1), (2, 3)]
    assert found["say Paris"][1].position == 5
    assert [place[:2] for place in found["b"]] == [(1, 1)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", r"holds no supernodes; write"),
        ('{"a": ["x/3"], "b": ["1-2"]}', r"'1-2' names no feature; write LAYER/INDEX"),
        ("{a: [", r"no YAML or JSON .*; mend it"),
        (None, r"there is no such file; give a YAML or JSON file"),
    ],
)
def test_a_file_without_groups_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "groups.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=says):
        read_supernodes(file, L)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/3@4=0", ["1/3@4=0"]),
        ('["1/3@4=0","0/17@-1*2","2/5=3.0"]', ["1/3@4=0", "0/17@-1*2", "2/5=3.0"]),
        ("[1/3@4,5=0, 0/17,0/18@-1*2]", ["1/3@4,5=0", "0/17,0/18@-1*2"]),
        ("say Paris@2:4+-1,'b'*0", ["say Paris@2:4+-1", "b*0"]),
        ("1/3=0,2/2", ["1/3=0", "2/2"]),
        ("", []),
    ],
)
def test_a_list_of_edits_is_read_however_the_shell_left_it(text: str, expected: list[str]) -> None:
    assert read(text) == expected == pieces(text)


def test_edits_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("- 1/3@4=0\n- say Paris@2,3*0\n")
    assert read(str(file)) == ["1/3@4=0", "say Paris@2,3*0"]
    file.write_text("a: 1\n")
    with pytest.raises(UserError, match=r"holds no list of edits; write one a line"):
        read(str(file))


@pytest.mark.parametrize(("first", "length"), [(0, T), (0, T + 3), (4, 5), (T, 1), (T + 1, 2)])
def test_edits_act_on_sparse_features_as_on_dense_ones(first: int, length: int) -> None:
    """Every window of a prompt of T tokens and what is generated behind it."""
    generator = torch.Generator().manual_seed(first + length)
    edits = [
        [Edit(1, 3, Where((4,)), 0.0, 0.0), Edit(1, 3, where("2:6", T), 2.0, 1.0), Edit(0, 3, Where((4,)), 0.0, 9.0)],
        [],
        [Edit(1, i, where("all", T), -1.0, 0.25 * i) for i in range(0, F, 2)] + [Edit(1, 4, where("new", T), 0.0, 3.0)],
        [Edit(1, 0, Where((6,), new=True), 1.0, 1.0), Edit(1, F - 1, Where((6,), new=True), 0.0, -1.0)],
    ]
    dense = torch.rand(4, length, F, generator=generator) * (torch.rand(4, length, F, generator=generator) > 0.6)
    pattern = from_mask(dense.flatten(0, 1) > 0)
    values = dense.flatten(0, 1)[pattern.tokens, pattern.indices]
    compiled = Compiled(edits, T, first, length, F)
    made, got = compiled.apply(1, pattern, values)
    expected = dense.clone()
    for row, of_row in enumerate(edits):
        for edit in (one for one in of_row if one.layer == 1):
            for j in range(length):
                if first + j in edit.where.positions or (edit.where.new and first + j >= T):
                    expected[row, j, edit.feature] = edit.scale * expected[row, j, edit.feature] + edit.add
    scattered = torch.zeros(4 * length, F).index_put((made.tokens, made.indices), got)
    torch.testing.assert_close(scattered.view_as(expected), expected)
    assert (got != 0).all()
    keys = made.tokens * F + made.indices
    assert (keys.diff() > 0).all()
    assert compiled.apply(2, pattern, values) == (pattern, values), "a layer without edits is as it was"
