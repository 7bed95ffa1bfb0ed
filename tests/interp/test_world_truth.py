"""The built-in world's facts, held against transcoders that are planted to know them, or not to."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import Site, Target
from pipeline.arch.per_layer import PerLayer
from pipeline.core.activations import FixedThreshold
from pipeline.data import models, world
from pipeline.data.model_files import BUILTIN
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.data.tokens import Split, split_of
from pipeline.data.world import facts
from pipeline.interp import country_swap, purity, world_text, world_truth
from pipeline.interp.country_swap import Asked
from pipeline.interp.edits import Sides, features_of
from pipeline.interp.world_text import Mass, Text
from tests import oracle
from tests.interp.test_replacement import random, slow_hooks, tokens

C = len(facts.COUNTRIES)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return models.load(ModelOptions(name="world", path=BUILTIN))


@pytest.fixture(scope="module")
def tiny(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="local", path=str(tiny_gpt2)))


def knows_capitals(lm: LanguageModel, write_of: int = 0) -> Transcoder:
    """A feature for each country in layer 0: it looks for what that MLP reads at the country in "The capital of X is",
    and writes what the MLP makes of it; with write_of, what it makes of another country."""
    model = PerLayer(oracle.arch_options("per_layer", d_features=C), Dims(lm.n_layers, lm.d_model), FixedThreshold(
        torch.full((lm.n_layers, C), 0.5)
    ))  # fmt: skip
    sides = Sides(lm, model.eval().requires_grad_(False))
    pairs = [p for p in world.swap_pairs() if p.relation == "capital"]
    ask = country_swap.asked(sides, pairs, 0)
    state = sides.state(ask.tokens)
    x, y = state.x[:, ask.at, 0], state.mlp_out[:, ask.at, 0]
    # Each row gives 1 at its own country and 0 at the others.
    model.encoders[0].copy_(torch.linalg.pinv(x).T)
    next(model.tables(0)).copy_(y.roll(write_of, dims=0))
    return model


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_text, "N_DOCUMENTS", 8000)
    monkeypatch.setattr(country_swap, "N_PAIRS", 80)


def test_answers_follow_features_that_hold_the_country(lm: LanguageModel) -> None:
    model = knows_capitals(lm)
    every = torch.ones(4, C, dtype=torch.bool)
    others = torch.randn(20, 4, lm.d_model, generator=torch.Generator().manual_seed(0))
    values, ci95 = country_swap.measure(Sides(lm, model), every, others, resamples=50)
    capital = values["capital"]
    assert capital["n"] == country_swap.N_PAIRS
    assert capital["answered"]["original"] == 1
    assert (capital["active"], capital["swapped"]) == (1, 1)
    assert capital["features"]["follows"] > 0.95
    assert capital["features"] == capital["all_features"]
    assert capital["exact_mlp"] == {"follows": 1, "keeps": 0}
    assert capital["random_features"]["follows"] < 0.1
    assert capital["replacement"]["follows"] < 0.1, "without features in the later layers it answers nothing"
    low, high = ci95["capital"]["features"]["follows"]
    assert low <= capital["features"]["follows"] <= high


def test_answers_follow_what_is_written_not_who_writes_it(lm: LanguageModel) -> None:
    """Each country's feature writes another country: none answers for its own."""
    model = knows_capitals(lm, write_of=1)
    every, others = torch.ones(4, C, dtype=torch.bool), torch.randn(20, 4, lm.d_model)
    capital = country_swap.measure(Sides(lm, model), every, others)[0]["capital"]
    assert capital["features"]["follows"] < 0.15


def test_features_that_are_not_swapped_change_nothing(lm: LanguageModel) -> None:
    model, none = knows_capitals(lm), torch.zeros(4, C, dtype=torch.bool)
    capital = country_swap.measure(Sides(lm, model), none, torch.randn(20, 4, lm.d_model))[0]["capital"]
    assert capital["swapped"] == 0
    assert capital["features"] == capital["random_features"] == {"follows": 0, "keeps": 1}
    assert capital["all_features"]["follows"] > 0.95


def test_the_replacement_swaps_the_marked_features_alone(tiny: LanguageModel, tiny_gpt2: Path) -> None:
    """Against dense features in plain hooks, at the one position."""
    model, at = random("clt", 0.3), 8
    tells = torch.rand(3, 13, generator=torch.Generator().manual_seed(5)) < 0.5
    source, target = (torch.arange(4)[:, None] != torch.arange(4)[None]).nonzero().unbind(1)
    ask = Asked(tokens(), at, source, target, torch.zeros(4, dtype=torch.int64))
    given, unswapped = country_swap._replaced(Sides(tiny, model), ask, tells)

    def slow(ids: Tensor, theirs: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []

        def write(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
            h = normed @ model.encoders[layer].T + model.b_enc[layer]
            a = h * (h > model.activation.threshold[layer])  # type: ignore[index]
            if theirs is not None:
                a[:, at] = torch.where(tells[layer], theirs[layer][target, at], a[:, at])
            features.append(a)
            return model.b_dec[layer] + sum(f @ model.W_dec[s][:, layer - s] for s, f in enumerate(features))

        return slow_hooks(tiny_gpt2, ids, write)[:, -1].argmax(-1), features

    plain, theirs = slow(tokens(), None)
    expected, _ = slow(tokens()[source], theirs)
    assert unswapped.tolist() == plain.tolist()
    assert given.tolist() == expected.tolist()
    assert given.tolist() != plain[source].tolist(), "the swap shows"


def test_features_tell_countries_apart_when_few_countries_have_them() -> None:
    fires = torch.zeros(2, 3, C + 1, dtype=torch.float64)
    n_tokens = torch.full((C + 1,), 4.0, dtype=torch.float64)
    fires[0, 0, 5] = 2  # half of one country's tokens
    fires[0, 1, 5] = 1  # less
    fires[0, 2, :10] = 4  # a quarter of the countries
    fires[1, 0, :11] = 4  # more
    fires[1, 1, C] = 4  # no country
    assert country_swap.tell_apart(Mass(fires, fires, n_tokens)).tolist() == [[True, False, True], [False] * 3]


def test_the_feature_of_a_country_has_the_highest_share_of_those_that_are_active_on_it() -> None:
    activation = torch.zeros(2, 3, C + 1, dtype=torch.float64)
    n_tokens = torch.full((C + 1,), 4.0, dtype=torch.float64)
    fires = torch.zeros_like(activation)
    activation[0, 1, 0], activation[0, 1, 1], fires[0, 1, 0] = 6.0, 2.0, 4.0  # 3/4 on country 0
    activation[1, 2, 0], activation[1, 2, C], fires[1, 2, 0] = 9.0, 1.0, 2.0  # 9/10, on half of its tokens
    activation[1, 0, 0], fires[1, 0, 0] = 5.0, 1.0  # all, on a quarter
    chosen = purity.choose(Mass(activation, fires, n_tokens))
    assert chosen[0] == 1 * 3 + 2
    assert set(chosen[1:].tolist()) == {-1}


def test_purity_is_the_share_of_activation_on_text_that_was_not_chosen_on(tiny: LanguageModel) -> None:
    for name in ("clt", "crosscoder"):
        model, generator = random(name, 0.3), torch.Generator().manual_seed(0)
        sides, n = Sides(tiny, model), model.n_sources * 13
        text = Text(tokens(30), torch.randint(0, C + 1, (30, 9), generator=generator))
        chosen = torch.randint(-1, n, (C,), generator=generator)
        found = purity.score(sides, chosen, text, batch_tokens=50)
        features = features_of(model, sides.state(text.tokens).x[:, 1:].flatten(0, 1)).dense().flatten(1)
        country, shares = text.country[:, 1:].flatten().tolist(), []
        for c in range(C):
            total = own = 0.0
            active = n_c = 0
            for token, a in enumerate(features[:, chosen[c]].tolist() if chosen[c] >= 0 else []):
                total, own = total + a, own + (a if country[token] == c else 0)
                n_c, active = n_c + (country[token] == c), active + (country[token] == c and a > 0)
            shares.append(own / total if total else 0.0)
            one = found["countries"][facts.COUNTRIES[c].name]
            assert one["share"] == pytest.approx(shares[-1], rel=1e-5)
            assert one["active_on"] == pytest.approx(active / n_c if n_c else 0, rel=1e-9)
        assert found["mean"] == pytest.approx(sum(shares) / C, rel=1e-5)
        assert 0 < found["mean"] < 0.5


class OneHot(Sides):
    """Tokens are numbers of countries (C: none), and what is read at a token is its number, one-hot."""

    def __init__(self, transcoder: Transcoder) -> None:
        self.transcoder = transcoder

    def inputs(self, tokens: Tensor) -> Tensor:
        return torch.eye(C + 1)[tokens][:, :, None].expand(-1, -1, 2, -1)


def text_of(numbers: Tensor) -> Text:
    """The first position of a context is no row."""
    contexts = torch.cat([torch.full((len(numbers), 1), C), numbers], dim=1)
    return Text(contexts, contexts)


def test_one_feature_for_each_country_is_pure_and_one_for_two_is_half_so() -> None:
    options, threshold = oracle.arch_options("per_layer", d_features=C), FixedThreshold(torch.full((2, C), 0.5))
    sides = OneHot(PerLayer(options, Dims(2, C + 1), threshold).eval().requires_grad_(False))
    encoder = sides.transcoder.encoders[1]
    encoder.copy_(torch.eye(C + 1)[:C])
    text = text_of(torch.arange(C + 1).repeat(3, 2))
    mass, _ = world_text.mass(sides, text, 100)
    found = purity.score(sides, purity.choose(mass), text, 100)
    assert (found["mean"], found["pure"], found["active_on"], found["n_tokens"]) == (1, C, 1, 6 * C)
    assert found["countries"]["France"] == {"layer": 1, "feature": 0, "share": 1, "active_on": 1, "n_tokens": 6}

    encoder[:2] = encoder[:2].sum(dim=0)  # one feature, twice, for France and Germany
    mass, _ = world_text.mass(sides, text, 100)
    found = purity.score(sides, purity.choose(mass), text, 100)
    assert (found["countries"]["France"]["share"], found["countries"]["Germany"]["share"]) == (0.5, 0.5)
    assert found["mean"] == pytest.approx((C - 1) / C)
    assert found["pure"] == C - 2

    encoder[:, C] = 1.0  # on other text they fire on everything else too
    elsewhere = text_of(torch.full((2, 30), C))
    assert purity.score(sides, purity.choose(mass), elsewhere, 100)["mean"] == 0


def test_the_two_texts_are_held_out_and_share_no_document(lm: LanguageModel) -> None:
    here, there = world_text.halves(lm)
    documents: list[set[str]] = []
    for text in (here, there):
        assert text.tokens.shape[1] == text.country.shape[1] == world_text.CONTEXT
        assert (text.tokens[:, 0] == lm.tokenizer.bos_token_id).all()
        stream = lm.tokenizer.decode(text.tokens[:, 1:].flatten()).split(lm.tokenizer.eos_token)
        documents.append({document.strip() for document in stream[:-1]})
        names = [country.name for country in facts.COUNTRIES]
        for number, name in ((0, "France"), (names.index("Peru"), "Peru")):
            said = sum(token == name for document in stream for token in document.split())
            assert int((text.country == number).sum()) == said
    assert not documents[0] & documents[1]
    assert all(split_of(document) is Split.evaluation for part in documents for document in part)


def test_the_sums_by_country_are_those_of_the_features(tiny: LanguageModel) -> None:
    model, generator = random("clt", 0.3), torch.Generator().manual_seed(0)
    text = Text(tokens(20), torch.randint(C - 3, C + 1, (20, 9), generator=generator))
    mass, others = world_text.mass(Sides(tiny, model), text, batch_tokens=40)
    x = Sides(tiny, model).state(text.tokens).x[:, 1:].flatten(0, 1)
    features, country = features_of(model, x).dense().double(), text.country[:, 1:].flatten()
    for c in range(C - 3, C + 1):
        torch.testing.assert_close(mass.activation[..., c], features[country == c].sum(dim=0), rtol=1e-5, atol=1e-6)
        assert torch.equal(mass.fires[..., c], (features[country == c] > 0).sum(dim=0).double())
    assert mass.n_tokens.tolist() == torch.bincount(country, minlength=C + 1).tolist()
    assert len(others) == int((country == C).sum())


def test_what_does_not_write_mlp_outputs_has_purity_and_no_swap(lm: LanguageModel) -> None:
    options = oracle.arch_options("sae", site=Site.resid_mid, target=Target.site)
    model = oracle.transcoder(options, FixedThreshold(torch.ones(4, 11)), 4, 11, lm.d_model, torch.float32)
    values, ci95 = world_truth.measure(lm, model.requires_grad_(False), 4096, resamples=10)
    assert values["country_swap"] is None
    assert "arch=sae" in values["no_country_swap"]
    assert 0 <= values["purity"]["mean"] < 0.5
    assert ci95 == {}


def test_tasks_are_scored_by_their_answers(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths of the prompts, and however many are run at once."""
    monkeypatch.setattr(
        world_truth,
        "tasks",
        lambda: [t for t in world.tasks() if t.name in ("capital", "city_country", "bracket_last")],
    )
    answer = lm.tokenizer("Paris")["input_ids"][0]
    seen: list[int] = []

    def paris(ids: Tensor) -> Tensor:
        seen.append(ids.numel())
        logits = torch.zeros(len(ids), 1, lm.vocab_size)
        logits[..., answer] = 1
        return logits

    found = world_truth.world_tasks(lm, {"paris": paris}, 50)
    assert found["sets"]["capital/train"] == {"n": 40, "original": 1.0, "paris": 1 / 40}
    assert max(seen) <= 50
    for task in world_truth.tasks():
        asked, last, expected = map(torch.from_numpy, world.encode_task(task, lm.tokenizer, lm.tokenizer.bos_token_id))
        given = lm.logits(asked)[torch.arange(len(asked)), last].argmax(-1)
        own = found["sets"][f"{task.name}/{task.split}"]
        assert (own["n"], own["original"]) == (len(asked), float((given == expected).double().mean()))
    assert found["mean"]["original"] > 0.9


def test_no_prompt_of_a_swap_is_in_the_text_that_features_are_chosen_on(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {pair.source for pair in world.swap_pairs()}
    here, _ = world_text.halves(lm)
    unasked = world_text.unasked(lm, prompts)
    said = [lm.tokenizer.decode(text.tokens[:, 1:].flatten()) for text in (here, unasked)]
    assert any(prompt in said[0] for prompt in prompts)
    assert not any(prompt in said[1] for prompt in prompts)
    documents = [set(text.split(lm.tokenizer.eos_token)[:-1]) for text in said]
    left_out = {document for document in documents[0] if any(prompt in document for prompt in prompts)}
    cut = 3  # documents that the end of either text may cut
    assert len(documents[1] - documents[0]) <= cut
    assert len(documents[0] - documents[1] - left_out) <= cut < len(left_out)
    used: list[Text] = []
    mass = world_text.mass

    def note(sides: Sides, text: Text, batch_tokens: int) -> tuple[world_text.Mass, Tensor]:
        used.append(text)
        return mass(sides, text, batch_tokens)

    monkeypatch.setattr(world_text, "mass", note)
    world_truth.measure(lm, knows_capitals(lm), 4096)
    assert torch.equal(used[-1].tokens, unasked.tokens)
