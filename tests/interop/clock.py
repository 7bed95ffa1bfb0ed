"""Our trace beside circuit-tracer's `attribute`, in CPU seconds: `python -m tests.interop.clock FOLDER [RUN PROMPT]`.

Same weights, prompt, targets and batch (64); one thread; without loading. The two sides take turns, each in a process
of its own that has warmed up. Two random CLTs (GPT-2, 4 layers of width 64, 96 features a layer), and with
RUN, a finished run on the built-in world, that run.
"""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.data.model_files import BUILTIN, local_directory
from pipeline.data.options import ModelOptions
from pipeline.interp.circuits import attribution
from pipeline.interp.circuits.graph import Kind
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.exchange import export_circuit_tracer
from pipeline.interp.exchange.export_options import ExportOptions
from pipeline.interp.exchange.export_weights import Source
from tests.interop import compare
from tests.interop.cases import Case, Sizes, arch, for_transformers_4, make

ROUNDS, BATCH = 7, 64
SIZES = Sizes(4, 64, 96, 40)


def of_run(folder: Path, run: Path, prompt: str) -> Path:
    """A run on the built-in world as a case."""
    from transformers import AutoTokenizer

    place, model = folder / "run", folder / "model-world"
    source = local_directory(ModelOptions(name="world", path=BUILTIN))
    assert source is not None
    shutil.copytree(source, model)
    for_transformers_4(model, int(json.loads((model / "config.json").read_text())["n_positions"]))
    (place / "export").mkdir(parents=True)
    export_circuit_tracer.write(Source(run), place / "export", ExportOptions(model_name=str(model)))
    (place / "run").symlink_to(run.resolve())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    (place / "prompt.json").write_text(json.dumps({"tokens": tokens, "model": str(model)}))
    return place


class Theirs:
    """circuit-tracer in its own process, on one case."""

    def __init__(self, place: Path) -> None:
        job = place / "clock.json"
        job.write_text(json.dumps([{"do": "clock", "place": str(place), "batch": BATCH}]))
        command = [os.environ["CLT_INTEROP"], "tests/interop/theirs.py", str(job)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seconds(self) -> float:
        """CPU seconds of one trace."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line[0].isdigit():  # what else it says of loading the model
                return float(line)
        raise AssertionError("it has stopped")


def measured(place: Path) -> None:
    model, tokens = compare.opened(place)
    options = GraphOptions(batch=BATCH)
    graph = attribution.trace(model, tokens, options)
    counted = f"{len(graph.texts)} tokens, {graph.kind.count(Kind.feature)} features, {len(graph.labels)} logits"
    other, taken = Theirs(place), []
    for _ in range(ROUNDS):
        theirs = other.seconds()
        start = time.process_time()
        attribution.trace(model, tokens, options)
        taken.append((time.process_time() - start, theirs))
    other.process.kill()
    mine, others = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    ratios = sorted(theirs / ours for ours, theirs in taken)
    found = f"{mine:.3f} s here, {others:.3f} s there; ratio {statistics.median(ratios):.2f}"
    logging.info("%s: %s: %s (%.2f to %.2f)", place.name, counted, found, ratios[0], ratios[-1])


def main(folder: Path, run: list[str]) -> None:
    wide = replace(arch("clt"), d_features=SIZES.d_features)
    cases = [Case("gpt2", wide, bias=bias, prompt="The old sailor") for bias in (-0.3, -1.5)]
    places = [make(case, folder, SIZES) for case in cases]
    places += [of_run(folder, Path(run[0]), run[1])] if run else []
    for place in places:
        measured(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]), sys.argv[2:])
