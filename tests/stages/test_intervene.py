"""`clt intervene` on a tiny trained run: what it prints, what it writes, what it refuses."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.interp.steering.feature_edits import Edit, Where
from pipeline.interp.steering.intervene import intervene as interventions
from pipeline.interp.steering.intervene_options import InterveneOptions
from pipeline.stages import intervene

PROMPT = "The old sailor"


def intervened(*words: str) -> dict[str, Any]:
    file = intervene.run(compose("intervene", ["run=relu", f"prompt={PROMPT}", "to=out/found.json", *words]))
    assert file is not None
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_edits_are_made_and_shown(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = intervened('edits=["0/3@4=5","1/7@-1*2","2/5=0.5"]', "tokens=e,#9", "intervene.top=4")
    lines = [record.getMessage() for record in caplog.records]
    model = pipeline.replace("runs/relu")
    T = len(PROMPT) + 1
    edits = [
        Edit(0, 3, Where((4,)), 0, 5),
        Edit(1, 7, Where((T - 1,)), 2, 0),
        Edit(2, 5, Where((*range(1, T),)), 0, 0.5),
    ]
    expected = interventions(model, PROMPT, [edits], InterveneOptions())
    p, q = (logits[-1].double().softmax(-1) for logits in (expected.before.logits[0], expected.logits[0]))
    [e] = model.lm.tokenizer("e", add_special_tokens=False)["input_ids"]
    assert [one["token"] for one in found["next_token"][:2]] == [e, 9]
    for one in found["next_token"]:
        assert one["probability"] == pytest.approx([float(p[one["token"]]), float(q[one["token"]])], rel=1e-4)
        assert one["text"] == model.lm.tokenizer.decode([one["token"]])
    assert len(found["kl"]) == T
    assert found["kl"][-1] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
    assert [(one["layer"], one["feature"], one["position"]) for one in found["edited"][:2]] == [
        (0, 3, 4),
        (1, 7, T - 1),
    ]
    assert len(found["edited"]) == T - 1 + 2
    assert lines[1].startswith(f"edited       {T + 1} activations: on the original; later layers respond")
    assert any(line.startswith(f"KL(before || after) in nats: {found['kl'][-1]:.4f}") for line in lines)
    counts = [sum(one["kind"] == kind for one in found["features"]) for kind in ("appears", "vanishes", "changes")]
    assert "other features: {} appear, {} vanish, {} change".format(*counts) in lines
    assert lines[-2] == "out/found.json"
    assert lines[-1] == f"next: clt graph run=runs/relu prompt='{PROMPT}'"


def test_a_continuation_follows_the_edit_of_every_new_token(finished: Path) -> None:
    found = intervened("edits=2/5@new=30", "intervene.n_tokens=6")
    sides = found["generated"]
    assert max(found["kl"]) < 1e-9, "the prompt is not edited"
    assert found["edited"] == []
    assert len(sides["after"]["tokens"]) == len(sides["after"]["kl"])
    assert sides["after"]["kl"][0] < 1e-9 < 1e-6 < max(sides["after"]["kl"][1:])
    assert (
        intervened("edits=2/5@new=30", "intervene.n_tokens=6", "intervene.kv_cache=false")["generated"]["after"][
            "tokens"
        ]
        == sides["after"]["tokens"]
    )


def test_groups_are_swapped_and_inhibited_by_name(finished: Path) -> None:
    Path("groups.json").write_text(json.dumps({"vowels": ["0/1", "0/2@3"], "rest": ["1/4"]}))
    found = intervened(
        "supernodes=groups.json", "swap.features=vowels", "swap.from_prompt=My new boats, 3", "edits=rest@2:4*-1"
    )
    assert [(one["layer"], one["feature"], one["position"]) for one in found["edited"]] == [
        (0, 1, len(PROMPT)),
        (0, 2, len(PROMPT)),
        (1, 4, 2),
        (1, 4, 3),
    ]
    model = pipeline.replace("runs/relu")
    live = model.at_original(model.original(model.tokens("My new boats, 3"))).features[0]
    for one in found["edited"][:2]:
        at = (live[0].tokens == len("My new boats, 3")) & (live[0].indices == one["feature"])
        assert one["after"] == pytest.approx(float(live[1][at].sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"nothing is edited; add edits="),
        (["swap.from_prompt=a"], r"add swap.features=all, or some"),
        (["edits=0/3@99=0"], r"@99: the prompt has 15 tokens; give"),
        (["edits=0/3=0", "tokens=abc"], r'tokens: "abc" is 3 tokens of model=.*; give one'),
        (["edits=[]"], r"no feature is edited"),
        (["edits=0/3=0", "intervene.until=1"], r"intervene.until=1 says"),
        (["edits=France=0", "supernodes=none.json"], r"supernodes=none.json: there is no such file"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(finished: Path, words: list[str], says: str) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=says):
        intervened(*words)
    assert sorted(Path().rglob("*")) == before


def test_without_a_prompt_nothing_is_loaded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.models.load", lambda options: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"no prompt; add prompt="):
        intervene.run(compose("intervene", ["run=relu", "edits=0/3=0"]))
