"""The report of `clt bench train` as lines of text."""

from collections.abc import Iterator
from typing import Any

from pipeline.data.layout import gb
from pipeline.stages.bench_train_parts import PARTS
from pipeline.stages.bench_train_timing import DENSE

HEAD = (
    f"{'':10}{'ms':>9}{'quartiles':>18}{'tokens/s':>11}{'over dense':>12}{'quartiles':>15}{'floors':>8}"
    f"{'quartiles':>13}{'copy':>8}{'peak':>10}"
)


def head(report: dict[str, Any]) -> Iterator[str]:
    """What all shapes have in common."""
    yield (
        f"{report['activation']}, loss {report['loss']}, {report['device']}, torch {report['torch']}, "
        f"{report['threads']} of {report['cpus']} CPUs, load {report['load']:.1f}, "
        f"{report['rounds']} rounds by the {report['timed_by']} clock"
    )
    yield report["formula"]


def of_shape(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Both sides, the floor, the parts."""
    shape, rates, floor = found["shape"], found["rates"], found["floor_ms"]
    yield (
        f"\n{name}: L={shape['n_layers']} d={shape['d_model']} F={shape['d_features']:,} B={shape['batch_tokens']:,}, "
        f"{found['l0']:.1f} active a layer, {shape['n_parameters']:,} parameters"
    )
    yield HEAD
    for side_name, side in {DENSE: found[DENSE], **found["kernels"]}.items():
        ms = side["ms"]
        line = f"{side_name:10}{ms['median']:9,.1f}{_pair(ms, 1):>18}{side['tokens_per_s']:11,.0f}"
        faster, floors = side.get("speedup_vs_dense"), side["times_floor"]
        line += f"{faster['median']:12.2f}{_pair(faster, 2):>15}" if faster else " " * 27
        line += f"{floors['median']:8.2f}{_pair(floors, 2):>13}"
        line += f"{side['times_copy_floor']['median']:8.2f}" if faster else " " * 8
        yield line + (f"{gb(side['peak_memory_bytes']):>10}" if side["peak_memory_bytes"] is not None else "")
    yield (
        f"floor {floor['all']:,.1f} ms: gemm {floor['gemm']:,.1f} at {rates['gemm'] / 1e9:,.1f} GFLOP/s, gather "
        f"{floor['gather']:,.1f} at {rates['gather'] / 1e9:,.1f} GB/s, parameters {floor['parameters']:,.1f} at "
        f"{max(rates['copy'], rates['in_place']) / 1e9:,.1f} GB/s"
    )
    yield (
        f"with a copy's rate {floor['copy']:,.1f} ms: parameters {floor['parameters_copied']:,.1f} at "
        f"{rates['copy'] / 1e9:,.1f} GB/s"
    )
    yield f"{'parts, ms':10}" + "".join(f"{part:>11}" for part in PARTS) + f"{'sum':>11}"
    for side_name, side in {DENSE: found[DENSE], **found["kernels"]}.items():
        parts = [side["ms_by_part"][part] for part in PARTS]
        yield f"{side_name:10}" + "".join(f"{ms:11,.1f}" for ms in (*parts, sum(parts)))
    for side_name, side in found["kernels"].items():
        exact = side["exact"]
        line = (
            f"{side_name}: gradients differ from the dense ones by {exact['gradients']:.1e}, the loss by "
            f"{exact['loss']:.1e}, the selection in {exact['selection']:.1e} of the pairs"
        )
        if "peak_over_dense" in side:
            line += f"; peak memory {side['peak_over_dense']:.2f} of the dense step's"
        yield line


def _pair(spread: dict[str, float], digits: int) -> str:
    return f"{spread['q1']:,.{digits}f} {spread['q3']:,.{digits}f}"


def of_scaling(name: str, found: dict[str, Any]) -> Iterator[str]:
    for what, target in found["targets"].items():
        if what in found:
            spread = found[what]
            yield (
                f"{name}, {found['kernels']}: twice the {what} takes {spread['median']:.2f} times as long "
                f"({_pair(spread, 2)}; target {target})"
            )
    if "skipped" in found:
        yield f"{name}: {found['skipped']}"


def of_loop(found: dict[str, Any]) -> Iterator[str]:
    spread = {name: 100 * value for name, value in found["overhead"].items()}
    yield (
        f"trainer's loop, {found['kernels']}, on {found['cache']}: {found['trainer_ms']:,.1f} ms a step, bare "
        f"{found['bare_ms']:,.1f}: {spread['median']:+.1f} % ({_pair(spread, 1)}; all pairs "
        f"{100 * found['all_pairs']:+.1f} %; target {100 * found['target']:.0f} %), {found['pairs']} pairs of "
        f"{found['steps']} steps"
    )


def of_estimate(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"estimate, {found['what']}, {found['tokens']:,} tokens on this machine: {found['hours']:,.1f} hours "
        f"({found['tokens_per_s']:,.0f} tokens/s: a floor of {found['floor_ms']:,.0f} ms a step at the rates of "
        f"{found['from_shape']}, times {found['times_floor']:.2f} as there; needs {gb(found['bytes'])}). "
        "Estimated, not measured"
    )
