"""The generator against independent oracles, the tokenizer, the questions, and the model that ships."""

import json
import math
import re
from collections import Counter
from functools import cache
from itertools import islice

import numpy as np
import pytest

from pipeline.data import world
from pipeline.data.world import facts, statements, stories, tokenizer
from pipeline.data.world.draw import Draw


class Script(Draw):
    """Choices from a list instead of a hash; past its end, always the first one."""

    def __init__(self, choices):
        self.choices, self.sizes, self.log_prob = choices, [], 0.0

    def _next(self, n):
        i = len(self.sizes)
        self.sizes.append(n)
        return self.choices[i] if i < len(self.choices) else 0

    def below(self, n):
        self.log_prob -= math.log(n)
        return self._next(n)

    def one_in(self, n):
        hit = self._next(2) == 0
        self.log_prob += math.log(1 / n if hit else 1 - 1 / n)
        return hit


def every_text(draw_text):
    """All derivations of a kind of document: (text, log-probability), by counting through all choices."""
    choices = []
    while True:
        script = Script(choices)
        yield draw_text(script), script.log_prob
        choices = choices + [0] * (len(script.sizes) - len(choices))
        while choices and choices[-1] + 1 == script.sizes[len(choices) - 1]:
            choices = choices[:-1]
        if not choices:
            return
        choices = [*choices[:-1], choices[-1] + 1]


@cache
def sample(n=40_000):
    return list(islice(world.documents(seed=5), n))


def kind_weight(kind):
    return world.KINDS[kind][0] / sum(weight for weight, _ in world.KINDS.values())


@pytest.mark.parametrize("kind", ["count", "country", "pronoun", "feel"])
def test_the_probabilities_of_all_texts_of_a_kind_sum_to_one_and_are_those_that_documents_carry(kind):
    derivations = list(every_text(world.KINDS[kind][1]))
    texts = dict(derivations)
    assert len(texts) == len(derivations)  # one derivation a text
    assert math.fsum(math.exp(p) for p in texts.values()) == pytest.approx(1, abs=1e-9)
    seen = [d for d in sample() if d.kind == kind]
    assert seen
    for document in seen:
        assert document.log_prob == pytest.approx(texts[document.text] + math.log(kind_weight(kind)), abs=1e-9)


def test_frequencies_are_the_probabilities_that_documents_carry():
    texts = dict(every_text(stories.count))
    n = 200_000
    found = Counter(stories.count(Draw(f"frequency {i}")) for i in range(n))
    chi2 = sum((found[t] - n * math.exp(p)) ** 2 / (n * math.exp(p)) for t, p in texts.items())
    freedom = len(texts) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_probability_of_sums_follows_from_the_text_alone():
    n_pairs = sum(1 for a in range(1, 21) for b in range(1, 21) if not facts.held_sum(a, b))
    for document in sample():
        if document.kind == "add":
            expected = math.log(kind_weight("add") / 3)
            for sentence in document.text.split(" .")[:-1]:
                expected += math.log((2 if "+" in sentence else 1) / 3 / n_pairs)
            assert document.log_prob == pytest.approx(expected, abs=1e-9)


def test_the_probability_of_brackets_follows_from_the_text_alone():
    def held_here(start):  # of three opening brackets in a row, some triples are held out
        return [c for c in "([{" if facts.held("nest", *start, c, one_in=6)] if len(start) == 2 else []

    for document in sample():
        if document.kind != "brackets":
            continue
        expected, depth, before = math.log(kind_weight("brackets")), 0, ""
        for bracket in document.text.split():
            forced = depth == 4 or len(before) + depth >= 24
            free = bool(before) and not forced  # both to open and to close (or to stop) were possible
            expected += math.log(0.5) if free else 0
            if bracket in "([{":
                rest = held_here(before) if all(b in "([{" for b in before) else []
                expected -= math.log(3 - len(rest))
                depth += 1
            else:
                depth -= 1
            before += bracket
        expected += math.log(0.5) if len(before) < 24 else 0  # stopped
        assert depth == 0
        assert document.log_prob == pytest.approx(expected, abs=1e-9)


def test_one_text_has_one_kind_and_one_probability():
    first = {}
    for document in sample():
        same = first.setdefault(document.text, document)
        assert (same.kind, same.log_prob) == (document.kind, pytest.approx(document.log_prob))
    assert len(first) > 0.8 * len(sample())


def test_kinds_come_as_often_as_they_weigh():
    found = Counter(document.kind for document in sample())
    for kind in world.KINDS:
        expected = len(sample()) * kind_weight(kind)
        assert abs(found[kind] - expected) < 5 * math.sqrt(expected)


def test_a_document_depends_on_seed_and_index_only():
    assert list(islice(world.documents(3, start=1000), 20)) == list(islice(world.documents(3), 1000, 1020))
    assert world.document(3, 10**15).text  # no walking there
    assert next(world.documents(3)) != next(world.documents(4))


def test_documents_are_short_enough_for_a_context():
    assert max(len(document.text.split()) for document in sample()) <= 60


def test_held_out_facts_are_never_stated():
    stated = {s.strip() for d in sample() for s in d.text.split(" .")}
    for task in world.tasks():
        if task.split == "held" and task.name.startswith(("twohop", "state_", "person_", "opp_", "add", "subtract")):
            assert not stated & {f"{p} {a}" for p, a in zip(task.prompts, task.answers, strict=True)}, task.name


def test_held_out_city_relations_are_not_told_in_stories_either():
    checked = 0
    for document in sample():
        if document.kind == "lives":
            home = dict(re.findall(r"(\w+) lives in (\w+)", document.text))
            pronoun = {w: name for name in home for w in (facts.she(name).capitalize(), facts.her(name))}
            for who, verb in re.findall(r"(\w+) (speaks|pays)", document.text):
                city = home[pronoun.get(who, who)]
                relation = {"speaks": "language", "pays": "currency"}[verb]
                assert city not in facts.COUNTRY_OF or not statements.held_city(city, relation)
                checked += 1
    assert checked > 1000


def test_held_out_sums_never_appear_in_any_form():
    text = " . ".join(document.text for document in sample())
    pairs = [(int(a), int(b)) for a, b in re.findall(r"(\d+) \+ (\d+) =", text)]
    pairs += [(int(c) - int(b), int(b)) for c, b in re.findall(r"(\d+) - (\d+) =", text)]
    pairs += [(int(a), int(b)) for a, b in re.findall(r"has (\d+) \w+ \. Somebody gives \w+ (\d+)", text)]
    pairs += [(int(c) - int(b), int(b)) for c, b in re.findall(r"has (\d+) \w+ \. \w+ loses (\d+)", text)]
    assert len(pairs) > 5000
    assert not [pair for pair in pairs if facts.held_sum(*pair)]
    assert all(facts.held_sum(a, b) == facts.held_sum(b, a) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "kinds", "pattern"),
    [
        ("lives_capital", ("lives",), r"(\w+) lives in (\w+)"),
        ("obj_loc", ("obj",), r"put the (\w+) in the (\w+)"),
        ("pronoun", ("obj", "pronoun", "feel"), r"(\w+) went to the (\w+)"),
        ("anton_story", ("feel",), r"(\w+) is not (\w+)"),
        ("give_to", ("give",), r"^(\w+) (?:and|met) (\w+)"),
        ("agree", ("agree",), r"The (\w+) beside the (\w+)"),
    ],
)
def test_held_out_pairs_never_meet_in_stories(name, kinds, pattern):
    single = {plural: animal for animal, plural in stories.PLURAL.items()}
    pronouns = {"She", "He"}
    held = next(task for task in world.tasks() if (task.name, task.split) == (name, "held"))

    def pairs(texts):
        found = {m for text in texts for m in re.findall(pattern, text) if m[0] not in pronouns}
        return {tuple(single.get(word, word) for word in pair) for pair in found}

    asked = pairs(held.prompts)
    if name == "obj_loc":  # one of the two objects of a prompt is asked about
        asked = {pair for pair in asked if pair[1] not in stories.STORED[pair[0]]}
    if name == "give_to":
        asked |= {(b, a) for a, b in asked}
    met = pairs(document.text for document in sample() if document.kind in kinds)
    assert len(asked) > 20
    assert len(met) > 100
    assert not asked & met


@pytest.mark.parametrize("name", ["induction", "bracket_last"])
def test_held_out_lists_begin_as_no_document_does(name):
    held = next(task for task in world.tasks() if (task.name, task.split) == (name, "held"))
    starts = {" ".join(prompt.split()[:3]) for prompt in held.prompts}
    assert starts.isdisjoint({" ".join(document.text.split()[:3]) for document in sample()})


def test_every_name_means_one_thing():
    groups = [
        [c.name for c in facts.COUNTRIES],
        [c.capital for c in facts.COUNTRIES],
        facts.CITIES,
        [s.name for s in facts.STATES],
        [s.capital for s in facts.STATES],
        list(facts.STATE_OF),
        facts.NAMES,
        [p.surname for p in facts.PEOPLE],
        facts.JOBS,
        list(facts.EN_OPPOSITE),
        list(facts.FR_OPPOSITE),
        facts.OBJECTS,
        facts.CONTAINERS,
        facts.PLACES,
        facts.COUNTABLE,
        list(stories.PLURAL),
    ]
    assert not [word for word, n in Counter(w for group in groups for w in group).items() if n > 1]
    assert len(facts.COUNTRIES) == 40


def test_every_document_survives_encoding_and_decoding():
    words = tokenizer.build()
    for document in sample()[:3000]:
        ids = words(document.text)["input_ids"]
        assert len(ids) == len(document.text.split())
        assert words.unk_token_id not in ids
        assert words.decode(ids) == document.text


def test_the_vocabulary_is_what_documents_say_and_no_more():
    said = {word for document in sample() for word in document.text.split()}
    assert said == set(tokenizer.words())


def test_a_word_is_one_token_with_its_space_and_an_unknown_word_is_not_dropped():
    words = tokenizer.build()
    paris, unknown = words.convert_tokens_to_ids(" Paris"), words.unk_token_id
    assert words("Paris is in Zanzibar")["input_ids"][::3] == [paris, unknown]
    assert words("is Paris")["input_ids"][1] == paris
    assert (words.bos_token, words.eos_token) == ("<bos>", "<eos>")
    assert words("")["input_ids"] == []


def test_questions_have_answers_of_one_token_and_encode_as_contexts():
    words = tokenizer.build()
    bos = words.bos_token_id
    for task in world.tasks():
        tokens, last, answer = world.encode_task(task, words, bos)
        assert tokens.dtype == last.dtype == answer.dtype == np.int64
        assert len(task.prompts) == len(set(task.prompts)) == len(tokens) >= 8
        for row, end, a, prompt, word in zip(tokens, last, answer, task.prompts, task.answers, strict=True):
            assert row[0] == bos
            assert words.decode(row[1 : end + 1]) == prompt
            assert (row[end + 1 :] == bos).all()
            assert words.decode([a]) == word
        assert words.unk_token_id not in tokens


def test_swap_pairs_differ_at_the_country_only():
    pairs = world.swap_pairs()
    assert sum(pair.relation == "capital" for pair in pairs) == 40 * 39
    for pair in pairs:
        source, target = (["<bos>", *text.split()] for text in (pair.source, pair.target))
        assert [i for i in range(len(source)) if source[i] != target[i]] == [pair.position]
        assert pair.source_answer != pair.answer


def shipped():
    from transformers import AutoTokenizer

    from pipeline.train import world_report

    return world_report.load(world.MODEL_DIR), AutoTokenizer.from_pretrained(world.MODEL_DIR)


@cache
def report():
    return json.loads((world.MODEL_DIR / "world.json").read_text())


def test_the_shipped_model_is_small_and_has_the_tokenizer_of_this_world():
    from transformers import AutoTokenizer

    assert (world.MODEL_DIR / "model.safetensors").stat().st_size < 3e6
    assert {path.suffix for path in world.MODEL_DIR.iterdir()} == {".json", ".safetensors"}
    ours = AutoTokenizer.from_pretrained(world.MODEL_DIR)
    assert ours.get_vocab() == tokenizer.build().get_vocab()
    text = sample()[0].text
    assert ours(text)["input_ids"] == tokenizer.build()(text)["input_ids"]


def test_the_report_of_the_shipped_model_meets_what_is_asked_of_it():
    scores = {name: score["accuracy"] for name, score in report()["tasks"].items()}
    assert set(scores) == {f"{task.name}/{task.split}" for task in world.tasks()}
    facts_known = {"capital/train", "language/train", "currency/train", "continent/train", "induction/held"}
    facts_known |= {name for name in scores if name.startswith(("twohop_", "state_"))}
    assert {name for name in facts_known if scores[name] < 0.9} == set()
    assert np.mean([score >= 0.9 for score in scores.values()]) >= 0.85
    for swap in report()["swap_layer_0_mlp"].values():
        assert swap["at_country"] >= 0.95
    assert report()["losses"]["floor"] < report()["losses"]["held_out_loss"] < report()["losses"]["floor"] + 0.05


def test_the_shipped_model_answers_as_its_report_says():
    from pipeline.train import world_report

    asked = [t for t in world.tasks() if t.name in ("capital", "twohop_language", "induction")]
    model, words = shipped()
    found = world_report.accuracies(model, words, asked)
    assert {name: score["accuracy"] for name, score in found.items()} == pytest.approx(
        {name: report()["tasks"][name]["accuracy"] for name in found}, abs=0.02
    )


def test_the_shipped_model_looks_facts_up_where_the_country_stands():
    from pipeline.train import world_report

    pairs = [pair for pair in world.swap_pairs() if "France" in pair.source]
    for swap in world_report.swaps(*shipped(), pairs).values():
        assert swap["n"] >= 38
        assert swap["at_country"] >= 0.95
        assert swap["at_last"] <= 0.05


def test_the_language_is_still_the_one_that_the_shipped_model_was_trained_on():
    from pipeline.train import world_report

    assert world_report.fingerprint(report()["dataset"]["seed"]) == report()["documents_sha256"]


@pytest.mark.slow
def test_every_figure_of_the_report_is_reproduced():
    from pipeline.train import world_report

    model, words = shipped()
    found = world_report.accuracies(model, words, world.tasks())
    for name, score in report()["tasks"].items():
        assert found[name]["n"] == score["n"]
        assert found[name]["accuracy"] == pytest.approx(score["accuracy"], abs=0.021), name
    for relation, swap in world_report.swaps(model, words, world.swap_pairs()).items():
        assert swap == pytest.approx(report()["swap_layer_0_mlp"][relation], abs=0.005)
    losses = world_report.losses(model, words, report()["dataset"]["seed"])
    kinds, stated = losses.pop("kinds"), dict(report()["losses"])
    for kind, both in stated.pop("kinds").items():
        assert kinds[kind] == pytest.approx(both, abs=1e-3), kind
    assert losses == pytest.approx(stated, abs=1e-3)
