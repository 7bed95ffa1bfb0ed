"""What ranks that share the tokens say of their gradients, on paper. The choice between terms and tables, and the bytes
of each, are `dist/gradient_plan.py`'s own; here is what it is handed where no gradient exists.

A table that is read as it is stored has a term for each part of a step: of source l the pattern of its active pairs,
which its encoder and decoders share; weights, one tensor for the encoder and one for all decoders; rows, what the
source reads, and for each target what its reconstruction is taught. All else has a gradient as large as itself. So has
a table beside its terms where AuxK revives dead features; of that only their rows are summed.
"""

from collections.abc import Iterator, Sequence

from torch.nn import Parameter

from pipeline.arch.base import Transcoder
from pipeline.dist import gradient_plan, gradients
from pipeline.dist.gradient_plan import HEADER, Held, Key, Whole
from pipeline.dist.plan import WIDE, Axis, Talk
from pipeline.dist.wire import Op

LEAVES = {"clt", "per_layer", "sae", "skip"}
"""Architectures whose decoders are read as they are stored, so that gradients can be kept as terms."""

INT32 = 4


def held(model: Transcoder, tokens: int, pairs: Sequence[Sequence[int]], revives: Sequence[int] = ()) -> Held:
    """The gradients of a rank after a sparse step. tokens: its own in a part; pairs: active ones of each source, for
    each part; revives: the dead features of each source, where AuxK is at work. Of the model shapes and dtypes alone
    are read: terms are of the dtype of the tables."""
    terms: dict[Parameter, list[tuple[int, int, int]]] = {}
    sizes: dict[Key, int] = {}
    n_sources, n_layers, item = model.n_sources, model.dims.n_layers, model.encoders[0].element_size()
    for part, active in enumerate(pairs):
        for source in range(n_sources):
            pattern = part * n_sources + source
            encoder, decoder = 2 * pattern, 2 * pattern + 1
            read = part * 2 * n_layers + source
            sizes["indices", pattern] = INT32 * active[source]
            sizes["counts", pattern] = INT32 * tokens
            sizes["weights", encoder] = sizes["weights", decoder] = item * active[source]
            sizes["rows", read] = item * tokens * model.width()
            terms.setdefault(model.encoders[source], []).append((pattern, encoder, read))
            for target, table in zip(model.targets(source), model.tables(source), strict=True):
                written = (part * 2 + 1) * n_layers + target
                sizes["rows", written] = item * tokens * model.dims.d_model
                assert isinstance(table, Parameter)
                terms.setdefault(table, []).append((pattern, decoder, written))
    parameters, beside = learned(model), {parameter for parameter, _ in _revived(model, revives)}
    return Held(
        [parameter not in terms or parameter in beside for parameter in parameters],
        [terms.get(parameter, []) for parameter in parameters],
        {key: sizes[key] for key in sorted(sizes, key=gradient_plan.order)},
    )


def whole(model: Transcoder, revives: Sequence[int] = ()) -> list[Whole]:
    """Its parameters. revives: as for `held`, of the ranks together."""
    parameters, rows = learned(model), dict(_revived(model, revives))
    return gradients.whole(parameters, {p: rows[one] for p, one in enumerate(parameters) if one in rows})


def _revived(model: Transcoder, revives: Sequence[int]) -> Iterator[tuple[Parameter, int]]:
    for source, n in enumerate(revives):
        for table in (model.encoders[source], *model.tables(source)) if n else ():
            assert isinstance(table, Parameter)
            yield table, n


def dense(model: Transcoder) -> Held:
    """The same where every gradient is as large as its parameter."""
    n = len(learned(model))
    return Held([True] * n, [[] for _ in range(n)], {})


def learned(model: Transcoder) -> list[Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def talks(of_ranks: Sequence[Held], whole: Sequence[Whole]) -> Iterator[Talk]:
    """Of a step, by what each data rank has. The ranks have to have the same structure, or a list of it goes round."""
    plan = gradient_plan.decided(of_ranks, whole)
    yield Talk("gradient sizes", Axis.data, Op.gather, WIDE * HEADER)
    if n_sizes := max(len(one.sizes) for one in of_ranks):
        yield Talk("gradient sizes", Axis.data, Op.gather, WIDE * n_sizes)
    structures = [one.structure() for one in of_ranks]
    if any(one != structures[0] for one in structures):
        yield Talk("gradient sizes", Axis.data, Op.gather, WIDE * max(map(len, structures)))
    if both := gradient_plan.beside(of_ranks):
        yield Talk("gradient rows", Axis.data, Op.reduce, sum(whole[p].n_rows for p in both))
    for call in plan.gathers:
        longest = max(sum(plan.sizes[i][rank] for i in call) for rank in range(len(of_ranks)))
        yield Talk("gradient terms", Axis.data, Op.gather, longest)
    by_rows = set(plan.as_terms)
    for call in plan.sums:
        n = sum(whole[p].beside_bytes if p in by_rows else whole[p].nbytes for p in call)
        yield Talk("gradients", Axis.data, Op.reduce, n)
