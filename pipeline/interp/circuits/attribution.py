"""Attribution graphs by exact linear effects (Ameisen et al. 2025, "Circuit Tracing", Transformer Circuits).

With attention patterns and norm denominators held at the prompt's, and what each MLP writes split into what the
transcoder's features write, its bias and an error, the pre-activation h of a feature is a sum:

    h = sum of features  a_s sum_m W_dec[s -> m] . g^m[p_s]      g^m[p]: gradient of h by layer m's MLP output at p
      + sum of errors    error^m[p] . g^m[p]
      + tokens, positions  embedding[p] . g^emb[p]
      + position 0       mlp_out^m[0] . g^m[0]
      + biases           of each layer, from a forward pass with nothing but them

and so is a logit. Each term is an edge; none is found as what is left over, and that the sum is h is checked at every
target. Features are read at positions 1 and later: the transcoder has not learned position 0.

1. Record the prompt (`held_prompt.py`), choose its features, decode them, and take the errors.
2. What biases add to every active feature and output: one forward pass for each layer.
3. Rows of outputs, then of features, in batches of one backward pass each. Where `max_feature_nodes` leaves some
   features out, those of most influence on the outputs come first, and the influence is computed anew from all rows so
   far every few batches, as circuit-tracer does.
4. Put the graph together; features that are no nodes are summed into a rest node of their layer and position.
"""

import copy
import logging
from dataclasses import fields

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.errors import UserError
from pipeline.interp.circuits import graph_rows, graph_targets, held_prompt
from pipeline.interp.circuits.graph import Graph
from pipeline.interp.circuits.graph_assembly import assembled
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.circuits.graph_plan import Clock, Plan, planned
from pipeline.interp.circuits.graph_rows import Rows
from pipeline.interp.circuits.held_prompt import Backward
from pipeline.interp.replacement import ReplacementModel
from pipeline.plain import to_plain
from pipeline.progress import Progress

logger = logging.getLogger(__name__)


def trace(model: ReplacementModel, tokens: Tensor, options: GraphOptions | None = None) -> Graph:
    """The attribution graph of one prompt, int64 [1, T] (`model.tokens`), on the CPU.

    Raises UserError for settings that mean nothing, a transcoder that is not linear in its features, a model whose
    gates cannot be held, several prompts or one of a single token, and for what does not fit into `memory_gb`."""
    options, clock = options or GraphOptions(), Clock()
    check(model, tokens, options)
    model = in_dtype(model, getattr(torch, options.dtype))
    with torch.no_grad():
        prompt = held_prompt.recorded(model, tokens)
        outputs = graph_targets.outputs(model, prompt, options)
        found = graph_rows.decoded(model, prompt)
        clock("record")
        plan = planned(model, prompt, found, outputs, options)
        logger.info("%s", plan)
        rows = Rows(model, prompt, found, outputs, plan.keep_bytes)
        clock("biases")
    with Backward(model, prompt, plan.batch) as backward, torch.no_grad():
        targets, edges = made(rows, backward, plan, options)
    clock("rows")
    graph = assembled(rows, targets, edges)
    clock("assemble")
    graph.texts = [model.lm.tokenizer.decode([token]) for token in graph.tokens.tolist()]
    graph.meta |= {"model": model.lm.name, "prompt": model.lm.tokenizer.decode(graph.tokens.tolist())}
    plain = to_plain(options)  # a command may have more
    settings = {field.name: plain[field.name] for field in fields(GraphOptions)}
    graph.meta |= {"settings": settings, "labels": outputs.labels, "seconds": clock.seconds}
    return graph


def check(model: ReplacementModel, tokens: Tensor, options: GraphOptions) -> None:
    """Raises UserError where no graph can be made."""
    graph_targets.check(options)
    check_linear(model.transcoder)
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise UserError(f"the tokens are {list(tokens.shape)}; trace one prompt at a time, [1, T]")
    if tokens.shape[1] < 2:
        raise UserError("the prompt is one token, at position 0, where nothing is traced; give a longer one")


def check_linear(transcoder: Transcoder) -> None:
    """Raises UserError for a transcoder whose graph would not be exact."""
    options = transcoder.options
    why = {
        "molt": "its features switch maps of the input on, so that what they write is bilinear",
        "sae": "it reads what the MLPs write, so that the MLPs stay between its features",
        "crosscoder": "it reads all layers at once, so that no feature comes before another",
    }.get(options.name)
    if why is None and (options.site == Site.mlp_out or options.writes != Site.mlp_out):
        why = "it does not stand in for the MLPs"
    if why is None and not transcoder.linear:
        why = "a feature writes its offset as soon as it is active, which is not linear (arch.offset)"
    if why is not None:
        raise UserError(f"arch={options.name} has no attribution graph: {why}; use arch=clt, per_layer, skip, tied")


def in_dtype(model: ReplacementModel, dtype: torch.dtype) -> ReplacementModel:
    """The same model and transcoder in another dtype: copies, unless they have it."""
    if model.lm.dtype == dtype and model.transcoder.b_enc.dtype == dtype:
        return model
    other = copy.copy(model)
    other.lm = copy.deepcopy(model.lm)
    other.lm.weights.to(dtype)
    if dtype == torch.float64:
        # The fused products of a mixture of experts know no float64; models without experts do not mind.
        other.lm.weights.set_experts_implementation("eager")
    other.lm.dtype = dtype
    other.norm = other.lm.mlp_norm(dtype).to(str(other.lm.device))
    other.transcoder = copy.deepcopy(model.transcoder).to(dtype)
    return other


def made(rows: Rows, backward: Backward, plan: Plan, options: GraphOptions) -> tuple[Tensor, Tensor]:
    """What became a target, features by their number and outputs as -1 [n + k], and the rows [n + k, C]."""
    n, k = rows.active.n, len(rows.outputs.ids)
    edges = rows.error.new_zeros(plan.n_features + k, len(rows.columns.kind))
    owners = torch.full((len(edges),), -1)
    weights = edges.new_zeros(len(edges))
    weights[:k] = rows.outputs.probabilities
    done = 0
    with Progress(len(edges), unit="row", desc="graph") as progress:

        def take(targets: Tensor) -> None:
            nonlocal done
            for batch in graph_rows.batches(targets, plan.batch):
                edges[done : done + len(batch)] = rows.make(backward, batch.to(rows.error.device))
                owners[done : done + len(batch)] = torch.where(batch < n, batch, -1)
                done += len(batch)
                progress.update(len(batch))

        take(torch.arange(n, n + k))
        if plan.n_features == n:
            take(torch.arange(n))
        while done < len(edges):
            scores = graph_rows.influence(edges[:done], owners[:done], weights[:done], n)
            scores[owners[k:done]] = -1.0
            more = min(options.update_every * plan.batch, len(edges) - done)
            take(scores.topk(more).indices.sort().values.cpu())
    return owners, edges
