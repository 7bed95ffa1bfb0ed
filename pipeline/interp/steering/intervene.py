"""What happens when features are edited: one forward pass for many interventions side by side.

Without an edit ("before"), layer m's MLP writes out^m and its reconstruction is y_hat^m, of features a. In the edited
pass each layer m reads the stream as it is there, x~, which gives features a'(x~); what they count as, c, and what the
edits make of that, a~ = edit(c):

    open          c = a'(x~)                               later features respond
    gates         c = W_enc x~ + b_enc where a > 0, else 0  they respond behind the gates that were open before
    constrained   c = a                                     they hold their values: edits act through decoders alone

and the MLP's output becomes

    model=original, open      own(x~) + decode(a~) - decode(c)    the MLP itself responds, and the change is added
    everything else           out^m + decode(a~) - y_hat^m        so errors out - y_hat are kept as constants

With model=replacement and without errors, out = y_hat. decode(a~) at layer m is of the features of all layers <= m; a
skip path and the maps of MOLT read x~ in each case. Where nothing is edited nothing changes, to the bit on a CPU but
for sums over batches of other sizes. Position 0 keeps its own MLP output and has no features.

In model=original with open layers an MLP of a later layer may respond to a change of the stream that the edited feature
already writes there through its own decoder: both are added. `constrained` has no such overlap.

Frozen attention and norms are those of the pass without edits. MLPs of layers that the transcoder does not read run
with open layers, and write what they wrote before with others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.arch.options import Site
from pipeline.core.pattern import Pattern
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp.circuits import frozen
from pipeline.interp.circuits.frozen import Gates
from pipeline.interp.original import Prompt, read_site, wide
from pipeline.interp.replacement import Live, Past, ReplacementModel, keep_position_0, sparse
from pipeline.interp.steering.feature_edits import Compiled, Edit, Values
from pipeline.interp.steering.intervene_options import Hold, InterveneOptions, Model, Response

if TYPE_CHECKING:
    from transformers import DynamicCache

Read = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, resid [n, T, D], the MLP's own output) -> what the transcoder reads."""


class Before(NamedTuple):
    """The pass without edits, of contexts [n, T]."""

    logits: Tensor
    """[n, T, V]"""
    features: list[Values]
    """Of each layer, over n T tokens; at position 0 they are read and used by nothing."""
    y_hat: list[Tensor]
    """L times [n, T, D], at least float32."""
    outputs: list[Tensor]
    """What each MLP writes: its own output, or y_hat in a replacement without errors."""
    others: dict[int, Tensor]
    """By layer of the base model [n, T, D]: what the MLPs write that the transcoder does not read."""

    def tiled(self, n: int) -> "Before":
        """n copies of one context, side by side; the logits stay one."""
        features = [(_joined([pattern] * n), values.repeat(n)) for pattern, values in self.features]
        y_hat, outputs = ([layer.expand(n, -1, -1) for layer in one] for one in (self.y_hat, self.outputs))
        return Before(self.logits, features, y_hat, outputs, self.others)


class Intervened(NamedTuple):
    """Interventions on one prompt, and the pass without them."""

    tokens: Tensor
    """int64 [1, T]"""
    interventions: Sequence[Sequence[Edit]]
    """n lists of edits."""
    before: Before
    logits: Tensor
    """[n, T, V]"""
    read: list[Values]
    """What each layer's features are in the edited stream, before they are edited themselves; over n T tokens."""
    edited: list[Values]
    """What is decoded."""


class Edited:
    """What takes the place of each MLP's output in one edited pass (`ReplaceMlp`)."""

    def __init__(
        self,
        model: ReplacementModel,
        before: Before,
        edits: Compiled,
        options: InterveneOptions,
        first: bool = True,
        read: Read | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        respond: Sequence[Tensor] | None = None,
    ) -> None:
        """first: the tokens begin a context. read: in place of the live norm. watch: is shown what each layer reads.
        respond: for layers=gates, which of the features of each layer before do; bool [nnz]."""
        self.model, self.before, self.edits, self.options, self.first = model, before, edits, options, first
        self.read_input = read or (lambda layer, resid, own: read_site(model.site, model.norm, layer, resid, own))
        self.watch, self.respond = watch, respond
        self.read: list[Values] = []
        self.counted: list[Values] = []
        self.edited: list[Values] = []

    def __call__(self, layer: int, resid: Tensor, own: Tensor) -> Tensor:
        x = self.read_input(layer, resid, own)
        if self.watch is not None:
            self.watch(layer, x)
        flat = x.flatten(0, 1)
        self.read.append(self.model.transcoder.layer_features(flat, layer))
        self.counted.append(self._counted(layer, flat))
        self.edited.append(self.edits.apply(layer, *self.counted[-1]))
        y_hat = self._decode(self.edited, layer, flat, own.shape)
        if self.options.model == Model.original and self._response(layer) == Response.open:
            if all(edited is counted for edited, counted in zip(self.edited, self.counted, strict=True)):
                return own
            out = wide(own) + (y_hat - self._decode(self.counted, layer, flat, own.shape))
        else:
            out = wide(self.before.outputs[layer]) + (y_hat - self.before.y_hat[layer])
        return keep_position_0(own, out.to(own.dtype)) if self.first else out.to(own.dtype)

    def logits(
        self, tokens: Tensor, past: "DynamicCache | None" = None, hold_others: bool = False, last: bool = False
    ) -> Tensor:
        """The edited pass. tokens int64 [n, T] -> [n, T, V]; last: [n, 1, V], the last position's. hold_others: the
        MLPs that the transcoder does not read write what they wrote before, with open layers too."""
        holds = hold_others or (self.options.layers != Response.open and self.options.until is None)
        with _others(self.model.lm, self.before.others) if holds else nullcontext():
            return self.model.lm.logits(tokens, self, past, last=last)

    def _response(self, layer: int) -> Response:
        until = self.options.until
        return self.options.layers if until is None or layer <= until else Response.open

    def _counted(self, layer: int, x: Tensor) -> Values:
        """What the layer's features count as, x [n T, D]."""
        pattern, values = self.before.features[layer]
        match self._response(layer):
            case Response.open:
                return self.read[layer]
            case Response.constrained:
                return pattern, values
            case Response.gates:
                pre_acts = self.model.transcoder.encode_layer(x, layer)
                found = pre_acts[pattern.tokens, pattern.indices]
                return pattern, found if self.respond is None else found.where(self.respond[layer], values)

    def _decode(self, features: list[Values], layer: int, x: Tensor, shape: torch.Size) -> Tensor:
        return wide(self.model.transcoder.decode_layer(sparse(features), layer, x)).view(shape)


@torch.inference_mode()
def intervene(
    model: ReplacementModel,
    prompt: Prompt,
    interventions: Sequence[Sequence[Edit]],
    options: InterveneOptions | None = None,
) -> Intervened:
    """Make each of n interventions, a list of edits, on one prompt. UserError for a prompt that
    `ReplacementModel.tokens` refuses or that is several, and for options that mean nothing."""
    options = options or InterveneOptions()
    check(options, model.lm.n_layers)
    tokens = model.tokens(prompt)
    if tokens.shape[0] != 1:
        raise UserError(f"{tokens.shape[0]} prompts; intervene on one at a time")
    before, gates = recorded(model, tokens, options)
    passes = [
        edited(model, tokens, before, some, options, gates) for some in batches(interventions, tokens.shape[1], options)
    ]
    return Intervened(
        tokens,
        interventions,
        before,
        torch.cat([logits for logits, _ in passes]),
        [concatenated([made.read[layer] for _, made in passes]) for layer in range(model.lm.n_layers)],
        [concatenated([made.edited[layer] for _, made in passes]) for layer in range(model.lm.n_layers)],
    )


def check(options: InterveneOptions, n_layers: int) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded where n_layers is huge."""
    if options.until is not None and options.layers == Response.open:
        raise UserError(
            f"intervene.until={options.until} says how far layers are held; add intervene.layers=constrained"
        )
    if options.until is not None and options.until not in range(n_layers):
        raise UserError(f"intervene.until={options.until}: layers are 0 to {n_layers - 1}; name the last held one")
    if options.model == Model.original and not options.keep_error:
        raise UserError(
            "intervene.keep_error=false leaves errors out of a replacement; add intervene.model=replacement"
        )
    if options.top < 1 or options.n_tokens < 0 or options.batch_tokens < 1:
        raise UserError("intervene.top and batch_tokens are at least 1, n_tokens at least 0; give such numbers")
    if options.n_tokens and Hold.frozen in (options.attention, options.norms):
        raise UserError(
            "intervene.n_tokens: generated tokens are in no unedited text whose attention or norms could be frozen; "
            "use intervene.attention=live intervene.norms=live"
        )


def batches(
    interventions: Sequence[Sequence[Edit]], length: int, options: InterveneOptions
) -> Iterator[Sequence[Sequence[Edit]]]:
    """As many at a time as batch_tokens allows."""
    size = max(1, options.batch_tokens // length)
    return (interventions[start : start + size] for start in range(0, len(interventions), size))


@torch.inference_mode()
def unedited(model: ReplacementModel, tokens: Tensor, options: InterveneOptions, past: Past | None = None) -> Before:
    """The pass without edits. tokens int64 [n, T]; `past` (`model.new_past()`): they follow those that it has seen, and
    join them."""
    first = past is None or past.original.get_seq_length() == 0
    with _others(model.lm) as others:
        if options.model == Model.original or options.keep_error:
            original = model.original(tokens, past)
            live = model.at_original(original, first)
            return Before(original.logits, live.features, live.y_hat, original.mlp_out, others)
        live = Live(model, range(model.lm.n_layers), first=first, everything=True)
        logits = model.lm.logits(tokens, live, past.original if past else None)
        return Before(logits, live.features, live.y_hat, live.y_hat, others)


@contextmanager
def _others(lm: LanguageModel, held: dict[int, Tensor] | None = None) -> Iterator[dict[int, Tensor]]:
    """What runs inside leaves what the MLPs write that are not read; with `held` they write that."""
    found: dict[int, Tensor] = {}

    def see(module: nn.Module, inputs: object, output: Tensor, layer: int) -> Tensor | None:
        found[layer] = output
        return None if held is None else held[layer].expand_as(output)

    with ExitStack() as hooks:
        for layer in set(range(lm.n_base_layers)) - set(lm.layers):
            hooks.enter_context(lm.modules(layer)[1].register_forward_hook(partial(see, layer=layer)))
        yield found


def recorded(model: ReplacementModel, tokens: Tensor, options: InterveneOptions) -> tuple[Before, Gates | None]:
    """`unedited`, and what of it is to be held; None where nothing is. UserError as `frozen.recording`."""
    if Hold.frozen not in (options.attention, options.norms):
        return unedited(model, tokens, options), None
    with frozen.recording(model.lm) as gates:
        before = unedited(model, tokens, options)
    return before, gates


@torch.inference_mode()
def edited(
    model: ReplacementModel,
    tokens: Tensor,
    before: Before,
    edits: Sequence[Sequence[Edit]],
    options: InterveneOptions,
    gates: Gates | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    respond: Sequence[Tensor] | None = None,
    hold_others: bool = False,
    last: bool = False,
) -> tuple[Tensor, Edited]:
    """One pass with the edits of n rows; the rest as in `Edited` and its `logits`. tokens [1, T] -> (logits [n, T, V],
    what was made)"""
    n, length = len(edits), tokens.shape[1]
    compiled = Compiled(edits, length, 0, length, model.transcoder.d_features)
    attention, norms = (one == Hold.frozen for one in (options.attention, options.norms))
    read = held_read(model, gates) if gates is not None and norms else None
    answer = None if respond is None else [one.repeat(n) for one in respond]
    made = Edited(model, before.tiled(n), compiled, options, read=read, watch=watch, respond=answer)
    with ExitStack() as stack:
        if gates is not None:
            stack.enter_context(frozen.held(model.lm, gates, attention, norms))
        return made.logits(tokens.expand(n, -1), hold_others=hold_others, last=last), made


def held_read(model: ReplacementModel, gates: Gates) -> Read:
    """What the transcoder reads where the norms in front of the MLPs are held."""
    lm = model.lm
    names = {module: name for name, module in lm.weights.named_modules()}
    modules = [lm.modules(layer)[0] for layer in lm.layers]

    def read(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        if model.site != Site.mlp_in:
            return read_site(model.site, model.norm, layer, resid, own)
        norm, denominator = gates.norms[names[modules[layer]]]
        return norm.output(modules[layer], wide(resid), denominator)

    return read


def concatenated(parts: Sequence[Values]) -> Values:
    """Features of tokens that follow one another."""
    if len(parts) == 1:
        return parts[0]
    return _joined([pattern for pattern, _ in parts]), torch.cat([values for _, values in parts])


def _joined(patterns: Sequence[Pattern]) -> Pattern:
    steps = torch.cat([pattern.offsets.diff() for pattern in patterns])
    indices = torch.cat([pattern.indices for pattern in patterns])
    return Pattern(indices, torch.cat([steps.new_zeros(1), steps.cumsum(0)]), patterns[0].n_features)
