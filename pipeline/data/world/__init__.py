"""The built-in world: a generated language whose entropy is known, and the small language model trained on it.

documents(seed)    any number of documents, each with its exact log-probability
tokenizer.build()  the word-level tokenizer, in Hugging Face format
tasks()            what the model is asked; swap_pairs() for the country swap
MODEL_DIR          the model that ships with the package, and world.json, which says how good it is
"""

from pathlib import Path

from pipeline.data.world.documents import KINDS, Document, document, documents
from pipeline.data.world.tasks import SwapPair, Task, encode_task, swap_pairs, tasks

MODEL_DIR = Path(__file__).parent / "model"

__all__ = [
    "KINDS",
    "MODEL_DIR",
    "Document",
    "SwapPair",
    "Task",
    "document",
    "documents",
    "encode_task",
    "swap_pairs",
    "tasks",
]
