"""What is read from a model equals what plain Hugging Face module hooks see, in several architectures."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline.data import models, world
from pipeline.data.options import Dtype, ModelOptions
from pipeline.errors import UserError

N_LAYERS, D_MODEL, N_CONTEXT = 3, 20, 40


def options(path: Path | str, **more: Any) -> ModelOptions:
    return ModelOptions(name="tiny", path=str(path), device="cpu", **more)


@pytest.fixture(scope="session")
def directory(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random models of other architectures, made when first asked for."""

    def make(family: str) -> Path:
        import transformers

        path = tmp_path_factory.getbasetemp() / "families" / family
        if family == "GPT2" or path.exists():
            return tiny_gpt2 if family == "GPT2" else path
        sizes = {"hidden_size": D_MODEL, "intermediate_size": 28, "num_hidden_layers": N_LAYERS, "vocab_size": 64}
        more: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": N_CONTEXT}
        more |= {"layer_norm_eps": 1e-3} if family == "GPTNeoX" else {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}
        if family == "Gemma2":
            more |= {"head_dim": 10}
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes, **more, bos_token_id=1, eos_token_id=2)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(path)
        return path

    return make


FAMILIES = {
    "GPT2": ("transformer.h", "ln_2", "mlp"),
    "Llama": ("model.layers", "post_attention_layernorm", "mlp"),
    "Qwen2": ("model.layers", "post_attention_layernorm", "mlp"),
    "Gemma2": ("model.layers", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "GPTNeoX": ("gpt_neox.layers", "post_attention_layernorm", "mlp"),
}
"""Where plain Hugging Face has the blocks, the norm in front of the MLP, and the module whose output is added."""


class Plain:
    """The same model without our code: transformers and torch module hooks."""

    def __init__(self, path: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        blocks, norm, out = FAMILIES[family]
        self.blocks = self.model.get_submodule(blocks)
        self.norms = [block.get_submodule(norm) for block in self.blocks]
        self.mlps = [block.get_submodule("mlp") for block in self.blocks]
        self.outs = [block.get_submodule(out) for block in self.blocks]

    @torch.no_grad()
    def seen(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(input of the norm, input of the MLP, what is added to the residual stream), each [n, T, L, D]."""
        kept: dict[tuple[str, int], Tensor] = {}
        handles = []
        for layer in range(N_LAYERS):

            def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor, layer: int = layer) -> None:
                for name, modules in (("norm", self.norms), ("mlp", self.mlps)):
                    if module is modules[layer]:
                        kept[name, layer] = inputs[0]
                if module is self.outs[layer]:
                    kept["out", layer] = output

            hooked = {self.norms[layer], self.mlps[layer], self.outs[layer]}
            handles += [module.register_forward_hook(keep) for module in hooked]
        self.model(tokens)
        for handle in handles:
            handle.remove()
        norm, mlp, out = (
            torch.stack([kept[name, layer] for layer in range(N_LAYERS)], dim=2) for name in ("norm", "mlp", "out")
        )
        return norm, mlp, out


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_plain_module_hooks_see(
    directory: Callable[[str], Path], tokens: Tensor, family: str, dtype: torch.dtype
) -> None:
    path = directory(family)
    model = models.load(options(path, dtype=Dtype(str(dtype).removeprefix("torch."))))
    resid_mid, mlp_out = model.collect(tokens)
    norm_in, mlp_in, added = Plain(path, family, dtype).seen(tokens)
    assert resid_mid.shape == mlp_out.shape == (4, 9, N_LAYERS, D_MODEL)
    assert resid_mid.dtype == mlp_out.dtype == model.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float32 else 0.0
    torch.testing.assert_close(resid_mid, norm_in, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mlp_out, added, rtol=tolerance, atol=tolerance)
    normed = model.mlp_norm()(resid_mid)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-7  # bfloat16 keeps 8 bits; its module rounds once or twice
    torch.testing.assert_close(normed, mlp_in.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_each_mlp_by_itself_changes_nothing_and_by_zero_what_zeroed_mlps_change(
    directory: Callable[[str], Path], tokens: Tensor, family: str
) -> None:
    path = directory(family)
    model = models.load(options(path))
    plain = Plain(path, family)
    logits = model.logits(tokens)
    torch.testing.assert_close(logits, plain.model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(tokens, mlp=lambda layer, resid, own: own), logits)
    handles = [out.register_forward_hook(lambda module, inputs, output: 0 * output) for out in plain.outs]
    zeroed = plain.model(tokens).logits
    for handle in handles:
        handle.remove()
    assert not torch.allclose(zeroed, logits, atol=0.1)
    torch.testing.assert_close(
        model.logits(tokens, mlp=lambda layer, resid, own: 0 * own), zeroed, rtol=1e-5, atol=1e-5
    )
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


def test_the_head_is_not_computed_when_collecting(tiny_gpt2: Path, tokens: Tensor) -> None:
    model = models.load(options(tiny_gpt2))
    fired: list[str] = []
    with model.bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: fired.append("unembed"))]):
        model.collect(tokens)
        assert fired == []
        model.logits(tokens)
        assert fired == ["unembed"]


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
    model.bridge.original_model.train()
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
    assert (model.architecture, model.bos_token_id, model.eos_token_id) == ("GPT2LMHeadModel", 1, 2)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    norm = model.mlp_norm()
    assert norm.kind == "layer"
    assert norm.eps == 1e-3
    assert norm.gain.shape == norm.bias.shape == (N_LAYERS, D_MODEL)
    assert norm.gain.dtype == norm.bias.dtype == torch.float32
    model.check_context(N_CONTEXT)
    with pytest.raises(UserError, match=r"dataset.context=41: model=tiny has 40 positions; use dataset.context=40"):
        model.check_context(N_CONTEXT + 1)


def test_a_model_without_a_bos_token_has_none(directory: Callable[[str], Path], tmp_path: Path) -> None:
    """The bridge would take the end-of-text token for one."""
    path = shutil.copytree(directory("Llama"), tmp_path / "llama")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    model = models.load(options(path))
    assert model.bos_token_id is None
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
    original = models.source_identity(options(tiny_gpt2))
    assert set(original) == {"sha256"}
    assert models.source_identity(options(copy)) == original
    (copy / "README.md").write_text("not part of the model")
    assert models.source_identity(options(copy)) == original
    for name in ("tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b" ")
        assert models.source_identity(options(copy)) != original
        (copy / name).write_bytes(content)
    assert models.source_identity(options("openai-community/gpt2")) == {}


def test_devices_are_resolved_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert models.resolve_device("auto") == models.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="has 0 cuda devices"):
        models.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.resolve_device("auto") == torch.device("cuda")
    assert models.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="has 2 cuda devices"):
        models.resolve_device("cuda:2")
    with pytest.raises(UserError, match="'gpu' is unknown"):
        models.resolve_device("gpu")


def test_auto_is_bfloat16_on_cuda_and_float32_on_the_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert models.resolve_dtype(Dtype.auto, cpu) == models.resolve_dtype(Dtype.float32, cuda) == torch.float32
    assert models.resolve_dtype(Dtype.auto, cuda) == models.resolve_dtype(Dtype.bfloat16, cpu) == torch.bfloat16


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))

    return change


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (remove("config.json"), "no config.json in"),
        (remove("model.safetensors"), "no weights in"),
        (remove("tokenizer.json"), "no tokenizer in"),
        (truncate, "cannot use its weights"),
        (drop_a_tensor, "1 tensors are missing, transformer.h.1.mlp.c_fc.bias"),
        (edit("config.json", n_embd=22), "cannot use its weights"),
        (edit("config.json", model_type="unheard-of"), "cannot use its configuration"),
        (edit("config.json", architectures=["GPT2Model"]), "GPT2Model is no causal language model"),
        (edit("tokenizer_config.json", eos_token=None), "no end-of-text token"),
    ],
)
def test_a_spoilt_directory_is_refused_in_one_line(
    tiny_gpt2: Path, tmp_path: Path, spoil: Callable[[Path], None], match: str
) -> None:
    path = shutil.copytree(tiny_gpt2, tmp_path / "spoilt")
    spoil(path)
    with pytest.raises(UserError, match=match) as error:
        models.load(options(path))
    assert "\n" not in str(error.value)


def test_an_architecture_without_a_norm_in_front_of_the_mlp_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.GPTJConfig(
        n_layer=2, n_embd=20, n_head=2, vocab_size=61, n_positions=40, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPTJForCausalLM has no norm of its own in front of the MLP"):
        models.load(options(tmp_path))


def test_a_norm_that_the_formula_does_not_describe_is_refused(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_eps", lambda module: 0.5)
    with pytest.raises(UserError, match="LayerNorm of GPT2LMHeadModel is no plain LayerNorm or RMSNorm"):
        models.load(options(tiny_gpt2))


def test_paths_and_names_that_lead_nowhere_are_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory, and no hub name"):
        models.load(options(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is a file; give the directory"):
        models.load(options(tiny_gpt2 / "config.json"))
    with pytest.raises(UserError, match=r"model.revision is for hub names"):
        models.load(options(tiny_gpt2, revision="main"))
    with pytest.raises(UserError, match=r"the hub did not give it .*; use a local directory, or run `hf download a/b`"):
        models.load(options("a/b"))  # the tests run offline


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = shutil.copytree(tiny_gpt2, tmp_path / "large")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="the tokenizer has 62 tokens, the model 61"):
        models.load(options(path))


def test_loading_says_nothing(
    tiny_gpt2: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    models.load(options(tiny_gpt2))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_the_builtin_model_is_the_directory_that_ships(monkeypatch: pytest.MonkeyPatch, tiny_gpt2: Path) -> None:
    monkeypatch.setattr(world, "MODEL_DIR", tiny_gpt2)
    assert models.load(options("builtin:world")).weights_hash() == models.load(options(tiny_gpt2)).weights_hash()
    assert models.source_identity(options("builtin:world")) == models.source_identity(options(tiny_gpt2))


@pytest.mark.parametrize("module", ["models", "model_files", "tokens", "text", "options"])
def test_slow_libraries_are_imported_inside_functions_only(module: str) -> None:
    slow = ("transformers", "transformer_lens", "datasets", "huggingface_hub", "safetensors", "tokenizers")
    tree = ast.parse((Path(pipeline.__file__).parent / "data" / f"{module}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imports for name in node.names} | {getattr(node, "module", "") for node in imports}
    assert not {name for name in names if name.split(".")[0] in slow}
