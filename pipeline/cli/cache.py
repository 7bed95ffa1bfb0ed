"""`clt cache`: caches listed, checked, converted, copied, merged and removed. No settings of Hydra's."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import answer

app = typer.Typer(
    help="List, check, convert, copy, merge and remove caches.", no_args_is_help=True, rich_markup_mode=None
)


def _complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Caches whose names begin so."""
    folder = Path(ctx.params.get("cache_dir") or "cache")
    return sorted(path.name for path in folder.glob(f"{incomplete}*-*") if path.is_dir())


_NAME = "Directory, path, or the beginning of a name or key."
Name = Annotated[str | None, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
SomeNames = Annotated[list[str], typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)]
CacheDir = Annotated[str, typer.Option("--cache-dir", help="Where the caches lie: a folder, or s3://bucket/prefix.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where the runs lie that may use them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CACHE_DIR, RUNS_DIR = "cache", Path("runs")


@app.command("ls")
def cache_ls(cache_dir: CacheDir = CACHE_DIR, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
    """Every cache: what it holds, its size on disk, whether it is complete, and which runs use it.

    \b
    clt cache ls
    clt cache ls --cache-dir s3://bucket/caches --json
    """

    def work() -> str:
        from pipeline.data.address import place_of
        from pipeline.stages import cache_list

        return cache_list.ls(place_of(cache_dir), runs_dir, as_json)

    answer(work)


@app.command("info")
def cache_info(
    name: Name = None, cache_dir: CacheDir = CACHE_DIR, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False
) -> None:
    """All that is known of one cache, with the command that makes it; the newest, when none is named.

    \b
    clt cache info
    clt cache info world-world --json
    """

    def work() -> str:
        from pipeline.data.address import place_of
        from pipeline.stages import cache_list

        return cache_list.info(name, place_of(cache_dir), runs_dir, as_json)

    answer(work)


@app.command("verify")
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
        from pipeline.data.address import place_of
        from pipeline.stages import cache_verify

        return cache_verify.run(names or [], place_of(cache_dir), against_model, device)

    answer(work)


@app.command("convert")
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
        from pipeline.data.address import place_of
        from pipeline.stages import cache_convert

        return cache_convert.run(name, codec, place_of(cache_dir))

    answer(work)


@app.command("copy")
def cache_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_NAME, autocompletion=_complete_name)],
    to: Annotated[str, typer.Argument(metavar="PLACE", help="Folder of caches, or s3://bucket/prefix, gs://, az://.")],
    cache_dir: CacheDir = CACHE_DIR,
    verify: Annotated[bool, typer.Option("--verify", help="Read and compare what is there already.")] = False,
) -> None:
    """Send a whole cache to an object store, fetch one, or copy it to another disk; goes on where it was stopped.

    \b
    clt cache copy world-world s3://bucket/caches
    clt cache copy world-world /data/cache --cache-dir s3://bucket/caches
    """

    def work() -> str:
        from pipeline.data.address import place_of
        from pipeline.stages import cache_copy

        return cache_copy.run(name, place_of(to), place_of(cache_dir), verify)

    answer(work)


@app.command("merge")
def cache_merge(
    names: SomeNames,
    cache_dir: CacheDir = CACHE_DIR,
    name: Annotated[str | None, typer.Option("--name", help="Of the new directory; else MODEL-merged-KEY.")] = None,
    allow_repeats: Annotated[
        bool, typer.Option("--allow-repeats", help="Even if text stands in several: it is trained on as often.")
    ] = False,
) -> None:
    """Several caches of one model as one, in one random order. No row is copied: the parts must stay.

    \b
    clt extract dataset.n_tokens=200k dataset.skip_tokens=400k     (more of the same text, of which 400k are there)
    clt cache merge world-world-33e1 world-world-5b20
    clt cache merge cache/gpt2-openwebtext-33e1a5f65cb9 cache/gpt2-pile-5b20c7f2d1aa --name gpt2-both
    """

    def work() -> str:
        from pipeline.data.address import place_of
        from pipeline.stages import cache_merge

        return cache_merge.run(names, place_of(cache_dir), name, allow_repeats)

    answer(work)


@app.command("rm")
def cache_rm(
    names: SomeNames,
    cache_dir: CacheDir = CACHE_DIR,
    runs_dir: RunsDir = RUNS_DIR,
    force: Annotated[bool, typer.Option("--force", help="Even if a run or a merged cache uses it.")] = False,
) -> None:
    """Remove caches, unless a run or a merged cache uses them or an extraction is at work.

    \b
    clt cache rm world-world-33e1a5f65cb9
    clt cache rm 33e1 --force
    """

    def work() -> str:
        from pipeline.data.address import place_of
        from pipeline.stages import cache_remove

        return cache_remove.rm(names, place_of(cache_dir), runs_dir, force)

    answer(work)


@app.command("prune")
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
        from pipeline.data.address import place_of
        from pipeline.stages import cache_remove

        return cache_remove.prune(place_of(cache_dir), runs_dir, yes)

    answer(work)
