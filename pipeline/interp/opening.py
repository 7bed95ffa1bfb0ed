"""A finished run with the base model that it was trained on."""

from dataclasses import fields
from pathlib import Path

from pipeline.data import models, tokens
from pipeline.data.models import LanguageModel
from pipeline.data.options import Bos, DatasetKind, DatasetOptions, ModelOptions
from pipeline.errors import UserError
from pipeline.interp import replacement
from pipeline.interp.replacement import ReplacementModel
from pipeline.plain import from_plain
from pipeline.train import finished
from pipeline.train import run as runs
from pipeline.train.artifact import Trained


def replace(run: str | Path, device: str = "auto", transcoder: str = "auto") -> ReplacementModel:
    """The language model of a run with the run's transcoder in place of its MLPs: `pipeline.replace("runs/demo")`.

    `run` is a directory or a run's name, `device` auto, cpu, cuda or cuda:N; `transcoder` says where its weights are:
    memory, disk (of which the rows that are needed are read) or auto, disk for what is too large. `.run(prompt)` gives
    logits, features, reconstructions and errors (`Replaced`). Raises UserError for a run that is not finished, for a
    base model that is not where it was or has other weights now, and for a transcoder that cannot stand in for MLPs
    live (an acausal one, or one that reconstructs something else).
    """
    trained = finished.read(runs.named(str(run)), finished.chosen(transcoder), device)
    check_replaces(trained)
    return opened(trained, base_model(trained, device))


def opened(trained: Trained, lm: LanguageModel) -> ReplacementModel:
    """The same from what was loaded already; a text begins as the run's contexts did."""
    check_replaces(trained)
    model = ReplacementModel(lm, trained.transcoder.to(lm.device), trained.site)
    model.bos_token_id = begins_with(trained, lm)
    return model


def begins_with(trained: Trained, lm: LanguageModel) -> int | None:
    """The token at position 0 of the run's contexts, or None where text begins there."""
    return tokens.bos_of(_dataset(trained), lm.tokenizer)


def check_replaces(trained: Trained) -> None:
    """UserError where nothing can run live in the MLPs' place; before a language model is loaded."""
    options, basis = trained.transcoder.options, replacement.basis(trained.transcoder)
    if basis is None:
        raise UserError(f"{trained.path}: {replacement.no_basis(options)}; use a run with arch.target=mlp_out")
    if not trained.transcoder.causal:
        raise UserError(
            f"{trained.path}: arch={options.name} reads all layers at once, so it cannot run live; "
            "use a run of a causal arch (clt, per_layer, skip, tied, molt, matryoshka)"
        )


def base_model(trained: Trained, device: str = "auto") -> LanguageModel:
    """The language model that a run was trained on. Raises UserError where it is not to be found, and where its weights
    are others now."""
    asked = trained.config["cache"]["request"]["model"]
    revision = trained.config["model"]["revision"] or asked["revision"]  # the commit, where a branch was asked for
    lm = models.load(from_plain(ModelOptions, {**asked, "device": device, "revision": revision}))
    expected, found = trained.config["model"]["weights_sha256"], lm.weights_hash()
    if expected != found:
        raise UserError(
            f"{trained.path} was trained on other weights of {lm.name} ({expected[:12]}, now {found[:12]}); "
            "restore those weights or extract and train again"
        )
    return lm


def _dataset(trained: Trained) -> DatasetOptions:
    """What of the run's data set says how a context begins. Runs from before there was a choice have the default."""
    described = trained.config["dataset"]
    default = next(field.default for field in fields(DatasetOptions) if field.name == "bos")
    bos = Bos(described.get("bos", default))
    return DatasetOptions(name=described["name"], kind=DatasetKind(described["kind"]), n_tokens="all", bos=bos)
