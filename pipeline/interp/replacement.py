"""A language model whose MLPs are a transcoder.

What stands in for the MLPs, by architecture and sites (`basis`):

    live            every layer's features come from the live residual stream, which earlier reconstructions have
                    already changed; the reconstruction from all layers' features so far is the MLP's output
    teacher_forced  features come from the original model's activations at all layers, and then all MLP outputs are
                    replaced at once: all that an acausal architecture allows, since it reads layers that come later
    runs the MLP    an SAE on mlp_out: the MLP runs on the live residual stream, and its output is replaced by its
                    reconstruction. Not comparable with the others, which compute that output without the MLP

Attention, norms and embeddings are the model's own. Position 0 keeps its own MLP output: it is never a row, so no
transcoder has learned it. The last two are no replacement that can generate or be attributed.
"""

from enum import StrEnum

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.core.normalize import MlpNorm
from pipeline.core.sparse import Pattern, Sparse
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError


class Basis(StrEnum):
    """Where the features of a replacement come from."""

    live = "live"
    teacher_forced = "teacher_forced"
    runs_the_mlp = "runs the MLP"


NOTES = {
    Basis.teacher_forced: "features are those of the original model's activations at all layers; not comparable with "
    "live replacement, where errors feed on",
    Basis.runs_the_mlp: "the MLP runs and its output is reconstructed; not comparable with transcoders, which stand in "
    "for the MLP itself",
}
"""What `metrics.json` says beside a replacement that is not live."""


def basis(transcoder: Transcoder) -> Basis | None:
    """How this transcoder can take the MLPs' place. None: it reconstructs something else than MLP outputs."""
    options = transcoder.options
    if options.writes != Site.mlp_out:
        return None
    if not transcoder.causal:
        return Basis.teacher_forced
    return Basis.runs_the_mlp if options.target == Target.site else Basis.live


def no_basis(options: ArchOptions) -> str:
    """Why there is no replacement."""
    return f"arch={options.name} reconstructs {options.writes}, not the MLPs' outputs, so nothing can take their place"


def replacement(lm: LanguageModel, transcoder: Transcoder) -> "ReplacementModel | TeacherForced":
    """The model with its MLPs replaced, as `basis` says. UserError where there is no basis."""
    found = basis(transcoder)
    if found is None:
        raise UserError(f"{no_basis(transcoder.options)}; train with arch.target=mlp_out or arch.site=mlp_out")
    kind = TeacherForced if found == Basis.teacher_forced else ReplacementModel
    return kind(lm, transcoder, transcoder.options.site)


class ReplacementModel:
    """`transcoder` in the model's units, with a rule that can run live (one layer of one token at a time)."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, site: Site) -> None:
        _check(lm, transcoder)
        if not transcoder.causal:
            raise UserError(
                f"arch={transcoder.options.name} reads all layers at once, so it cannot run live; use a causal arch="
            )
        self.lm, self.transcoder, self.site = lm, transcoder, site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n, T] -> [n, T, V]"""
        chosen: list[tuple[Pattern, Tensor]] = []

        def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            x = _read(self.site, self.norm, layer, resid, own).flatten(0, 1)
            chosen.append(self.transcoder.layer_features(x, layer))
            so_far = Sparse([pattern for pattern, _ in chosen], [values for _, values in chosen])
            y_hat = self.transcoder.decode_layer(so_far, layer, x).view(own.shape).to(own.dtype)
            return keep_position_0(own, y_hat)

        return self.lm.logits(tokens, mlp)


class TeacherForced:
    """Reconstructions from the original model's activations at all layers, put in place of all its MLP outputs."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, site: Site) -> None:
        _check(lm, transcoder)
        self.lm, self.transcoder, self.site = lm, transcoder, site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n, T] -> [n, T, V]"""
        read: list[Tensor] = []

        def collect(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            read.append(_read(self.site, self.norm, layer, resid, own).flatten(0, 1))
            return own

        self.lm.logits(tokens, collect)
        y_hat = self.transcoder(torch.stack(read, dim=1)).y_hat

        def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            return keep_position_0(own, y_hat[:, layer].view(own.shape).to(own.dtype))

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


def _check(lm: LanguageModel, transcoder: Transcoder) -> None:
    if (lm.n_layers, lm.d_model) != tuple(transcoder.dims):
        raise UserError(
            f"the transcoder has (n_layers, d_model) = {tuple(transcoder.dims)}, the model {lm.name} "
            f"({lm.n_layers}, {lm.d_model}); give the model that it was trained on"
        )
    if not transcoder.activation.per_token:
        raise UserError("this activation looks at other tokens, so it cannot run live; use the fixed thresholds")


def _read(site: Site, norm: MlpNorm, layer: int, resid: Tensor, own: Tensor) -> Tensor:
    """What the transcoder reads at a layer, [n, T, D], from the residual stream and the MLP's own output there."""
    if site == Site.mlp_out:
        return own.float()
    return norm.layer(resid, layer) if site == Site.mlp_in else resid.float()
