"""Chats, ids and what stands between documents and before them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import tokens
from pipeline.data.options import Bos, Content, Separator
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.conftest import tiny_tokenizer
from tests.data.corpus import (
    BOS,
    EOS,
    Characters,
    options,
    packed,
    records,
    stream,
    to_jsonl,
    to_parquet,
    tokenizer,
)

# Chats


def chats(n: int) -> list[dict[str, Any]]:
    """Conversations of one to three messages. The first message alone has a name."""
    messages = [
        [{"role": "user", "content": f"{chr(0x4E00 + i)}?"}, {"role": "bot", "content": "y" * (i % 4)}]
        for i in range(n)
    ]
    return [
        {"messages": m[: 1 + i % 2] + ([{"role": "tool", "content": "z"}] if i % 3 else [])}
        for i, m in enumerate(messages)
    ]


def test_a_chat_is_laid_out_by_the_template_with_one_bos_and_one_eos(tmp_path: Path) -> None:
    asked = options(to_jsonl(tmp_path / "a.jsonl", chats(200)), content=Content.chat, held_out=1)
    ids = stream(asked)
    assert BOS not in ids  # the template's own; contexts have theirs
    assert not any(pair == (EOS, EOS) for pair in pairwise(ids))
    first = next(
        ids for ids in [list(map(ord, Characters().apply_chat_template(c["messages"], False))) for c in chats(200)]
    )
    assert first[0] == BOS
    assert ids[: len(first) - 1] == first[1:]


def test_chats_give_the_same_rows_from_a_table_that_writes_nulls(tmp_path: Path) -> None:
    rows = chats(200)
    for row in rows[::7]:
        row["messages"][0]["name"] = "me"
    jsonl = options(to_jsonl(tmp_path / "a.jsonl", rows), content=Content.chat, held_out=1)
    table = options(to_parquet(tmp_path / "a.parquet", rows), "parquet", content=Content.chat, held_out=1)
    assert packed(jsonl) == packed(table)


def test_the_split_of_a_chat_does_not_depend_on_the_template(tmp_path: Path) -> None:
    class Other(Characters):
        def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
            return "".join(m["content"] for m in messages)

    other: Any = Other()
    asked = options(to_jsonl(tmp_path / "a.jsonl", chats(300)), content=Content.chat, held_out=1)
    one, two = tokens.pack(asked, tokenizer(), BOS), tokens.pack(asked, other, BOS)
    for split in Split:
        found = [{i for i in p[split].contexts.ravel().tolist() if i >= 0x4E00} for p in (one, two)]
        assert found[0] & found[1]
        for elsewhere in set(Split) - {split}:
            assert not found[0] & {i for i in two[elsewhere].contexts.ravel().tolist() if i >= 0x4E00}


def test_a_real_tokenizer_gives_the_ids_of_its_own_template(tmp_path: Path) -> None:
    real = tiny_tokenizer()
    real.chat_template = (
        "{{bos_token}}{% for m in messages %}{{m['role']}}: {{m['content']}}\n{% endfor %}{{eos_token}}"
    )
    rows = [{"messages": [{"role": "user", "content": f"say {'a' * i}"}]} for i in range(1, 90)]
    asked = options(to_jsonl(tmp_path / "a.jsonl", rows), content=Content.chat, held_out=1)
    contexts, n_rows = tokens.pack(asked, real, real.bos_token_id)[Split.train]
    train = [
        row["messages"]
        for row in rows
        if tokens.split_of(json.dumps(row["messages"], sort_keys=True, separators=(",", ":"))) is Split.train
    ]
    expected = [i for m in train for i in real.apply_chat_template(m, return_dict=False)[1:]]
    assert contexts[:, 1:].ravel()[:n_rows].tolist() == expected
    real.chat_template = None
    with pytest.raises(UserError, match="no chat template; use the instruction-tuned"):
        tokens.pack(asked, real, 1)


def test_a_chat_that_the_template_refuses_is_one_line(tmp_path: Path) -> None:
    real = tiny_tokenizer()
    real.chat_template = "{% if messages[0]['role'] != 'user' %}{{raise_exception('user first')}}{% endif %}x"
    rows = [{"messages": [{"role": role, "content": "a"}]} for role in ("user", "user", "bot")]
    asked = options(to_jsonl(tmp_path / "a.jsonl", rows), content=Content.chat)
    with pytest.raises(
        UserError, match=r"record 3 of .*a\.jsonl: the model's chat template refuses it \(user first\); "
    ):
        tokens.pack(asked, real, 1)


# Ids


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids_are_packed_as_they_are_with_their_own_marks_counted_once(tmp_path: Path, kind: str) -> None:
    documents = [[i, i + 1, i + 2][: 1 + i % 3] for i in range(10, 300)]
    marked = [[BOS] * (i % 2) + ids + [EOS] * (i % 3 == 0) for i, ids in enumerate(documents)]
    path = (to_jsonl if kind == "jsonl" else to_parquet)(tmp_path / "a", [{"input_ids": ids} for ids in marked])
    asked = options(path, kind, content=Content.tokens, held_out=1)
    train = [i for i, ids in enumerate(marked) if tokens.split_of(" ".join(map(str, ids))) is Split.train]
    assert stream(asked) == [token for i in train for token in [*documents[i], EOS]]
    joined = stream(replace(asked, separator=Separator.none))
    assert joined == [token for i in train for token in marked[i][marked[i][0] == BOS :]]


@pytest.mark.parametrize("ids", [[1, -2], [1.5], ["a"], "text", [2**31], [True], [None], 3])
def test_what_is_no_list_of_ids_is_one_line(tmp_path: Path, ids: Any) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6]}, {"input_ids": ids}])
    with pytest.raises(UserError, match=r"record 2 of .*a\.jsonl: column 'input_ids' is no list of token ids .*; "):
        packed(options(path, content=Content.tokens))


# The first position


def test_position_0_follows_the_bos_policy() -> None:
    asked, with_bos, without = options("x"), tiny_tokenizer(), tiny_tokenizer(bos=False)
    assert tokens.bos_of(asked, with_bos) == with_bos.bos_token_id == 1
    assert tokens.bos_of(asked, without) is None
    assert tokens.bos_of(replace(asked, bos=Bos.eos), without) == without.eos_token_id == 2
    assert tokens.bos_of(replace(asked, bos=Bos.none), with_bos) is None
    without.eos_token = None
    with pytest.raises(UserError, match=r"dataset\.bos=eos: .*; use dataset\.bos=none"):
        tokens.bos_of(replace(asked, bos=Bos.eos), without)


def test_a_separator_needs_an_end_of_text_token(tmp_path: Path) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", records(str(i) for i in range(200)))
    without = tiny_tokenizer(bos=False)
    without.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-text token; use dataset\.separator=none"):
        tokens.pack(options(path), without, None)
    tokens.pack(options(path, separator=Separator.none, held_out=1, context=2), without, None)
