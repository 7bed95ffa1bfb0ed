"""Attribution graphs against the same effects found forwards: each source alone sent through a model written out by
hand, and taken away from the held model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import Site, Tie
from pipeline.core.activations import FixedThreshold
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp.circuits import attribution, graph_rows, graph_targets
from pipeline.interp.circuits.attribution import trace
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_options import GraphOptions, Precision
from pipeline.interp.replacement import ReplacementModel
from tests import oracle
from tests.families import D_MODEL, FAMILIES, N_LAYERS

F, T = 13, 7
SMALL = 0.0006
"""GB in which these graphs fit, and batches of 64 do not."""
DOUBLE = GraphOptions(dtype=Precision.float64)
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "clt": ("clt", {}),
    "clt with skip": ("clt", {"skip": True, "max_reach": 1}),
    "per_layer": ("per_layer", {}),
    "skip": ("skip", {}),
    "tied to source": ("tied", {"tie": Tie.source, "scale": True}),
    "tied to target": ("tied", {"tie": Tie.target, "skip": True}),
    "matryoshka": ("matryoshka", {}),
}


def opened(path: Path, **options: Any) -> LanguageModel:
    return models.load(ModelOptions(name="tiny", path=str(path), device="cpu", **options))


def random(name: str = "clt", n_layers: int = N_LAYERS, threshold: float = 0.5, **options: Any) -> Transcoder:
    """An architecture with random weights; threshold 0 is ReLU."""
    chosen = oracle.arch_options(name, d_features=F, **options)
    generator, dims = torch.Generator().manual_seed(3), Dims(n_layers, D_MODEL)
    levels = threshold * torch.rand(table.n_sources(chosen, dims), F, generator=generator)
    model = table.build(chosen, dims, FixedThreshold(levels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model.eval().requires_grad_(False)


def model_of(lm: LanguageModel, transcoder: Transcoder | None = None, site: Site = Site.resid_mid) -> ReplacementModel:
    return ReplacementModel(lm, transcoder or random(), site)


def tokens(n: int = T, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> LanguageModel:
    return opened(tiny_gpt2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_model: Callable[[str], Path]) -> LanguageModel:
    return opened(family_model(request.param))


def nodes(graph: Graph, kind: Kind) -> Iterator[tuple[int, int, int, int]]:
    """(node, layer, position, index)"""
    for i in range(graph.n_nodes)[graph.of(kind)]:
        yield i, int(graph.layer[i]), int(graph.position[i]), int(graph.index[i])


def edge(graph: Graph, source: int) -> Tensor:
    return graph.edges[graph.targets, source]


class ByHand:
    """GPT-2 with its gates held, without our code: a source's effect on all that is read, layer by layer."""

    def __init__(self, path: Path, ids: Tensor, site: Site) -> None:
        from transformers import GPT2LMHeadModel

        self.site = site
        self.hf = GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager").double().eval()
        self.mids: list[Tensor] = []
        self.mlp_out: list[Tensor] = []
        for block in self.hf.transformer.h:
            block.ln_2.register_forward_pre_hook(lambda module, args: self.mids.append(args[0][0]))
            block.mlp.register_forward_hook(lambda module, args, out: self.mlp_out.append(out[0]))
        with torch.no_grad():
            out = self.hf(ids, output_attentions=True, output_hidden_states=True)
        self.patterns = [pattern[0] for pattern in out.attentions]
        self.pres = [hidden[0] for hidden in out.hidden_states[:-1]]
        self.final = self.mids[-1] + self.mlp_out[-1]
        self.logits = out.logits[0, -1]

    def norm(self, ln: torch.nn.LayerNorm, recorded: Tensor, x: Tensor) -> Tensor:
        d = (recorded.var(dim=-1, unbiased=False, keepdim=True) + ln.eps).sqrt()
        return (x - x.mean(dim=-1, keepdim=True)) / d * ln.weight

    def send(self, x: Tensor, writes: dict[int, Tensor], biases: int | None = None) -> tuple[list[Tensor], Tensor]:
        """x [T, D]: the source at the embedding; writes: what it adds behind each MLP; biases: also those of a layer.
        -> what a transcoder reads of it at each layer [T, D], and the unembedding at the last position [D]"""
        reads, n_heads = [], self.hf.config.n_head
        for l, block in enumerate(self.hf.transformer.h):
            on = float(biases == l)
            normed = self.norm(block.ln_1, self.pres[l], x) + on * block.ln_1.bias
            value = (normed @ block.attn.c_attn.weight + on * block.attn.c_attn.bias)[:, 2 * x.shape[1] :]
            heads = value.view(len(x), n_heads, -1)
            mixed = torch.stack([self.patterns[l][h] @ heads[:, h] for h in range(n_heads)], dim=1).flatten(1)
            x = x + mixed @ block.attn.c_proj.weight + on * block.attn.c_proj.bias
            read = self.norm(block.ln_2, self.mids[l], x) + on * block.ln_2.bias
            reads.append(read if self.site == Site.mlp_in else x)
            x = x + writes.get(l, torch.zeros_like(x))
        on = float(biases == len(reads))
        return reads, (self.norm(self.hf.transformer.ln_f, self.final, x) + on * self.hf.transformer.ln_f.bias)[-1]


@pytest.mark.parametrize("threshold", [0.0, 0.5], ids=["relu", "jumprelu"])
@pytest.mark.parametrize("site", [Site.resid_mid, Site.mlp_in])
@torch.no_grad()
def test_every_edge_is_what_its_source_alone_adds(gpt2: LanguageModel, site: Site, threshold: float) -> None:
    T = 5
    clt, ids = random(threshold=threshold).double(), tokens(T)
    graph = trace(model_of(gpt2, random(threshold=threshold), site), ids, DOUBLE)
    hand = ByHand(gpt2.directory, ids, site)
    W_U = hand.hf.lm_head.weight
    rows = W_U[graph.index[graph.of(Kind.logit)]] - W_U.mean(dim=0)
    features = list(nodes(graph, Kind.feature))

    def check(source: int, x: Tensor, writes: dict[int, Tensor], biases: int | None = None) -> None:
        reads, last = hand.send(x, writes, biases)
        own = [float(l == biases) * clt.b_enc[l, f] for _, l, _, f in features]
        expected = [clt.encoders[l][f] @ reads[l][p] + b for (_, l, p, f), b in zip(features, own, strict=True)]
        torch.testing.assert_close(edge(graph, source), torch.stack([*expected, *(rows @ last)]), rtol=1e-9, atol=1e-11)

    def at(position: int, vector: Tensor) -> Tensor:
        return torch.zeros(T, D_MODEL, dtype=torch.float64).index_add_(0, torch.tensor([position]), vector[None])

    nothing = at(0, torch.zeros(D_MODEL, dtype=torch.float64))
    # What features write, put together anew: a = h above the threshold, y_hat = b_dec + sum a W_dec.
    y_hat = {l: clt.b_dec[l].repeat(T, 1) for l in range(N_LAYERS)}
    resid = hand.mids if site == Site.resid_mid else None
    for l, block in enumerate(hand.hf.transformer.h):
        read = resid[l] if resid else block.ln_2(hand.mids[l])
        h = read @ clt.encoders[l].T + clt.b_enc[l]
        a = torch.where(h > clt.activation.threshold[l], h, 0.0)
        mine = [(n, p, f) for n, layer, p, f in features if layer == l]
        assert {(p, f) for _, p, f in mine} == {(p, f) for p, f in (a > 0).nonzero().tolist() if p > 0}
        for n, p, f in mine:
            torch.testing.assert_close(graph.activation[n], a[p, f])
            torch.testing.assert_close(graph.value[n], h[p, f])
            writes = {m: at(p, a[p, f] * clt.table(l, m)[f]) for m in range(l, N_LAYERS)}
            check(n, nothing, writes)
            for m, write in writes.items():
                y_hat[m] = y_hat[m] + write
    for n, l, p, _ in nodes(graph, Kind.error):
        check(n, nothing, {l: at(p, (hand.mlp_out[l] - y_hat[l])[p])})
    for n, l, _, _ in nodes(graph, Kind.position_0):
        check(n, nothing, {l: at(0, hand.mlp_out[l][0])})
    for kind, weight, which in (
        (Kind.token, hand.hf.transformer.wte.weight, ids[0]),
        (Kind.position, hand.hf.transformer.wpe.weight, torch.arange(T)),
    ):
        for n, _, p, _ in nodes(graph, kind):
            check(n, at(p, weight[which[p]]), {})
    for n, l, _, _ in nodes(graph, Kind.bias):
        later = clt.b_dec[l].repeat(T, 1) if l < N_LAYERS else nothing
        check(n, nothing, {l: later - at(0, later[0])}, biases=l)
    torch.testing.assert_close(
        graph.value[graph.of(Kind.logit)], (hand.logits - hand.logits.mean())[graph.index[graph.of(Kind.logit)]]
    )
    assert len(features) > 20
    assert graph.of(Kind.rest) == slice(0, 0)


class Held:
    """The held model with sources changed: what every target becomes."""

    def __init__(self, model: ReplacementModel, ids: Tensor) -> None:
        from pipeline.interp.circuits import held_prompt

        self.model = attribution.in_dtype(model, torch.float64)
        self.prompt = held_prompt.recorded(self.model, ids)
        self.outputs = graph_targets.outputs(self.model, self.prompt, DOUBLE)

    @torch.no_grad()
    def targets(self, graph: Graph, changes: dict[int, Tensor] | None = None) -> Tensor:
        """changes: added to what the MLP of a layer writes [T, D]. -> [m]"""
        from pipeline.interp.circuits import frozen

        lm, transcoder = self.model.lm, self.model.transcoder
        reads: dict[int, Tensor] = {}

        def read(module: object, args: tuple[Tensor], output: Tensor, layer: int) -> None:
            reads[layer] = output if self.model.site == Site.mlp_in else args[0]

        def write(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            out = self.prompt.mlp_out[lm.layers[layer]][None] + (changes or {}).get(layer, 0)
            if transcoder.W_skip is not None:
                moved = (reads[layer] - self.prompt.x[layer]) @ transcoder.W_skip[layer].T
                out = out + torch.cat([0 * moved[:, :1], moved[:, 1:]], dim=1)
            return out

        handles = [
            lm.modules(base)[0].register_forward_hook(lambda *given, layer=i: read(*given, layer))
            for i, base in enumerate(lm.layers)
        ]
        handles += [
            lm.modules(base)[1].register_forward_hook(lambda *given, base=base: self.prompt.mlp_out[base][None])
            for base in set(range(lm.n_base_layers)) - set(lm.layers)
        ]
        last: list[Tensor] = []
        handles.append(
            lm.weights.get_output_embeddings().register_forward_hook(lambda m, args, out: last.append(args[0][0, -1]))
        )
        with frozen.held(lm, self.prompt.gates):
            lm.logits(self.prompt.tokens, write)
        for handle in handles:
            handle.remove()
        features = [transcoder.encode_layer(reads[l][0, p][None], l)[0, f] for _, l, p, f in nodes(graph, Kind.feature)]
        return torch.stack([*features, *(self.outputs.rows @ last[0] + self.outputs.biases)])


def check_ablations(model: ReplacementModel, ids: Tensor, every: int = 5) -> Graph:
    """Sums, and what becomes of all targets when one source's writing is taken away."""
    graph, held = trace(model, ids, DOUBLE), Held(model, ids)
    assert float(graph.imbalance().max()) < 1e-12
    torch.testing.assert_close(held.targets(graph), graph.value[graph.targets], rtol=1e-9, atol=1e-10)
    transcoder, n_tokens = held.model.transcoder, ids.shape[1]
    for n, l, p, f in list(nodes(graph, Kind.feature))[::every]:
        change = torch.zeros(n_tokens, D_MODEL, dtype=torch.float64)
        changes = {}
        for m in transcoder.targets(l):
            changes[m] = change.index_copy(0, torch.tensor([p]), -graph.activation[n] * transcoder.table(l, m)[f][None])
        moved = held.targets(graph, changes) - graph.value[graph.targets]
        torch.testing.assert_close(moved, -edge(graph, n), rtol=1e-9, atol=1e-10)
    return graph


@pytest.mark.parametrize("site", [Site.resid_mid, Site.mlp_in])
def test_sums_and_ablations_hold_in_every_family(family: LanguageModel, site: Site) -> None:
    graph = check_ablations(model_of(family, site=site), tokens())
    has_positions = "GPT2" in family.architecture
    assert graph.kind.count(Kind.position) == (T if has_positions else 0)
    assert graph.kind.count(Kind.token) == T
    assert graph.kind.count(Kind.error) == N_LAYERS * (T - 1)
    assert graph.kind.count(Kind.bias) == N_LAYERS + 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("site", [Site.resid_mid, Site.mlp_in])
def test_sums_and_ablations_hold_for_every_linear_architecture(gpt2: LanguageModel, arch: str, site: Site) -> None:
    name, options = ARCHS[arch]
    check_ablations(model_of(gpt2, random(name, **options), site), tokens())


def test_in_single_precision_sums_hold_too(family: LanguageModel) -> None:
    for seed in range(4):
        graph = trace(model_of(family), tokens(seed=seed))
        assert graph.edges.dtype == torch.float32
        assert float(graph.imbalance().max()) < 1e-5


@pytest.mark.slow
def test_sums_hold_for_every_node_of_twenty_prompts(family: LanguageModel) -> None:
    model, generator = model_of(family, site=Site.mlp_in), torch.Generator().manual_seed(5)
    for seed in range(20):
        ids = tokens(int(torch.randint(2, 30, (), generator=generator)), seed)
        assert float(trace(model, ids).imbalance().max()) < 1e-5
        assert float(trace(model, ids, DOUBLE).imbalance().max()) < 1e-12


def test_doubling_every_bias_adds_the_bias_nodes(gpt2: LanguageModel) -> None:
    model, ids = model_of(gpt2, random("skip"), Site.mlp_in), tokens()
    graph, held = trace(model, ids, DOUBLE), Held(model, ids)
    weights, transcoder = held.model.lm.weights, held.model.transcoder
    with torch.no_grad():
        for name, parameter in weights.named_parameters():
            if name.endswith("bias"):
                parameter *= 2
        more = {l: transcoder.b_dec[l].clone().repeat(T, 1) for l in range(N_LAYERS)}
        for l in range(N_LAYERS):
            more[l][0] = 0
        transcoder.b_enc *= 2
    added = held.targets(graph, more) - graph.value[graph.targets]
    torch.testing.assert_close(added, graph.edges[graph.targets][:, graph.of(Kind.bias)].sum(dim=1))
    assert float(added.abs().min()) > 0


def test_an_unembeddings_bias_belongs_behind_the_last_layer(tiny_gpt2: Path) -> None:
    lm, ids = opened(tiny_gpt2), tokens()
    options = GraphOptions(dtype=Precision.float64, targets=["a", "b"])
    before = trace(model_of(lm), ids, options)
    bias = torch.randn(lm.vocab_size, generator=torch.Generator().manual_seed(4))
    lm.weights.get_output_embeddings().bias = torch.nn.Parameter(bias)
    added = trace(model_of(lm), ids, options).edges - before.edges
    node, outputs = before.of(Kind.bias).stop - 1, before.of(Kind.logit)
    assert int(before.layer[node]) == N_LAYERS
    expected = torch.zeros_like(before.edges)
    expected[outputs, node] = (bias - bias.mean())[before.index[outputs]].double()
    torch.testing.assert_close(added, expected)


def test_layers_that_are_not_read_are_errors(tiny_gpt2: Path) -> None:
    lm = opened(tiny_gpt2, layers=[1, 2])
    graph = check_ablations(model_of(lm, random(n_layers=1)), tokens(), every=1)
    assert {l for _, l, _, _ in nodes(graph, Kind.error)} == {-1, 0, 1}
    assert {l for _, l, _, _ in nodes(graph, Kind.bias)} == {-1, 0, 1, 2}
    assert {l for _, l, _, _ in nodes(graph, Kind.feature)} == {0}


def test_a_prompt_without_any_active_feature_has_a_graph(gpt2: LanguageModel) -> None:
    graph = check_ablations(model_of(gpt2, random(threshold=1e6)), tokens())
    assert graph.kind.count(Kind.feature) == graph.n_active == 0
    assert graph.kind.count(Kind.logit) >= 1


def test_no_feature_needs_to_be_active_at_the_last_position(gpt2: LanguageModel) -> None:
    clt, ids = random(), tokens()
    before = trace(model_of(gpt2, clt), ids)
    most = before.activation[before.position == T - 1].max()
    clt.activation.threshold.fill_(float(most))
    graph = check_ablations(model_of(gpt2, clt), ids)
    assert graph.kind.count(Kind.feature) > 0
    assert int(graph.position[graph.of(Kind.feature)].max()) < T - 1


def greedy(whole: Graph, n: int) -> set[int]:
    """Features by influence on the logits, one at a time, where rows of features not yet taken count as zero."""
    rows = whole.edges.abs() / whole.edges.abs().sum(dim=1, keepdim=True).clamp(min=1e-30)
    logits, taken = list(range(whole.n_nodes)[whole.of(Kind.logit)]), set[int]()
    while len(taken) < n:
        known = torch.zeros_like(rows)
        for i in [*taken, *logits]:
            known[i] = rows[i]
        flow, total = whole.probability.clone().to(rows), torch.zeros(whole.n_nodes, dtype=rows.dtype)
        while flow.any():
            flow = flow @ known
            total += flow
        candidates = [i for i, kind in enumerate(whole.kind) if kind == Kind.feature and i not in taken]
        taken.add(max(candidates, key=lambda i: float(total[i])))
    return taken


def test_a_limit_keeps_the_features_of_most_influence_and_sums_the_others(gpt2: LanguageModel) -> None:
    model, ids = model_of(gpt2), tokens()
    whole = trace(model, ids, DOUBLE)
    few = trace(model, ids, GraphOptions(dtype=Precision.float64, max_feature_nodes=9, batch=1, update_every=1))
    assert few.n_active == whole.n_active > 9
    kept = sorted(greedy(whole, 9))
    assert [(l, p, f) for _, l, p, f in nodes(few, Kind.feature)] == [
        (int(whole.layer[i]), int(whole.position[i]), int(whole.index[i])) for i in kept
    ]
    assert float(few.imbalance().max()) < 1e-12
    targets = [*kept, *range(whole.n_nodes)[whole.of(Kind.logit)]]
    torch.testing.assert_close(few.edges[few.targets][:, :9], whole.edges[targets][:, kept])
    for n, l, p, _ in nodes(few, Kind.rest):
        cut = [i for i, *place, _ in nodes(whole, Kind.feature) if place == [l, p] and i not in kept]
        assert cut
        torch.testing.assert_close(edge(few, n), whole.edges[targets][:, cut].sum(dim=1))


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_batches_change_nothing(gpt2: LanguageModel, batch: int) -> None:
    model, ids = model_of(gpt2), tokens()
    one = trace(model, ids, DOUBLE)
    other = trace(model, ids, GraphOptions(dtype=Precision.float64, batch=batch))
    torch.testing.assert_close(one.edges, other.edges, rtol=1e-12, atol=1e-13)


def test_little_memory_makes_small_batches_and_too_little_is_refused(
    gpt2: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = model_of(gpt2), tokens()
    caplog.set_level("INFO")
    small = trace(model, ids, GraphOptions(memory_gb=SMALL))
    assert ": 64 targets at a time" not in caplog.messages[0]
    assert "targets at a time" in caplog.messages[0]
    torch.testing.assert_close(small.edges, trace(model, ids).edges, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"is too little, .* are needed .*; lower graph.max_feature_nodes"):
        trace(model, ids, GraphOptions(memory_gb=1e-6))


def test_a_difference_is_the_difference_of_two_logits(gpt2: LanguageModel) -> None:
    model, ids = model_of(gpt2), tokens()
    two = trace(model, ids, GraphOptions(dtype=Precision.float64, targets=["a", "b"]))
    one = trace(model, ids, GraphOptions(dtype=Precision.float64, difference=["a", "b"]))
    assert two.labels == ["a", "b"]
    assert one.labels == ["a - b"]
    first, second = two.edges[two.of(Kind.logit)][:, :-2]
    torch.testing.assert_close(one.edges[-1, :-1], first - second)
    torch.testing.assert_close(one.value[-1], two.value[-2] - two.value[-1])
    logits = model.lm.logits(ids)[0, -1].double()
    torch.testing.assert_close(two.probability[-2:], logits.softmax(0)[two.index[-2:]], rtol=1e-5, atol=1e-7)


def test_a_feature_can_be_the_target(gpt2: LanguageModel) -> None:
    model, ids = model_of(gpt2), tokens()
    whole = trace(model, ids, DOUBLE)
    n, l, p, f = list(nodes(whole, Kind.feature))[-3]
    graph = trace(model, ids, GraphOptions(dtype=Precision.float64, feature=f"{l}/{f}@{p}"))
    assert graph.labels == [f"{l}/{f}@{p}"]
    torch.testing.assert_close(graph.edges[-1, :-1], whole.edges[n, : graph.n_nodes - 1])
    torch.testing.assert_close(graph.value[-1], whole.value[n])


def test_the_most_likely_tokens_are_as_few_as_reach_the_mass() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    for mass, expected in ((0.5, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.95, [1, 3, 2]), (1.0, [1, 3, 2, 0])):
        assert graph_targets.likely(probabilities.double(), GraphOptions(logit_mass=mass)) == expected
    assert graph_targets.likely(probabilities, GraphOptions(logit_mass=1.0, max_logits=2)) == [1, 3]


REFUSED: list[tuple[GraphOptions, str]] = [
    (GraphOptions(targets=["a"], feature="0/0@1"), "both say"),
    (GraphOptions(targets=[]), "names no token"),
    (GraphOptions(targets=["ab"]), '"ab" is 2 tokens'),
    (GraphOptions(targets=["#"]), "is no token"),
    (GraphOptions(difference=["a"]), "needs two tokens"),
    (GraphOptions(feature="0-1"), "names no feature; write LAYER/INDEX@POSITION"),
    (GraphOptions(feature="0/99@1"), "there is no feature 0/99; layers are 0 to"),
    (GraphOptions(feature="3/1@1"), "there is no feature 3/1"),
    (GraphOptions(feature="0/1@0"), "traced from 1 on"),
    (GraphOptions(logit_mass=1.5), "is no probability"),
    (GraphOptions(max_feature_nodes=0), "must be 1 or more"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_mean_nothing_are_refused(gpt2: LanguageModel, options: GraphOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trace(model_of(gpt2), tokens(), options)


def test_what_is_not_linear_is_refused_with_the_reason(gpt2: LanguageModel) -> None:
    for name, options, why in (
        ("molt", {"ranks": [3, 1]}, "bilinear"),
        ("tied", {"tie": Tie.source, "offset": True}, "offset"),
        ("sae", {}, "reads what the MLPs write"),
        ("crosscoder", {}, "reads all layers at once"),
    ):
        chosen = oracle.arch_options(name, d_features=12, **options)
        levels = torch.zeros(table.n_sources(chosen, Dims(N_LAYERS, D_MODEL)), 12)
        with pytest.raises(UserError, match=why):
            attribution.check_linear(table.build(chosen, Dims(N_LAYERS, D_MODEL), FixedThreshold(levels)))
    with pytest.raises(UserError, match="one token"):
        trace(model_of(gpt2), tokens(1))
    with pytest.raises(UserError, match="one prompt at a time"):
        trace(model_of(gpt2), tokens().repeat(2, 1))


def test_a_model_that_is_not_linear_when_held_is_found_out(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = gpt2.weights.transformer.h[1]
    own = block.attn.c_proj.forward
    monkeypatch.setattr(block.attn.c_proj, "forward", lambda x: own(x).tanh())
    with pytest.raises(UserError, match="not linear between its MLPs"):
        trace(model_of(gpt2), tokens())


def test_tracing_leaves_the_model_as_it_was(gpt2: LanguageModel) -> None:
    before = gpt2.logits(tokens())
    asked = [parameter.requires_grad for parameter in gpt2.weights.parameters()]
    trace(model_of(gpt2), tokens())
    assert torch.equal(gpt2.logits(tokens()), before)
    assert [parameter.requires_grad for parameter in gpt2.weights.parameters()] == asked


def test_influence_flows_through_the_rows_that_are_there() -> None:
    rows = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 0.0, 6.0]])
    owners, weights = torch.tensor([-1, 2]), torch.tensor([0.5, 0.0])
    found = graph_rows.influence(rows, owners, weights, 3)
    torch.testing.assert_close(found, torch.tensor([0.375 * 0.25, 0.125, 0.375]))
