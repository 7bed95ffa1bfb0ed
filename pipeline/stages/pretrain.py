"""`clt pretrain`: text -> a small language model in Hugging Face format.

    clt pretrain lm=small dataset=text dataset.path=book.txt
    clt pretrain lm=world dataset=world dataset.n_tokens=24M

1. The settings name the result: when models/NAME is there and was made by them, nothing is done.
2. A tokenizer is trained on the training documents (or taken from elsewhere), the text is packed into contexts.
3. A GPT-2 is trained on the training split, in a hidden directory beside the result. A stopped run goes on with the
   same command and ends at the same bytes.
4. The finished directory holds the model, its tokenizer, metrics.jsonl and pretrain.json; world.json as well for the
   built-in world in its own words.
"""

import importlib.metadata
import json
import logging
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeline.data import tokens, world
from pipeline.data.asking import asked, words_of
from pipeline.data.commands import command_of
from pipeline.data.layout import gb
from pipeline.data.models import resolve_device, resolve_dtype
from pipeline.data.options import Content, DatasetKind, DatasetOptions, ModelOptions
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.tokens import Packed, Split
from pipeline.data.world import tokenizer as world_tokenizer
from pipeline.errors import UserError
from pipeline.files import atomic_directory, write_aside
from pipeline.plain import to_plain
from pipeline.stages.options import PretrainConfig
from pipeline.train import lm_loop, lm_run, pretrain, world_report
from pipeline.train.lm_loop import Plan
from pipeline.train.lm_measure import bits_per_byte, unigram_entropy
from pipeline.train.lm_run import REPORT, Json, Work
from pipeline.train.pretrain import Sample
from pipeline.train.run import flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STREAMED = {DatasetKind.hub, DatasetKind.mixture}
"""Kinds whose packing can fail for want of a network: what is done of it stays for the next start."""
NEXT_TOKENS = "400k"
"""Training rows in the extract command that is proposed at the end, where the text has more: a first, small cache."""


def run(cfg: PretrainConfig) -> Path:
    """Make the model, or go on with it, or say that it is there. -> its directory

    Raises UserError for settings that contradict one another, for a place that is taken and for text that is too short.
    """
    to = Path(cfg.to or f"models/{cfg.lm.name}")
    device = resolve_device(cfg.lm.device)
    settings = _settings(cfg)
    work = lm_run.start(to, settings)
    if work is None:
        made = json.loads((to / REPORT).read_text(encoding="utf-8"))
        logger.info("already there, nothing to do: %s\n%s", to, _next(to, cfg.dataset, made["data"]["n_rows"]))
        return to
    try:
        return _make(cfg, work, settings, device)
    finally:
        work.release()


class Ready(NamedTuple):
    """Everything that training needs."""

    tokenizer: "PreTrainedTokenizerBase"
    bos_token_id: int | None
    packed: dict[Split, Packed]
    plan: Plan
    model: Any
    unigram: float
    """Cross-entropy of the held-out tokens under the frequencies of the training tokens, nats a token."""

    @property
    def held_out(self) -> Any:
        """Contexts int32 [n, T]."""
        return self.packed[Split.evaluation].contexts


def _make(cfg: PretrainConfig, work: Work, settings: Json, device: torch.device) -> Path:
    try:
        ready = _prepare(cfg, work, device)
    except UserError:
        worth_keeping = cfg.dataset.kind in STREAMED and any(work.packing.glob("*"))
        if work.checkpoint is None and not worth_keeping:
            work.discard()
        raise
    _say(cfg, ready)
    model, tokenizer = ready.model, ready.tokenizer
    begun = pretrain.prompts(cfg.lm.n_samples, ready.held_out, ready.bos_token_id, tokenizer.eos_token_id)

    def samples() -> list[Sample]:
        return pretrain.samples(model, tokenizer, begun, cfg.lm)

    train = ready.packed[Split.train]
    last = lm_loop.fit(cfg.lm, ready.plan, model, train.contexts, ready.held_out, work, lambda: pretrain.say(samples()))
    report = _report(cfg, settings, work, ready, last, samples())
    _finish(cfg, work, model, tokenizer, report)
    _say_result(report)
    logger.info("%s\n%s", work.to, _next(work.to, cfg.dataset, train.n_rows))
    return work.to


def _prepare(cfg: PretrainConfig, work: Work, device: torch.device) -> Ready:
    """Tokenizer, text, plan and a model with its first weights."""
    tokenizer = _tokenizer(cfg, work)
    bos = tokens.bos_of(cfg.dataset, tokenizer)
    packed = tokens.pack(cfg.dataset, tokenizer, bos, work.packing)
    work.data = tokens.fingerprint(packed)
    train, held_out = packed[Split.train], packed[Split.evaluation].contexts
    plan = lm_loop.make_plan(cfg.lm, len(train.contexts), cfg.dataset.context, resolve_dtype(cfg.lm.dtype, device))
    torch.manual_seed(cfg.lm.seed)
    model = _build(cfg, packed, tokenizer, bos).to(device)
    _check_space(work.to, model)
    unigram = unigram_entropy(train, held_out, model.config.vocab_size)
    return Ready(tokenizer, bos, packed, plan, model, unigram)


def _report(cfg: PretrainConfig, settings: Json, work: Work, ready: Ready, last: Json, found: list[Sample]) -> Json:
    """pretrain.json. Nothing in it depends on the time that training took, so that it repeats to the byte."""
    plan, packed, loss = ready.plan, ready.packed, last["held_out_loss"]
    return {
        "command": _command(cfg),
        **settings,
        "data": {
            "sha256": work.data,
            "resolved": tokens.resolved(cfg.dataset),
            "n_rows": packed[Split.train].n_rows,
            **{f"{split}_contexts": len(packed[split].contexts) for split in Split},
        },
        "training": {
            "n_parameters": ready.model.num_parameters(),
            "n_steps": plan.n_steps,
            "n_tokens": plan.n_tokens,
            "loss": last["loss"],
            "held_out_loss": loss,
            "epochs": plan.epochs,
            "device": str(ready.model.device),
            "dtype": _name(plan.dtype),
        },
        "held_out": {
            "loss": loss,
            "unigram_entropy": ready.unigram,
            "bits_per_byte": bits_per_byte(loss, ready.held_out, ready.tokenizer),
        },
        "samples": [sample._asdict() for sample in found],
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "torch", "transformers")},
    }


def _settings(cfg: PretrainConfig) -> Json:
    """What decides the result: the options, and the hashes of local files. UserError for what cannot be."""
    tokens.check(cfg.dataset)
    pretrain.check(cfg.lm, cfg.dataset.context)
    needed = {Content.tokens: "the tokenizer of its ids", Content.chat: "a tokenizer with a chat template"}
    if cfg.dataset.content in needed and cfg.lm.tokenizer is None:
        content = cfg.dataset.content
        raise UserError(f"dataset.content={content} needs {needed[content]}; name one with lm.tokenizer=")
    dataset = asked(cfg.dataset)
    if cfg.dataset.n_tokens != "all":  # 400k and 400000 are one setting
        dataset["n_tokens"] = str(tokens.count(cfg.dataset.n_tokens))
    source = {
        "dataset": tokens.source_identity(cfg.dataset),
        "tokenizer": pretrain.tokenizer_identity(cfg.lm.tokenizer),
    }
    return {"lm": to_plain(cfg.lm), "dataset": dataset, "source": source}


def _own_words(cfg: PretrainConfig) -> bool:
    """Whether this is the built-in world in its own words, on which the world's tasks can be asked."""
    return cfg.dataset.kind is DatasetKind.world and cfg.lm.tokenizer is None


def _tokenizer(cfg: PretrainConfig, work: Work) -> "PreTrainedTokenizerBase":
    """The one that stands in the working directory, or a new one, which is put there."""
    if work.tokenizer.exists() and not _own_words(cfg):
        return pretrain.load_tokenizer(str(work.tokenizer))
    if _own_words(cfg):
        tokenizer: PreTrainedTokenizerBase = world_tokenizer.build()
    elif cfg.lm.tokenizer is not None:
        tokenizer = pretrain.load_tokenizer(cfg.lm.tokenizer)
    else:
        tokenizer = pretrain.train_tokenizer(tokens.texts(cfg.dataset), cfg.lm.vocab_size, cfg.lm.tokenizer_mb)
    with atomic_directory(work.tokenizer) as aside:
        tokenizer.save_pretrained(aside)
    return tokenizer


def _build(
    cfg: PretrainConfig, packed: dict[Split, Packed], tokenizer: "PreTrainedTokenizerBase", bos: int | None
) -> Any:
    n_words = pretrain.n_words(tokenizer)
    largest = max(int(split.contexts.max()) for split in packed.values())
    if largest >= n_words:
        why = f"the text holds token {largest}, the tokenizer has {n_words}"
        raise UserError(f"lm.tokenizer={cfg.lm.tokenizer}: {why}; give the tokenizer that the text was made with")
    return pretrain.build(cfg.lm, n_words, cfg.dataset.context, bos, tokenizer.eos_token_id)


def _check_space(to: Path, model: Any) -> None:
    """UserError when checkpoints and result would not fit on the disk."""
    # Weights and two moments in a checkpoint, another while it is being written, and the result.
    needed = 4 * model.num_parameters() * (2 * 3 + 1)
    if needed > (free := free_bytes(to.parent)):
        sizes = f"{gb(needed)} to write, {gb(free)} free on {disk_of(to.parent)}"
        raise UserError(f"the training does not fit: {sizes}; free some space or choose another to=")


def _finish(cfg: PretrainConfig, work: Work, model: Any, tokenizer: "PreTrainedTokenizerBase", report: Json) -> None:
    """The finished directory, which is there as a whole or not at all."""
    with atomic_directory(work.to) as aside:
        pretrain.save(model, work.tokenizer, cfg.lm.weights, aside)
        if _own_words(cfg):
            (aside / "world.json").write_text(json.dumps(_world_report(cfg, aside, tokenizer, report), indent=2) + "\n")
        (aside / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_aside(aside / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in work.lines).encode())
    work.discard()


def _world_report(cfg: PretrainConfig, directory: Path, tokenizer: "PreTrainedTokenizerBase", report: Json) -> Json:
    model = world_report.load(directory)  # as stored: what is measured is what is used
    trained = {key: report["training"][key] for key in ("n_parameters", "n_steps", "n_tokens", "loss", "held_out_loss")}
    return {
        "command": f"clt pretrain lm={cfg.lm.name} dataset={cfg.dataset.name} dataset.n_tokens={cfg.dataset.n_tokens}",
        "lm": asdict(cfg.lm),
        "dataset": asked(cfg.dataset),
        "documents_sha256": world_report.fingerprint(cfg.dataset.seed),
        "training": trained,
        "losses": world_report.losses(model, tokenizer, cfg.dataset.seed),
        "tasks": world_report.accuracies(model, tokenizer, world.tasks()),
        "swap_layer_0_mlp": world_report.swaps(model, tokenizer, world.swap_pairs()),
    }


def _say(cfg: PretrainConfig, ready: Ready) -> None:
    """What will be done, before it is done."""
    lm, plan, model, train = cfg.lm, ready.plan, ready.model, ready.packed[Split.train]
    lines = {
        "model": f"{lm.name}, {lm.n_layers} layers of {lm.d_model}, {model.config.vocab_size:,} tokens, "
        f"{model.num_parameters():,} parameters, {_name(plan.dtype)} on {model.device}",
        "dataset": f"{cfg.dataset.name}, {train.n_rows:,} tokens in {plan.n_contexts:,} contexts of "
        f"{plan.context}; {len(ready.held_out):,} contexts held out",
        "training": f"{plan.n_steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.epochs:.1f} epochs",
        "to beat": f"{ready.unigram:.4f} nats a token, the unigram entropy of the held-out text",
    }
    for name, text in lines.items():
        logger.info("%-10s %s", name, text)


def _say_result(report: Json) -> None:
    trained, held = report["training"], report["held_out"]
    in_bits = f", {held['bits_per_byte']:.3f} bits a byte" if held["bits_per_byte"] is not None else ""
    sizes = f"{trained['n_parameters']:,} parameters on {trained['n_tokens']:,} tokens"
    logger.info("%-10s %s", "trained", sizes)
    logger.info("%-10s loss %.4f nats a token%s", "held out", held["loss"], in_bits)
    logger.info("%-10s unigram entropy %.4f nats a token", "", held["unigram_entropy"])
    logger.info("%-10s given beginning|what the model wrote", "samples")
    pretrain.say(Sample(**sample) for sample in report["samples"])


def _next(to: Path, dataset: DatasetOptions, n_rows: int) -> str:
    """The command that caches this model's activations on the same text, of `n_rows` training rows."""
    dataset = replace(dataset, n_tokens=NEXT_TOKENS) if n_rows > tokens.count(NEXT_TOKENS) else dataset
    model = to_plain(ModelOptions(name="local", path=str(to)))
    return f"next: {command_of({'model': model, 'dataset': asked(dataset), 'codec': 'raw'}, Path('cache'))}"


def _command(cfg: PretrainConfig) -> str:
    """The command that makes this model again, whatever becomes of the YAML file of its name."""
    settings = flatten(to_plain(cfg.lm))
    words = [f"lm.{key}={'null' if value is None else value}" for key, value in settings.items() if key != "name"]
    words = [f"lm={cfg.lm.name}", *words_of(asked(cfg.dataset)), *words]
    return " ".join(["clt pretrain", *map(shlex.quote, words)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
