"""What each kind of `clt plot` shows: its numbers, its figure and what is said below it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data import caches
from pipeline.data.address import cache_place
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp import naming, opening
from pipeline.interp.dashboards import feature_files
from pipeline.interp.dashboards.feature_options import Text
from pipeline.interp.dashboards.feature_text import FeatureText, Words
from pipeline.interp.edits import Sides
from pipeline.interp.original import prompt_tokens
from pipeline.interp.plots import plot_data, plot_effects, plot_embedding
from pipeline.interp.plots.plot_data import Feature
from pipeline.interp.plots.plot_options import By, Kind
from pipeline.stages.plot_options import PlotConfig
from pipeline.train.artifact import Trained
from pipeline.web import plot_effects as drawn_effects
from pipeline.web import plot_maps, plot_tokens
from pipeline.web.panels import Figure

N = {Kind.tokens: 12, Kind.correlation: 60, Kind.token_probability: 4, Kind.embedding: 2000}
"""Features that are shown where plot.n is null; of the other kinds 30."""
LABELLED = 36
"""Features that carry their label on a map."""
FOLLOWED = (2, 4)
"""Tokens of token_probability: the most likely ones, and those that change most."""


class Drawn(NamedTuple):
    """A picture and what stands beside it."""

    figure: Figure
    caption: str
    features: list[Feature]
    facts: dict[str, str]


class Subject:
    """What is drawn: a run with its language model, and a prompt where there is one."""

    def __init__(self, cfg: PlotConfig, trained: Trained, lm: LanguageModel) -> None:
        self.cfg, self.options, self.trained, self.lm = cfg, cfg.plot, trained, lm
        self.transcoder = trained.transcoder.to(lm.device)
        self.sides = Sides(lm, self.transcoder)
        self.words = Words(lm.tokenizer)
        self.n = cfg.plot.n or N.get(cfg.kind, 30)
        self.only: list[Feature] | None = None
        if cfg.plot.features is not None:
            self.only = naming.features(cfg.plot.features, "plot.features")
            naming.check_there(self.only, self.transcoder.n_sources, self.transcoder.d_features, "plot.features: ")
        self.tokens: Tensor | None = None
        if cfg.prompt is not None:
            self.tokens = prompt_tokens(lm, opening.begins_with(trained, lm), cfg.prompt)
            if self.tokens.shape[1] < 2:
                raise UserError("no feature is read at the first token of a context; give a prompt with more")
        self._labels: dict[Feature, str] = {}

    @property
    def texts(self) -> list[str]:
        assert self.tokens is not None
        return [self.words(token) for token in self.tokens[0].tolist()]

    def name(self, feature: Feature) -> str:
        """0/321 France / Paris"""
        if feature not in self._labels:
            self._labels[feature] = feature_files.label(self.trained.path / "features", *feature)
        return f"{feature[0]}/{feature[1]} {self._labels[feature]}".strip()

    def active(self) -> plot_data.Entries:
        assert self.tokens is not None
        return plot_data.entries(self.sides, self.tokens)

    def shown(self, found: plot_data.Entries) -> list[Feature]:
        """The features that were asked for, or the strongest ones, by layer and then by where they are strongest."""
        if self.only is not None:
            return self.only
        features = found.strongest(self.n)
        peaks = dict(zip(features, found.table(features, len(self.texts)).argmax(axis=1).tolist(), strict=True))
        return sorted(features, key=lambda feature: (feature[0], peaks[feature], feature[1]))

    def text(self) -> FeatureText:
        """The first tokens of the evaluation split."""
        key, asked = self.trained.config["cache"]["key"], self.trained.config["cache"]["request"]
        cache = caches.with_key(cache_place(self.cfg.cache), key, asked)
        return FeatureText(cache, self.trained, self.lm, Text.evaluation, self.options.n_tokens, 4096)

    def followed(self, logits: Tensor) -> int:
        """The token that plot.token names, or the most likely one. logits [V]"""
        if self.options.token is None:
            return int(logits[: len(self.lm.tokenizer)].argmax())
        return naming.token(self.lm, self.options.token, "plot.token")


def heatmap(subject: Subject) -> Drawn:
    found = subject.active()
    features = subject.shown(found)
    values = found.table(features, len(subject.texts)).tolist()
    figure = plot_tokens.heatmap(subject.texts, [subject.name(f) for f in features], [l for l, _ in features], values)
    caption = "Activations at each token (layer/feature and its most activating tokens). Lines part the layers; the "
    caption += "features are those that write most at each token: activation x decoder norm."
    return Drawn(figure, caption, features, _counted(found))


def tokens(subject: Subject) -> Drawn:
    found = subject.active()
    features = subject.shown(found)
    values = found.table(features, len(subject.texts)).tolist()
    figure = plot_tokens.coloured(subject.texts, [subject.name(f) for f in features], [l for l, _ in features], values)
    caption = (
        "The text once for each feature. Colour is full at the feature's highest activation in this text; point at "
    )
    caption += "a token for the number."
    return Drawn(figure, caption, features, _counted(found))


def embedding(subject: Subject) -> Drawn:
    transcoder = subject.transcoder
    every = [(layer, f) for layer in range(transcoder.n_sources) for f in range(transcoder.d_features)]
    generator = torch.Generator().manual_seed(subject.options.seed)
    drawn = torch.randperm(len(every), generator=generator)[: subject.n].sort().values.tolist()
    features = subject.only or [every[i] for i in drawn]
    maps = plot_embedding.embeddings(
        plot_embedding.rows(transcoder, features), subject.options.perplexity, subject.options.seed
    )
    names = [subject.name(feature) for feature in features]
    known = [i for i, name in enumerate(names) if any(letter.isalpha() for letter in name)]
    labelled = []
    for one in maps:
        texts = [names[i].partition(" ")[2] for i in known]
        which = plot_embedding.legible(one.points[known], texts, LABELLED)
        labelled.append(([known[i] for i in which], [texts[i] for i in which]))
    points = [(one.name, one.said, one.points.tolist()) for one in maps]
    figure = plot_maps.embedding(points, [layer for layer, _ in features], names, labelled)
    caption = "Each point is a feature: its decoder rows, concatenated over target layers and scaled to length 1. Near "
    caption += "points write alike. Some carry their most activating tokens; point at others for theirs."
    facts = {"features": f"{len(features):,} of {len(every):,}"}
    return Drawn(figure, caption, features if subject.only else [], facts)


def correlation(subject: Subject) -> Drawn:
    text = subject.text()
    only = subject.only
    if only is None and subject.tokens is not None:
        only = subject.active().strongest(subject.n)
    found = plot_data.correlations(subject.transcoder, text, only, subject.n)
    if not found.features:
        raise UserError(
            f"none of these features is active on {plot_data.LEAST_ACTIVE} tokens; name others or more tokens"
        )
    best = [[None if np.isnan(value) else round(value, 4) for value in row] for row in found.best.tolist()]
    names = [subject.name(feature) for feature in found.features]
    layers = [layer for layer, _ in found.features]
    figure = plot_maps.correlation(best, names, layers, found.matrix.tolist())
    caption = "Pearson correlations of activations over tokens of the evaluation split. Left: for each feature of the "
    caption += (
        "row's layer its highest correlation with a feature of the column's, averaged over features active on at "
    )
    caption += f"least {plot_data.LEAST_ACTIVE} tokens. Right: single features. Correlation is no cause: see clt graph."
    return Drawn(figure, caption, found.features, {"tokens": f"{text.n_rows:,}"})


def ranking(subject: Subject) -> Drawn:
    found, texts = subject.active(), subject.texts
    n_layers = subject.transcoder.n_sources
    facts = _counted(found)
    if subject.options.by is By.norm:
        order = np.argsort(-found.importance, kind="stable")
        places = [((int(found.layer[i]), int(found.feature[i])), int(found.token[i]), i) for i in order.tolist()]
        places = [one for one in places if subject.only is None or one[0] in subject.only][: subject.n]
        values = [float(found.importance[i]) for _, _, i in places]
        title = "activation x decoder norm"
        caption = (
            "How much each active feature writes: activation x norm of its decoder rows, all target layers together."
        )
        rows = [(feature, position) for feature, position, _ in places]
    else:
        model = opening.opened(subject.trained, subject.lm)
        token = subject.followed(subject.sides.state(_of(subject)).logits[0, -1])
        name = subject.words(token).strip()
        effects = plot_effects.effects(
            model, _of(subject), found, token, subject.n, subject.options.response, subject.only
        )
        rows, values = [(one.feature, one.position) for one in effects], [one.effect for one in effects]
        facts["token"] = name
        title = f"effect on the logit of {name} (less the mean logit)"
        caption = (
            "The logit behind the last token with each feature minus without it: one ablation each in the original "
        )
        caption += (
            f"model, other features {subject.options.response}; of the {plot_effects.CANDIDATES * subject.n} active "
        )
        caption += "features that write most, those with the largest effect."
    if not rows:
        raise UserError("none of these features is active on the prompt; name others or another prompt")
    names = [f"{subject.name(feature)}  @ {position} {texts[position].strip()}" for feature, position in rows]
    figure = drawn_effects.ranking(names, [layer for (layer, _), _ in rows], values, title, n_layers)
    return Drawn(figure, caption, list(dict.fromkeys(feature for feature, _ in rows)), facts)


def token_probability(subject: Subject) -> Drawn:
    options, found = subject.options, subject.active()
    model = opening.opened(subject.trained, subject.lm)
    logits = subject.sides.state(_of(subject)).logits[0, -1].float().cpu()
    features = subject.only
    if features is None:
        token = subject.followed(logits)
        effects = plot_effects.effects(model, _of(subject), found, token, 3 * subject.n, options.response)
        features = list(dict.fromkeys(one.feature for one in effects))
    factors = sorted(set(options.factors))
    turned = plot_effects.turned(model, _of(subject), found, features, factors, options.response)
    if not turned:
        raise UserError("none of these features is active on the prompt; name others or another prompt")
    if subject.only is None:
        turned = plot_effects.moving(turned, subject.n)
    followed = plot_effects.followed(turned, logits.softmax(dim=-1), *FOLLOWED)
    if options.token is not None and (token := subject.followed(logits)) not in followed:
        followed = [token, *followed]
    panels = []
    for one in turned:
        where = ", ".join(subject.texts[position].strip() for position in one.positions)
        panels.append((f"{subject.name(one.feature)}, at: {where}", one.probabilities[:, followed].T.tolist()))
    figure = drawn_effects.token_probability(factors, [subject.words(token).strip() for token in followed], panels)
    caption = (
        "Probabilities behind the last token when a feature's activation is multiplied wherever it is active: 1 is "
    )
    caption += f"the model as it is, 0 without the feature, 2 twice as much of it. Other features {options.response}."
    return Drawn(figure, caption, [one.feature for one in turned], _counted(found))


DRAW: dict[Kind, Callable[[Subject], Drawn]] = {
    Kind.heatmap: heatmap,
    Kind.tokens: tokens,
    Kind.embedding: embedding,
    Kind.correlation: correlation,
    Kind.ranking: ranking,
    Kind.token_probability: token_probability,
}

TITLES = {
    Kind.heatmap: "Features over tokens",
    Kind.tokens: "A text, coloured by feature",
    Kind.embedding: "A map of features",
    Kind.correlation: "Correlated features",
    Kind.ranking: "Features by importance",
    Kind.token_probability: "Features turned up and down",
}


def _of(subject: Subject) -> Tensor:
    assert subject.tokens is not None
    return subject.tokens


def _counted(found: plot_data.Entries) -> dict[str, str]:
    return {"active features": f"{len(found.value):,} (feature, token) pairs"}
