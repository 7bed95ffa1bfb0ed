"""Run directories written by hand: what `clt train` and `clt eval` leave, of three layers, in a few kilobytes."""

import json
import struct
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]

SETTINGS: Tree = {
    "model": {"name": "tiny"},
    "dataset": {"name": "english"},
    "arch": {"name": "clt", "d_features": 33, "target": "mlp_out"},
    "activation": {"name": "topk", "k": 4},
    "optim": {"name": "adam", "lr": 0.002},
    "train": {"seed": 0, "n_tokens": "3k"},
    "log": {"every": 5},
}


def make_run(directory: Path, settings: Tree | None = None, metrics: Tree | None = None, finished: bool = True) -> Path:
    """settings: sections over SETTINGS. metrics: of eval/metrics.json; None is a run that was not evaluated."""
    config = {key: dict(section) | (settings or {}).get(key, {}) for key, section in SETTINGS.items()}
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config | {"name": directory.name}))
    lines = [
        {"step": step, "tokens": 128 * step, "loss": 9 / step, "loss/reconstruction": 8 / step, "fvu": 1 / step,
         "l0": 12.0, "dead_fraction": None if step < 10 else 0.25, "lr": 1e-3}
        for step in (5, 10, 15, 20)
    ]  # fmt: skip
    write_lines(directory / "metrics.jsonl", lines)
    times = [{"step": line["step"], "tokens_per_s": 1000.0, "step_ms": 2.0, "data_ms": 0.1} for line in lines]
    write_lines(directory / "timings.jsonl", times)
    if finished:
        final = {
            "arch": config["arch"], "dims": {"n_layers": 3, "d_model": 20}, "activation": config["activation"],
            "model": {"name": "tiny", "weights_sha256": "ab"}, "dataset": {"fingerprint": "cd"},
        }  # fmt: skip
        write_json(directory / "final" / "config.json", final)
        tensors = {"W_enc": [3, 33, 20], "b_enc": [3, 33], "threshold": [3, 33], "y_mean": [3, 20]}
        write_shapes(directory / "final" / "transcoder.safetensors", tensors)
    if metrics is not None:
        write_json(directory / "eval" / "metrics.json", metrics)
    return directory


def measured(scale: float = 1.0, basis: str = "live") -> Tree:
    """A metrics.json of schema 2 with every part; errors are `scale` times those of another."""
    fit: Tree = {
        "l0": {"total": 12.5, "per_layer": [4.0, 4.25, 4.25], "p5": 8, "p50": 12, "p95": 20},
        "dead_fraction": {"total": 0.0625, "per_layer": [0.0, 0.125, 0.0625]},
        "fvu": {"pooled": 0.015625 * scale, "per_layer": [0.01 * scale, 0.02 * scale, 0.03 * scale]},
        "explained_variance": {"pooled": 1 - 0.015625 * scale, "per_layer": [0.99, 0.98, 0.97]},
        "explained_variance_centred": {"pooled": 0.985, "per_layer": [0.99, 0.98, 0.97]},
        "cosine": {"pooled": 0.9876, "per_layer": [0.99, 0.98, 0.97]},
        "bias": {"pooled": 0.0011, "per_layer": [0.001, 0.002, 0.003]},
        "relative_norm": {"pooled": 1.0625, "per_layer": [1.0, 1.1, 1.2]},
        "replacement": {
            "basis": basis, "kl": 0.03125 * scale, "kl_median": 0.0123, "top1": 0.875, "top5": 0.9375,
            "delta_ce": 0.028 * scale, "kl_recovered_mean_ablation": 0.99, "kl_recovered_zero_ablation": 0.995,
            "ce_recovered_mean_ablation": 0.985, "ce_recovered_zero_ablation": 0.9925,
            "kl_by_position": [0.5 * scale, 0.25 * scale, 0.0625 * scale, None],
        },
    }  # fmt: skip
    curve = [{"kl": 0.01 * scale, "top1": 0.9, "delta_ce": 0.01}, {"kl": 0.02, "top1": 0.9, "delta_ce": 0.01},
             {"kl": 0.03 * scale, "top1": 0.9, "delta_ce": 0.01}]  # fmt: skip
    curves = {"only": curve, "up_to": curve, "from": curve}
    intervals = {
        "l0": {"total": [12.0, 13.0]}, "fvu": {"pooled": [0.0125 * scale, 0.01875 * scale]},
        "replacement": {"kl": [0.025 * scale, 0.0375 * scale], "top1": [0.85, 0.9]},
    }  # fmt: skip
    exact = {**fit, "fvu": {"pooled": 0.0078125, "per_layer": [0.007, 0.008, 0.009]}}
    return {
        "schema": 2, "n_tokens": 1840, "n_contexts": 80, "split": "evaluation", "seconds": 3.5, **fit,
        "dense_features": {"total": 7, "per_layer": [1, 2, 4]},
        "density_histogram": {"log10_edges": [-3.0, -2.0, -1.0, 0.0],
                              "per_layer": [[3, 20, 10], [2, 20, 11], [9, 9, 9]]},
        "decoder_norm_histogram": {"log10_edges": [-1.0, 0.0, 1.0], "per_layer": [[13, 20], [30, 3], [1, 32]]},
        "threshold_histogram": {"edges": [0.0, 0.5 * scale, 1.0 * scale], "per_layer": [[13, 20], [30, 3], [1, 32]]},
        "replacement_curves": {"live": curves, "teacher_forced": curves},
        "worst_contexts": [
            {"context": 6, "kl": 0.75, "tokens": ["<bos>", "The", " <i>cat</i>", " sat"],
             "kl_per_token": [0.25, 2.0, 0.0]},
            {"context": 9, "kl": 0.5, "tokens": ["<bos>", "A", " dog"], "kl_per_token": [0.5, 0.5]},
        ],
        "tasks": {"mean": {"original": 0.9, "threshold": 0.8125, "exact": 0.828125}, "sets": {}},
        "ci95": intervals,
        "exact": {**exact, "ci95": {"fvu": {"pooled": [0.0075, 0.0081]}}},
    }  # fmt: skip


def measured_before(scale: float = 1.0) -> Tree:
    """A metrics.json from before schema 2."""
    whole = measured(scale)
    kept = ("l0", "dead_fraction", "fvu", "explained_variance", "density_histogram", "n_tokens", "split", "tasks")
    few = ("basis", "kl", "top1", "delta_ce", "kl_recovered_mean_ablation")
    replaced = {key: whole["replacement"][key] for key in few}
    return {key: whole[key] for key in kept} | {"replacement": replaced}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_lines(file: Path, lines: list[Tree]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_shapes(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors header without the numbers."""
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
