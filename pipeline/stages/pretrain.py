"""`clt pretrain lm=world dataset=world`: a small language model from scratch, with a report of what it knows."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline.data import world
from pipeline.data.options import DatasetKind
from pipeline.data.tokens import Split, pack
from pipeline.data.world import tokenizer as world_tokenizer
from pipeline.errors import UserError
from pipeline.stages.options import PretrainConfig
from pipeline.train import pretrain, world_report

logger = logging.getLogger(__name__)


def run(cfg: PretrainConfig) -> Path:
    """Trains on the training split and returns the new Hugging Face directory, with world.json: the command, the
    options, the losses against the generator's entropy, the accuracy of every task and the country swap.

    Raises UserError when the directory exists and for data other than the built-in world, whose words are the
    tokenizer's vocabulary.
    """
    to = Path(cfg.to or f"models/{cfg.lm.name}")
    if cfg.dataset.kind is not DatasetKind.world:
        raise UserError(
            f"dataset={cfg.dataset.name}: pretrain knows the words of the built-in world; use dataset=world"
        )
    pretrain.check(cfg.lm, to)
    tokenizer = world_tokenizer.build()
    packed = pack(cfg.dataset, tokenizer, tokenizer.bos_token_id)
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.unmeasured")
    shutil.rmtree(aside, ignore_errors=True)
    trained = pretrain.fit(cfg.lm, packed[Split.train].contexts, packed[Split.evaluation].contexts, tokenizer, aside)
    model = world_report.load(aside)  # as stored: what is measured is what is used
    report = {
        "command": f"clt pretrain lm={cfg.lm.name} dataset={cfg.dataset.name} dataset.n_tokens={cfg.dataset.n_tokens}",
        "lm": asdict(cfg.lm),
        "dataset": asdict(cfg.dataset),
        "documents_sha256": world_report.fingerprint(cfg.dataset.seed),
        "training": trained,
        "losses": world_report.losses(model, tokenizer, cfg.dataset.seed),
        "tasks": world_report.accuracies(model, tokenizer, world.tasks()),
        "swap_layer_0_mlp": world_report.swaps(model, tokenizer, world.swap_pairs()),
    }
    (aside / "world.json").write_text(json.dumps(report, indent=2) + "\n")
    aside.rename(to)
    logger.info("%s\nnext: clt extract model=local model.path=%s dataset=%s", to, to, cfg.dataset.name)
    return to
