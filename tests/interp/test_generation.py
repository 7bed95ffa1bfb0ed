"""How tokens are drawn, where a continuation stops, and how far apart the two are said to be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions, Site
from pipeline.core.activations import FixedThreshold
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp.generation import check, continuation, drawing, generate, original_steps
from pipeline.interp.options import GenerateOptions
from pipeline.interp.replacement import ReplacementModel

L, D, F, CONTEXT, EOS = 3, 20, 13, 40, 2


@pytest.fixture(scope="module")
def lm(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="tiny", path=str(tiny_gpt2), device="cpu"))


@pytest.fixture(scope="module")
def model(lm: LanguageModel) -> ReplacementModel:
    generator = torch.Generator().manual_seed(3)
    clt = CLT(ArchOptions("clt", d_features=F), Dims(L, D), FixedThreshold(torch.rand(L, F, generator=generator)))
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return ReplacementModel(lm, clt.eval().requires_grad_(False), Site.mlp_in)


def slow_kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_kl_at_each_token_is_of_the_two_distributions_before_it(model: ReplacementModel, temperature: float) -> None:
    found = generate(model, "some text", GenerateOptions(n_tokens=6, temperature=temperature, seed=5))
    begin = model.tokens("some text")[0].tolist()
    assert found.prompt == begin == [1, *model.lm.tokenizer("some text", add_special_tokens=False)["input_ids"]]
    for side in (found.original, found.replacement):
        whole = torch.tensor([begin + side.tokens])
        original, replaced = model.lm.logits(whole)[0], model.logits(whole)[0]
        places = range(len(begin) - 1, len(begin) - 1 + len(side.tokens))
        assert side.kl == pytest.approx([slow_kl(original[i], replaced[i]) for i in places], rel=1e-3, abs=1e-6)
        own = original if side is found.original else replaced
        if temperature == 0:
            assert side.tokens == [int(own[i].argmax()) for i in places]
    assert found.original.tokens != found.replacement.tokens
    parted = found.n_same
    assert found.original.tokens[:parted] == found.replacement.tokens[:parted]
    assert found.original.tokens[parted] != found.replacement.tokens[parted]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_model_draws_the_same_tokens_on_both_sides(model: ReplacementModel, seed: int) -> None:
    options = GenerateOptions(n_tokens=20, temperature=2, seed=seed, keep_error=True)
    found = generate(model, "a", options)
    assert found.original.tokens == found.replacement.tokens
    assert max(found.original.kl + found.replacement.kl) < 1e-9
    assert found == generate(model, "a", options)
    others = generate(model, "a", GenerateOptions(n_tokens=20, temperature=2, seed=seed + 1, keep_error=True))
    assert found.original.tokens != others.original.tokens


def test_draws_have_the_frequencies_that_are_asked_for() -> None:
    logits = torch.tensor([0.1, 1.0, -1.0, 0.4, 0.8])
    cases = {
        "all": (GenerateOptions(temperature=2), logits / 2),
        "top k": (GenerateOptions(temperature=1, top_k=2), logits.where(logits > 0.5, -torch.inf)),
        "top p": (GenerateOptions(temperature=1, top_p=0.6), logits.where(logits > 0.5, -torch.inf)),
    }
    n = 4000
    for name, (options, expected) in cases.items():
        draw = drawing(options)
        counts = torch.bincount(torch.tensor([draw(logits) for _ in range(n)]), minlength=5)
        p = expected.softmax(-1)
        spread = (p * (1 - p) / n).sqrt()
        assert ((counts / n - p).abs() <= 4.5 * spread).all(), name


def test_it_stops_at_an_end_of_text(model: ReplacementModel) -> None:
    def step(tokens: Tensor) -> Tensor:
        logits = torch.zeros(1, tokens.shape[1], 61)
        logits[0, -1, EOS if int(tokens[0, -1]) == 9 else 9] = 5
        return logits

    found = continuation(step, torch.tensor([[1, 4]]), model.lm, GenerateOptions(n_tokens=8))
    assert (found.tokens, found.ended) == ([9, EOS], "end of text")
    assert found.logits.shape == (2, 61)


def test_a_model_with_several_ends_stops_at_each(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.weights.generation_config, "eos_token_id", [17, 18])
    assert lm.end_tokens == {EOS, 17, 18}


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize(("length", "n"), [(CONTEXT - 3, 4), (CONTEXT, 1)])
def test_it_stops_behind_the_models_last_position(lm: LanguageModel, kv_cache: bool, length: int, n: int) -> None:
    prompt = torch.full((1, length), 7)
    found = continuation(original_steps(lm, kv_cache), prompt, lm, GenerateOptions(n_tokens=30))
    assert (len(found.tokens), found.ended) == (n, "context")
    asked = continuation(original_steps(lm, kv_cache), prompt, lm, GenerateOptions(n_tokens=n))
    assert (asked.tokens, asked.ended) == (found.tokens, "n_tokens")


def test_an_empty_prompt_begins_a_context(model: ReplacementModel) -> None:
    assert generate(model, "", GenerateOptions(n_tokens=2)).prompt == [1]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (["ab", "a"], r"3, 2 tokens; run them one by one"),
        (["ab", "cd"], r"2 prompts; continue one at a time"),
        ("a" * CONTEXT, r"has 41 tokens, model=tiny 40 positions; shorten"),
        ([4, 61], r"no token 61; ids go from 0 to 60"),
        ([-1], r"no token -1; ids"),
        ([], r"has no token.*; give some text"),
        (torch.zeros(1, 3), r"float32 \[1, 3\]; give whole numbers"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_continued_is_refused(model: ReplacementModel, prompt: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate(model, prompt, GenerateOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"top_k": 3},
        {"top_p": 0.9},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"generate\..*[;:] ?(give|add|there)"):
        check(GenerateOptions(**wrong))  # type: ignore[arg-type]


def test_a_layer_that_there_is_not_is_refused(model: ReplacementModel) -> None:
    with pytest.raises(UserError, match=r"layers=\[3\]: the transcoder's layers are 0 to 2; "):
        generate(model, "a", GenerateOptions(layers=[0, 3]))
