"""`clt features`: each number of a feature against its definition over dense activations, and stops at any instant."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.interp import opening
from pipeline.interp.dashboards import feature_files, feature_writer, features
from pipeline.stages import features as stage
from pipeline.stages import train
from pipeline.train import artifact
from tests.stages.conftest import SHORT

L, F, T, N = 3, 33, 24, 20
"""Layers, features a layer, tokens of a context, held-out contexts."""
ALL = ["features.sample=1000", "features.before=5", "features.after=3", "features.top=4", "features.bins=6"]
ALL += ["features.quantiles=3", "features.per_quantile=2", "features.batch_tokens=100", "features.related=5"]
RECORD = {
    *("transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max"),
    *("quantile_values", "histogram", "activation_frequency"),
}


def described(*words: str) -> Path:
    """The directory of a command that succeeds."""
    assert launch("features", Request(overrides=words)) == 0
    return Path("runs/batchtopk/features")


def dense(run: str, split: Split = Split.evaluation) -> tuple[Tensor, np.ndarray]:
    """(activations [N, T - 1, L, F], contexts [N, T]) by the definition, all at once."""
    cache = Cache.open(next(path for path in Path("cache").iterdir() if path.is_dir()))
    contexts, resid_mid, _ = cache.held_out(split)
    with torch.no_grad():
        found = pipeline.load(run)(cache.norm(resid_mid.float()), need_pre_acts=True).features
    assert isinstance(found, Tensor)
    return found.unflatten(0, (N, T - 1)), contexts


@pytest.fixture
def made(finished: Path) -> tuple[Path, Tensor, np.ndarray]:
    directory = described("run=batchtopk", *ALL)
    return directory, *dense("runs/batchtopk")


def each(directory: Path) -> list[dict[str, Any]]:
    found = [feature_files.read(directory, layer, feature) for layer in range(L) for feature in range(F)]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def test_counts_ranges_and_histograms_are_those_of_all_activations(made: tuple[Path, Tensor, np.ndarray]) -> None:
    directory, activations, _ = made
    fired = 0
    for record in each(directory):
        values = activations[:, :, record["layer"], record["index"]].flatten().double().numpy()
        values = values[values > 0]
        assert record.keys() >= RECORD
        assert record["n_active"] == len(values)
        assert record["activation_frequency"] == len(values) / (N * (T - 1))
        if not len(values):
            assert (record["act_min"], record["act_max"], record["histogram"], record["label"]) == (0, 0, [], "")
            continue
        fired += 1
        assert record["act_min"] == pytest.approx(values.min(), rel=1e-4)
        assert record["act_max"] == pytest.approx(values.max(), rel=1e-4)
        assert record["act_mean"] == pytest.approx(values.mean(), rel=1e-4)
        assert record["histogram"] == np.histogram(values, 6, (values.min(), values.max() + 1e-12))[0].tolist()
        assert record["quantile_values"] == pytest.approx(np.quantile(values, np.arange(1, 101) / 100), rel=1e-4)
    assert fired > 20


def test_top_contexts_are_those_with_the_highest_activations_one_of_each(
    made: tuple[Path, Tensor, np.ndarray], tiny_gpt2: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    directory, activations, contexts = made
    for record in each(directory):
        mine = activations[:, :, record["layer"], record["index"]]
        highest = mine.amax(dim=1)
        best = [c for c in (-highest).argsort(stable=True).tolist() if highest[c] > 0][:4]
        parts = {part["quantile_name"]: part["examples"] for part in record["examples_quantiles"]}
        tops = parts.get("Top activations", [])
        assert [example["context"] for example in tops] == best
        for example, c in zip(tops, best, strict=True):
            position = 1 + int(mine[c].argmax())
            start, stop = max(0, position - 5), min(T, position + 4)
            assert example["train_token_ind"] == position - start
            assert example["tokens"] == [tokenizer.decode([token]) for token in contexts[c, start:stop].tolist()]
            whole = torch.cat([torch.zeros(1), mine[c]])[start:stop]
            assert example["tokens_acts_list"] == pytest.approx(whole.tolist(), rel=1e-4, abs=1e-6)
            assert not example["is_repeated_datapoint"]


def test_quantile_examples_come_from_their_part_of_the_active_tokens(made: tuple[Path, Tensor, np.ndarray]) -> None:
    directory, activations, _ = made
    names = [f"Quantile {part} %" for part in ("67-100", "33-67", "0-33")]
    for record in each(directory):
        values = activations[:, :, record["layer"], record["index"]].flatten()
        ranked = values[values > 0].sort().values
        for part in record["examples_quantiles"][1:]:
            third = 2 - names.index(part["quantile_name"])
            low, high = math.ceil(third * len(ranked) / 3), math.ceil((third + 1) * len(ranked) / 3) - 1
            assert len({example["context"] for example in part["examples"]}) == len(part["examples"]) <= 2
            for example in part["examples"]:
                peak = example["tokens_acts_list"][example["train_token_ind"]]
                assert ranked[low] * 0.9999 <= peak <= ranked[high] * 1.0001


def test_logits_go_through_the_final_norms_gain_and_the_unembedding(
    made: tuple[Path, Tensor, np.ndarray], tiny_gpt2: Path
) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)
    clt = pipeline.load("runs/batchtopk")
    for record in each(made[0]):
        rows = clt.W_dec[record["layer"]][record["index"]]
        written = rows.sum(dim=0)
        effect = ((written - written.mean()) * model.transformer.ln_f.weight) @ model.lm_head.weight.T
        best = effect.sort(descending=True)
        assert record["top_logits"] == [tokenizer.decode([token]) for token in best.indices[:10].tolist()]
        assert record["top_logit_values"] == pytest.approx(best.values[:10].tolist(), rel=1e-3, abs=1e-5)
        assert record["bottom_logits"] == [tokenizer.decode([token]) for token in best.indices.flip(0)[:10].tolist()]
        norms = [0.0] * record["layer"] + rows.norm(dim=1).tolist()
        assert record["decoder_norms"] == pytest.approx(norms, rel=1e-4)


def test_related_features_write_alike_or_are_active_together(made: tuple[Path, Tensor, np.ndarray]) -> None:
    directory, activations, _ = made
    clt = pipeline.load("runs/batchtopk")
    rows = [torch.cat([torch.zeros(F, l, 20), W], dim=1).flatten(1) for l, W in enumerate(clt.W_dec)]
    unit = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    cosine = unit @ unit.T - 2 * torch.eye(L * F)
    on = (activations.flatten(0, 1) > 0).flatten(1).double()
    both, counts = on.T @ on, on.sum(dim=0)
    score = (both / (counts[:, None] * counts).sqrt()).nan_to_num(0) * (both >= 5)
    score.fill_diagonal_(0)
    for i, record in enumerate(each(directory)):
        near = record["related"]["decoder"]
        assert [value for _, _, value in near] == pytest.approx(cosine[i].sort(descending=True).values[:5], abs=1e-4)
        assert all(cosine[i, l * F + f] == pytest.approx(value, abs=1e-4) for l, f, value in near)
        met = record["related"]["active"]
        best = [value for value in score[i].sort(descending=True).values[:5].tolist() if value > 0]
        assert [value for _, _, value, _ in met] == pytest.approx(best, rel=1e-4)
        assert all(both[i, l * F + f] == n for l, f, _, n in met)


def test_the_tables_hold_what_the_files_hold(made: tuple[Path, Tensor, np.ndarray]) -> None:
    directory, _, _ = made
    records = each(directory)
    rows = parquet.read_table(directory / "features.parquet").to_pylist()
    assert [(row["layer"], row["feature"]) for row in rows] == [(l, f) for l in range(L) for f in range(F)]
    for row, record in zip(rows, records, strict=True):
        for name in ("label", "n_active", "histogram", "top_logits"):
            assert row[name] == record[name]
    examples = [
        (record["layer"], record["index"], part["quantile_name"], example["tokens"])
        for record in records
        for part in record["examples_quantiles"]
        for example in part["examples"]
    ]
    rows = parquet.read_table(directory / "contexts.parquet").to_pylist()
    assert [(row["layer"], row["feature"], row["quantile_name"], row["tokens"]) for row in rows] == examples
    assert all(row["activation"] == row["activations"][row["peak"]] for row in rows)


def test_a_label_is_made_of_the_tokens_at_the_peaks(made: tuple[Path, Tensor, np.ndarray]) -> None:
    for record in each(made[0]):
        if not record["n_active"]:
            continue
        mass: dict[str, float] = {}
        for example in record["examples_quantiles"][0]["examples"]:
            at = example["train_token_ind"]
            text = example["tokens"][at].strip() or repr(example["tokens"][at])
            mass[text] = mass.get(text, 0) + example["tokens_acts_list"][at]
        best = sorted(mass.values(), reverse=True)
        assert record["label"].split(" / ")[0] in {text for text, value in mass.items() if value == best[0]}
        assert [share for _, share in record["top_tokens"]] == pytest.approx(
            [value / sum(best) for value in best], rel=1e-2
        )


def test_a_sample_and_other_blocks_change_nothing_that_is_exact(made: tuple[Path, Tensor, np.ndarray]) -> None:
    directory, activations, _ = made
    before = each(directory)
    described("run=batchtopk", *ALL[1:6], "features.sample=3", "features.batch_tokens=4000", "features.quantiles=3")
    for record, old in zip(each(directory), before, strict=True):
        for name in ("n_active", "histogram", "top_logits", "label"):
            assert record[name] == old[name]
        tops = [part["examples"] for part in record["examples_quantiles"][:1]]
        assert tops == [part["examples"] for part in old["examples_quantiles"][:1]]
        assert sum(len(part["examples"]) for part in record["examples_quantiles"][1:]) <= 3
        values = activations[:, :, record["layer"], record["index"]]
        assert all(values.sub(value).abs().min() < 1e-3 for value in record["quantile_values"][-1:])


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Stop:
    """Raises KeyboardInterrupt the n-th time that anything is written, renamed or removed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = -1
        places: list[tuple[Any, str]] = [(features, "write_aside"), (feature_writer, "write_aside"), (shutil, "rmtree")]
        places += [(feature_writer, "sync"), (Path, "rename"), (Path, "write_text"), (feature_files, "write_aside")]
        for place, name in [*places, (Path, "unlink")]:
            patch.setattr(place, name, self._counting(getattr(place, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize(
    ("packed", "stride"),
    [(False, 19), pytest.param(False, 2, marks=pytest.mark.slow), pytest.param(True, 2, marks=pytest.mark.slow)],
)
def test_a_run_stopped_at_any_write_goes_on_to_the_same_bytes(
    packed: bool, stride: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = opening.base_model(artifact.read("runs/batchtopk"), "cpu")
    monkeypatch.setattr(opening, "base_model", lambda trained, device: lm)
    monkeypatch.setattr(features, "SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(features.Notes.__init__, "__defaults__", (0.0,))
    monkeypatch.setattr(features, "bytes_of", lambda options: 1 << 19)  # two features in a group
    words = [
        "run=batchtopk",
        "features.ids=[0/3,0/4,1/32,2/0,2/7]",
        f"features.packed={packed}",
        "features.memory_mb=1",
        *ALL,
    ]
    whole = files(stage.run(compose("features", words)) or Path())
    stop, number = Stop(monkeypatch), 0
    while True:
        number += stride
        shutil.rmtree("runs/batchtopk/features")
        stop.left = number
        try:
            stage.run(compose("features", words))
        except KeyboardInterrupt:
            stop.left = -1
            made = stage.run(compose("features", words))
            assert made is not None
            assert files(made) == whole, f"stopped at write {number}"
            assert [path.name for path in Path("runs/batchtopk").glob(".features*")] == []
        else:
            break
    assert number > 40


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(finished: Path) -> None:
    words = ["run=batchtopk", "features.batch_tokens=23", "features.related=0"]
    whole = files(described(*words))
    shutil.rmtree("runs/batchtopk/features")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    code = "import sys; from pipeline.interp.dashboards.features import Notes; Notes.__init__.__defaults__ = (0.0,); "
    code += "from pipeline.config import Request, launch; sys.exit(launch('features', Request(overrides=sys.argv[1:])))"
    work, left = Path("runs/batchtopk/.features.making"), 6
    while left:
        process = subprocess.Popen([sys.executable, "-c", code, *words], env=env, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (work / "request.json").exists():
            time.sleep(0.01)
        time.sleep(0.05 * left)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left -= 1
    subprocess.run([sys.executable, "-c", code, *words], env=env, check=True, capture_output=True)
    assert files(Path("runs/batchtopk/features")) == whole


def test_what_has_been_made_is_not_made_again(
    finished: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    described("run=batchtopk", "features.ids=0/1,2/4")
    monkeypatch.setattr(opening, "base_model", lambda trained, device: pytest.fail("the model was loaded"))
    caplog.set_level(logging.INFO, "pipeline")
    described("run=batchtopk", "features.ids=[2/4, 0/1, 0/1]", "features.memory_mb=1")
    assert "has been made from this run with these settings already" in caplog.text


def test_features_are_chosen_by_layer_number_file_and_activity(finished: Path) -> None:
    def made(*words: str) -> list[tuple[int, int]]:
        table = parquet.read_table(described("run=batchtopk", *words) / "features.parquet")
        return [(row["layer"], row["feature"]) for row in table.select(["layer", "feature"]).to_pylist()]

    assert made("features.layers=[2,0]") == [(l, f) for l in (0, 2) for f in range(F)]
    Path("mine.txt").write_text("2/4\n0/31\n")
    assert made("features.ids=mine.txt") == [(0, 31), (2, 4)]
    drawn = made("features.n=10")
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn)
    assert made("features.n=10", "features.seed=1") != drawn
    counts = (dense("runs/batchtopk")[0] > 0).flatten(0, 1).sum(dim=0).flatten()
    best = made("features.n=10", "features.choose=most_active")
    assert sorted(counts[[l * F + f for l, f in best]].tolist()) == counts.sort().values[-10:].tolist()


def test_training_tokens_are_computed_again_as_the_cache_rounds_them(finished: Path) -> None:
    """Against the cache's own rows, which lie in another order."""
    directory = described("run=batchtopk", "features.split=training", "features.n_tokens=400", "features.sample=500")
    cache = Cache.open(next(path for path in Path("cache").iterdir() if path.is_dir()))
    resid = torch.cat([cache.rows("resid_mid", chunk) for chunk in range(cache.specs["resid_mid"].n_chunks)]).float()
    context, _, _ = cache.locate(np.arange(cache.n_rows))
    with torch.no_grad():
        found = pipeline.load("runs/batchtopk")(cache.norm(resid[torch.from_numpy(context < 18)]), need_pre_acts=True)
    assert isinstance(found.features, Tensor)
    assert found.features.shape[0] == 18 * 23
    for record in each(directory):
        values = found.features[:, record["layer"], record["index"]]
        # A forward pass over other batches: bfloat16 may round to the other side.
        assert abs(record["n_active"] - int((values > 0).sum())) <= 2
        assert record["act_max"] == pytest.approx(float(values.max()), rel=0.02, abs=0.02)


def test_a_search_ranks_features_by_their_share_of_activation_on_the_text(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = described("run=batchtopk", *ALL)
    assert launch("features", Request(overrides=("run=batchtopk", "search=ER", "to=found.json"))) == 0
    found = json.loads(Path("found.json").read_text())["features"]
    assert found
    shares = {}
    for record in each(directory):
        examples = [e for part in record["examples_quantiles"] for e in part["examples"]]
        examples = [e for e in examples if not e["is_repeated_datapoint"]]
        on = total = n = 0.0
        for example in examples:
            text = "".join(
                token[-1] if token != "<bos>" else "#" for token in example["tokens"]
            ).lower()  # a token each
            hit = {at + j for at in range(len(text)) for j in (0, 1) if text.startswith("er", at)}
            on += sum(example["tokens_acts_list"][i] for i in hit)
            total += sum(example["tokens_acts_list"])
            n += bool(hit)
        if n:
            shares[record["layer"], record["index"]] = on / total if total else 0
    assert {(one["layer"], one["feature"]): one["score"] for one in found} == pytest.approx(shares, rel=1e-3)
    assert [one["score"] for one in found] == sorted(shares.values(), reverse=True) or len(found) == len(shares)
    assert all("er" in one["example"].lower() for one in found if one["score"] > 0)


def test_a_prompt_shows_the_features_of_each_token(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = described("run=batchtopk", *ALL)
    caplog.set_level(logging.INFO, "pipeline")
    words = ("run=batchtopk", "prompt=The old", "to=on.json", "features.shown=3")
    assert launch("features", Request(overrides=words)) == 0
    rows = json.loads(Path("on.json").read_text())["tokens"]
    model = pipeline.replace("runs/batchtopk", device="cpu")
    tokens = model.tokens("The old")
    original = model.original(tokens)
    with torch.no_grad():
        found = model.transcoder(torch.stack([x[0] for x in original.x], dim=1), need_pre_acts=True).features
    assert isinstance(found, Tensor)
    assert [row["token"] for row in rows] == ["<bos>", *"The old"]
    assert rows[0]["features"] == []
    for row in rows[1:]:
        mine = found[row["position"]].flatten()
        best = [value for value in mine.sort(descending=True).values[:3].tolist() if value > 0]
        assert [entry["activation"] for entry in row["features"]] == pytest.approx(best, rel=1e-4)
        for entry in row["features"]:
            assert entry["label"] == feature_files.label(directory, entry["layer"], entry["feature"])


@pytest.mark.parametrize(
    "arch",
    [
        "crosscoder",
        "molt",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sae", "matryoshka", "tied", "skip")),
    ],
)
def test_every_architecture_has_features(arch: str, cached: Path) -> None:
    words = ["+experiment=batchtopk", "activation.k=4", f"arch={arch}", "name=it", *SHORT, "train.n_steps=2"]
    words = [word for word in words if arch != "molt" or not word.startswith("arch.d_features")]
    train.run(compose("train", words))
    assert launch("features", Request(overrides=("run=it", "features.n=40"))) == 0
    rows = parquet.read_table("runs/it/features/features.parquet").to_pylist()
    assert any(row["n_active"] for row in rows)
    assert all(bool(row["top_logits"]) == (arch not in {"sae", "molt"}) for row in rows)
    assert all(bool(row["related_decoder"]) == (arch != "molt") for row in rows)


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    before = files(Path("runs"))
    stage.run(compose("features", ["run=batchtopk", "dry_run=true"]))
    assert "99 features of runs/batchtopk; 460 tokens of the evaluation split, 2 passes" in caplog.text
    assert files(Path("runs")) == before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["features.ids=[0/33]"], r"there is no feature 0/33; layers are 0 to 2, features 0 to 32"),
        (["features.ids=0-3"], r"features.ids=0-3 is no file and no list; write \[0/12,1/7\]"),
        (["features.ids=[0/1,7]"], r"'7' names no feature; write LAYER/INDEX"),
        (["features.ids=[0/1]", "features.n=5"], r"leave features.layers and features.n out"),
        (["features.layers=[0,3]"], r"features.layers=\[3\]: the transcoder's layers are 0 to 2"),
        (["features.n=few"], r"'few' is not a count"),
        (["features.top=0"], r"features.top=0 must be 1 or more"),
        (["search=x"], r"holds no described features; run clt features run=runs/batchtopk first"),
        (["search=x", "prompt=y"], r"ask one at a time"),
        (["prompt="], r"give a prompt with more"),
        (["to=cache"], r"cache exists and holds no features; name another directory with to="),
    ],
)
def test_what_means_nothing_is_refused_and_leaves_nothing(words: list[str], why: str, finished: Path) -> None:
    before = files(Path("runs"))
    with pytest.raises(UserError, match=why):
        stage.run(compose("features", ["run=runs/batchtopk", *words]))
    assert files(Path("runs")) == before
