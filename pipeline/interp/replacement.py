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

With `layers`, only these are replaced (counted from 0 at the first layer that the transcoder reads); the MLPs of the
others run on the stream as it is. The reconstruction of a replaced layer m is the whole one: it has the features of
all layers <= m, of those that are not replaced too, live ones from the live stream there, teacher-forced ones from the
original's. What those features write to a layer that is not replaced goes nowhere. So `layers=[m]` is the same live
and teacher-forced: nothing below m has changed.

With `keep_error`, what the transcoder misses on the original's activations, error = mlp_out - y_hat, is added to each
reconstruction as a constant: where nothing is changed, the logits are the original's. It is added as

    mlp_out + (y_hat live - y_hat at the original's activations)

whose second term is then exactly 0, so that no rounding can push a feature over its threshold.
"""

from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.core.normalize import MlpNorm
from pipeline.core.sparse import Pattern, Sparse, from_pairs
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp.original import Original, Prompt, prompt_tokens, read_original, read_site, wide

if TYPE_CHECKING:
    from transformers import DynamicCache


Choice = Callable[[int, Pattern, Tensor], tuple[Pattern, Tensor]]
"""(layer, pattern over n T tokens, values [nnz]) -> the features that take their place."""


class Reads(Protocol):
    """What a transcoder in the MLPs' place needs to know."""

    transcoder: Transcoder
    site: Site
    norm: MlpNorm


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


class Past(NamedTuple):
    """What a replacement keeps of the tokens that it has seen, for those that follow them."""

    replaced: "DynamicCache"
    original: "DynamicCache"
    """Used with keep_error, whose terms are those of the original on the same tokens."""


class Replaced(NamedTuple):
    """A prompt under the replacement and under the original. Made without gradient."""

    tokens: Tensor
    """int64 [n, T]"""
    logits: Tensor
    """[n, T, V] of the replacement."""
    original_logits: Tensor
    """[n, T, V]"""
    features: Sparse
    """Of each source, B = n T tokens in order; none at position 0, which is no row. `dense()` has their axes."""
    y_hat: Tensor
    """[n, T, L, D], float32: the reconstruction of every layer in the replacement, of layers that are not replaced too,
    without error terms. Position 0: the MLP's own output."""
    mlp_out: Tensor
    """[n, T, L, D], float32: what the original's MLPs write."""
    error: Tensor
    """[n, T, L, D], float32: mlp_out minus the reconstruction at the original's activations; 0 at position 0.
    The logits hold it with keep_error alone."""

    def dense(self) -> Tensor:
        """The features, [n, T, S, F]."""
        return self.features.dense().unflatten(0, tuple(self.tokens.shape))


class ReplacementModel:
    """`transcoder` in the model's units, with a rule that can run live (one layer of one token at a time)."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, site: Site) -> None:
        """UserError for a transcoder of other sizes, an acausal one, and a rule that looks at other tokens."""
        _check(lm, transcoder)
        if not transcoder.causal:
            raise UserError(
                f"arch={transcoder.options.name} reads all layers at once, so it cannot run live; use a causal arch="
            )
        self.lm, self.transcoder, self.site = lm, transcoder, site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))
        self.bos_token_id: int | None = lm.tokenizer.bos_token_id
        """What stands in front of a text, as in the contexts that the transcoder was trained on; None: nothing."""

    @torch.inference_mode()
    def run(self, prompt: Prompt, keep_error: bool = False, layers: Collection[int] | None = None) -> Replaced:
        """Everything that a prompt gives: logits, features, reconstructions and errors. See `tokens` for what a prompt
        is, and the top of this file for `layers` (null: all) and `keep_error`.

        Raises UserError for a layer that there is not and for what `tokens` refuses."""
        tokens = self.tokens(prompt)
        original = self.original(tokens)
        at_original = self.at_original(original).y_hat
        kept = [*zip(original.mlp_out, at_original, strict=True)] if keep_error else None
        live = Live(self, _chosen(layers, self.lm.n_layers), kept, everything=True)
        logits = self.lm.logits(tokens, live)
        mlp_out = torch.stack(original.mlp_out, dim=2).float()
        return Replaced(
            tokens.to(logits.device),
            logits,
            original.logits,
            _without_position_0(live.features, tokens.shape[1]),
            torch.stack(live.y_hat, dim=2),
            mlp_out,
            mlp_out - torch.stack(at_original, dim=2),
        )

    @torch.inference_mode()
    def logits(
        self,
        tokens: Tensor,
        layers: Collection[int] | None = None,
        keep_error: bool = False,
        past: Past | None = None,
        last: bool = False,
    ) -> Tensor:
        """tokens int64 [n, T] -> [n, T, V]; last: [n, 1, V], the last position's. `past` (`new_past`): these tokens
        follow those that it has seen, and join them. Raises UserError for a layer that there is not, for tokens behind
        the model's last position, and for keep_error where the past has been without."""
        kept, n_past = None, past.replaced.get_seq_length() if past else 0
        first = n_past == 0
        if n_past + tokens.shape[1] > self.lm.n_context:
            n = n_past + tokens.shape[1]
            raise UserError(f"{n} tokens in all, model={self.lm.name} has {self.lm.n_context} positions; take fewer")
        if keep_error and past and past.original.get_seq_length() != n_past:
            raise UserError("the errors of the past were not kept; give keep_error from its first token on")
        if keep_error:
            original = self.original(tokens, past)
            kept = [*zip(original.mlp_out, self.at_original(original, first).y_hat, strict=True)]
        live = Live(self, _chosen(layers, self.lm.n_layers), kept, first=first)
        # Error terms cancel exactly where each position 0 was computed in the same way.
        unread = live.unread() if past is None and kept is None else ()
        return self.lm.logits(tokens, live, past.replaced if past else None, unread, last)

    def new_past(self) -> Past:
        """Empty."""
        return Past(self.lm.new_past(), self.lm.new_past())

    def tokens(self, prompt: Prompt) -> Tensor:
        """int64 [n, T]. A text is tokenised as in extraction, behind the token that begins a context; ids are taken as
        they are. Raises UserError for no token at all, texts of unequally many tokens, ids that the model does not
        have, and more tokens than it has positions."""
        return prompt_tokens(self.lm, self.bos_token_id, prompt)

    def original(self, tokens: Tensor, past: Past | None = None) -> Original:
        """The model itself on tokens int64 [n, T]. -> what it computes there"""
        return read_original(self.lm, self.site, self.norm, tokens, past.original if past else None)

    @torch.inference_mode()
    def at_original(self, original: Original, first: bool = True) -> "Live":
        """Features and reconstructions of every layer at the original's activations, computed as live ones are. first:
        the tokens begin a context."""
        live = Live(self, range(0), first=first, everything=True)
        for layer, (x, own) in enumerate(zip(original.x, original.mlp_out, strict=True)):
            live.reconstruct(layer, x, own)
        return live


class Live:
    """What takes the place of each MLP in one forward pass (`ReplaceMlp`), and what it was made of."""

    def __init__(
        self,
        model: Reads,
        layers: Collection[int],
        kept: list[tuple[Tensor, Tensor]] | None = None,
        first: bool = True,
        everything: bool = False,
        known: Sequence[tuple[Pattern, Tensor]] = (),
        choose: Choice | None = None,
    ) -> None:
        """kept: for each layer the original's mlp_out and y_hat [n, T, D], for error terms. first: the tokens begin a
        context. everything: compute what no replaced layer needs too. known: the features of the first layers, where
        they were computed before. choose: what each layer's features are edited by, whose result is decoded."""
        self.model, self.layers, self.kept, self.first, self.everything = model, layers, kept, first, everything
        self.choose = choose
        self.last = max(layers, default=-1)
        self.features: list[tuple[Pattern, Tensor]] = list(known)
        self.y_hat: list[Tensor] = []
        """float32 [n, T, D] of each layer, with `everything`."""

    def __call__(self, layer: int, resid: Tensor, own: Tensor) -> Tensor:
        if layer > self.last and not self.everything:
            return own
        x = read_site(self.model.site, self.model.norm, layer, resid, own)
        y_hat = self.reconstruct(layer, x, own)
        if y_hat is None or layer not in self.layers:
            return own
        if self.kept is None:
            return y_hat.to(own.dtype)
        mlp_out, at_original = self.kept[layer]
        return (wide(mlp_out) + (y_hat - at_original)).to(own.dtype)

    def unread(self) -> Collection[int]:
        """The layers whose MLPs need not run, but at position 0 (`LanguageModel.logits`)."""
        return () if self.model.site == Site.mlp_out else self.layers

    def reconstruct(self, layer: int, x: Tensor, own: Tensor) -> Tensor | None:
        """Choose the layer's features, x [n, T, D], and decode those of all layers so far: y_hat [n, T, D] in float32,
        or None where nobody asks for it."""
        transcoder, shape, x = self.model.transcoder, x.shape, x.flatten(0, 1)
        if layer >= len(self.features):
            found = transcoder.layer_features(x, layer)
            self.features.append(self.choose(layer, *found) if self.choose else found)
        if layer not in self.layers and not self.everything:
            return None
        y_hat = transcoder.decode_layer(sparse(self.features[: layer + 1]), layer, x)
        y_hat = wide(y_hat).view(shape)
        y_hat = keep_position_0(wide(own), y_hat) if self.first else y_hat
        if self.everything:
            self.y_hat.append(y_hat)
        return y_hat


class TeacherForced:
    """Reconstructions from the original model's activations at all layers, put in place of its MLP outputs."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, site: Site) -> None:
        _check(lm, transcoder)
        self.lm, self.transcoder, self.site = lm, transcoder, site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))

    @torch.inference_mode()
    def logits(self, tokens: Tensor, layers: Collection[int] | None = None, last: bool = False) -> Tensor:
        """tokens int64 [n, T] -> [n, T, V]; last: [n, 1, V], the last position's. Raises UserError for a layer that
        there is not."""
        original = read_original(self.lm, self.site, self.norm, tokens)
        return put_back(self.lm, self.y_hat(original), tokens, layers, last)

    @torch.inference_mode()
    def y_hat(self, original: Original) -> Tensor:
        """The reconstructions [n, T, L, D] of what the original computed."""
        x = torch.stack([layer.flatten(0, 1) for layer in original.x], dim=1)
        return self.transcoder(x).y_hat.unflatten(0, original.x[0].shape[:2])


@torch.inference_mode()
def put_back(
    lm: LanguageModel, y_hat: Tensor, tokens: Tensor, layers: Collection[int] | None = None, last: bool = False
) -> Tensor:
    """The model with y_hat [n, T, L, D] in place of the MLP outputs of these layers (null: all). -> [n, T, V]; last:
    [n, 1, V]"""
    replaced = _chosen(layers, lm.n_layers)

    def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        return keep_position_0(own, y_hat[:, :, layer].to(own.dtype)) if layer in replaced else own

    return lm.logits(tokens, mlp, own_at_0=replaced, last=last)


@torch.inference_mode()
def ablated_logits(lm: LanguageModel, output: Tensor, tokens: Tensor) -> Tensor:
    """The model with every MLP's output replaced by a constant: zeros, or the mean. output [L, D] -> [n, T, V]"""

    def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        return keep_position_0(own, output[layer].to(own).expand_as(resid))

    return lm.logits(tokens, mlp, own_at_0=range(lm.n_layers))


def keep_position_0(own: Tensor, replaced: Tensor) -> Tensor:
    """[n, T, D], [n, T, D] -> [n, T, D]"""
    return torch.cat([own[:, :1], replaced[:, 1:]], dim=1)


def sparse(features: Sequence[tuple[Pattern, Tensor]]) -> Sparse:
    """Layer by layer -> all of them."""
    return Sparse([pattern for pattern, _ in features], [values for _, values in features])


def _check(lm: LanguageModel, transcoder: Transcoder) -> None:
    if (lm.n_layers, lm.d_model) != tuple(transcoder.dims):
        raise UserError(
            f"the transcoder has (n_layers, d_model) = {tuple(transcoder.dims)}, the model {lm.name} "
            f"({lm.n_layers}, {lm.d_model}); give the model that it was trained on"
        )
    if not transcoder.activation.per_token:
        raise UserError("this activation looks at other tokens, so it cannot run live; use the fixed thresholds")


def _chosen(layers: Collection[int] | None, n_layers: int) -> Collection[int]:
    if layers is None:
        return range(n_layers)
    wrong = sorted(layer for layer in layers if layer not in range(n_layers))
    if wrong:
        raise UserError(f"layers={wrong}: the transcoder's layers are 0 to {n_layers - 1}; name those to replace")
    return frozenset(layers)


def _without_position_0(features: Sequence[tuple[Pattern, Tensor]], context: int) -> Sparse:
    cut = []
    for pattern, values in features:
        rows = pattern.tokens % context != 0
        kept = from_pairs(pattern.tokens[rows], pattern.indices[rows], pattern.n_tokens, pattern.n_features)
        cut.append((kept, values[rows]))
    return sparse(cut)
