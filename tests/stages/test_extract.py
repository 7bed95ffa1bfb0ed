"""`clt extract` as a whole, on a random GPT-2 and a page of English."""

import logging
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.arch.options import Site
from pipeline.config import compose
from pipeline.core.normalize import Scaling
from pipeline.data import caches, models, shards, spill
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.layout import request_of
from pipeline.data.loader import Loader
from pipeline.data.options import (
    CacheOptions,
    Codec,
    DatasetKind,
    DatasetOptions,
    ExtractOptions,
    ModelOptions,
    SplitBy,
    Write,
)
from pipeline.data.tokens import Split
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from pipeline.stages import extract
from pipeline.stages.options import ExtractConfig
from pipeline.train import inputs
from tests.data.fake import stored_files
from tests.families import FAMILIES, Plain

N, T, HELD_OUT = 2000, 17, 5


@pytest.fixture
def cfg(tiny_gpt2: Path, english: Path, tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        model=ModelOptions("local", str(tiny_gpt2), device="cpu"),
        dataset=DatasetOptions(
            "text",
            DatasetKind.text,
            str(N),
            path=str(english),
            split_by=SplitBy.paragraph,
            context=T,
            held_out=HELD_OUT,
        ),
        cache=CacheOptions(dir=str(tmp_path / "cache"), shard_mb="0.05"),
        extract=ExtractOptions(batch_tokens=340),
    )


def hugging_face_sees(model_path: str, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of each block's second norm and output of each MLP, [n, T, L, D], by plain module hooks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager").eval()
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for block in model.transformer.h:
        block.ln_2.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
        block.mlp.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model(contexts)
    return torch.stack(inputs, dim=2), torch.stack(outputs, dim=2)


def test_rows_in_plain_zarr_are_what_hugging_face_sees_for_their_tokens(cfg: ExtractConfig) -> None:
    path = extract.run(cfg)
    cache, group = Cache.open(path), zarr.open_group(path, mode="r")
    assert (cache.n_rows, cache.n_layers, cache.d_model, cache.context) == (N, 3, 20, T)
    assert len(cache.shards()) == 5
    contexts = torch.from_numpy(group["tokens"][:]).long()
    context, position, token = cache.locate(np.arange(N))
    assert (token == contexts.numpy()[context, position]).all()
    assert len({*zip(context.tolist(), position.tolist(), strict=True)}) == N
    assert position.min() == 1
    model = models.load(cfg.model)
    n = 340 // T  # as many contexts in a pass as in the extraction: other shapes may round differently
    collected = [model.collect(contexts[i : i + n]) for i in range(0, len(contexts), n)]
    seen = hugging_face_sees(cfg.model.path, contexts)
    for name, exact, expected in zip(("resid_mid", "mlp_out"), zip(*collected, strict=True), seen, strict=True):
        stored = torch.from_numpy(group[name][:]).view(torch.bfloat16)
        compare(stored, torch.cat(exact)[context, position])
        compare(stored, expected[context, position])
    tokens, resid_mid, mlp_out = cache.held_out(Split.evaluation)
    assert tokens.shape == (HELD_OUT, T)
    for stored, expected in zip(
        (resid_mid, mlp_out), hugging_face_sees(cfg.model.path, torch.from_numpy(tokens).long()), strict=True
    ):
        compare(stored, expected[:, 1:].reshape(-1, 3, 20))


def compare(stored: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for numbers that lie within float32's rounding (1e-6) of the middle between two bfloat16 ones."""
    exact = expected.bfloat16()
    assert (stored != exact).float().mean() < 1e-3
    nearest = (stored.double() - expected.double()).abs(), (exact.double() - expected.double()).abs()
    torch.testing.assert_close(*nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_every_family_is_what_hugging_face_sees_and_gives_the_real_input_of_its_mlp(
    cfg: ExtractConfig, family_model: Callable[[str], Path], family: str
) -> None:
    """From the text to what a trainer is handed, and back into the model."""
    cfg.model.path = str(family_model(family))
    cache = Cache.open(extract.run(cfg))
    contexts = torch.from_numpy(cache.tokens).long()
    context, position, _ = cache.locate(np.arange(N))
    seen = [sites[context, position] for sites in Plain(Path(cfg.model.path), family).seen(contexts)]
    norm_in, mlp_in, added = seen
    to_x = inputs.build(cache.norm, Site.mlp_in, unscaled(cache), torch.device("cpu"))
    n_seen = 0
    with Loader(cache, batch_tokens=500, seed=0) as loader:
        for _ in range(N // 500):
            batch = next(loader)
            for stored, expected in ((batch.resid_mid, norm_in), (batch.mlp_out, added)):
                compare(stored, expected[batch.rows])
            x, y = to_x(batch.resid_mid, batch.mlp_out)
            assert torch.equal(y, batch.mlp_out.float())
            off = (x - mlp_in[batch.rows]).norm() / mlp_in[batch.rows].norm()
            assert off < 2**-8  # resid_mid is stored with 8 bits
            n_seen += len(x)
    assert n_seen == N


def unscaled(cache: Cache) -> Scaling:
    one = torch.ones(cache.n_layers, cache.d_model)
    return Scaling(0 * one, one, 0 * one, one)


def test_it_says_what_it_does(cfg: ExtractConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = extract.run(cfg)
    said = caplog.text
    for what in (
        "local, layers 0 to 2 of width 20, float32 on cpu, sdpa attention",
        f"text, 2,000 tokens in 125 contexts of {T}; {HELD_OUT} + {HELD_OUT} contexts held out",
        "240 bytes a token",
        "2 x 5 shards of 0.0458 MB",
        "GB free",
        "spot check: 64 rows computed again",
        f"{path}: 2,000 rows in 2 x 5 shards",
        "tokens/s",
        f"next: clt train +experiment=batchtopk_across cache.dir={cfg.cache.dir}",
    ):
        assert what in said


def test_the_next_command_of_the_default_directory_is_short(
    cfg: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    cfg.cache.dir = "cache"
    extract.run(cfg)
    assert caplog.messages[-1].endswith("next: clt train +experiment=batchtopk_across")
    cfg.dataset.seed = 1
    extract.run(cfg)
    cfg.dataset.seed = 0
    extract.run(cfg)
    last = caplog.messages[-1]
    assert "already there" in last
    assert "+experiment=batchtopk_across model=local" in last  # not the newest any more, so it is named
    assert "dataset.seed=0" in last


def test_the_same_request_again_does_nothing(
    cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = extract.run(cfg)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}

    def load(options: ModelOptions) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)
    (path / ".journal").mkdir()  # of a process that ended just after the cache was finished
    cfg.extract.batch_tokens, cfg.cache.shard_mb, cfg.dataset.n_tokens = 100, "auto", "2k"
    with caplog.at_level(logging.INFO):
        assert extract.run(cfg) == path
    assert f"already there, nothing to do: {path}" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before
    assert not (path / ".journal").exists()


def test_stopped_in_a_pass_it_goes_on_to_the_same_bytes(
    cfg: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = stored_files(extract.run(cfg))
    cfg.cache.dir = str(tmp_path / "again")
    collect, calls = models.LanguageModel.collect, 0

    def failing(self: models.LanguageModel, tokens: torch.Tensor, **more: Any) -> Any:
        nonlocal calls
        counts = "first" in more  # not what a load tries out
        calls += counts
        if counts and calls == 5:
            raise KeyboardInterrupt
        return collect(self, tokens, **more)

    monkeypatch.setattr(models.LanguageModel, "collect", failing)
    monkeypatch.setattr("pipeline.data.plan.BLOCK_TOKENS", (680, 680))  # two passes
    with pytest.raises(KeyboardInterrupt):
        extract.run(cfg)
    with pytest.raises(UserError, match="is not finished; run: clt extract"):
        caches.find(Path(cfg.cache.dir), cfg.model, cfg.dataset)
    monkeypatch.setattr("pipeline.data.plan.BLOCK_TOKENS", (8192, 65536))
    with caplog.at_level(logging.INFO):
        path = extract.run(cfg)
    assert "going on: 1,280 of 2,160 tokens are done" in caplog.text
    differ = {name for name, data in stored_files(path).items() if data != whole[name]}
    assert not {name for name in differ if not name.startswith("stats/") and name != "zarr.json"}
    assert caches.find(Path(cfg.cache.dir), cfg.model, cfg.dataset).path == path


def test_a_damaged_cache_is_made_whole_by_the_command_in_the_refusal(
    cfg: ExtractConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = extract.run(cfg)
    before = stored_files(path)
    shard = path / "mlp_out/c/2/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="chunk 2 of mlp_out is truncated") as refusal:
        caches.find(Path(cfg.cache.dir), cfg.model, cfg.dataset)
    words = shlex.split(str(refusal.value).split("make it again: ")[1])
    assert words[:2] == ["clt", "extract"]
    asked = compose("extract", [*words[2:], f"extract.batch_tokens={cfg.extract.batch_tokens}"])
    assert isinstance(asked, ExtractConfig)
    assert extract.run(asked) == path
    assert "making again what is damaged: " in caplog.text
    assert stored_files(path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["model=world", "dataset.n_tokens=1.5k"],
        ["model=gpt2", "model.revision=main", "dataset=text", "dataset.path={text}"],
        ["model=gpt2", "dataset=text", "dataset.path={text}", "dataset.n_tokens=12k", "model.dtype=bfloat16"],
        ["model=local", "model.path={model}", "dataset.path={odd}", "dataset.split_by=line", "dataset.context=33"],
        [
            "model=local",
            "model.path={model}",
            "model.name=mine",
            "dataset=text",
            "dataset.name=x",
            "dataset.path={text}",
        ],
        ["model=world", "model.path={model}", "dataset=text", "dataset.path={text}", "dataset.seed=5"],
    ],
)
def test_the_command_of_a_request_asks_for_the_same_cache(
    words: list[str], tiny_gpt2: Path, english: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "it's, an odd=name.txt"
    shutil.copy(english, odd)
    filled = [word.format(model=tiny_gpt2, text=english, odd=odd) for word in words]
    asked = compose("extract", filled)
    assert isinstance(asked, ExtractConfig)
    request = request_of(asked.model, asked.dataset, asked.cache.codec)
    command = shlex.split(command_of(request, Path("my cache")))
    again = compose("extract", command[2:])
    assert isinstance(again, ExtractConfig)
    assert request_of(again.model, again.dataset, again.cache.codec) == request
    assert again.cache.dir == "my cache"


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_found_before_anything_is_written(
    cfg: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 400_000))
    with pytest.raises(UserError, match=r"does not fit: .* MB to write, 0\.4 MB free .*\(240 bytes a token\)"):
        extract.run(cfg)
    assert "240 bytes a token" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_wrong_input_is_one_line_and_leaves_nothing(cfg: ExtractConfig, tmp_path: Path) -> None:
    wrong: list[tuple[Any, str, Any, str]] = [
        (cfg.extract, "batch_tokens", 0, "batch_tokens=0"),
        (cfg.dataset, "context", 41, "has 40 positions"),
        (cfg.dataset, "n_tokens", "1G", "is not a count"),
        (cfg.dataset, "n_tokens", "1M", "the text ends"),
        (cfg.dataset, "path", "nowhere.txt", "no such file"),
        (cfg.model, "path", "no-such/directory/anywhere", "no such directory"),
        (cfg.cache, "shard_mb", "big", "use auto or a number of MB"),
    ]
    for options, field, value, message in wrong:
        before = getattr(options, field)
        setattr(options, field, value)
        with pytest.raises(UserError, match=message) as refusal:
            extract.run(cfg)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "cache").exists()
        setattr(options, field, before)


def test_a_token_that_the_model_has_no_embedding_for_is_refused(
    cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = models.load

    def smaller(options: ModelOptions) -> models.LanguageModel:
        model = load(options)
        model.vocab_size = 20
        return model

    monkeypatch.setattr(models, "load", smaller)
    with pytest.raises(UserError, match="its embedding has 20; put the tokenizer that belongs to it"):
        extract.run(cfg)
    assert not (tmp_path / "cache").exists()


def test_changed_weights_make_another_cache(cfg: ExtractConfig, tiny_gpt2: Path, tmp_path: Path) -> None:
    path = extract.run(cfg)
    other = tmp_path / "model"
    shutil.copytree(tiny_gpt2, other)
    cfg.model.path = str(other)
    assert request_of(cfg.model, cfg.dataset)["source"] == Cache.open(path).request["source"]
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="does not exist; run: clt extract"):
        caches.find(Path(cfg.cache.dir), cfg.model, cfg.dataset)


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(
    cfg: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("pipeline.stages.estimate.TIMED_SECONDS", 0.05)

    def promised() -> dict[str, str]:
        """name -> text of the lines that it says."""
        caplog.clear()
        cfg.dry_run = True
        path = extract.run(cfg)
        cfg.dry_run = False
        assert not (tmp_path / "cache").exists()
        assert caplog.messages[-1].startswith("nothing was written")
        pieces = [message.split(maxsplit=2 if message.startswith("as ") else 1) for message in caplog.messages[:-1]]
        lines = {" ".join(name): text for *name, text in pieces}
        assert lines["path"] == str(path)
        return lines

    some = promised()
    assert some["tokens"] == "2,000 train, 80 calibration, 80 evaluation"
    assert some["contexts"] == f"135 of {T} tokens"
    assert some["bytes"] == "240 a token as raw"
    cfg.cache.codec = Codec["int8"]
    assert promised()["bytes"] == "120 a token as int8"
    cfg.cache.codec = Codec["pcodec"]
    assert promised()["bytes"] == "240 a token as pcodec before compression"
    cfg.cache.codec = Codec.raw
    cfg.dataset.n_tokens = "all"  # then the text is tokenised to be counted
    whole = promised()
    cache = Cache.open(extract.run(cfg))
    assert whole["tokens"].split(" train")[0] == f"{cache.n_rows:,}"
    assert abs(cache.n_bytes / 1e6 - float(whole["as raw"].split()[0])) < 0.01 * cache.n_bytes / 1e6
    assert float(whole["as int8"].split()[0]) < float(whole["as pcodec"].split()[1]) < float(whole["as raw"].split()[0])
    cfg.dry_run = True
    extract.run(cfg)
    assert "already there, nothing to do" in caplog.messages[-1]


def test_a_second_extraction_of_the_same_request_waits_for_no_one(
    cfg: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one still reads its text."""
    pack = extract.tokens.pack
    seen: list[str] = []

    def meanwhile(*arguments: Any) -> Any:
        if not seen:
            seen.append("first")
            with pytest.raises(UserError, match=r"another process \(\d+\) is making .*; wait for it to end"):
                extract.run(cfg)
        return pack(*arguments)

    monkeypatch.setattr(extract.tokens, "pack", meanwhile)
    path = extract.run(cfg)
    assert seen == ["first"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no workspace stays behind


@pytest.mark.parametrize("codec", [codec for codec in Codec if codec is not Codec.raw])
def test_it_extracts_in_every_codec_and_says_so(
    cfg: ExtractConfig, codec: Codec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cfg.cache.codec = codec
    path = extract.run(cfg)
    cache = Cache.open(path)
    assert cache.codec is codec
    assert caches.find(Path(cfg.cache.dir), cfg.model, cfg.dataset, codec).path == path
    most = "at most " if codec is not Codec["int8"] else ""
    n = 120 if codec is Codec["int8"] else 240
    for what in (f"{codec}, {most}{n} bytes a token", "spot check: ", "times smaller than raw (240)", f"{path}: "):
        assert what in caplog.text
    if codec is Codec["int8"]:
        assert "int8: fitting the scales to 2,000 rows of 125 contexts" in caplog.text
        assert "mlp_out: FVU" in caplog.text
        (path / "zarr.json").unlink()
        assert extract.run(cfg) == path
        assert "put back from its copy" in caplog.text
        assert "already there, nothing to do" in caplog.messages[-1]
    else:
        cfg.cache.codec, cfg.cache.write, cfg.cache.dir = codec, Write.scatter, "nowhere"
        with pytest.raises(UserError, match=r"cache\.write=scatter: the size of a"):
            extract.run(cfg)
        assert not Path("nowhere").exists()


@pytest.mark.parametrize("codec", [Codec["int8"], Codec["pcodec"]])
@pytest.mark.parametrize("harm", ["swap", "zero"])
def test_rows_that_are_swapped_or_zeroed_fail_the_spot_check_of_every_codec(
    cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch, codec: Codec, harm: str
) -> None:
    cfg.cache.codec = codec
    encode, write = shards.write_shard, Writer.write

    def spoilt(rows: Any) -> Any:
        return rows[::-1] if harm == "swap" else rows * 0

    monkeypatch.setattr(spill, "write_shard", lambda spec, file, rows: encode(spec, file, spoilt(rows)))

    def put(self: Writer, split: Split, rows: Any) -> None:
        flip = (lambda x: x.flip(0)) if harm == "swap" else torch.zeros_like
        write(self, split, rows._replace(mlp_out=flip(rows.mlp_out)) if codec is Codec["int8"] else rows)

    monkeypatch.setattr(Writer, "write", put)
    with pytest.raises(UserError, match=r"of layer 0, computed again, differs by .* the cache was not finished"):
        extract.run(cfg)
    assert not list(Path(cfg.cache.dir).glob("*/zarr.json"))
