"""What a graph's features respond to: as `clt features` described them, else seen in the text of the run itself."""

import logging
from collections.abc import Collection

import numpy as np

from pipeline.data import caches
from pipeline.data.address import cache_place
from pipeline.errors import UserError
from pipeline.interp.dashboards import feature_files, features
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.dashboards.feature_options import FeatureOptions
from pipeline.interp.dashboards.feature_records import Records, weights
from pipeline.interp.dashboards.feature_text import FeatureText, Words
from pipeline.interp.dashboards.features import Chosen
from pipeline.interp.replacement import ReplacementModel
from pipeline.stages.graph_options import GraphConfig
from pipeline.train import run as runs
from pipeline.train.artifact import Trained

logger = logging.getLogger(__name__)

N_TOKENS = "64k"
"""Of the evaluation split, at the most: a page is to be there in seconds."""

Place = tuple[int, int]
"""(layer, feature)"""


def records(
    cfg: GraphConfig, trained: Trained, model: ReplacementModel, places: Collection[Place]
) -> dict[Place, Record]:
    """Of these features, as far as something is known. Those that the run's features/ lacks are described from the
    cache's evaluation split and kept nowhere. Raises UserError for graph.examples=true without that cache."""
    folder = trained.path / "features"
    found = {place: record for place in places if (record := feature_files.read(folder, *place)) is not None}
    missing = sorted(set(places) - set(found))
    if not missing or cfg.graph.examples is False:
        return found
    cached = trained.config["cache"]
    try:
        cache = caches.with_key(cache_place(cfg.cache), cached["key"], cached["request"])
    except UserError as error:
        if cfg.graph.examples:
            raise
        logger.info("%d features without contexts: %s", len(missing), error)
        return found
    options, transcoder = FeatureOptions(n_tokens=N_TOKENS, related=0), model.transcoder
    text = FeatureText(cache, trained, model.lm, options.split, options.n_tokens, options.batch_tokens)
    chosen = Chosen(*np.array(missing, dtype=np.int64).T)
    measured = features.measure(transcoder, text, chosen, options)
    about = weights(model.lm, transcoder, chosen, None, options)
    name, words = runs.name_of(trained.path), Words(model.lm.tokenizer)
    described = Records(name, text, words, chosen, measured, about, transcoder.d_features, options)
    return found | dict(zip(missing, described, strict=True))
