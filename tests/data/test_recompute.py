"""Targets from resid_mid: the model's own outputs to the rounding of bfloat16, or a refusal."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import compose
from pipeline.data import models, recompute
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.convert import convert
from pipeline.data.layout import JOURNAL, key_of, request_of
from pipeline.data.loader import Loader
from pipeline.data.mlps import Mlps
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec, DatasetKind, DatasetOptions, Dtype, ModelOptions, Read, Targets, Write
from pipeline.data.recompute import MOST, Comparison, mlps_of, try_out
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages import extract
from pipeline.stages.options import ExtractConfig
from tests.data import fake
from tests.data.fake import Crash, stop_after, stored_files
from tests.families import FAMILIES, Plain

MEASURED = {"float32": 4.0, "bfloat16": 1.0}
"""Most of what rounding costs that the families are allowed here; docs/cache.md has the figures."""


def local(path: Path, dtype: str = "float32") -> ModelOptions:
    return ModelOptions("local", str(path), device="cpu", dtype=Dtype(dtype))


@pytest.mark.parametrize("dtype", MEASURED)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_outputs_are_what_hugging_face_adds_to_the_residual_stream(
    family_model: Callable[[str], Path], family: str, dtype: str
) -> None:
    path = family_model(family)
    tokens = torch.randint(3, 60, (7, 33), generator=torch.Generator().manual_seed(1))
    norm_in, _, added = Plain(path, family, getattr(torch, dtype)).seen(tokens)
    model = models.load(local(path, dtype))
    rows, true = norm_in[:, 1:].flatten(0, 1).bfloat16(), added[:, 1:].flatten(0, 1)
    again = model.mlps()(rows)
    assert again.dtype is getattr(torch, dtype)
    comparison = Comparison(3, 20)
    comparison.add(again, true)
    found = comparison.result()
    assert max(found.over_rounding) < MEASURED[dtype]
    assert max(found.fvu) < (1e-4 if dtype == "float32" else 1e-6)
    assert found.largest < 4
    assert found.n_rows == 7 * 32
    try_out(model)


def swapped_norms(mlps: Mlps) -> None:
    mlps.layers[0][0], mlps.layers[1][0] = mlps.layers[1][0], mlps.layers[0][0]


def without_post_norm(mlps: Mlps) -> None:
    assert len(mlps.layers[0]) == 3
    for modules in mlps.layers:
        modules.pop()


def without_norm(mlps: Mlps) -> None:
    for modules in mlps.layers:
        modules.pop(0)


def gain_off_by_a_twentieth(mlps: Mlps) -> None:
    for modules in mlps.layers:
        modules[0] = copy.deepcopy(modules[0])  # not the model's own
        modules[0].weight.data *= 1.05


@pytest.mark.parametrize(
    ("family", "spoil"),
    [
        *((family, swapped_norms) for family in FAMILIES),
        *((family, without_norm) for family in FAMILIES),
        ("Gemma2", without_post_norm),
        ("GPT2", gain_off_by_a_twentieth),
    ],
)
def test_wrong_modules_are_refused(
    family_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    spoil: Callable[[Mlps], None],
) -> None:
    model = models.load(local(family_model(family)))
    mlps = model.mlps()
    spoil(mlps)
    monkeypatch.setattr(model, "mlps", lambda: mlps)
    refusal = r"mlp_out of layer \d, recomputed from resid_mid, is off by .* times what rounding to bfloat16 costs"
    with pytest.raises(UserError, match=rf"{refusal} .*; use cache.targets=stored"):
        try_out(model)


def spoilt_extraction(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Mlps], None]) -> None:
    """Past the trial on random tokens, to the spot check."""
    right = LanguageModel.mlps

    def wrong(self: LanguageModel) -> Mlps:
        mlps = right(self)
        spoil(mlps)
        return mlps

    monkeypatch.setattr(LanguageModel, "mlps", wrong)
    monkeypatch.setattr(extract, "try_out", lambda model: None)


@pytest.mark.parametrize(("family", "spoil"), [("GPT2", swapped_norms), ("Gemma2", without_post_norm)])
def test_the_spot_check_refuses_to_finish_a_cache_whose_targets_come_out_wrong(
    asked: Callable[..., ExtractConfig],
    family_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    spoil: Callable[[Mlps], None],
) -> None:
    spoilt_extraction(monkeypatch, spoil)
    cfg = asked("cache.targets=recompute", f"model.path={family_model(family)}")
    with pytest.raises(UserError, match=r"recomputed from resid_mid, is off by .* use cache\.targets=stored"):
        extract.run(cfg)
    assert not list(Path(cfg.cache.dir).glob("*/zarr.json"))


def test_a_model_that_proves_wrong_is_refused_before_anything_is_packed(
    asked: Callable[..., ExtractConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt_extraction(monkeypatch, swapped_norms)
    monkeypatch.setattr(extract, "try_out", try_out)
    cfg = asked("cache.targets=recompute")
    with pytest.raises(UserError, match="recomputed from resid_mid"):
        extract.run(cfg)
    assert not Path(cfg.cache.dir).exists()


def random_model(family: str, path: Path, tokenizer: Path, **sizes: Any) -> ModelOptions:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
    weights = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in weights.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    weights.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return local(path)


def test_a_router_that_chooses_other_experts_for_rounded_inputs_is_refused(tmp_path: Path, tiny_gpt2: Path) -> None:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_local_experts": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = models.load(random_model("Mixtral", tmp_path, tiny_gpt2, **sizes, **heads))
    with pytest.raises(UserError, match="times what rounding to bfloat16 costs"):
        try_out(model)


def test_an_mlp_that_is_no_function_of_its_input_is_refused(tmp_path: Path, tiny_gpt2: Path) -> None:
    model = models.load(random_model("Bloom", tmp_path, tiny_gpt2, hidden_size=20, n_layer=3, n_head=2))
    refusal = "BloomMLP needs residual besides its input, so mlp_out cannot be recomputed; use cache.targets=stored"
    with pytest.raises(UserError, match=refusal):
        model.mlps()


def test_an_mlp_that_is_no_module_or_gives_no_rows_is_refused(tiny_gpt2: Path) -> None:
    model = models.load(local(tiny_gpt2))
    mlps = model.mlps()
    mlps.layers[1][1] = torch.nn.Linear(20, 9)
    with pytest.raises(UserError, match=r"Linear gives \(1, 5, 9\), no rows of width 20, so .*use cache"):
        mlps(torch.zeros(5, 3, 20))
    model._sites = model._sites._replace(mlp=None)
    with pytest.raises(UserError, match=r"is no module that can be run alone; use cache\.targets=stored"):
        model.mlps()


def test_only_the_layers_that_are_read_are_recomputed_and_pieces_change_nothing(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(ModelOptions("local", str(tiny_gpt2), device="cpu", layers=[1, 3]))
    resid_mid, mlp_out = (site.flatten(0, 1) for site in model.collect(torch.arange(60).view(3, 20)))
    mlps = model.mlps()
    torch.testing.assert_close(mlps(resid_mid), mlp_out)
    assert mlps.flops == 2 * 2 * 2 * 20 * 28
    assert mlps.n_bytes == 2 * 4 * (2 * 20 * 28 + 28 + 20 + 2 * 20)
    monkeypatch.setattr("pipeline.data.mlps.ROWS", 7)
    torch.testing.assert_close(mlps(resid_mid), mlp_out)
    assert not mlps(resid_mid).requires_grad


def neighbour(values: Tensor) -> Tensor:
    """The next bfloat16 number away from zero."""
    return (values.view(torch.int16) + 1).view(torch.bfloat16)


def test_rounding_is_the_unit_of_the_error() -> None:
    true = torch.randn(500, 2, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [700.0]])

    def compared(again: Tensor, true: Tensor) -> recompute.Exactness:
        comparison = Comparison(2, 30)
        for piece in (slice(200), slice(200, None)):
            comparison.add(again[piece], true[piece])
        return comparison.result()

    rounded = compared(true.bfloat16(), true)
    assert rounded.over_rounding == pytest.approx([1, 1], rel=0.05)
    assert rounded.largest < 1
    exact = true.bfloat16()
    off_by_one = compared(neighbour(exact), exact)
    assert off_by_one.over_rounding == pytest.approx([12, 12], rel=1e-6)  # the most that is called rounding is above
    assert 1 < off_by_one.largest < 2
    assert MOST > 12
    error = (neighbour(exact).double() - exact.double()).square().sum((0, 2))
    spread = (exact.double() - exact.double().mean(0)).square().sum((0, 2))
    assert off_by_one.fvu == pytest.approx((error / spread).tolist(), rel=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(tiny_gpt2: Path, value: float) -> None:
    model = models.load(local(tiny_gpt2))
    comparison = Comparison(3, 20)
    wrong = torch.ones(4, 3, 20)
    wrong[2, 1, 5] = value
    comparison.add(wrong, torch.ones(4, 3, 20))
    with pytest.raises(UserError, match="mlp_out of layer 1, recomputed from resid_mid"):
        comparison.result().check(model)


@pytest.fixture
def asked(tiny_gpt2: Path, english: Path, tmp_path: Path) -> Callable[..., ExtractConfig]:
    def cfg(*more: str) -> ExtractConfig:
        words = {"model.path": str(tiny_gpt2), "model.device": "cpu", "dataset": "text", "dataset.path": str(english)}
        words |= {"dataset.n_tokens": "1500", "dataset.context": "19", "dataset.held_out": "3"}
        words |= {"cache.shard_mb": "0.05", "cache.dir": str(tmp_path / "cache")}
        words |= dict(word.split("=", 1) for word in more)
        found = compose("extract", ["model=local", *(f"{key}={value}" for key, value in words.items())])
        assert isinstance(found, ExtractConfig)
        return found

    return cfg


@pytest.mark.parametrize("dtype", MEASURED)
def test_the_cache_holds_the_same_rows_without_their_targets_and_says_how_exact_they_are(
    asked: Callable[..., ExtractConfig], dtype: str
) -> None:
    whole = Cache.open(extract.run(asked(f"model.dtype={dtype}")))
    half = Cache.open(extract.run(asked(f"model.dtype={dtype}", "cache.targets=recompute")))
    assert (whole.targets, half.targets) == (Targets.stored, Targets.recompute)
    assert half.key != whole.key
    assert half.attributes["targets"] == "recompute"
    assert {"targets", "recompute"} & whole.attributes.keys() == set()
    assert not (half.path / "mlp_out").exists()
    files, others = stored_files(half.path), stored_files(whole.path)
    assert {name: data for name, data in others.items() if not name.startswith("mlp_out/")} | {"zarr.json": b""} == {
        **files,
        "zarr.json": b"",
    }, "held-out rows and statistics are those of the true outputs"
    rows = sum(len(data) for name, data in files.items() if name.startswith("resid_mid/c/"))
    assert half.n_bytes == whole.n_bytes - rows
    found = half.attributes["recompute"]
    assert found["n_rows"] == 18 + 18 + 1500 % 18 + 18
    assert len(found["fvu"]) == len(found["over_rounding"]) == 3
    assert max(found["over_rounding"]) < MEASURED[dtype]


@pytest.mark.parametrize("dtype", MEASURED)
def test_what_a_trainer_computes_is_what_the_other_cache_stores(
    asked: Callable[..., ExtractConfig], dtype: str
) -> None:
    whole, half = (
        Cache.open(extract.run(asked(f"model.dtype={dtype}", f"cache.targets={targets}"))) for targets in Targets
    )
    mlps = mlps_of(half, torch.device("cpu"))
    comparison = Comparison(3, 20)
    for read in (Read.mmap, Read.readinto):
        with Loader(whole, 250, seed=5, read=read) as one, Loader(half, 250, seed=5, read=read) as other:
            assert other.buffer_bytes < one.buffer_bytes
            for _ in range(7):
                a, b = next(one), next(other)
                assert torch.equal(a.rows, b.rows)
                assert torch.equal(a.resid_mid, b.resid_mid)
                assert a.mlp_out is not None
                assert b.mlp_out is None
                comparison.add(mlps(b.resid_mid), a.mlp_out)
    # The stored targets are rounded themselves, in float32.
    assert max(comparison.result().over_rounding) < MEASURED[dtype] + 1


def test_of_the_model_only_the_mlps_stay_in_memory(
    asked: Callable[..., ExtractConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(extract.run(asked("cache.targets=recompute")))
    kept: list[weakref.ref[torch.nn.Module]] = []
    load = models.load

    def watched(options: ModelOptions) -> LanguageModel:
        model = load(options)
        kept.extend([weakref.ref(model.weights), weakref.ref(model.weights.transformer.wte)])
        kept.append(weakref.ref(model.weights.transformer.h[1].attn))
        return model

    monkeypatch.setattr(models, "load", watched)
    mlps = mlps_of(cache, torch.device("cpu"))
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]
    assert len(mlps.layers) == 3


def test_other_weights_are_refused(asked: Callable[..., ExtractConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(extract.run(asked("cache.targets=recompute")))
    monkeypatch.setattr("pipeline.data.models.weights_hash", lambda directory: "0" * 64)
    with pytest.raises(UserError, match=r"has no mlp_out, and was made with other weights of local .* restore those"):
        mlps_of(cache, torch.device("cpu"))


def test_keys_of_ordinary_caches_do_not_change_and_the_command_asks_for_the_same(tmp_path: Path) -> None:
    model, text = ModelOptions("gpt2", "openai-community/gpt2"), DatasetOptions("wikitext", DatasetKind.hub, "400k")
    text.path = "Salesforce/wikitext"
    ordinary, half = request_of(model, text), request_of(model, text, targets=Targets.recompute)
    assert half == ordinary | {"targets": "recompute"}
    assert key_of(ordinary) == "f7a4385e4857"
    assert key_of(half) != key_of(ordinary)
    assert "targets" not in command_of(ordinary, Path("cache"))
    assert command_of(half, Path("cache")) == f"{command_of(ordinary, Path('cache'))} cache.targets=recompute"
    packed = command_of(half | {"codec": "pcodec"}, Path("cache"))
    assert packed == f"{command_of(ordinary, Path('cache'))} cache.codec=pcodec cache.targets=recompute"


@pytest.mark.parametrize("write", [Write.scatter, Write.spill])
def test_stopped_after_any_block_it_goes_on_to_the_same_bytes(tmp_path: Path, write: Write) -> None:
    expected = stored_files(fake.extract(tmp_path / "whole", targets="recompute"))
    ordinary = stored_files(fake.extract(tmp_path / "ordinary"))
    assert expected.keys() == {name for name in ordinary if not name.startswith("mlp_out/")}

    for number in range(0, 9, 2):
        with pytest.raises(Crash):
            fake.extract(tmp_path, after_block=stop_after(number), targets="recompute", write=write)
    path = fake.extract(tmp_path, targets="recompute")
    assert stored_files(path) == expected
    assert not (path / JOURNAL).exists()


def test_parts_make_the_same_bytes_and_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    expected = stored_files(fake.extract(tmp_path / "whole", targets="recompute"))
    for part in ("1/2", "0/2"):
        path = fake.extract(tmp_path, part=part, targets="recompute")
    assert stored_files(path) == expected
    (path / "resid_mid/c/3/0/0").unlink()
    assert stored_files(fake.extract(tmp_path, targets="recompute")) == expected


def test_codecs_without_loss_hold_it_and_int8_is_refused(tmp_path: Path) -> None:
    source = Cache.open(fake.extract(tmp_path, targets="recompute"))
    for codec in (Codec["pcodec"], Codec["blosc-lz4-bitshuffle"]):
        cache = Cache.open(convert(source, codec))
        assert cache.targets is Targets.recompute
        with Loader(source, 40, seed=0) as one, Loader(cache, 40, seed=0) as other:
            for _ in range(7):
                a, b = next(one), next(other)
                assert torch.equal(a.resid_mid, b.resid_mid)
                assert b.mlp_out is None
    refusal = "cache.codec=int8 with cache.targets=recompute: .* not the model's; use cache.targets=stored with it, or"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=refusal):
        convert(source, Codec["int8"])
    assert sorted(tmp_path.iterdir()) == before
    text = DatasetOptions("c", DatasetKind.world, "1")
    with pytest.raises(UserError, match=refusal):
        request_of(ModelOptions("a", "b"), text, Codec["int8"], Targets.recompute)


def test_the_arrays_open_in_zarr_and_xarray_and_there_are_no_zeros_in_place_of_targets(tmp_path: Path) -> None:
    import xarray
    import zarr

    path = fake.extract(tmp_path, targets="recompute")
    group = zarr.open_group(path, mode="r")
    assert "mlp_out" not in group
    assert group["resid_mid"].shape == (244, 3, 5)
    assert set(xarray.open_zarr(path, consolidated=False).data_vars) == {"resid_mid", "tokens"}
    assert set(xarray.open_zarr(path, group="evaluation", consolidated=False).data_vars) == {
        "resid_mid",
        "mlp_out",
        "tokens",
    }
    cache = Cache.open(path)
    ordinary = Cache.open(fake.extract(tmp_path))
    for split in (Split.calibration, Split.evaluation):
        for one, other in zip(cache.held_out(split), ordinary.held_out(split), strict=True):
            assert (
                np.asarray(one.float() if isinstance(one, Tensor) else one).tolist()
                == np.asarray(other.float() if isinstance(other, Tensor) else other).tolist()
            )
    for one, other in zip(cache.stats("mlp_out"), ordinary.stats("mlp_out"), strict=True):
        assert torch.equal(one, other)
