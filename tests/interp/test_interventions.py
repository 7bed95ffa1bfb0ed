"""Removing features from a model and its replacement: planted cases in which they agree, and in which they do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions
from pipeline.core.activations import FixedThreshold
from pipeline.core.sparse import Chosen, from_mask
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.interp import interventions
from pipeline.interp.edits import Sides, features_of
from tests.interp.test_replacement import random, slow_hooks

L, D, F, T = 3, 20, 13, 12
GROUPS = interventions.COMPARED


class IsTheTranscoder(nn.Module):
    """An MLP whose output is what a transcoder reconstructs, from features of its own layer and of earlier ones."""

    def __init__(self, model: Transcoder, layer: int, read: list[Tensor]) -> None:
        super().__init__()
        self.model, self.layer, self.read = [model], layer, read

    def forward(self, x: Tensor) -> Tensor:
        if self.layer == 0:
            self.read.clear()
        self.read.append(x.flatten(0, 1))
        later = [torch.zeros_like(self.read[0])] * (L - self.layer - 1)
        y_hat = self.model[0](torch.stack([*self.read, *later], dim=1)).y_hat
        return y_hat[:, self.layer].view(x.shape)


def planted(tiny_gpt2: Path, model: Transcoder) -> LanguageModel:
    """The tiny model with the transcoder for MLPs."""
    lm = models.load(ModelOptions(name="local", path=str(tiny_gpt2)))
    read: list[Tensor] = []
    for layer, block in enumerate(lm.weights.transformer.h):
        block.mlp = IsTheTranscoder(model, layer, read)
    lm._outs = [block.mlp for block in lm.weights.transformer.h]
    return lm


def text(n: int = 6) -> tuple[np.ndarray, Tensor]:
    """Contexts and their rows; the last one is padded."""
    contexts = np.random.default_rng(0).integers(3, 60, (n, T), dtype=np.int32)
    scored = torch.ones(n, T, dtype=torch.bool)
    scored[:, 0] = False
    scored[-1, 5:] = False
    return contexts, scored


def measured(lm: LanguageModel, model: Transcoder, **options: Any) -> dict[str, Any]:
    contexts, scored = text()
    settings = {"batch_tokens": 1000, "n": 12, **options}
    return interventions.measure(lm, model, contexts, scored, **settings)[0]


@pytest.mark.parametrize("factor", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["clt", "per_layer", "tied"])
def test_where_the_mlps_are_the_transcoder_they_agree_exactly(tiny_gpt2: Path, name: str, factor: float) -> None:
    model = random(name, 0.3)
    found = measured(planted(tiny_gpt2, model), model, factor=factor)
    assert found["n"] == 12
    for group in ("replacement", "with_errors", "mediated"):
        assert found[group]["n"] == (8 if group == "mediated" else 12)
        for number in ("cosine", "slope", "r2", "rank_correlation"):
            assert found[group][number] == pytest.approx(1, abs=1e-3), (group, number)
        assert found[group]["shuffled"] < 0.7
    assert found["mlps_frozen"]["r2"] < 0.9, "the later MLPs do respond"


def test_a_transcoder_of_something_else_does_not_agree(tiny_gpt2: Path) -> None:
    """The right decoders in the wrong order: what is removed is the same in both models, how they respond is not."""
    model, other = random("clt", 0.3), random("clt", 0.3)
    for tables in other.decoders:
        for table in tables:
            table.copy_(table.roll(1, dims=0))
    found = measured(planted(tiny_gpt2, model), other, n=24)
    assert found["mediated"]["cosine"] < 0.5
    assert found["mediated"]["r2"] < 0.5
    assert found["replacement"]["r2"] < 0.9


def test_a_replacement_that_never_responds_agrees_as_frozen_mlps_do(tiny_gpt2: Path) -> None:
    """All of its features are constants."""
    model = random("clt", 0.3)
    lm, deaf = planted(tiny_gpt2, model), random("clt", 0.3)
    for layer in range(L):
        deaf.encoders[layer].zero_()
        deaf.b_enc[layer] = 1.0
    found = measured(lm, deaf)
    for number in ("cosine", "slope", "r2"):
        assert found["with_errors"][number] == pytest.approx(found["mlps_frozen"][number], abs=1e-4)
    assert found["mediated"]["slope"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 30])
def test_how_interventions_are_batched_does_not_matter(tiny_gpt2: Path, batch_tokens: int) -> None:
    lm = models.load(ModelOptions(name="local", path=str(tiny_gpt2)))
    model = random("clt", 0.2)
    whole, parts = (measured(lm, model, batch_tokens=size) for size in (1000, batch_tokens))
    for group in GROUPS:
        assert parts[group]["n"] == whole[group]["n"]
        for number in ("cosine", "slope", "r2", "rank_correlation", "shuffled"):
            assert parts[group][number] == pytest.approx(whole[group][number], abs=2e-3), (group, number)


def test_effects_are_those_of_plain_hooks(tiny_gpt2: Path) -> None:
    """The effect in the original, the direct one and the one with errors, each intervention alone."""
    lm = models.load(ModelOptions(name="local", path=str(tiny_gpt2)))
    model, layer, (contexts, scored) = random("clt", 0.2), 1, text(3)
    tokens, sides = torch.from_numpy(contexts.astype(np.int64)), Sides(lm, model)
    rows, effects = interventions._effects(sides, tokens, scored, layer, range(3), -1.0)
    features = features_of(model, sides.state(tokens).x.flatten(0, 1))
    where = interventions._draw(Chosen(features.patterns[layer], features.values[layer]), scored, range(3))  # type: ignore[arg-type]
    assert rows.tolist() == [0, 1, 2]
    for k in range(3):
        at, i, a, one = int(where.position[k]), int(where.feature[k]), where.value[k], tokens[k : k + 1]
        base: list[tuple[Tensor, Tensor]] = []

        def keep(m: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
            base.append((normed, own))  # noqa: B023
            return own

        before = slow_hooks(tiny_gpt2, one, keep)
        y_hat = model(torch.cat([normed for normed, _ in base]).transpose(0, 1)).y_hat

        def removed(m: int, out: Tensor) -> Tensor:
            out = out.clone()
            if m >= layer:
                out[0, at] -= a * model.W_dec[layer][i, m - layer]  # noqa: B023
            return out

        read: list[Tensor] = []

        def with_errors(m: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
            read.append(normed[0])  # noqa: B023
            x = torch.stack([*read, *([torch.zeros_like(read[0])] * (L - m - 1))], dim=1)  # noqa: B023
            return removed(m, model(x).y_hat[:, m][None] + base[m][1] - y_hat[:, m])  # noqa: B023

        total = slow_hooks(tiny_gpt2, one, lambda m, r, x, own: removed(m, own))
        frozen = slow_hooks(tiny_gpt2, one, lambda m, r, x, own: removed(m, base[m][1]))  # noqa: B023
        ours = slow_hooks(tiny_gpt2, one, with_errors)
        expected = {
            "with_errors": (ours - before, total - before),
            "mediated": (ours - frozen, total - frozen),
            "mlps_frozen": (frozen - before, total - before),
        }
        for group, sides_of in expected.items():
            for got, change in zip(effects[group], sides_of, strict=True):
                last = int(scored[k].nonzero().max())
                slow = torch.zeros(interventions.POSITIONS, lm.vocab_size)
                for j in range(interventions.POSITIONS):
                    if at + j <= last:
                        slow[j] = change[0, at + j] - change[0, at + j].mean()
                assert slow.norm() > 1e-2
                torch.testing.assert_close(got[k].float(), slow.flatten(), atol=2e-3, rtol=1e-3)


def test_only_what_is_active_at_a_row_is_drawn_and_all_of_it_alike() -> None:
    dense = torch.zeros(2 * 4, F)
    dense[1, 3], dense[1, 5], dense[3, 3], dense[6, 1] = 1.0, 2.0, 3.0, 4.0
    dense[0, 7] = dense[7, 8] = 9.0  # position 0, and padding
    scored = torch.tensor([[False, True, True, True], [False, True, True, False]])
    pattern = from_mask(dense > 0)
    one = Chosen(pattern, dense[pattern.tokens, pattern.indices])
    seen: dict[tuple[int, int, int, float], int] = {}
    for k in range(300):
        where = interventions._draw(one, scored, range(2 * k, 2 * k + 2))
        for row in zip(*(part.tolist() for part in where), strict=True):
            seen[row] = seen.get(row, 0) + 1
    assert set(seen) == {(0, 1, 3, 1.0), (0, 1, 5, 2.0), (0, 3, 3, 3.0), (1, 2, 1, 4.0)}
    assert seen[1, 2, 1, 4.0] == 300
    assert min(seen.values()) > 70


def test_a_context_without_an_active_feature_is_left_out() -> None:
    dense = torch.zeros(3 * 4, F)
    dense[9, 2] = 1.0
    pattern = from_mask(dense > 0)
    where = interventions._draw(Chosen(pattern, dense[pattern.tokens, pattern.indices]), torch.ones(3, 4) > 0, range(3))
    assert (where.context.tolist(), where.position.tolist(), where.feature.tolist()) == ([2], [1], [2])


def test_the_numbers_are_those_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    r, o = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    r[2] = 0  # does not respond
    r[4] = o[4] = 0  # nothing happens in either
    found = interventions._agreement([interventions._compared(r, o)])
    cosines, chance, ro, oo, miss = [], [], 0.0, 0.0, 0.0
    for k in range(7):
        other = r[k - 1]
        if k == 4:
            continue
        cosines.append(float(r[k] @ o[k] / (r[k].norm() * o[k].norm())) if k != 2 else 0.0)
        chance.append(float(other @ o[k] / (other.norm() * o[k].norm())) if k not in (3, 5) else 0.0)
        ro, oo = ro + float(r[k] @ o[k]), oo + float(o[k] @ o[k])
        miss += float((r[k] - o[k]) @ (r[k] - o[k]))
    assert found["n"] == 6
    assert found["cosine"] == pytest.approx(sum(cosines) / 6, rel=1e-12)
    assert found["shuffled"] == pytest.approx(sum(chance) / 6, rel=1e-12)
    assert found["slope"] == pytest.approx(ro / oo, rel=1e-12)
    assert found["r2"] == pytest.approx(1 - miss / oo, rel=1e-12)
    assert found["per_layer"]["slope"] == [found["slope"]]


def test_intervals_hold_the_numbers_and_tighten_with_more_contexts(tiny_gpt2: Path) -> None:
    lm, model = models.load(ModelOptions(name="local", path=str(tiny_gpt2))), random("clt", 0.2)
    contexts, scored = text(40)
    scored[:] = scored[0]
    widths = []
    for n in (15, 120):
        values, ci95 = interventions.measure(lm, model, contexts, scored, 1000, n=n, resamples=200)
        low, high = ci95["with_errors"]["cosine"]
        assert low < values["with_errors"]["cosine"] < high
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]


def test_one_layer_has_no_later_mlps(tiny_gpt2: Path) -> None:
    lm = models.load(ModelOptions(name="local", path=str(tiny_gpt2), layers=[1, 2]))
    model = CLT(ArchOptions("clt", d_features=F), Dims(1, D), FixedThreshold(torch.zeros(1, F)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    found = measured(lm, model.eval().requires_grad_(False))
    assert found["mediated"] is None
    assert found["with_errors"]["cosine"] == pytest.approx(1, abs=1e-3)
