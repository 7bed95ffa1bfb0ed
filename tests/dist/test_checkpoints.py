"""Checkpoints and finished transcoders of several ranks: any number reads them, gathered they are the bytes of one."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.arch.table import ARCHS
from pipeline.core import activations
from pipeline.core.activations import FixedThreshold
from pipeline.dist import mesh as meshes
from pipeline.dist.mesh import Mesh
from pipeline.dist.options import DistOptions
from pipeline.dist.shard import Shard, shards, whole
from pipeline.dist.wire import Group, Wire
from pipeline.errors import UserError
from pipeline.train import artifact, checkpoint, optim, together
from pipeline.train.checkpoint import State
from pipeline.train.checkpoint_writer import Copies, Writer
from pipeline.train.controller import Steering
from pipeline.train.row_files import Stored
from tests import oracle
from tests.disk import files_of_at_most
from tests.dist import processes
from tests.train.test_optim import options as optim_options

CPU = torch.device("cpu")
B, L, F, D = 5, 2, 44, 6
"""Four mixtures of 11 transforms."""

Built = tuple[Transcoder, Optimizer, State]

MORE: dict[str, dict[str, Any]] = {
    "clt": {"skip": True},
    "tied": {"offset": True},
    "matryoshka": {"prefixes": [5, 20, F]},
}


def options_of(architecture: str) -> ArchOptions:
    return oracle.arch_options(architecture, d_features=F, **MORE.get(architecture, {}))


def build(arch: ArchOptions, rule: str, optimizer: str, shard: Shard, first: bool = True, seed: int = 0) -> Built:
    """A transcoder with the features of a shard, as the ranks have it, with what trains it."""
    if not shard.is_whole:
        arch = replace(arch, d_features=shard.n, prefixes=None, random_prefixes=None)
    n_sources = table.n_sources(arch, Dims(L, D))
    held = activations.build(oracle.activation_options(rule), n_sources, shard.n)
    model = oracle.transcoder(arch, held, L, shard.n, D, dtype=torch.float32, seed=seed).train()
    for name in ("b_dec", "W_skip"):
        parameter = getattr(model, name)
        if parameter is not None and not first:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    name, _, clip = optimizer.partition(" ")
    made = optim.build(model.named_parameters(), optim_options(name, **({"clip": 1.0} if clip else {})))
    return model, made, State(0, torch.zeros(n_sources, shard.n, dtype=torch.int64))


def trained(arch: ArchOptions, rule: str, optimizer: str) -> Built:
    """One process after two steps, everything that a checkpoint holds set."""
    model, made, state = build(arch, rule, optimizer, whole(F))
    torch.manual_seed(3)
    for step in range(2):
        x = oracle.normal(B, L, D, seed=step, dtype=torch.float32)
        made.zero_grad()
        (model(x).y_hat - x).square().sum().backward()
        made.step()
    state.step = 2
    state.tokens_since_fired = torch.arange(state.tokens_since_fired.numel()).view_as(state.tokens_since_fired)
    state.steering = Steering(-1 / 3, 0.5, 1 / 7, 3.0)
    state.more = {"divergence": torch.tensor([1 / 3, 7.0]).double()}
    return model, made, state


def rewrite(dist: DistOptions, cases: dict[str, tuple[str, str, str]], source: Path, to: Path) -> None:
    """Load each case's checkpoint with the ranks that there are, and save it."""
    with meshes.started(dist, CPU) as mesh:
        for case, (architecture, rule, optimizer) in cases.items():
            model, made, _, shard = on_rank(mesh, architecture, rule, optimizer)
            state = checkpoint.load(source / case / "checkpoints/step_2", model, made, mesh, shard)
            if mesh.features.rank:
                assert not model.b_dec.any()
            checkpoint.save(to / case, model, made, state, {"cache": "abc"}, mesh, shard)


def on_rank(
    mesh: Mesh, architecture: str, rule: str, optimizer: str, seed: int = 9
) -> tuple[Transcoder, Optimizer, State, Shard]:
    arch = options_of(architecture)
    n_sources = table.n_sources(arch, Dims(L, D))
    shard = shards(arch, oracle.activation_options(rule), n_sources, mesh.features.size)[mesh.features.rank]
    return *build(arch, rule, optimizer, shard, mesh.features.rank == 0, seed), shard


def as_bytes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


ARCH_CASES = {name: (name, "jumprelu", "adam") for name in sorted(ARCHS)}
OPTIM_CASES = {
    name: ("clt", rule, name)
    for name, rule in {"adamw": "topk", "adam clip": "batchtopk", "signsgd": "jumprelu"}.items()
}
CASES = ARCH_CASES | OPTIM_CASES

SHARDED = {n: DistOptions("feature_shard", features=None, data=1) for n in (1, 2, 3, 4)}


@pytest.mark.slow
def test_what_four_ranks_wrote_one_two_and_three_read_and_gathered_it_is_the_bytes_of_one(tmp_path: Path) -> None:
    for case, (architecture, rule, optimizer) in CASES.items():
        checkpoint.save(tmp_path / "one" / case, *trained(options_of(architecture), rule, optimizer), {"cache": "abc"})
    before = as_bytes(tmp_path / "one")
    processes.run(4, rewrite, SHARDED[4], CASES, tmp_path / "one", tmp_path / "four")
    for n in (1, 2, 3):
        processes.run(n, rewrite, SHARDED[n], CASES, tmp_path / "four", tmp_path / f"by {n}")
    assert as_bytes(tmp_path / "by 1") == before
    for n in (2, 3):
        processes.run(1, rewrite, SHARDED[1], CASES, tmp_path / f"by {n}", tmp_path / f"{n} gathered")
        assert as_bytes(tmp_path / f"{n} gathered") == before


def test_ranks_of_a_grid_and_data_ranks_alone_read_each_others(tmp_path: Path) -> None:
    cases = {"adam": ("clt", "jumprelu", "adam"), "muon": ("clt", "topk", "muon")}
    for case, (architecture, rule, optimizer) in cases.items():
        checkpoint.save(tmp_path / "one" / case, *trained(options_of(architecture), rule, optimizer), {"cache": "abc"})
    before = as_bytes(tmp_path / "one")
    processes.run(3, rewrite, DistOptions("ddp", 1, None), cases, tmp_path / "one", tmp_path / "data")
    adam = {"adam": cases["adam"]}
    processes.run(4, rewrite, DistOptions("mesh", 2, 2), adam, tmp_path / "data", tmp_path / "grid")
    processes.run(1, rewrite, SHARDED[1], cases, tmp_path / "data", tmp_path / "data gathered")
    processes.run(1, rewrite, SHARDED[1], adam, tmp_path / "grid", tmp_path / "grid gathered")
    assert as_bytes(tmp_path / "data gathered") == before
    gathered = as_bytes(tmp_path / "grid gathered")
    assert gathered == {name: data for name, data in before.items() if name.startswith("adam/")}
    # Each rank has written a part, none the whole.
    for folder, n in (("data", 3), ("grid", 4)):
        files = sorted((tmp_path / folder / "adam/checkpoints/step_2").glob("optimizer-*"))
        assert [file.name for file in files] == [f"optimizer-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        assert max(file.stat().st_size for file in files) < sum(file.stat().st_size for file in files) / (n - 1)


# In one process: ranks one after the other


class Quiet(Group):
    """A rank's group whose others are not there: nobody is waited for."""

    def barrier(self) -> None:
        pass


def grid(features: int, data: int = 1) -> list[Mesh]:
    def group(size: int, rank: int) -> Group:
        return Quiet(size, rank, Wire(), process_group=object())  # type: ignore[arg-type]

    ranks = [(d, f) for d in range(data) for f in range(features)]
    return [Mesh(group(features, f), group(data, d), group(features * data, d * features + f)) for d, f in ranks]


def save_in_turn(
    to: Path, meshes_of: list[Mesh], source: Path, optimizer: str = "adam", rule: str = "jumprelu"
) -> None:
    """Every rank loads a checkpoint and saves it as step 3, the last rank first."""
    savings = []
    for mesh in meshes_of:
        model, made, _, shard = on_rank(mesh, "clt", rule, optimizer)
        state = checkpoint.load(source, model, made, mesh, shard)
        state.step = 3
        torch.manual_seed(mesh.world.rank)
        if rule == "jumprelu":
            model.activation.form.fill_(mesh.world.rank)  # type: ignore[operator, union-attr]
        # Copies: what one rank has of its own is not to be the next one's.
        savings.append(Copies().of(checkpoint.prepared(to, model, made, state, {}, mesh, shard))[0])
    assert [saving.write() for saving in reversed(savings)] == [False] * (len(savings) - 1) + [True]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", *trained(options_of("clt"), "jumprelu", "adam"), {})


def test_what_is_of_a_rank_alone_comes_back_to_it_and_that_of_rank_0_to_others(tmp_path: Path, one: Path) -> None:
    save_in_turn(tmp_path / "run", grid(2, 2), one)

    def restored(mesh: Mesh) -> tuple[list[int], Tensor]:
        model, made, _, shard = on_rank(mesh, "clt", "jumprelu", "adam")
        checkpoint.load(tmp_path / "run/checkpoints/step_3", model, made, mesh, shard)
        return model.activation.form.tolist(), torch.rand(3)  # type: ignore[operator, union-attr]

    def drawn(seed: int) -> Tensor:
        return torch.rand(3, generator=torch.Generator().manual_seed(seed))

    for mesh in grid(2, 2):
        form, numbers = restored(mesh)
        assert form == [mesh.world.rank] * L
        assert torch.equal(numbers, drawn(mesh.world.rank))
    for mesh in [meshes.alone(), *grid(4), *grid(1, 2)]:
        form, numbers = restored(mesh)
        assert form == [0] * L
        assert torch.equal(numbers, drawn(0))


def test_a_rank_reads_its_own_rows_alone(tmp_path: Path, one: Path) -> None:
    save_in_turn(tmp_path / "run", grid(4), one)
    mesh = grid(4)[2]
    model, made, _, shard = on_rank(mesh, "clt", "jumprelu", "adam")
    place = tmp_path / "run/checkpoints/step_3"
    for rank in (0, 1, 3):  # the others' moments may be anywhere
        (place / f"optimizer-0000{rank + 1}-of-00004.safetensors").rename(tmp_path / f"{rank}")
    # All but the step counters, which are rank 0's.
    with pytest.raises(FileNotFoundError):
        checkpoint.load(place, model, made, mesh, shard)
    (tmp_path / "0").rename(place / "optimizer-00001-of-00004.safetensors")
    opened: list[Stored] = []
    init = Stored.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "__init__", lambda self, *args: (opened.append(self), init(self, *args))[1])
        checkpoint.load(place, model, made, mesh, shard)
    for stored in opened:
        for file, name, elements in stored.slices:
            if "-00001-" in file:
                assert elements <= L * D * D, (file, name)  # W_skip is the largest that all share
    read = sum(elements for stored in opened for _, _, elements in stored.slices)
    held = 3 * sum(parameter.numel() for parameter in model.parameters())
    assert read < 1.2 * held + 10_000  # 10,000: random numbers


WIDE = oracle.arch_options("clt", d_features=12 * 128)
"""128 rows of 6 numbers are 3 blocks of 256: 2, 3 and 4 ranks meet at borders of blocks."""


def coded(mesh: Mesh, seed: int = 9) -> tuple[Transcoder, Optimizer, State, Shard]:
    """With moments of 8 bits."""
    shard = shards(WIDE, oracle.activation_options("topk"), L, mesh.features.size)[mesh.features.rank]
    return *build(WIDE, "topk", "adam8bit", shard, mesh.features.rank == 0, seed), shard


def recoded(to: Path, meshes_of: list[Mesh], source: Path) -> Path:
    """What these ranks read of a checkpoint, written by them."""
    savings = []
    for mesh in meshes_of:
        model, made, _, shard = coded(mesh)
        state = checkpoint.load(source, model, made, mesh, shard)
        savings.append(checkpoint.prepared(to, model, made, state, {}, mesh, shard))
    assert [saving.write() for saving in reversed(savings)][-1]
    return savings[0].target


@pytest.fixture
def one_coded(tmp_path: Path) -> Path:
    model, made, state, _ = coded(meshes.alone(), seed=0)
    model(oracle.normal(B, L, D, dtype=torch.float32)).y_hat.square().sum().backward()
    made.step()
    return checkpoint.save(tmp_path / "one", model, made, state, {})


def test_moments_of_eight_bits_go_from_any_number_of_ranks_to_any_other(tmp_path: Path, one_coded: Path) -> None:
    before = as_bytes(one_coded)
    tensors = load_file(one_coded / "optimizer.safetensors")
    assert tensors["exp_avg.codes/encoders.0"].float().std() > 0
    assert tensors["exp_avg_sq.scale/decoders.0.1"].unique().numel() > 5
    four = recoded(tmp_path / "four", grid(4), one_coded)
    rows = Stored(four, "optimizer")
    assert rows.read("exp_avg.scale/encoders.1", 0, [range(9, 18)]).numel() == 9
    assert list(rows.slices) == [("optimizer-00002-of-00004.safetensors", "exp_avg.scale/encoders.1", 9)]
    for name, meshes_of in {"two": grid(2), "three": grid(3), "two by two": grid(2, 2), "data": grid(1, 2)}.items():
        place = recoded(tmp_path / name, meshes_of, four)
        assert as_bytes(recoded(tmp_path / f"{name} gathered", [meshes.alone()], place)) == before, name
    assert as_bytes(recoded(tmp_path / "by one", [meshes.alone()], four)) == before


def test_a_rank_has_the_moments_of_its_rows(one_coded: Path) -> None:
    model, made, _, _ = coded(meshes.alone())
    checkpoint.load(one_coded, model, made)
    whole_moment = made.state[model.encoders[1]]["exp_avg"].dequantize()
    for mesh, rows in zip(grid(3), whole_moment.split(len(whole_moment) // 3), strict=True):
        own, made, _, shard = coded(mesh)
        checkpoint.load(one_coded, own, made, mesh, shard)
        assert torch.equal(made.state[own.encoders[1]]["exp_avg"].dequantize(), rows)


def test_checkpoints_of_older_versions_go_on_where_features_are_not_shared(tmp_path: Path, one_coded: Path) -> None:
    # They had 8 bits for large biases too, and a piece of all features for each of several data ranks.
    file = one_coded / "optimizer.safetensors"
    bias = {name.replace("encoders.0", "b_enc"): t for name, t in load_file(file).items() if "encoders.0" in name}
    bias = {name: t.flatten()[: L * 1536].reshape(L, -1) if "codes" in name else t for name, t in bias.items()}
    plain = {name: t for name, t in load_file(file).items() if not name.endswith("/b_enc")}
    bias = {name: t[:12] if "scale" in name else t for name, t in bias.items()}
    save_file(plain | bias, file)
    place = recoded(tmp_path / "data", grid(1, 2), one_coded)
    index = json.loads((place / "index.json").read_text())
    for name, entry in index["files"]["optimizer"].items():
        if "." in name.split("/")[0]:
            [piece] = entry["pieces"]
            entry |= {"each": "features", "axis": None, "pieces": [{"file": piece["file"], "rank": 0}]}
    (place / "index.json").write_text(json.dumps(index))
    for source in (one_coded, place):
        for mesh in (meshes.alone(), grid(1, 3)[2]):
            model, made, _, shard = coded(mesh)
            checkpoint.load(source, model, made, mesh, shard)
            assert torch.equal(made.state[model.b_enc]["exp_avg"].codes, bias["exp_avg.codes/b_enc"])
        model, made, _, shard = coded(grid(2)[1])
        with pytest.raises(
            UserError, match=r"step_0 is of an older version.* 2 feature ranks cannot share; go on with"
        ):
            checkpoint.load(source, model, made, grid(2)[1], shard)


# Killed


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir"}


def in_a_child(work: Callable[[], None]) -> int:
    """Its exit code, below 0 for the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int) -> None:
    left = [number]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in FILE_EVENTS and "checkpoints" in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
def test_killed_before_any_touch_of_a_file_there_is_a_whole_checkpoint_or_none(tmp_path: Path, one: Path) -> None:
    run, seen = tmp_path / "run", set()
    for number in range(1, 200):

        def killed(number: int = number) -> None:
            kill_at(number)
            save_in_turn(run, grid(2), one)

        code = in_a_child(killed)
        assert code in (0, -signal.SIGKILL)
        newest = checkpoint.newest(run)
        assert newest is not None
        seen.add((newest.name, code))
        model, made, _, shard = on_rank(meshes.alone(), "clt", "jumprelu", "adam")
        assert checkpoint.load(newest, model, made, None, shard).step == int(newest.name[-1])
        checkpoint.tidy(run)
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step_2", "step_3"}
        if code == 0:
            break
        if newest.name == "step_3":
            checkpoint.prune(run, 0)
            checkpoint.save(run, *trained(options_of("clt"), "jumprelu", "adam"), {})
    assert seen == {("step_2", -9), ("step_3", -9), ("step_3", 0)}
    assert number > 20


def test_a_rank_that_never_writes_leaves_nothing_and_is_not_waited_for_after_an_error(
    tmp_path: Path, one: Path
) -> None:
    mesh = grid(2)[0]
    model, made, state, shard = on_rank(mesh, "clt", "jumprelu", "adam")

    def run() -> None:
        with Writer(tmp_path / "run", mesh, shard, beside=True) as writer:
            state.step = 5
            writer.save(model, made, state, {})
            writer.check()
            raise ValueError("of the loop")

    with pytest.raises(ValueError, match="of the loop"):
        run()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_2"]


def test_a_rank_that_cannot_write_is_named_by_rank_0_and_nothing_is_left(tmp_path: Path, one: Path) -> None:
    savings = []
    for mesh in grid(2):
        model, made, state, shard = on_rank(mesh, "clt", "jumprelu", "adam")
        state.step = 5
        savings.append(checkpoint.prepared(tmp_path / "run", model, made, state, {}, mesh, shard))
    with pytest.raises(UserError, match=r"step_5 could not be written"), files_of_at_most(3000):
        savings[1].write()
    with pytest.raises(UserError, match=r"^rank 1: .*step_5 could not be written.*free some space"):
        savings[0].write()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_2"]


def test_rank_0_says_whom_it_waits_for(
    tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(together, "SLOW_WARNING_S", 0.0)
    mesh = grid(2)[0]
    model, made, state, shard = on_rank(mesh, "clt", "jumprelu", "adam")
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert not checkpoint.prepared(tmp_path / "run", model, made, state, {}, mesh, shard).write(stop)
    assert caplog.text.count("step_0: waiting for ranks 1") == 1


def test_checkpoints_of_one_and_of_many_are_kept_and_pruned_alike(tmp_path: Path, one: Path) -> None:
    run = tmp_path / "run"
    save_in_turn(run, grid(2), one)
    for step, score in ((2, 0.5), (3, 0.25)):
        file = run / f"checkpoints/step_{step}/state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {checkpoint.SCORE: score}))
    assert [path.name for path in checkpoint.best(run, 2)] == ["step_3", "step_2"]
    model, made, state = trained(options_of("clt"), "jumprelu", "adam")
    state.step = 4
    checkpoint.save(run, model, made, state, {})
    checkpoint.prune(run, 1, 1)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_3", "step_4"}


# Together, beside the training


def write_beside(source: Path, to: Path) -> list[bool]:
    with meshes.started(SHARDED[3], CPU) as mesh:
        model, made, _, shard = on_rank(mesh, "clt", "jumprelu", "adam")
        state = checkpoint.load(source, model, made, mesh, shard)
        seen = []
        with Writer(to, mesh, shard, beside=True) as writer:
            for step in (3, 4):
                state.step = step
                writer.save(model, made, state, {}, then=lambda: checkpoint.prune(to, 1))
                for parameter in model.parameters():
                    parameter.data += 1
                writer.check()
            writer.wait()
            seen.append((to / "checkpoints/step_4/index.json").exists())
            seen.append((to / "checkpoints/step_3").exists())
    return seen


def test_ranks_write_beside_the_training_and_all_wait_until_it_is_there(tmp_path: Path, one: Path) -> None:
    assert processes.run(3, write_beside, one, tmp_path / "beside") == [[True, False]] * 3
    fresh = on_rank(meshes.alone(), "clt", "jumprelu", "adam")
    checkpoint.load(tmp_path / "beside/checkpoints/step_4", *fresh[:2])
    assert torch.equal(fresh[0].b_enc, load_file(one / "model.safetensors")["b_enc"] + 1)


# Finished transcoders


def finish(architectures: list[str], dist: DistOptions, source: Path, to: Path) -> None:
    with meshes.started(dist, CPU) as mesh:
        for architecture in architectures:
            arch = options_of(architecture)
            n_sources = table.n_sources(arch, Dims(L, D))
            shard = shards(arch, oracle.activation_options("topk"), n_sources, mesh.features.size)[mesh.features.rank]
            own = artifact.read(source / architecture, shard)
            rule = own.transcoder.activation
            assert isinstance(rule, FixedThreshold)
            assert own.transcoder.d_features == shard.n == rule.threshold.shape[1]
            config = {key: value for key, value in own.config.items() if key != "schema"}
            place = artifact.save(
                to / architecture, own.transcoder, rule.threshold, own.y_mean, config, own.rank_norms, mesh, shard
            )
            assert (place / "index.json").exists()


@pytest.mark.parametrize("dist", [SHARDED[4], DistOptions("mesh", 2, 2)], ids=lambda dist: dist.name)
def test_a_finished_transcoder_of_four_ranks_is_read_as_that_of_one(tmp_path: Path, dist: DistOptions) -> None:
    for architecture in ARCHS:
        arch = options_of(architecture)
        n_sources = table.n_sources(arch, Dims(L, D))
        theta = oracle.normal(n_sources, F, dtype=torch.float32).abs()
        model = oracle.transcoder(arch, FixedThreshold(theta), L, F, D, dtype=torch.float32)
        described = artifact.describe(arch, model.dims, oracle.activation_options("topk"))
        norms = oracle.normal(n_sources, F, seed=8) if architecture != "molt" else None
        artifact.save(tmp_path / "one" / architecture, model, theta, oracle.normal(L, D, seed=4), described, norms)
    processes.run(4, finish, list(ARCHS), dist, tmp_path / "one", tmp_path / "four")
    for architecture in ARCHS:
        before, after = (artifact.read(tmp_path / place / architecture) for place in ("one", "four"))
        assert before.config == after.config
        again = artifact.save(
            tmp_path / "again" / architecture,
            after.transcoder,
            after.transcoder.activation.threshold,  # type: ignore[arg-type]
            after.y_mean,
            {key: value for key, value in after.config.items() if key != "schema"},
            after.rank_norms,
        )
        assert as_bytes(again) == as_bytes(tmp_path / "one" / architecture / "final"), architecture
