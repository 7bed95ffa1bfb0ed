"""`clt bench`: speed, as ratios within one run."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import ConfigDir, ConfigName, Multirun, Overrides, Resolve, ShowCfg, ShowInfo, launch

app = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True, rich_markup_mode=None)


@app.command("extract")
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
    launch("bench_extract", **locals())


@app.command("cache")
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
    launch("bench_cache", **locals())


@app.command("codec")
def bench_codec(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """What int8 loses of channels with heavy tails, by how its scale is chosen.

    \b
    clt bench codec
    clt bench codec bench.rows=2000000 bench.sample=130000
    """
    launch("bench_codec", **locals())


@app.command("share")
def bench_share(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Time of runs that share a pass over a cache, over that of separate ones, on this disk and on a slow one.

    \b
    clt bench share                                        8 runs, this disk and 100 MB/s; about three minutes
    clt bench share bench.runs=4 bench.throttle_mb=400
    clt bench share bench.d_features=512 bench.mb=64 cache.dir=/data/cache
    """
    launch("bench_share", **locals())


@app.command("train")
def bench_train(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here; the same as to=FILE.")] = None,
) -> None:  # fmt: skip
    """A training step against a dense one of the same model, and against what the machine allows.

    \b
    clt bench train                                        shapes A and B, TopK; on a GPU GPT-2 small's too
    clt bench train bench.shapes=[A] activation=batchtopk to=bench/batchtopk.json
    clt bench train activation=jumprelu bench.l0=16 bench.loop=false
    clt bench train bench.shapes=[B] bench.scaling=true bench.rounds=15
    clt bench train bench.n_layers=6 bench.d_model=512 bench.d_features=8192 activation.k=32
    """
    overrides = [*(overrides or []), *([f"to={json}"] if json else [])]
    del json
    launch("bench_train", **locals())


@app.command("dist")
def bench_dist(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here; the same as to=FILE.")] = None,
) -> None:  # fmt: skip
    """A training step under torchrun against a plain one, and steps that several processes share, with what they say.

    \b
    clt bench dist                                         shape A, one and two processes
    clt bench dist bench.ranks=[2,4] activation=batchtopk to=bench/dist.json
    clt bench dist bench.shape=B bench.pairs=30
    """
    overrides = [*(overrides or []), *([f"to={json}"] if json else [])]
    del json
    launch("bench_dist", **locals())
