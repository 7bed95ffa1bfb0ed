"""What the other projects say: run by the interpreter of their environment, which has none of ours.

python tests/interop/theirs.py JOBS.json    [{"do": NAME, "place": FOLDER, ...}, ...]; results beside what was read

trace       PLACE/prompt.json, PLACE/export -> PLACE/reference.npz: circuit-tracer's graph, scores and pruning, or
            PLACE/failed.txt where it raises
outputs     PLACE/export, PLACE/inputs.npy [B, L, D] -> PLACE/outputs.npz: its features [B, L, F] and y_hat [B, L, D]
saelens     PLACE/saelens, PLACE/inputs.npy -> PLACE/saelens.npz: the same of SAELens
graph_json  PLACE, a file: valid by graph_schema.json, and readable for circuit-tracer's front end
feature_json  PLACE, a file: readable for circuit-tracer's front end
clock       PLACE/prompt.json, PLACE/export -> seconds of `attribute` on stdout, after a warm-up
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jsonschema
import numpy as np
import torch
import transformer_lens.loading_from_pretrained as loading
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.frontend import feature_models, graph_models
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.utils.decode_url_features import decode_url_features
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

official = loading.get_official_model_name
CPU = torch.device("cpu")


def or_directory(name: str) -> str:
    """transformer_lens 3 refuses a local directory before its loaders, which take one, see it."""
    return name if Path(name).is_dir() else official(name)


loading.get_official_model_name = or_directory


def opened(place: Path) -> tuple[Any, torch.Tensor]:
    prompt = json.loads((place / "prompt.json").read_text())
    transcoders = str((place / "export").resolve())
    return ReplacementModel.from_pretrained(prompt["model"], transcoders, device=CPU), torch.tensor(prompt["tokens"])


def trace(place: Path, batch: int = 64) -> None:
    model, tokens = opened(place)
    try:
        graph = attribute(tokens, model, batch_size=batch, max_n_logits=10, desired_logit_prob=0.95)
    except (RuntimeError, ValueError) as error:
        (place / "failed.txt").write_text(f"{type(error).__name__}: {error}")
        return
    pruned = prune_graph(graph, 0.8, 0.98)
    np.savez(
        place / "reference.npz",
        features=graph.active_features.numpy(),
        selected=graph.selected_features.numpy(),
        activations=graph.activation_values.numpy(),
        adjacency=graph.adjacency_matrix.numpy(),
        logit_tokens=np.array([int(target.vocab_idx) for target in graph.logit_targets]),
        logit_probabilities=graph.logit_probabilities.numpy(),
        scores=np.array(compute_graph_scores(graph)),
        kept_nodes=pruned.node_mask.numpy(),
        kept_edges=pruned.edge_mask.numpy(),
    )


def outputs(place: Path) -> None:
    transcoders, _ = load_transcoder_from_hub(str((place / "export").resolve()), device=CPU)
    x = torch.from_numpy(np.load(place / "inputs.npy")).transpose(0, 1)
    with torch.no_grad():
        features = transcoders.encode(x)
        y_hat = transcoders.decode(features, x if transcoders.skip_connection else None)
    np.savez(place / "outputs.npz", features=features.transpose(0, 1).numpy(), y_hat=y_hat.transpose(0, 1).numpy())


def saelens(place: Path) -> None:
    from sae_lens import SAE

    x = torch.from_numpy(np.load(place / "inputs.npy"))
    features, y_hat = [], []
    with torch.no_grad():
        for l in range(x.shape[1]):
            sae = SAE.load_from_disk(place / "saelens" / f"layer_{l}")
            features.append(sae.encode(x[:, l]))
            y_hat.append(sae(x[:, l]))
    np.savez(
        place / "saelens.npz",
        features=torch.stack(features, dim=1).numpy(),
        y_hat=torch.stack(y_hat, dim=1).numpy(),
    )


def graph_json(place: Path) -> None:
    found = json.loads(place.read_text())
    jsonschema.validate(found, json.loads(Path(__file__).with_name("graph_schema.json").read_text()))
    graph_models.Model(**found)
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    decode_url_features(f"https://x/?pinnedIds={','.join(ids)}")


def feature_json(place: Path) -> None:
    feature_models.Model(**json.loads(place.read_text()))


def clock(place: Path, batch: int = 64) -> None:
    model, tokens = opened(place)
    attribute(tokens, model, batch_size=batch)
    for _ in sys.stdin:  # a line for each trace that is asked for
        start = time.process_time()
        attribute(tokens, model, batch_size=batch)
        sys.stdout.write(f"{time.process_time() - start}\n")
        sys.stdout.flush()


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job for job in (trace, outputs, saelens, graph_json, feature_json, clock)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        JOBS[job.pop("do")](Path(job.pop("place")), **job)
