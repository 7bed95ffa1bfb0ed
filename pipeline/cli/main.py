"""`clt` and its stages: the commands that Hydra configures."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import bench, cache
from pipeline.cli.common import (
    ConfigDir,
    ConfigName,
    DryRun,
    Multirun,
    Overrides,
    Resolve,
    Runs,
    ShowCfg,
    ShowInfo,
    launch,
)

app = typer.Typer(
    name="clt",
    help="Train cross-layer transcoders from cached activations, and measure them.",
    epilog="Start with: clt extract model=world, clt train +experiment=batchtopk_across, clt eval. Each has a --help.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


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
    launch("pretrain", **locals())


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
    clt extract model=gpt2 cache.codec=int8
    """
    overrides = [*(overrides or []), *(["dry_run=true"] if dry_run else [])]
    del dry_run
    launch("extract", **locals())


@app.command()
def train(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Train a cross-layer transcoder, or another arch=, on a cache; the newest one, when no model or dataset is named.

    \b
    clt train +experiment=batchtopk_across              into runs/batchtopk_across-0
    clt train +experiment=topk name=mine optim.lr=1e-3  into runs/mine; again: continues it
    clt train name=mine                                 continues it with its own settings; resume=true: the newest
    clt train -m name=sweep activation.k=8,16 optim.lr=1e-3,2e-3
                                                        four runs, runs/sweep/0 to runs/sweep/3, one cache
    clt train -m train.share_pass=true activation.k=8,16  two runs that read each batch once
    clt train arch=tied arch.d_features=16384 --dry-run   parameters, FLOPs, memory, batches; writes nothing
    clt train dist=mesh dist.features=8 dist.world=64 --dry-run  and what each of 64 ranks would hold and send
    clt train +experiment=sparse --cfg job              print the configuration, run nothing
    """
    overrides = [*(overrides or []), *(["dry_run=true"] if dry_run else [])]
    del dry_run
    launch("train", **locals())


@app.command()
def plan(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write it here too; the same as to=FILE.")] = None,
) -> None:  # fmt: skip
    """What a training run on many ranks would hold, send and take, without the ranks and without a cache.

    \b
    clt plan model=llama-3.2-1b arch.d_features=65536 activation.k=64 train.batch_tokens=4096 dist.world=64
    clt plan plan.n_layers=16 plan.d_model=2048 plan.expansion=32 dist=feature_shard
    clt plan plan.models=[gpt2,llama-3.2-1b,llama-3.1-8b] plan.worlds=[8,64] plan.expansion=32
    clt plan dist=ddp dist.world=2 plan.device=cpu plan.rates=bench/train.json plan.links=bench/dist.json
    """
    overrides = [*(overrides or []), *([f"to={json}"] if json else [])]
    del json
    launch("plan", **locals())


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
    launch("eval", **locals())


@app.command()
def generate(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write it here too; the same as to=FILE.")] = None,
) -> None:  # fmt: skip
    """Continue a prompt with the language model and with its replacement, side by side, with KL at each token.

    \b
    clt generate prompt='The capital of France is'
    clt generate run=runs/demo prompt='Anna lives in' generate.temperature=1 generate.seed=3
    clt generate run=demo prompt='Anna' generate.layers=[0,1] generate.n_tokens=8
    """
    overrides = [*(overrides or []), *([f"to={json}"] if json else [])]
    del json
    launch("generate", **locals())


@app.command()
def graph(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    validate: Annotated[bool, typer.Option("--validate", help="Check the graph against ablations.")] = False,
) -> None:  # fmt: skip
    """What made a prompt's next token: an attribution graph, as numbers, as JSON and as a page for a browser.

    \b
    clt graph prompt='The capital of France is'           into runs/NAME/graphs
    clt graph run=runs/demo prompt='The capital of France is' graph.difference=[Paris,Berlin]
    clt graph run=demo prompt='Anna lives in' graph.targets=[Berlin] graph.slug=anna graph.max_feature_nodes=200
    clt graph run=demo prompt='Anna lives in' graph.feature=2/731@3
    clt graph run=demo prompt='The capital of France is' --validate
    clt graph run=demo prompts=prompts.txt                 a prompt a line; then clt circuits
    """
    overrides = [*(overrides or []), *(["validate=true"] if validate else [])]
    del validate
    launch("graph", **locals())


@app.command()
def intervene(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write it here too; the same as to=FILE.")] = None,
) -> None:  # fmt: skip
    """Edit features on a prompt (set =, scale *, add +, swap) and see what changes: next token, later features.

    \b
    clt intervene prompt='The capital of France is' edits=0/342@4=0 tokens=Paris
    clt intervene run=demo prompt='Anna lives in' edits='0/17@-1*2,2/5@all=3' intervene.layers=constrained
    clt intervene prompt='The capital of France is' swap.features=all swap.at=4 swap.from_prompt='The capital of Japan'
    clt intervene prompt='Anna' edits=1/8@new+2.5 intervene.n_tokens=20 intervene.model=replacement
    """
    overrides = [*(overrides or []), *([f"to={json}"] if json else [])]
    del json
    launch("intervene", **locals())


@app.command()
def features(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """What features respond to and write, for circuit-tracer, Neuronpedia and Parquet; and which respond to a text.

    \b
    clt features run=runs/demo                               all of them, into runs/demo/features
    clt features run=demo features.n=1000 features.choose=most_active --dry-run
    clt features run=demo features.ids=[0/12,1/7] to=two     layer/feature
    clt features run=demo features.layers=[0,1] features.split=training features.n_tokens=1M
    clt features run=demo search=France                      features whose contexts have it
    clt features run=demo prompt='The capital of France is'  features active at each token
    """
    overrides = [*(overrides or []), *(["dry_run=true"] if dry_run else [])]
    del dry_run
    launch("features", **locals())


@app.command()
def weights(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """What a feature reads and feeds whatever the prompt: virtual weights, along the residual stream and through heads.

    \b
    clt weights run=demo feature=1/299
    clt weights run=demo feature=1/299 weights.n=50 to=weights.parquet
    clt weights run=demo feature=0/12 weights.count=false   without text: by the weights alone
    """
    launch("weights", **locals())


@app.command()
def circuits(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Features and edges that recur in the graphs of many prompts.

    \b
    clt circuits graphs=runs/demo/graphs
    clt circuits graphs=runs/demo/graphs circuits.least=5 to=common.json
    """
    launch("circuits", **locals())


@app.command()
def plot(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    png: Annotated[bool, typer.Option("--png", help="Also write the picture as an image.")] = False,
) -> None:  # fmt: skip
    """A picture of features, as a page that opens without a network. Labels come from clt features.

    \b
    clt plot kind=heatmap run=demo prompt='The capital of France is'  tokens x features
    clt plot kind=tokens run=demo prompt='Anna lives in Rome'         the text, coloured by each feature
    clt plot kind=embedding run=demo --png                            maps of what features write
    clt plot kind=correlation run=demo                                across layers
    clt plot kind=ranking run=demo prompt='The capital of France is' plot.by=effect plot.token=Paris
    clt plot kind=token_probability run=demo prompt='The capital of France is' plot.features=[0/321]
    """
    overrides = [*(overrides or []), *(["plot.png=true"] if png else [])]
    del png
    launch("plot", **locals())


@app.command()
def convert(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Make a JumpReLU run of a TopK or BatchTopK one: the same weights, thresholds that fire as often.

    \b
    clt convert run=runs/demo                             into runs/demo-jumprelu
    clt convert run=demo to=mine convert.thresholds=per_layer
    """
    launch("convert", **locals())


@app.command()
def compare(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Train and measure experiments on one cache, at equal parameters, L0 and tokens, and print the table.

    \b
    clt compare name=rules compare.experiments=[topk,batchtopk] compare.l0=64 train.n_tokens=400k
    clt compare name=all compare.experiments=[topk,sparse] compare.seeds=[0,1,2] compare.parameters=2M
    """
    launch("compare", **locals())


@app.command()
def export(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Write a finished transcoder for circuit-tracer, for SAELens, or as a folder for the Hugging Face hub.

    \b
    clt export run=runs/demo to=circuit-tracer            into runs/demo/export/circuit-tracer
    clt export run=demo to=huggingface path=out/demo export.licence=mit
    clt export run=demo to=circuit-tracer export.dtype=bfloat16
    """
    launch("export", **locals())


@app.command("import")
def import_run(
    overrides: Overrides = None, multirun: Multirun = False, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
) -> None:  # fmt: skip
    """Make a finished run of a directory of circuit-tracer or SAELens, for eval, generate and graph.

    \b
    clt import path=out/clt model=world name=theirs         into runs/theirs
    clt import path=mntss/clt-gemma-2-2b-426k model=gemma-2-2b name=published
    clt import path=out/clt model=gpt2 dataset=text dataset.path=book.txt name=theirs
    """
    launch("import", **locals())


@app.command()
def report(
    overrides: Runs = None, cfg: ShowCfg = None, resolve: Resolve = False,
    config_dir: ConfigDir = None, config_name: ConfigName = None, info: ShowInfo = None,
    png: Annotated[bool, typer.Option("--png", help="Also write every plot as an image.")] = False,
) -> None:  # fmt: skip
    """One page about runs, and a CSV: which is best, with intervals, and why; the newest run, when none is named.

    \b
    clt report runs/demo                                  runs/demo/report.html, opens without a network
    clt report runs/world                                 every run of a sweep or comparison
    clt report demo runs/sweep/3 to=two.html report.baseline=demo
    clt report runs/demo --png                            and every plot as an image
    """
    overrides = [*(overrides or []), *(["report.png=true"] if png else [])]
    del png
    launch("report", **locals())


def main() -> None:
    """The console script `clt`."""
    app(prog_name="clt")
