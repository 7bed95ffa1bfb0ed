"""How well a language model knows the built-in world: its losses against the entropy of the language, its accuracy on
every task, and whether facts are looked up where the country stands."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data import world
from pipeline.data.tokens import Split, split_of

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

N_DOCUMENTS = 40_000
"""Documents looked through for held-out ones; a twentieth of them is measured."""
BATCH = 128


class Losses(TypedDict):
    """Nats a token on whole held-out documents, the end-of-text token included, beside the generator's own."""

    n_documents: int
    held_out_loss: float
    floor: float
    kinds: dict[str, dict[str, float]]


class Score(TypedDict):
    n: int
    accuracy: float


class Swap(TypedDict):
    n: int
    at_country: float
    """Share of pairs that answer for the target with its layer-0 MLP output at the country's position."""
    at_last: float
    """The same with the output at the prompt's last position instead."""


def fingerprint(seed: int) -> str:
    """sha256 of this seed's first documents: tells whether the language is still the one a model was trained on."""
    return hashlib.sha256("\n".join(d.text for d in islice(world.documents(seed), 1000)).encode()).hexdigest()


def load(directory: Path) -> "GPT2LMHeadModel":
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as noise

    noise.disable_progress_bar()
    model: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def losses(model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", seed: int) -> Losses:
    """On held-out documents of this seed, each alone in a context [<bos>, <eos>, document, <eos>]."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [d for d in islice(world.documents(seed), N_DOCUMENTS) if split_of(d.text) is Split.evaluation]
    documents.sort(key=lambda d: len(d.text))  # little padding in a batch
    found = {kind: [0.0, 0.0, 0.0] for kind in world.KINDS}
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        ids = [torch.tensor([bos, eos, *i, eos]) for i in tokenizer([d.text for d in batch])["input_ids"]]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos).to(model.device)
        logits = model(tokens, use_cache=False).logits.float()
        nats = F.cross_entropy(logits[:, 1:-1].transpose(1, 2), tokens[:, 2:], reduction="none").double()
        for document, row, line in zip(batch, nats, ids, strict=True):
            n = len(line) - 2
            for i, value in enumerate((n, float(row[:n].sum()), -document.log_prob)):
                found[document.kind][i] += value
    n_tokens, reached, own = (sum(sums[i] for sums in found.values()) for i in range(3))
    return Losses(
        n_documents=len(documents),
        held_out_loss=reached / n_tokens,
        floor=own / n_tokens,
        kinds={kind: {"loss": a / n, "floor": b / n} for kind, (n, a, b) in found.items() if n},
    )


@torch.no_grad()
def accuracies(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", tasks: list[world.Task]
) -> dict[str, Score]:
    """Share of prompts whose most likely next token is the answer, for each task set, `name/split`."""
    scores = {}
    for task in tasks:
        tokens, last, answer = map(torch.from_numpy, world.encode_task(task, tokenizer, tokenizer.bos_token_id))
        logits = model(tokens.to(model.device), use_cache=False).logits.cpu()
        right = logits[torch.arange(len(last)), last].argmax(-1) == answer
        scores[f"{task.name}/{task.split}"] = Score(n=len(answer), accuracy=float(right.double().mean()))
    return scores


@torch.no_grad()
def swaps(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", pairs: list[world.SwapPair]
) -> dict[str, Swap]:
    """For each relation: how often the answer follows the exact layer-0 MLP output of the target's prompt, put in at
    one position of the source's."""
    found = {}
    for relation in dict.fromkeys(pair.relation for pair in pairs):
        asked = [pair for pair in pairs if pair.relation == relation]
        source, target = (
            _contexts(tokenizer, texts) for texts in ([p.source for p in asked], [p.target for p in asked])
        )
        answers = torch.tensor([ids[0] for ids in tokenizer([p.answer for p in asked])["input_ids"]])
        here = torch.tensor([pair.position for pair in asked])
        there = torch.full_like(here, source.shape[1] - 1)
        mlp_out = _mlp_out(model, target)
        at_country, at_last = (
            float((_swapped(model, source, mlp_out, at).argmax(-1) == answers).double().mean()) for at in (here, there)
        )
        found[relation] = Swap(n=len(asked), at_country=at_country, at_last=at_last)
    return found


def _contexts(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> Tensor:
    return torch.tensor([[tokenizer.bos_token_id, *ids] for ids in tokenizer(prompts)["input_ids"]])


def _mlp_out(model: "GPT2LMHeadModel", tokens: Tensor) -> Tensor:
    """What the MLP of layer 0 writes.  [n, T] -> [n, T, d_model]"""
    kept: list[Tensor] = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(tokens.to(model.device), use_cache=False)
    handle.remove()
    return kept[0]


def _swapped(model: "GPT2LMHeadModel", tokens: Tensor, mlp_out: Tensor, position: Tensor) -> Tensor:
    """Last logits with `mlp_out` put in at one position of each row.  -> [n, V]"""
    rows = torch.arange(len(tokens))

    def put(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, position] = mlp_out[rows, position]
        return output

    handle = model.transformer.h[0].mlp.register_forward_hook(put)
    logits = model(tokens.to(model.device), use_cache=False).logits[:, -1].cpu()
    handle.remove()
    return logits
