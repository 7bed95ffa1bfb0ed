"""What the real circuit-tracer says of the cases: run by the interpreter of its environment, which has none of ours.

python tests/interop/trace_reference.py DIR/CASE ...   writes DIR/CASE/reference.npz

features [n, 3] (layer, position, index), activations [n], adjacency [N, N] with N = n + L T + T + k in the order of
features, errors (layer by layer), tokens, logits; logit_tokens [k], logit_probabilities [k], scores (replacement,
completeness), kept_nodes, kept_edges (of pruning at .8 and .98), seconds
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformer_lens.loading_from_pretrained as loading
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph

official = loading.get_official_model_name


def or_directory(name: str) -> str:
    """transformer_lens 3 refuses a local directory before its loaders, which take one, see it."""
    return name if Path(name).is_dir() else official(name)


loading.get_official_model_name = or_directory


def load(model: str, transcoders: Path, double: bool = False) -> ReplacementModel:
    dtype = torch.float64 if double else torch.float32
    return ReplacementModel.from_pretrained(model, str(transcoders.resolve()), device=torch.device("cpu"), dtype=dtype)


def trace(place: Path, batch_size: int = 64) -> None:
    prompt = json.loads((place / "prompt.json").read_text())
    model = load(prompt["model"], place / "export")
    tokens = torch.tensor(prompt["tokens"])
    start = time.process_time()
    graph = attribute(tokens, model, batch_size=batch_size, max_n_logits=10, desired_logit_prob=0.95, verbose=False)
    seconds = time.process_time() - start
    replacement, completeness = compute_graph_scores(graph)
    pruned = prune_graph(graph, 0.8, 0.98)
    np.savez(
        place / "reference.npz",
        features=graph.active_features.numpy(),
        selected=graph.selected_features.numpy(),
        activations=graph.activation_values.numpy(),
        adjacency=graph.adjacency_matrix.numpy(),
        logit_tokens=np.array([int(target.vocab_idx) for target in graph.logit_targets]),
        logit_probabilities=graph.logit_probabilities.numpy(),
        scores=np.array([replacement, completeness]),
        kept_nodes=pruned.node_mask.numpy(),
        kept_edges=pruned.edge_mask.numpy(),
        seconds=seconds,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        trace(Path(name))
