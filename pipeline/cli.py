"""The command line: `clt COMMAND [OVERRIDE]...`.

Typer declares the commands and their options; everything about configuration is handed to `pipeline.config`, which is
imported when a command runs, so that `clt --help` answers at once.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="clt",
    help="Train cross-layer transcoders from cached activations, and measure them.",
    epilog="Start with: clt extract model=world, clt train +experiment=batchtopk_across, clt eval. Each has a --help.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


class Cfg(StrEnum):
    job = "job"
    hydra = "hydra"
    all = "all"


class Info(StrEnum):
    all = "all"
    config = "config"
    defaults = "defaults"
    defaults_tree = "defaults-tree"
    plugins = "plugins"
    searchpath = "searchpath"


def _complete(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides that continue what is typed. bash cuts words at `=` and replaces only the piece after it."""
    from pipeline.config import complete

    command = ctx.command_path.split()  # clt, bench, extract
    stage = "_".join(command[1:])
    words = [str(word) for word in ctx.params.get("overrides") or []]
    if "COMP_WORDS" not in os.environ:
        return complete(stage, words, incomplete)
    pieces = os.environ["COMP_WORDS"].splitlines()[len(command) : int(os.environ["COMP_CWORD"]) + 1]
    glued = " ".join(pieces).replace(" = ", "=").replace(" =", "=").split(" ")
    *words, typed = glued
    cut = typed.rfind("=") + 1
    return [found[cut:] for found in complete(stage, words, typed)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDE",
        help="Settings: group=choice, key=value, +experiment=name. --cfg job shows them all.",
        show_default=False,
        autocompletion=_complete,
    ),
]
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="Run every combination of a=1,2 b=x,y.")]
ShowCfg = Annotated[Cfg | None, typer.Option("--cfg", "-c", help="Print the configuration and leave.")]
Resolve = Annotated[bool, typer.Option("--resolve", help="With --cfg: resolve ${...}.")]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", "-cd", help="Folder with YAML files of your own.")]
ConfigName = Annotated[str | None, typer.Option("--config-name", "-cn", help="Root YAML to use instead.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the sizes and the time, write nothing.")]
ShowInfo = Annotated[Info | None, typer.Option("--info", help="Print what Hydra knows and leave.")]


def _launch(stage: str, overrides: list[str] | None, **flags: Any) -> None:
    # Read by OpenMP when torch is loaded. Threads that spin while they wait take the core from the one that works: with
    # one other busy process on two cores, training went from 2,000 to 9,000 tokens a second.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The hub's client announces every failed request; what becomes of it is said once, in the stage's own words.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from pipeline.config import Request, launch

    raise typer.Exit(launch(stage, Request(overrides=tuple(overrides or ()), **flags)))


@app.command()
def pretrain(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Train a small language model on any text, in Hugging Face format. The same command continues a stopped run.

    \b
    clt pretrain dataset=text dataset.path=book.txt to=models/book  four layers of 128, under ten minutes
    clt pretrain lm=tinystories dataset=tinystories                 two layers, for a GPU
    clt pretrain lm.n_layers=2 lm.n_tokens=5M dataset=jsonl dataset.path='dumps/*.jsonl.gz'
    clt pretrain lm.tokenizer=models/book dataset=text dataset.path=other.txt to=models/other
    clt pretrain lm=world dataset=world dataset.n_tokens=24M        the built-in world's model again
    """
    _launch("pretrain", **locals())


@app.command()
def extract(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Cache what a model's MLPs read and wrote on a text. The same request again costs nothing.

    \b
    clt extract model=world
    clt extract model=gpt2 dataset.n_tokens=2M --dry-run
    clt extract model=gpt2 dataset=text dataset.path=book.txt
    clt extract model=local model.path=models/mine dataset=jsonl dataset.path='dumps/*.jsonl.gz'
    clt extract model=qwen2.5-3b model.layers=[8,16] dataset=wikitext dataset.bos=eos
    clt extract model=world dataset.n_tokens=2M cache.dir=/data/cache
    """
    overrides = [*(overrides or []), *(["dry_run=true"] if dry_run else [])]
    del dry_run
    _launch("extract", **locals())


@app.command()
def train(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Train a cross-layer transcoder on a cache; the newest one, when no model or dataset is named.

    \b
    clt train +experiment=batchtopk_across              into runs/batchtopk_across-0
    clt train +experiment=topk name=mine optim.lr=1e-3  into runs/mine; again: continues it
    clt train -m name=sweep activation.k=8,16 optim.lr=1e-3,2e-3
                                                        four runs, runs/sweep/0 to runs/sweep/3, one cache
    clt train +experiment=sparse --cfg job              print the configuration, run nothing
    """
    _launch("train", **locals())


@app.command("eval")
def evaluate(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Measure a finished transcoder on held-out text; the newest run, when none is named.

    \b
    clt eval
    clt eval run=runs/demo
    clt eval run=runs/demo dataset=text dataset.path=book.txt
    """
    _launch("eval", **locals())


@bench.command("extract")
def bench_extract(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Tokens a second of a model's body alone, of reading it, and of reading and writing.

    \b
    clt bench extract                                      a random model of GPT-2 small's shape
    clt bench extract model=world bench.batch_tokens=8192
    clt bench extract model=gpt2 bench.context=1024
    """
    _launch("bench_extract", **locals())


@bench.command("cache")
def bench_cache(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Bytes a second of reading shuffled batches and of writing them, over what the disk gives.

    \b
    clt bench cache                                        random rows of GPT-2 small's shape, 1 GB
    clt bench cache bench.mb=256 bench.n_layers=4 bench.d_model=128
    clt bench cache cache.dir=/data/cache run=runs/demo
    """
    _launch("bench_cache", **locals())


def main() -> None:
    """The console script `clt`."""
    app(prog_name="clt")
