"""Where the modules are that a transcoder stands in for, in every architecture that transformer_lens knows.

The only file that imports transformer_lens, for its table of architectures: which module is the norm in front of the
MLP, which one's output is added to the residual stream, and what kind of norm it is. The model itself runs as
transformers makes it. transformer_lens can wrap it too (TransformerBridge), but computes attention by matrix products
then: at 1,024 tokens a context that took twice the time of the fused kernel on a CPU, and differs from it by 1e-6.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.options import ModelOptions
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import ArchitectureAdapter
    from transformers import PreTrainedModel


class Sites(NamedTuple):
    """Names of modules, as in `named_modules()`."""

    blocks: str
    """The list of layers."""
    norm: str
    """Within a layer: the norm in front of the MLP, whose input is resid_mid."""
    mlp_out: str
    """Within a layer: the module whose output is added to the residual stream."""
    mlp: str | None
    """Within a layer: the MLP. None where it is no module of its own."""
    is_rms: bool
    """RMSNorm; else LayerNorm."""
    gain_offset: float
    """Added to the norm's weight: 1 in Gemma, which stores gain - 1."""
    final_norm: str
    """The norm in front of the unembedding."""


_LLAMA = Sites("model.layers", "post_attention_layernorm", "mlp", "mlp", True, 0.0, "model.norm")

KNOWN = {
    "GPT2LMHeadModel": Sites("transformer.h", "ln_2", "mlp", "mlp", False, 0.0, "transformer.ln_f"),
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA._replace(
        norm="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm", gain_offset=1.0
    ),
    "GPTNeoXForCausalLM": Sites(
        "gpt_neox.layers", "post_attention_layernorm", "mlp", "mlp", False, 0.0, "gpt_neox.final_layer_norm"
    ),
}
"""What transformer_lens says of the usual ones. Importing it takes over a second, as long as a small model's graph."""


def sites_of(options: ModelOptions, weights: "PreTrainedModel") -> Sites:
    """As `KNOWN` has it, else as transformer_lens says. Raises UserError as `looked_up` does."""
    known = KNOWN.get(weights.config.architectures[0])
    return looked_up(options, weights) if known is None else known


def looked_up(options: ModelOptions, weights: "PreTrainedModel") -> Sites:
    """What transformer_lens says. Raises UserError for an architecture that it does not know, and one without a norm of
    its own in front of each MLP or without a module whose output is what the MLP adds."""
    architecture = weights.config.architectures[0]
    adapter = _adapter(options, weights, architecture)
    components = adapter.get_component_mapping()
    block = components["blocks"]
    added = (block.hook_aliases.get("hook_mlp_out") or "").removesuffix(".hook_out")
    if "ln2" not in block.submodules or not added:
        why = f"{architecture} has no norm of its own in front of the MLP to read the residual at"
        why = why if added else f"{architecture} scales what its MLPs add"
        raise UserError(f"model.path={options.path}: {why}; use a model of another family (GPT-2, Llama, Qwen, Gemma)")
    cfg = adapter.cfg
    return Sites(
        blocks=block.name,
        norm=block.submodules["ln2"].name,
        mlp_out=_name_of(block, added),
        mlp=block.submodules["mlp"].name if "mlp" in block.submodules else None,
        is_rms=bool(cfg.uses_rms_norm),
        gain_offset=float(bool(getattr(cfg, "rmsnorm_uses_offset", False))),
        final_norm=components["ln_final"].name,
    )


def _adapter(options: ModelOptions, weights: "PreTrainedModel", architecture: str) -> "ArchitectureAdapter":
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    config = build_bridge_config_from_hf(weights.config, architecture, options.name, weights.dtype)
    try:
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        fix = "use a model of another family (GPT-2, Llama, Qwen, Gemma)"
        raise UserError(f"model.path={options.path}: transformer_lens does not map {architecture}; {fix}") from error


def _name_of(component: Any, path: str) -> str:
    """`mlp.out` -> `mlp.dense_4h_to_h`: the module of a component, whose parts need not all be modules."""
    names = []
    for part in path.split("."):
        component = component.submodules[part]
        names.append(component.name)
    return ".".join(name for name in names if name)
