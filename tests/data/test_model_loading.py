"""Tokenizers and weights that are there, spread over devices, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data import models
from pipeline.data.options import Attention, Dtype, ModelOptions
from pipeline.errors import UserError


def options(path: Path | str, **more: Any) -> ModelOptions:
    return ModelOptions(name="tiny", path=str(path), **{"device": "cpu", **more})


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


@pytest.mark.parametrize(
    ("layers", "shown"), [([0, 4], "[0,4]"), ([2, 2], "[2,2]"), ([-1, 2], "[-1,2]"), ([1], "[1]"), ([], "[]")]
)
def test_layers_that_the_model_does_not_have_are_refused(tiny_gpt2: Path, layers: list[int], shown: str) -> None:
    with pytest.raises(UserError) as error:
        models.load(options(tiny_gpt2, layers=layers))
    assert str(error.value).startswith(f"model.layers={shown}: tiny has 3 layers, counted from 0; give [first,stop]")


def test_an_attention_kernel_that_is_not_there_is_refused_in_one_line(tiny_gpt2: Path) -> None:
    with pytest.raises(UserError, match=r"cannot use its weights \(FlashAttention2 has been toggled on") as error:
        models.load(options(tiny_gpt2, attention=Attention.flash_attention_2))
    assert "\n" not in str(error.value)


def test_a_model_spread_over_memory_and_disk_gives_the_same_rows(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Most of the weights lie on disk and are brought in for each layer."""
    tokens = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    whole = models.load(options(tiny_gpt2))
    spread = models.load(
        options(
            tiny_gpt2, device="auto", device_map="auto", max_memory={"cpu": "25KB"}, offload_dir=str(tmp_path / "off")
        )
    )
    assert "disk" in spread.weights.hf_device_map.values()
    for one, other in zip(spread.collect(tokens), whole.collect(tokens), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(
        spread.logits(tokens, lambda l, resid, own: 0 * own), whole.logits(tokens, lambda l, r, own: 0 * own)
    )
    for part in ("gain", "bias"):
        assert torch.equal(getattr(spread.mlp_norm(), part), getattr(whole.mlp_norm(), part))


def test_settings_of_a_device_map_that_contradict_are_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(UserError, match=r"model.device=cpu and model.device_map=auto contradict"):
        models.load(options(tiny_gpt2, device_map="auto"))
    with pytest.raises(UserError, match=r"go with model.device_map; add model.device_map=auto"):
        models.load(options(tiny_gpt2, max_memory={"cpu": "1GiB"}))


def test_bfloat16_on_a_cpu_without_such_instructions_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.data import model_loading

    for has in (True, False):
        monkeypatch.setattr(model_loading, "_cpu_has_bfloat16", lambda has=has: has)
        assert models.resolve_dtype(Dtype.bfloat16, torch.device("cpu")) == torch.bfloat16
        assert ("no bfloat16 instructions" in caplog.text) is not has
