"""A transcoder whose tables stay on disk gives what it gives in memory, and reads the rows that it needs."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.arch import on_disk
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.on_disk import OnDisk, among_active
from pipeline.arch.table import n_sources
from pipeline.core.activations import ACTIVATIONS, FixedThreshold
from pipeline.core.options import ActivationOptions, Rank
from pipeline.core.sparse import Pattern, Sparse, sparsify
from pipeline.errors import UserError
from pipeline.files import save_tensors
from pipeline.train import artifact, finished
from pipeline.train.options import WeightsIn
from pipeline.train.row_files import Stored
from tests import oracle
from tests.arch.test_contract import VARIANTS
from tests.train.spread import spread

B, L, F, D = 5, 3, 11, 6

READ_BY_ROWS = sorted(name for name, options in VARIANTS.items() if options.name != "molt")
THREE = [(range(3), range(8, 10)), (range(3, 7),), (range(7, 8), range(10, 11))]

each_arch = pytest.mark.parametrize("architecture", READ_BY_ROWS)
each_form = pytest.mark.parametrize("files", ["one", "three"])


def write(
    run: Path, architecture: str = "clt", files: str = "one", activation: ActivationOptions | None = None
) -> None:
    options = VARIANTS[architecture]
    sources = n_sources(options, Dims(L, D))
    # Few features are above these: some are active for no token.
    theta = 0.8 + torch.rand(sources, F, generator=torch.Generator().manual_seed(1))
    model = oracle.transcoder(options, FixedThreshold(theta), dtype=torch.float32)
    rule = activation or oracle.activation_options("topk")
    norms = None if rule.rank is not Rank.norm else torch.rand(sources, F)
    config = artifact.describe(options, model.dims, rule)
    artifact.save(run, model, model.activation.threshold, oracle.normal(L, D, dtype=torch.float32), config, norms)
    if files == "three":
        spread(run, THREE)


def both(run: Path) -> tuple[Transcoder, OnDisk]:
    found = artifact.read(run, on_disk=True).transcoder
    assert isinstance(found, OnDisk)
    return artifact.read(run).transcoder, found


def inputs() -> Tensor:
    return oracle.normal(B, L, D, dtype=torch.float32)


@each_arch
@each_form
def test_features_and_what_they_write_are_those_of_memory_to_the_bit(
    tmp_path: Path, architecture: str, files: str
) -> None:
    write(tmp_path, architecture, files)
    memory, disk = both(tmp_path)
    x = inputs()
    found = []
    for source, h in enumerate(memory.inputs(x)):
        (expected, values), (pattern, others) = memory.layer_features(h, source), disk.layer_features(h, source)
        found.append((pattern, others))
        assert torch.equal(pattern.indices, expected.indices)
        assert torch.equal(pattern.offsets, expected.offsets)
        assert torch.equal(others, values)
        assert len(values)
    patterns, values = zip(*found, strict=True)
    features = Sparse(patterns, values)
    assert torch.equal(disk.decode(features, x), memory.decode(features, x))
    if memory.causal:
        for layer in range(L):
            some = Sparse(patterns[: layer + 1], values[: layer + 1])
            assert torch.equal(
                disk.decode_layer(some, layer, x[:, layer]), memory.decode_layer(some, layer, x[:, layer])
            )


@each_arch
@each_form
def test_the_forward_pass_is_that_of_memory(tmp_path: Path, architecture: str, files: str) -> None:
    """Features to the bit. What they write is a dense product there and a sum over active rows here."""
    write(tmp_path, architecture, files)
    memory, disk = both(tmp_path)
    x = inputs()
    expected, found = memory(x), disk(x)
    assert isinstance(found.features, Sparse)
    assert torch.equal(found.features.dense(), expected.features)
    assert torch.equal(found.y_hat, memory.decode(sparsify(expected.features), x))
    assert oracle.normwise(found.y_hat, expected.y_hat) < 1e-6
    wide = disk(x, need_pre_acts=True)
    assert torch.equal(wide.pre_acts, expected.pre_acts)
    assert torch.equal(wide.y_hat, expected.y_hat)


@each_arch
@each_form
def test_rows_norms_and_weights_are_those_of_memory(tmp_path: Path, architecture: str, files: str) -> None:
    write(tmp_path, architecture, files)
    memory, disk = both(tmp_path)
    ids = torch.tensor([10, 0, 4, 4, 7])
    for source in range(memory.n_sources):
        assert torch.equal(disk.encoder_rows(source, ids), memory.encoder_rows(source, ids))
        assert torch.equal(disk.encoder_rows(source), memory.encoder_rows(source))
        assert torch.equal(disk.encoder_row(source, 7), memory.encoders[source][7])
        for target in memory.targets(source):
            assert torch.equal(disk.table(source, target, ids), memory.table(source, target, ids))
            assert torch.equal(disk.table(source, target), memory.table(source, target))
    assert torch.equal(disk.decoder_norms(), memory.decoder_norms())
    assert disk.n_parameters == memory.n_parameters
    weights = disk.weights()
    assert weights.keys() == memory.weights().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in memory.weights().items())


@each_form
@pytest.mark.parametrize("rank", Rank)
@pytest.mark.parametrize("activation", sorted(name for name, rule in ACTIVATIONS.items() if rule.chooses))
def test_the_rule_of_training_chooses_the_same(tmp_path: Path, activation: str, rank: Rank, files: str) -> None:
    options = oracle.activation_options(activation)
    options.rank = rank
    write(tmp_path, "clt", files, options)
    expected, found = artifact.read(tmp_path).exact(), artifact.read(tmp_path, on_disk=True).exact()
    assert expected is not None
    assert found is not None
    before, after = expected(inputs()), found(inputs())
    assert torch.equal(after.features.dense(), before.features.dense())
    assert torch.equal(after.y_hat, before.y_hat)


def test_ranking_by_the_norms_of_training_reads_no_decoder_row(tmp_path: Path) -> None:
    options = oracle.activation_options("topk")
    options.rank = Rank.norm
    write(tmp_path, activation=options)
    exact = artifact.read(tmp_path, on_disk=True).exact()
    assert isinstance(exact, OnDisk)
    reads = stored(exact).slices
    reads.clear()
    exact.choose(inputs())
    assert {name for _, name, _ in reads} == {"W_enc"}


def stored(model: Transcoder) -> Stored:
    assert isinstance(model, OnDisk)
    assert isinstance(model.rows, Stored)
    return model.rows


@each_form
def test_no_decoder_row_is_read_but_those_of_active_features(tmp_path: Path, files: str) -> None:
    write(tmp_path, "clt", files)
    _, disk = both(tmp_path)
    reads = stored(disk).slices
    assert {name for _, name, _ in reads} == {"threshold", "b_enc", "b_dec", "y_mean"}
    reads.clear()
    features = disk.activate(inputs(), need_pre_acts=False).features
    assert {name for _, name, _ in reads} == {"W_enc"}
    assert sum(n for *_, n in reads) == L * F * D
    reads.clear()
    disk.written(features)
    for source in range(L):
        n_active = len(features.patterns[source].indices.unique())
        assert 0 < n_active < F
        read = sum(n for _, name, n in reads if name == f"W_dec.{source}")
        assert read == n_active * (L - source) * D
    reads.clear()
    disk.table(0, 2, torch.tensor([3, 9]))
    assert [(name, n) for _, name, n in reads if n] == (
        [("W_dec.0", 2 * D)] if files == "one" else 2 * [("W_dec.0", D)]
    )


def test_a_feature_that_nobody_has_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    memory, disk = both(tmp_path)
    nothing = Pattern(torch.zeros(0, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64), F)
    features = Sparse([nothing] * L, [torch.zeros(0)] * L)
    assert torch.equal(disk.decode(features, inputs()), memory.decode(features, inputs()))
    ids, pattern = among_active(nothing)
    assert (len(ids), pattern.n_features) == (0, 0)


@each_form
def test_an_encoder_larger_than_a_piece_is_read_in_pieces(
    tmp_path: Path, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = 150
    options = oracle.arch_options("clt", d_features=wide)
    model = oracle.transcoder(options, FixedThreshold(torch.ones(L, wide)), d_features=wide, dtype=torch.float32)
    config = artifact.describe(options, model.dims, oracle.activation_options("topk"))
    artifact.save(tmp_path, model, torch.ones(L, wide), torch.zeros(L, D), config)
    if files == "three":
        spread(tmp_path, [(range(40), range(100, 120)), (range(40, 100),), (range(120, wide),)])
    monkeypatch.setattr(on_disk, "PIECE_BYTES", 64 * D * 4)
    memory, disk = both(tmp_path)
    reads = stored(disk).slices
    reads.clear()
    found = disk.encode_layer(inputs()[:, 1], 1)
    assert sum(n for *_, n in reads) == wide * D
    assert max(n for *_, n in reads) <= 64 * D
    assert len(reads) >= 3
    torch.testing.assert_close(found, memory.encode_layer(inputs()[:, 1], 1))
    assert torch.equal(disk.decoder_norms(), memory.decoder_norms())


def test_copies_in_another_type_read_the_same_files_in_that_type(tmp_path: Path) -> None:
    write(tmp_path, "tied")
    memory, disk = both(tmp_path)
    copied, x = copy.deepcopy(disk).to(torch.float64), inputs().double()
    assert copied.encoder_rows(0).dtype == torch.float64
    assert oracle.normwise(copied(x).y_hat, memory.double()(x).y_hat) < 1e-12
    assert disk.encoder_rows(0).dtype == torch.float32
    assert disk.b_dec.dtype == torch.float32


def test_rows_that_are_stored_in_16_bits_are_widened(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "final" / artifact.WEIGHTS
    tensors = load_file(file)
    save_tensors({name: t.bfloat16() if name.startswith("W") else t for name, t in tensors.items()}, file)
    memory, disk = both(tmp_path)
    assert torch.equal(disk.table(0, 1), memory.table(0, 1))
    assert disk(inputs()).y_hat.dtype == torch.float32


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    found = [10**9]
    monkeypatch.setattr(finished, "available_memory", lambda: found[0])
    return found


SIZE = 4 * (L * F * D + L * F + F * 6 * D + L * D + L * F + L * D)
"""Of clt, its thresholds and y_mean."""


def test_what_takes_more_than_half_of_the_free_memory_stays_on_disk(
    tmp_path: Path, free: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    caplog.set_level(logging.INFO)
    free[0] = 2 * SIZE
    assert not isinstance(finished.read(tmp_path, WeightsIn.auto, "cpu").transcoder, OnDisk)
    assert not caplog.messages
    free[0] = 2 * SIZE - 1
    assert isinstance(finished.read(tmp_path, WeightsIn.auto, "cpu").transcoder, OnDisk)
    [line] = caplog.messages
    assert f"{tmp_path / 'final'}, where rows are read as they are needed, and would take 0.00278 MB" in line
    assert not isinstance(finished.read(tmp_path, WeightsIn.memory, "cpu").transcoder, OnDisk)


def test_the_ranks_of_a_machine_share_its_memory(
    tmp_path: Path, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    free[0] = 4 * SIZE
    assert not isinstance(finished.read(tmp_path, WeightsIn.auto, "cpu").transcoder, OnDisk)
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert isinstance(finished.read(tmp_path, WeightsIn.auto, "cpu").transcoder, OnDisk)


def test_an_architecture_without_decoder_rows_is_refused_or_said_to_be_read_whole(
    tmp_path: Path, free: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "molt")
    with pytest.raises(UserError, match=r"arch=molt has no decoder rows.*use transcoder=memory"):
        finished.read(tmp_path, WeightsIn.disk, "cpu")
    free[0] = 100
    assert not isinstance(finished.read(tmp_path, WeightsIn.auto, "cpu").transcoder, OnDisk)
    [line] = caplog.messages
    assert "go into memory" in line


def test_loading_from_python_takes_the_place_by_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    found: Any = finished.load(tmp_path, transcoder="disk")
    assert isinstance(found, OnDisk)
    assert found.config == json.loads((tmp_path / "final/config.json").read_text())
    assert not isinstance(finished.load(tmp_path), OnDisk)
    with pytest.raises(UserError, match="transcoder=ram says nothing; use auto, memory, disk"):
        finished.load(tmp_path, transcoder="ram")
