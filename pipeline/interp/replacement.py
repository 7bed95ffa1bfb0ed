"""A language model whose MLPs are a transcoder.

At every layer the features come from the live residual stream, which earlier reconstructions have already changed, and
the reconstruction from all layers' features so far is written as the MLP's output. Attention, norms and embeddings are
the model's own. Position 0 keeps its own MLP output: it is never a row, so no transcoder has learned it.
"""

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm
from pipeline.core.sparse import Pattern, Sparse
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError


class ReplacementModel:
    """`transcoder` in the model's units, with a rule that can run live (one layer of one token at a time)."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, site: Site) -> None:
        if (lm.n_layers, lm.d_model) != tuple(transcoder.dims):
            raise UserError(
                f"the transcoder has (n_layers, d_model) = {tuple(transcoder.dims)}, the model {lm.name} "
                f"({lm.n_layers}, {lm.d_model}); give the model that it was trained on"
            )
        if not (transcoder.causal and transcoder.activation.per_token):
            raise UserError("this activation looks at other tokens, so it cannot run live; use the fixed thresholds")
        self.lm, self.transcoder, self.site = lm, transcoder, site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n, T] -> [n, T, V]"""
        chosen: list[tuple[Pattern, Tensor]] = []

        def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            x = self.norm.layer(resid, layer) if self.site == Site.mlp_in else resid.float()
            x = x.flatten(0, 1)
            chosen.append(self.transcoder.layer_features(x, layer))
            so_far = Sparse([pattern for pattern, _ in chosen], [values for _, values in chosen])
            y_hat = self.transcoder.decode_layer(so_far, layer, x).view(own.shape).to(own.dtype)
            return keep_position_0(own, y_hat)

        return self.lm.logits(tokens, mlp)


@torch.inference_mode()
def ablated_logits(lm: LanguageModel, output: Tensor, tokens: Tensor) -> Tensor:
    """The model with every MLP's output replaced by a constant: zeros, or the mean. output [L, D] -> [n, T, V]"""

    def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        return keep_position_0(own, output[layer].to(own).expand_as(own))

    return lm.logits(tokens, mlp)


def keep_position_0(own: Tensor, replaced: Tensor) -> Tensor:
    """[n, T, D], [n, T, D] -> [n, T, D]"""
    return torch.cat([own[:, :1], replaced[:, 1:]], dim=1)
