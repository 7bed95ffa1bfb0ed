"""Tiny random models and transcoders that both sides trace: `python -m tests.interop.cases DIR` makes them all.

DIR/CASE/model     the base model with its tokenizer, as both versions of transformers can load it
DIR/CASE/run       a finished run
DIR/CASE/prompt    token ids, JSON
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions, Site
from pipeline.core.activations import FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.data.model_files import weights_hash
from pipeline.train import artifact
from tests.conftest import CHARACTERS, SPECIAL, tiny_tokenizer

N_LAYERS, D_MODEL, F, VOCAB = 3, 20, 24, len(SPECIAL) + len(CHARACTERS)
PROMPT = "The old sailor, in May"


class Case(NamedTuple):
    family: str
    arch: str
    site: Site
    is_jump: bool

    def __str__(self) -> str:
        return f"{self.family}-{self.arch}-{self.site}-{'jumprelu' if self.is_jump else 'relu'}"


CASES = [
    *(Case(family, "clt", site, jump) for family in ("gpt2", "meta") for site in (Site.resid_mid, Site.mlp_in)
      for jump in (False, True)),
    Case("gpt2", "skip", Site.mlp_in, True),
    Case("meta", "tied", Site.mlp_in, True),
]  # fmt: skip
"""meta is a Llama: transformer_lens takes any directory with that name in its path for one of the real ones. It reads
Gemma-2 under the names of the real ones alone, so there is none here."""


def make_model(family: str, path: Path) -> None:
    """A random model large enough in every term for each to show, saved for transformers 4 and 5."""
    import transformers

    torch.manual_seed(0 if family == "gpt2" else 1)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    common = {"hidden_size": D_MODEL, "intermediate_size": 28, "num_hidden_layers": N_LAYERS, **ids}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40, "rms_norm_eps": 1e-5}
    if family == "gpt2":
        sizes = {"n_layer": N_LAYERS, "n_embd": D_MODEL, "n_head": 2, "n_positions": 40}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * (1 if "norm" in name or "bias" in name else 0.5)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    _for_transformers_4(path)


def _for_transformers_4(path: Path) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    config |= {"n_ctx": 40} if "n_positions" in config else {"rope_theta": rope.get("rope_theta", 10000.0)}
    file.write_text(json.dumps(config))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def make_run(case: Case, model: Path, run: Path, silent: bool = False) -> None:
    """A finished run with random weights of that model. silent: no feature is ever active."""
    generator = torch.Generator().manual_seed(7)
    threshold = 0.5 * torch.rand(N_LAYERS, F, generator=generator) if case.is_jump else torch.zeros(N_LAYERS, F)
    arch = ArchOptions(case.arch, d_features=F, site=case.site, skip=case.arch == "skip")
    transcoder = table.build(arch, Dims(N_LAYERS, D_MODEL), FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        transcoder.b_enc.sub_(1000.0 if silent else 0.3)
    activation = ActivationOptions("jumprelu" if case.is_jump else "relu")
    y_mean = torch.randn(N_LAYERS, D_MODEL, generator=generator)
    described = artifact.describe(arch, transcoder.dims, activation)
    artifact.save(run, transcoder, threshold, y_mean, {**described, **about(model)})


def about(model: Path) -> dict[str, Any]:
    """What config.json says of the base model and the text."""
    config = json.loads((model / "config.json").read_text())
    asked = {"name": "tiny", "path": str(model), "revision": None, "dtype": "auto", "layers": None, "attention": "auto"}
    return {
        "units": "model",
        "hooks": {"resid_mid": "blocks.{l}.ln2.hook_in", "mlp_out": "blocks.{l}.hook_mlp_out"},
        "model": {
            "name": "tiny",
            "path": str(model),
            "revision": None,
            "architecture": config["architectures"][0],
            "n_layers": N_LAYERS,
            "d_model": D_MODEL,
            "vocab_size": VOCAB,
            "weights_sha256": weights_hash(model),
            "layers": [0, N_LAYERS],
        },
        "dataset": {"name": "text", "kind": "text", "path": "x.txt", "bos": "auto", "context": 32},
        "cache": {"key": "none", "path": "cache/none", "request": {"model": asked}},
        "train": {"batch_tokens": 256, "seed": 0},
    }


def make(case: Case, folder: Path) -> Path:
    """-> DIR/CASE"""
    place = folder / str(case)
    model = folder / f"model-{case.family}"
    if not model.exists():
        make_model(case.family, model)
    make_run(case, model, place / "run")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    (place / "prompt.json").write_text(json.dumps({"tokens": tokens, "text": PROMPT, "model": str(model)}))
    return place


if __name__ == "__main__":
    from pipeline.interp import export_circuit_tracer
    from pipeline.interp.export_options import ExportOptions
    from pipeline.interp.export_weights import Source

    for case in CASES:
        place = make(case, Path(sys.argv[1]))
        out = place / "export"
        out.mkdir(exist_ok=True)
        source = Source(place / "run")
        export_circuit_tracer.check(source)
        export_circuit_tracer.write(source, out, ExportOptions())
