"""The command line: `clt COMMAND [OVERRIDE]...`.

Typer declares the commands and their options; everything about configuration is handed to `pipeline.config`, which is
imported when a command runs, so that `clt --help` answers at once.
"""

import os
from collections.abc import Callable
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
cache = typer.Typer(help="List, check, convert and remove caches.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache")


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


def _complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Caches whose names begin so."""
    folder = Path(ctx.params.get("cache_dir") or "cache")
    return sorted(path.name for path in folder.glob(f"{incomplete}*-*") if path.is_dir())


_NAME = "Directory, path, or the beginning of a name or key."
Name = Annotated[str | None, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
SomeNames = Annotated[list[str], typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
CacheDir = Annotated[Path, typer.Option("--cache-dir", help="Where the caches lie.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where the runs lie that may use them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CACHE_DIR, RUNS_DIR = Path("cache"), Path("runs")


def _answer(work: Callable[[], str]) -> None:
    """What is asked for goes to stdout; what is said on the way, and what is wrong, to stderr."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from pipeline.config import attempt

    raise typer.Exit(attempt(lambda: typer.echo(work())))


@cache.command("ls")
def cache_ls(cache_dir: CacheDir = CACHE_DIR, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
    """Every cache: what it holds, its size on disk, whether it is complete, and which runs use it.

    \b
    clt cache ls
    clt cache ls --cache-dir /data/cache --json
    """

    def work() -> str:
        from pipeline.stages import cache_list

        return cache_list.ls(cache_dir, runs_dir, as_json)

    _answer(work)


@cache.command("info")
def cache_info(
    name: Name = None, cache_dir: CacheDir = CACHE_DIR, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False
) -> None:
    """All that is known of one cache, with the command that makes it; the newest, when none is named.

    \b
    clt cache info
    clt cache info world-world --json
    """

    def work() -> str:
        from pipeline.stages import cache_list

        return cache_list.info(name, cache_dir, runs_dir, as_json)

    _answer(work)


@cache.command("verify")
def cache_verify(
    names: Names = None,
    cache_dir: CacheDir = CACHE_DIR,
    against_model: Annotated[
        bool, typer.Option("--against-model", help="Also compute a sample again with the base model.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="Of the base model: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
) -> None:
    """Read every byte and compare all checksums, of all finished caches when none is named. Exit code 2: damaged.

    \b
    clt cache verify
    clt cache verify world-world --against-model
    """

    def work() -> str:
        from pipeline.stages import cache_verify

        return cache_verify.run(names or [], cache_dir, against_model, device)

    _answer(work)


@cache.command("convert")
def cache_convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)],
    codec: Annotated[str, typer.Argument(metavar="codec=CODEC", help="raw, int8, blosc-lz4-bitshuffle or pcodec.")],
    cache_dir: CacheDir = CACHE_DIR,
) -> None:
    """The same cache in another codec, beside it: int8 is half as large, the others lose nothing.

    \b
    clt cache convert world-world codec=int8
    clt cache convert cache/gpt2-openwebtext-33e1a5f65cb9 codec=pcodec
    """

    def work() -> str:
        from pipeline.stages import cache_convert

        return cache_convert.run(name, codec, cache_dir)

    _answer(work)


@cache.command("rm")
def cache_rm(
    names: SomeNames,
    cache_dir: CacheDir = CACHE_DIR,
    runs_dir: RunsDir = RUNS_DIR,
    force: Annotated[bool, typer.Option("--force", help="Even if a run uses it.")] = False,
) -> None:
    """Remove caches, unless a run uses them or an extraction is at work.

    \b
    clt cache rm world-world-33e1a5f65cb9
    clt cache rm 33e1 --force
    """

    def work() -> str:
        from pipeline.stages import cache_remove

        return cache_remove.rm(names, cache_dir, runs_dir, force)

    _answer(work)


@cache.command("prune")
def cache_prune(
    cache_dir: CacheDir = CACHE_DIR,
    runs_dir: RunsDir = RUNS_DIR,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only say what would go.")] = False,
) -> None:
    """Remove what was begun and never finished, unless somebody is at work on it.

    \b
    clt cache prune
    clt cache prune --yes
    """

    def work() -> str:
        from pipeline.stages import cache_remove

        return cache_remove.prune(cache_dir, runs_dir, yes)

    _answer(work)


def main() -> None:
    """The console script `clt`."""
    app(prog_name="clt")
