"""Tiny random models and transcoders that both sides read.

FOLDER/model-FAMILY      a base model with its tokenizer, as transformers 4 and 5 can load it
FOLDER/CASE/run          a finished run
FOLDER/CASE/export       it, exported to circuit-tracer; also saelens
FOLDER/CASE/prompt.json  token ids, and the model's directory
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions, Site
from pipeline.core.activations import FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.data.model_files import weights_hash
from pipeline.interp.exchange import export_circuit_tracer, export_saelens
from pipeline.interp.exchange.export_options import ExportOptions
from pipeline.interp.exchange.export_weights import Source
from pipeline.train import artifact
from tests.conftest import CHARACTERS, SPECIAL, tiny_tokenizer

VOCAB = len(SPECIAL) + len(CHARACTERS)


class Sizes(NamedTuple):
    n_layers: int = 3
    d_model: int = 20
    d_features: int = 24
    n_context: int = 40


SMALL = Sizes()
PROMPT = "The old sailor, in May"


class Case(NamedTuple):
    family: str
    """gpt2; or meta, a Llama: transformer_lens takes any directory with that name in its path for one of the real ones.
    It reads Gemma-2 under the names of the real ones alone."""
    arch: ArchOptions
    is_jump: bool = True
    bias: float = -0.3
    """Of every feature, on average: how sparse they are."""
    prompt: str = PROMPT

    def __str__(self) -> str:
        sparse = "" if self.bias == -0.3 else f"-{-self.bias:g}"
        reach = "" if self.arch.max_reach is None else f"{self.arch.max_reach}"
        return (
            f"{self.family}-{self.arch.name}{reach}-{self.arch.site}-{'jumprelu' if self.is_jump else 'relu'}{sparse}"
        )


def arch(name: str, site: Site = Site.mlp_in, **options: Any) -> ArchOptions:
    return ArchOptions(name, d_features=SMALL.d_features, site=site, skip=name == "skip", **options)


CLTS = [
    Case(family, arch("clt", site), jump)
    for family in ("gpt2", "meta")
    for site in (Site.resid_mid, Site.mlp_in)
    for jump in (False, True)
]
OTHERS = [
    Case("meta", arch("tied")),
    Case("gpt2", arch("clt", max_reach=1)),
    Case("gpt2", arch("matryoshka")),
    Case("meta", arch("per_layer")),
    Case("gpt2", arch("per_layer"), is_jump=False),
]
SKIPS = [Case("gpt2", arch("skip")), Case("meta", arch("skip"), is_jump=False)]
SILENT = Case("gpt2", arch("clt"), bias=-1000.0)
"""No feature is ever active."""
SPARSE = Case("gpt2", arch("clt"), bias=-3.5)
"""Features at two positions, none at the last one."""


def make_model(family: str, path: Path, sizes: Sizes = SMALL) -> None:
    """A random model, large enough in every term for each to show."""
    import transformers

    torch.manual_seed(0 if family == "gpt2" else 1)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    if family == "gpt2":
        shape = {"n_layer": sizes.n_layers, "n_embd": sizes.d_model, "n_head": 2, "n_positions": sizes.n_context}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ids))
    else:
        shape = {"hidden_size": sizes.d_model, "intermediate_size": 28, "num_hidden_layers": sizes.n_layers}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": sizes.n_context}
        config = transformers.LlamaConfig(**shape, **ids, rms_norm_eps=1e-5, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * (1 if "norm" in name or "bias" in name else 0.5)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    for_transformers_4(path, sizes.n_context)


def for_transformers_4(path: Path, n_context: int) -> None:
    """The names that version 4 and transformer_lens 3 look for."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    config |= {"n_ctx": n_context} if "n_positions" in config else {"rope_theta": rope.get("rope_theta", 10000.0)}
    file.write_text(json.dumps(config))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def make_run(case: Case, model: Path, run: Path, sizes: Sizes = SMALL) -> None:
    """A finished run with random weights of that model."""
    generator, shape = torch.Generator().manual_seed(7), (sizes.n_layers, case.arch.d_features)
    threshold = 0.5 * torch.rand(shape, generator=generator) if case.is_jump else torch.zeros(shape)
    transcoder = table.build(case.arch, Dims(sizes.n_layers, sizes.d_model), FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        transcoder.b_enc.add_(case.bias)
    rule = ActivationOptions("jumprelu" if case.is_jump else "relu")
    y_mean = torch.randn(sizes.n_layers, sizes.d_model, generator=generator)
    artifact.save(
        run, transcoder, threshold, y_mean, {**artifact.describe(case.arch, transcoder.dims, rule), **about(model)}
    )


def about(model: Path) -> dict[str, Any]:
    """What config.json says of the base model and the text."""
    config = json.loads((model / "config.json").read_text())
    asked = {"name": "tiny", "path": str(model), "revision": None, "dtype": "auto", "layers": None, "attention": "auto"}
    named = {"name": "tiny", "path": str(model), "revision": None, "architecture": config["architectures"][0]}
    return {
        "units": "model",
        "hooks": {"resid_mid": "blocks.{l}.ln2.hook_in", "mlp_out": "blocks.{l}.hook_mlp_out"},
        "model": {**named, "weights_sha256": weights_hash(model)},
        "dataset": {"name": "text", "kind": "text", "path": "x.txt", "bos": "auto", "context": 32},
        "cache": {"key": "none", "path": "cache/none", "request": {"model": asked}},
        "train": {"batch_tokens": 256, "seed": 0},
    }


def make(case: Case, folder: Path, sizes: Sizes = SMALL) -> Path:
    """Model, run, export and prompt. -> FOLDER/CASE"""
    from transformers import AutoTokenizer

    place, model = folder / str(case), folder / f"model-{case.family}"
    if not model.exists():
        make_model(case.family, model, sizes)
    make_run(case, model, place / "run", sizes)
    source = Source(place / "run")
    for kind, name in ((export_circuit_tracer, "export"), (export_saelens, "saelens")):
        if name == "export" or source.own_layer_alone():
            kind.check(source)
            (place / name).mkdir()
            kind.write(source, place / name, ExportOptions())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer.bos_token_id, *tokenizer(case.prompt, add_special_tokens=False)["input_ids"]]
    (place / "prompt.json").write_text(json.dumps({"tokens": tokens, "model": str(model)}))
    return place
