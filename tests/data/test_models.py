"""What is read from a model equals what plain Hugging Face module hooks see, in several architectures."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline
from pipeline.data import model_files, model_sites, models, world
from pipeline.data.options import Attention, Dtype, ModelOptions
from pipeline.errors import UserError
from tests.families import D_MODEL, FAMILIES, N_CONTEXT, N_LAYERS, Plain


def options(path: Path | str, **more: Any) -> ModelOptions:
    return ModelOptions(name="tiny", path=str(path), device="cpu", **more)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [Attention.auto, Attention.eager])
def test_rows_are_what_plain_module_hooks_see(
    family_model: Callable[[str], Path], tokens: Tensor, family: str, dtype: torch.dtype, attention: Attention
) -> None:
    path = family_model(family)
    model = models.load(options(path, dtype=Dtype(str(dtype).removeprefix("torch.")), attention=attention))
    resid_mid, mlp_out = model.collect(tokens)
    norm_in, mlp_in, added = Plain(path, family, dtype, "eager" if attention is Attention.eager else None).seen(tokens)
    assert resid_mid.shape == mlp_out.shape == (4, 9, N_LAYERS, D_MODEL)
    assert resid_mid.dtype == mlp_out.dtype == model.dtype == dtype
    # The same operations on the same numbers; but how a CPU sums up depends on where in memory they happen to lie.
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    for ours, plain in ((resid_mid, norm_in), (mlp_out, added), (model.mlp_inputs(tokens), mlp_in)):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    normed = model.mlp_norm()(resid_mid)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-7  # bfloat16 keeps 8 bits; its module rounds once or twice
    torch.testing.assert_close(normed, mlp_in.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_known_sites_are_what_transformer_lens_says(family_model: Callable[[str], Path], family: str) -> None:
    asked = options(family_model(family))
    weights = models.load(asked).weights
    found = model_sites.looked_up(asked, weights)
    assert model_sites.KNOWN.get(weights.config.architectures[0], found) == found


def test_known_sites_are_of_families_that_are_tested() -> None:
    tested = {f"{family}{end}" for family in FAMILIES for end in ("LMHeadModel", "ForCausalLM")}
    assert model_sites.KNOWN.keys() <= tested


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_each_mlp_by_itself_changes_nothing_and_by_zero_what_zeroed_mlps_change(
    family_model: Callable[[str], Path], tokens: Tensor, family: str
) -> None:
    path = family_model(family)
    model = models.load(options(path))
    plain = Plain(path, family)
    logits = model.logits(tokens)
    torch.testing.assert_close(logits, plain.model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(tokens, mlp=lambda layer, resid, own: own), logits)
    exact = model.collect(tokens)[1]
    put_back = model.logits(tokens, mlp=lambda layer, resid, own: exact[:, :, layer])
    p, q = logits.double().log_softmax(-1), put_back.double().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-6  # KL(original || replaced by its own outputs), nats
    handles = [out.register_forward_hook(lambda module, inputs, output: 0 * output) for out in plain.outs]
    zeroed = plain.model(tokens).logits
    for handle in handles:
        handle.remove()
    assert not torch.allclose(zeroed, logits, atol=0.1)
    ablated = model.logits(tokens, mlp=lambda layer, resid, own: 0 * own)
    torch.testing.assert_close(ablated, zeroed, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(tokens), logits)  # no hook stays behind


def test_a_replacement_is_given_each_layer_in_order_and_the_stream_as_it_was_left(
    tiny_gpt2: Path, tokens: Tensor
) -> None:
    model = models.load(options(tiny_gpt2))
    resid_mid, mlp_out = model.collect(tokens)
    seen: list[int] = []

    def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        seen.append(layer)
        if layer <= 1:
            assert torch.equal(resid, resid_mid[:, :, layer])
            assert torch.equal(own, mlp_out[:, :, layer])
        else:
            assert not torch.allclose(resid, resid_mid[:, :, layer], atol=1e-3)
        return own + (layer == 1)

    model.logits(tokens, mlp=mlp)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_range_of_layers_is_read_and_replaced_and_the_layers_above_do_not_run(
    family_model: Callable[[str], Path], tokens: Tensor, family: str
) -> None:
    path = family_model(family)
    whole, part = models.load(options(path)), models.load(options(path, layers=[1, 2]))
    assert (part.layers, part.n_layers) == (range(1, 2), 1)
    ran: list[str] = []
    blocks = Plain(path, family).blocks  # their number, and the name of their list
    above = part.weights.get_submodule(f"{FAMILIES[family][0]}.2")
    with above.register_forward_hook(lambda module, inputs, output: ran.append("above")):
        for one, all_of_them in zip(part.collect(tokens), whole.collect(tokens), strict=True):
            assert torch.equal(one, all_of_them[:, :, 1:2])
        assert ran == []
        replaced = part.logits(tokens, mlp=lambda layer, resid, own: own + 1 + layer)
        assert ran == ["above"]
    assert len(part.weights.get_submodule(FAMILIES[family][0])) == len(blocks) == N_LAYERS
    expected = whole.logits(tokens, mlp=lambda layer, resid, own: own + (layer == 1))
    assert torch.equal(replaced, expected)
    norms = part.mlp_norm(), whole.mlp_norm()
    assert torch.equal(norms[0].gain, norms[1].gain[1:2])
    assert torch.equal(norms[0].bias, norms[1].bias[1:2])


def test_positions_can_be_left_out_and_numbers_rounded_while_they_are_collected(
    tiny_gpt2: Path, tokens: Tensor
) -> None:
    model = models.load(options(tiny_gpt2))
    out = torch.empty(2, len(tokens), tokens.shape[1] - 2, N_LAYERS, D_MODEL, dtype=torch.bfloat16)
    given = model.collect(tokens, 2, (out[0], out[1]))
    for less, all_of_it, place in zip(given, model.collect(tokens), out, strict=True):
        assert torch.equal(less, all_of_it[:, 2:].bfloat16())
        assert less.data_ptr() == place.data_ptr()


def test_the_head_is_not_computed_when_collecting(tiny_gpt2: Path, tokens: Tensor) -> None:
    model = models.load(options(tiny_gpt2))
    fired: list[str] = []
    with model.weights.lm_head.register_forward_hook(lambda module, inputs, output: fired.append("head")):
        model.collect(tokens)
        assert fired == []
        model.logits(tokens)
        assert fired == ["head"]


def test_dropout_is_off(tiny_gpt2: Path, tokens: Tensor, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_gpt2, tmp_path / "dropout")
    config = json.loads((path / "config.json").read_text())
    rates = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    (path / "config.json").write_text(json.dumps(config | rates))
    model = models.load(options(path))
    first, second = model.collect(tokens), model.collect(tokens)
    undisturbed = models.load(options(tiny_gpt2)).collect(tokens)
    for one, two, three in zip(first, second, undisturbed, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert not any(one.requires_grad for one in first)
    model.weights.train()
    with pytest.raises(AssertionError):
        model.collect(tokens)


def test_padding_behind_the_text_and_other_contexts_do_not_touch_a_row(tiny_gpt2: Path, tokens: Tensor) -> None:
    model = models.load(options(tiny_gpt2))
    padded = tokens.clone()
    padded[:, 6:] = model.eos_token_id
    for full, cut in zip(model.collect(tokens), model.collect(padded), strict=True):
        torch.testing.assert_close(cut[:, :6], full[:, :6], rtol=1e-6, atol=1e-6)


def test_a_model_says_what_it_is(tiny_gpt2: Path) -> None:
    model = models.load(options(tiny_gpt2))
    assert (model.n_layers, model.d_model, model.vocab_size, model.n_context) == (N_LAYERS, D_MODEL, 61, N_CONTEXT)
    assert (model.name, model.path, model.revision) == ("tiny", str(tiny_gpt2), None)
    assert (model.architecture, model.tokenizer.bos_token_id, model.eos_token_id) == ("GPT2LMHeadModel", 1, 2)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    norm = model.mlp_norm()
    assert norm.kind == "layer"
    assert norm.eps == 1e-3
    assert norm.gain.shape == norm.bias.shape == (N_LAYERS, D_MODEL)
    assert norm.gain.dtype == norm.bias.dtype == torch.float32
    model.check_context(N_CONTEXT)
    with pytest.raises(UserError, match=r"dataset.context=41: model=tiny has 40 positions; use dataset.context=40"):
        model.check_context(N_CONTEXT + 1)


def test_a_model_without_a_bos_token_has_none(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(family_model("Llama"), tmp_path / "llama")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    model = models.load(options(path))
    assert model.tokenizer.bos_token_id is None


def test_the_hash_of_weights_follows_values_and_not_dtype_or_shards(tiny_gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = models.load(options(tiny_gpt2)).weights_hash()
    assert models.load(options(tiny_gpt2, dtype=Dtype.bfloat16)).weights_hash() == original
    sharded, changed = (shutil.copytree(tiny_gpt2, tmp_path / name) for name in ("sharded", "changed"))
    tensors = load_file(tiny_gpt2 / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, sharded / file, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert models.load(options(sharded)).weights_hash() == original
    tensors["transformer.h.1.ln_2.bias"][3] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert models.load(options(changed)).weights_hash() != original


def test_weights_in_a_bin_file_are_loaded_and_hashed(tiny_gpt2: Path, tokens: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = shutil.copytree(tiny_gpt2, tmp_path / "pickled")
    (path / "model.safetensors").unlink()
    weights = AutoModelForCausalLM.from_pretrained(tiny_gpt2).state_dict()
    torch.save(weights, path / "pytorch_model.bin")
    model, original = models.load(options(path)), models.load(options(tiny_gpt2))
    assert torch.equal(model.collect(tokens)[0], original.collect(tokens)[0])
    first = model.weights_hash()
    weights["transformer.ln_f.bias"][0] += 1
    torch.save(weights, path / "pytorch_model.bin")
    assert model.weights_hash() != first


def test_a_hub_name_is_loaded_from_the_local_cache_and_its_commit_is_known(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_gpt2, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = models.load(options("someone/tiny"))
    assert (model.path, model.revision) == ("someone/tiny", commit)
    assert model.weights_hash() == models.load(options(tiny_gpt2)).weights_hash()


def test_the_identity_of_a_local_model_follows_its_files_and_costs_no_load(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", None)
    copy = shutil.copytree(tiny_gpt2, tmp_path / "copy")
    original = model_files.source_identity(options(tiny_gpt2))
    assert set(original) == {"sha256"}
    assert model_files.source_identity(options(copy)) == original
    (copy / "README.md").write_text("not part of the model")
    assert model_files.source_identity(options(copy)) == original
    for name in ("tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b" ")
        assert model_files.source_identity(options(copy)) != original
        (copy / name).write_bytes(content)
    assert model_files.source_identity(options("openai-community/gpt2")) == {}


def test_a_norm_that_the_formula_does_not_describe_is_refused(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_eps", lambda module: 0.5)
    with pytest.raises(UserError, match="LayerNorm of GPT2LMHeadModel is no plain LayerNorm or RMSNorm"):
        models.load(options(tiny_gpt2))


def test_the_builtin_model_is_the_directory_that_ships(monkeypatch: pytest.MonkeyPatch, tiny_gpt2: Path) -> None:
    monkeypatch.setattr(world, "MODEL_DIR", tiny_gpt2)
    assert models.load(options("builtin:world")).weights_hash() == models.load(options(tiny_gpt2)).weights_hash()
    assert model_files.source_identity(options("builtin:world")) == model_files.source_identity(options(tiny_gpt2))


@pytest.mark.parametrize(
    "module", ["models", "model_files", "model_loading", "model_sites", "tokens", "text", "options"]
)
def test_slow_libraries_are_imported_inside_functions_only(module: str) -> None:
    slow = ("transformers", "transformer_lens", "datasets", "huggingface_hub", "safetensors", "tokenizers")
    tree = ast.parse((Path(pipeline.__file__).parent / "data" / f"{module}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imports for name in node.names} | {getattr(node, "module", "") for node in imports}
    assert not {name for name in names if name.split(".")[0] in slow}
