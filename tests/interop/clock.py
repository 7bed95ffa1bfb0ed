"""Our trace beside circuit-tracer's `attribute`, in CPU seconds: `python -m tests.interop.clock FOLDER [RUN PROMPT]`.

Same weights, prompt, targets and batch (64); one thread; without loading. Rounds alternate between the two sides, each
a process of its own that warms up first. Two random CLTs (GPT-2, 4 layers of width 64, 96 features a layer), and with
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
from pipeline.interp import attribution, export_circuit_tracer
from pipeline.interp.export_options import ExportOptions
from pipeline.interp.export_weights import Source
from pipeline.interp.graph import Kind
from pipeline.interp.graph_options import GraphOptions
from tests.interop import compare
from tests.interop.cases import Case, Sizes, arch, for_transformers_4, make

ROUNDS, EACH, BATCH = 3, 3, 64
SIZES = Sizes(4, 64, 96, 40)


def ours(place: Path) -> list[float]:
    """Seconds of each trace after a warm-up."""
    model, tokens = compare.opened(place)
    graph = attribution.trace(model, tokens, GraphOptions(batch=BATCH))
    counted = f"{len(graph.texts)} tokens, {graph.kind.count(Kind.feature)} features, {len(graph.labels)} logits"
    (place / "size.txt").write_text(counted)
    seconds = []
    for _ in range(EACH):
        start = time.process_time()
        attribution.trace(model, tokens, GraphOptions(batch=BATCH))
        seconds.append(time.process_time() - start)
    return seconds


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


def seconds_of(side: str, place: Path) -> list[float]:
    """A process of its own."""
    job = place / "clock.json"
    job.write_text(json.dumps([{"do": "clock", "place": str(place), "batch": BATCH, "rounds": EACH}]))
    theirs = [os.environ["CLT_INTEROP"], "tests/interop/theirs.py", str(job)]
    command = theirs if side == "theirs" else [sys.executable, "-m", "tests.interop.clock", "--ours", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(folder: Path, run: list[str]) -> None:
    wide = replace(arch("clt"), d_features=SIZES.d_features)
    cases = [Case("gpt2", wide, bias=bias, prompt="The old sailor") for bias in (-0.3, -1.5)]
    places = [make(case, folder, SIZES) for case in cases]
    places += [of_run(folder, Path(run[0]), run[1])] if run else []
    for place in places:
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for side, seconds in taken.items():
                seconds += seconds_of(side, place)
        mine, other = (statistics.median(seconds) for seconds in taken.values())
        size = (place / "size.txt").read_text()
        logging.info("%s: %s: ours %.3f s, circuit-tracer %.3f s: %.2f", place.name, size, mine, other, other / mine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--ours":
        sys.stdout.write(json.dumps(ours(Path(sys.argv[2]))) + "\n")
    else:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        main(Path(sys.argv[1]), sys.argv[2:])
