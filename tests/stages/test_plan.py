"""`clt plan`, and what `clt train --dry-run dist.world=N` says beside the usual lines."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.arch.base import Dims
from pipeline.arch.table import build
from pipeline.config import compose
from pipeline.core import activations
from pipeline.errors import UserError
from pipeline.stages import plan, train
from pipeline.stages.options import TrainConfig
from pipeline.stages.plan_options import PlanConfig
from pipeline.train import optim, precision
from pipeline.train.optimisers import optimizer_tensors
from pipeline.train.options import Precision

SIZES = ["plan.n_layers=3", "plan.d_model=10"]


def composed(*words: str) -> PlanConfig:
    cfg = compose("plan", list(words))
    assert isinstance(cfg, PlanConfig)
    return cfg


def planned(tmp_path: Path, *words: str) -> dict[str, Any]:
    """What the JSON says of a plan."""
    file = plan.run(composed(*words, f"to={tmp_path / 'plan.json'}"))
    assert file is not None
    [one] = json.loads(file.read_text()).values()
    assert isinstance(one, dict)
    return one


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_it_says_what_a_rank_holds_sends_and_takes(said: pytest.LogCaptureFixture) -> None:
    file = plan.run(composed(*SIZES, "arch.d_features=64", "dist.world=16", "train.batch_tokens=32"))
    assert file is None
    for line in (
        "3 layers of 10; clt, topk",
        "16: 8 share the features, 2 the tokens (dist=mesh)",
        "3 x 8 of 64 features",
        "16 of 32 tokens",
        "weights ",
        "reconstruction",
        "gradient",
        "scalars",
        "bound by",
        "(assumed)",
        "tokens/s",
    ):
        assert line in said.text, line


def test_the_parameters_of_a_rank_are_those_of_its_rows_and_the_biases(tmp_path: Path) -> None:
    one = planned(tmp_path, *SIZES, "arch.d_features=64", "activation.k=2", "dist.features=4", "dist.world=4")
    # L = 3 encoders and 6 decoders of [F, D], biases L F and L D.
    assert one["parameters"] == 9 * 64 * 10 + 3 * 64 + 3 * 10
    assert one["rank_parameters"] == 9 * 16 * 10 + 3 * 16 + 3 * 10
    assert one["rank_bytes"]["weights"] == 4 * one["rank_parameters"]
    assert one["rank_bytes"]["optimiser"] == 8 * one["rank_parameters"]


def test_tables_of_sixteen_bits_and_moments_of_eight_are_counted_as_they_are_kept(tmp_path: Path) -> None:
    words = ["plan.n_layers=3", "plan.d_model=256", "arch.d_features=64", "dist.features=4", "dist.world=4"]
    words += ["optim=adam8bit", "train.weights=bfloat16", "arch=skip"]
    one = planned(tmp_path, *words)
    options, dims = compose_train(*words[2:]), Dims(3, 256)
    model = build(replace(options.arch, d_features=16), dims, activations.build(options.activation, 3, 16))
    precision.store(model, Precision.bfloat16)
    optimizer = optim.build(model.named_parameters(), options.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = optimizer_tensors(model, optimizer)
    moments = sum(t.nbytes for name, t in kept.items() if not name.startswith("step/") and ".qmap/" not in name)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert one["rank_bytes"]["weights"] == weights
    assert one["rank_bytes"]["gradients"] == weights
    assert one["rank_bytes"]["optimiser"] == moments
    assert one["rank_bytes"]["checkpoint"] == weights + moments


def test_a_step_takes_its_bytes_and_flops_at_the_rates_given(tmp_path: Path) -> None:
    rates = ["plan.gflops=1", "plan.gather_gb_s=2", "plan.memory_gb_s=3", "plan.link_gb_s=4", "plan.latency_us=0"]
    words = [*SIZES, *rates, "arch.d_features=64", "activation.k=2", "loss=mse", "train.batch_tokens=32"]
    one = planned(tmp_path, *words, "dist.features=4", "dist.world=4")
    assert one["ms"]["product"] == pytest.approx(1e3 * 32 * 2 * 3 * 10 * 16 / 1e9)
    gathered = 4 * 32 * (2 * 16 / 64) * 10 * (3 * 6 + 3)  # rows of active pairs: 3 times the decoder's, the encoder's
    assert one["ms"]["gather"] == pytest.approx(1e3 * gathered / 2e9)
    assert one["ms"]["memory"] == pytest.approx(1e3 * 2 * 16 * one["rank_parameters"] / 3e9)
    sent = sum(count["sent"] for count in one["sent"].values())
    assert one["sent"]["reconstruction"]["sent"] == 2 * (32 * 3 * 10 * 4) * 3 // 4
    assert one["ms"]["link"] == pytest.approx(1e3 * sent / 4e9)
    assert one["hours"] == pytest.approx(one["steps"] * one["step_ms"] / 3.6e6)


def test_the_rates_of_the_benches_are_taken(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    rates = {"gemm": 5e10, "gather": 2e10, "copy": 1e10, "in_place": 3e10}
    shapes = {
        name: {"shape": {"n_parameters": n}, "rates": rates, "times_floor": n} for name, n in (("A", 1), ("B", 2))
    }
    (tmp_path / "train.json").write_text(json.dumps({"shapes": shapes}))
    (tmp_path / "dist.json").write_text(json.dumps({"link": {"bytes_per_s": 4e9, "latency_s": 5e-5}}))
    files = [f"plan.rates={tmp_path / 'train.json'}", f"plan.links={tmp_path / 'dist.json'}"]
    one = planned(tmp_path, *SIZES, *files, "plan.gflops=60")
    assert one["rates"]["gemm"] == 6e10  # what is given stands above what was measured
    assert (one["rates"]["gather"], one["rates"]["memory"], one["rates"]["times_floor"]) == (2e10, 3e10, 2.0)
    assert (one["rates"]["link"], one["rates"]["latency"]) == (4e9, pytest.approx(5e-5))
    assert "between machines 40 GB/s (assumed)" in said.text
    assert f"gather 20 GB/s, memory 30 GB/s ({tmp_path / 'train.json'})" in said.text


def test_a_table_has_a_line_for_each_model_and_world(said: pytest.LogCaptureFixture) -> None:
    plan.run(composed("plan.models=[gpt2,llama-3.1-8b]", "plan.worlds=[8,64]", "plan.expansion=2"))
    lines = [line for line in said.messages if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| gpt2", "| gpt2", "| llama-3.1-8b", "| llama-3.1-8b"]
    assert "64 (8 x 8)" in lines[2]
    assert "8,192" in lines[3]


def test_the_sizes_of_a_model_come_from_its_configuration_alone(
    tiny_gpt2: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_gpt2 / "config.json").read_bytes())
    plan.run(composed("model=local", f"model.path={tmp_path}", "arch.d_features=64"))
    assert "3 layers of 20" in said.text


def test_rules_without_a_k_are_planned_dense_unless_an_l0_is_given(said: pytest.LogCaptureFixture) -> None:
    words = [*SIZES, "arch.d_features=64", "activation=relu", "loss=tanh"]
    plan.run(composed(*words))
    assert "every layer in dense form; plan.l0 for less" in said.text
    plan.run(composed(*words, "plan.l0=12"))
    assert "an L0 of 12" in said.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan.n_layers=3"], "go together"),
        (["plan.n_layers=0", "plan.d_model=4"], r"plan\.n_layers=0 must be at least 1"),
        (["plan.models=[gpt5]"], "gpt5 is not written down; choose from gpt2"),
        (["plan.worlds=[8]"], r"plan\.worlds goes with plan\.models"),
        (["plan.dead=2"], r"plan\.dead=2"),
        (["plan.device=tpu"], "must be cpu or cuda"),
        ([*SIZES, "plan.gflops=0"], r"plan\.gflops=0.* must be above 0"),
        ([*SIZES, "plan.rates=nothing.json"], "nothing.json: No such file"),
        ([*SIZES, "dist.world=12"], r"dist\.features=8 does not divide the 12 ranks"),
        ([*SIZES, "dist.world=0"], r"dist\.world=0 must be at least 1"),
        ([*SIZES, "dist=ddp", "train.batch_tokens=4"], "cannot be shared by 8 data ranks"),
        ([*SIZES, "train.batch_tokens=9", "train.accumulate=2"], r"train\.accumulate=2"),
        ([*SIZES, "arch.d_features=4", "activation.k=2"], "not enough for dist.features=8"),
        ([*SIZES, "optim=muon"], "muon"),
        (
            [*SIZES, "optim=adam8bit", "arch.d_features=96"],
            "borders of 8 feature ranks lie inside blocks of tables that are 10 wide",
        ),
        ([*SIZES, "dist=ddp", "train.weights=bfloat16"], "rounds at random, which optim=adam does not"),
        (["model=hub", "model.path=no/such-model"], "cannot use its configuration"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.run(composed(*words))


def test_files_of_other_commands_are_no_rates(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for key, command in (("rates", "clt bench train"), ("links", "clt bench dist")):
        with pytest.raises(UserError, match=f"is no report of {command}"):
            plan.run(composed(*SIZES, f"plan.{key}={tmp_path / 'x.json'}"))


RUN = ["+experiment=topk", "activation.k=4", "arch.d_features=33", "train.n_steps=20", "train.n_tokens=null"]


def test_a_dry_run_of_training_plans_for_ranks_that_nobody_started(
    cached: Path, said: pytest.LogCaptureFixture
) -> None:
    words = [*RUN, "dist=mesh", "dist.features=4", "dist.world=8", "train.batch_tokens=128"]
    train.run(compose_train(*words, "dry_run=true"))
    assert sorted(path.name for path in cached.iterdir()) == ["cache"]
    for line in (
        "FLOPs a step",
        "8: 4 share the features, 2 the tokens",
        "64 of 128 tokens",
        "reconstruction",
        "20 steps",
    ):
        assert line in said.text, line


@pytest.mark.parametrize(
    ("world", "grid"), [(64, "8 share the features, 8 the tokens"), (12, "4 share the features, 3 the tokens")]
)
def test_ranks_of_which_nothing_is_said_share_features_within_machines(
    cached: Path, said: pytest.LogCaptureFixture, world: int, grid: str
) -> None:
    train.run(compose_train(*RUN, f"dist.world={world}", "train.batch_tokens=192", "dry_run=true"))
    assert f"dist=single is one process; {world} are planned as dist=mesh dist.features={grid[0]}" in said.text
    assert f"{world}: {grid}" in said.text
    said.clear()
    train.run(compose_train(*RUN, "dist.world=1", "dry_run=true"))
    assert "dist=mesh" not in said.text


def test_a_run_on_ranks_that_are_only_planned_is_refused(cached: Path) -> None:
    with pytest.raises(UserError, match=r"dist\.world=8 plans for so many ranks and starts none; add --dry-run"):
        train.run(compose_train(*RUN, "dist=mesh", "dist.world=8"))
    with pytest.raises(UserError, match=r"dist\.world=8 plans for so many ranks and starts none; add --dry-run"):
        train.run(compose_train(*RUN, "dist.world=8"))
    assert sorted(path.name for path in cached.iterdir()) == ["cache"]


def compose_train(*words: str) -> TrainConfig:
    cfg = compose("train", list(words))
    assert isinstance(cfg, TrainConfig)
    return cfg


def test_the_docs_have_the_tables_that_the_commands_print(said: pytest.LogCaptureFixture) -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()
    commands = re.findall(r"^clt plan (plan\.models=.*)$", docs, re.MULTILINE)
    for command in commands:
        plan.run(composed(*command.split()))
    lines = [line for line in said.messages if line.startswith("|")]
    assert len(lines) == 2 * len(commands) + 3 * 2 + 2 + 1
    for line in lines:
        assert line in docs
