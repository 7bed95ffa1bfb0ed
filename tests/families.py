"""Tiny random models of the architectures that people study, and plain Hugging Face hooks to compare with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

N_LAYERS, D_MODEL, N_CONTEXT = 3, 20, 40

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

    def __init__(
        self, path: Path, family: str, dtype: torch.dtype = torch.float32, attention: str | None = None
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
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


def make(family: str, path: Path, tokenizer: Path) -> None:
    """A tiny random model of a family but GPT-2, with the tokenizer of another directory."""
    import transformers

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
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
