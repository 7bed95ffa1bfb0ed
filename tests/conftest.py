"""Fixtures that need no network: a tiny random GPT-2 in Hugging Face format and a small English text."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.core.options import Kernels
    from tests.data.s3 import Server

SPECIAL = ["<unk>", "<bos>", "<eos>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n.,'?"
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)


def tiny_tokenizer(bos: bool = True) -> "PreTrainedTokenizerFast":
    """One token a character; what is not in CHARACTERS is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", **special)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 directory with random weights and unequal sizes: 3 layers of width 20, 61 tokens, 40 positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("models") / "tiny_gpt2"
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 20, "n_head": 2, "n_inner": 28, "vocab_size": VOCAB_SIZE, "n_positions": 40}
    # An epsilon of its own: code that takes the usual 1e-5 for granted shows.
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, layer_norm_epsilon=1e-3)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():  # large enough for every term to show, norms and biases included
        parameter.data += 0.3 * torch.randn_like(parameter) * (1 if "ln" in name or "bias" in name else 0.5)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def family_model(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model of an architecture in tests/families.py, made when first asked for."""
    from tests.families import make

    def directory(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "families" / family
        if family == "GPT2":
            return tiny_gpt2
        if not path.exists():
            make(family, path, tiny_gpt2)
        return path

    return directory


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 kB of English in 800 paragraphs."""
    rng = random.Random(0)
    nouns = ["river", "garden", "teacher", "winter", "letter", "kitchen", "sailor", "window", "farmer", "bridge"]
    verbs = ["follows", "watches", "remembers", "carries", "paints", "opens", "visits", "hears", "loves", "mends"]
    adjectives = ["old", "quiet", "green", "heavy", "bright", "narrow", "wooden", "distant", "cold", "gentle"]

    def sentence() -> str:
        words = f"the {rng.choice(adjectives)} {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}"
        if rng.random() < 0.5:
            words += f", and the {rng.choice(nouns)} is {rng.choice(adjectives)}"
        return words.capitalize() + rng.choice("...?")

    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text("\n\n".join(" ".join(sentence() for _ in range(rng.randint(1, 4))) for _ in range(800)) + "\n")
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    from tests.data.s3 import serving

    with serving(tmp_path_factory.mktemp("s3")) as server:
        server.request("PUT", "bucket")
        yield server


@pytest.fixture
def s3(s3_server: "Server", monkeypatch: pytest.MonkeyPatch) -> "Server":
    """A real S3 server on loopback with a bucket named bucket; the environment says how to reach it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


NO_COMPILER = not any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.fixture(params=["torch", pytest.param("compiled", marks=pytest.mark.skipif(NO_COMPILER, reason="no compiler"))])
def kernels(request: pytest.FixtureRequest) -> Iterator["Kernels"]:
    """What runs on a CPU, each in turn."""
    import torch

    from pipeline.core import products
    from pipeline.core.options import Kernels

    with products.using(Kernels(request.param), torch.device("cpu")) as chosen:
        yield chosen


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a module's own `made`, as the working directory."""
    place = tmp_path / "work"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    return place
