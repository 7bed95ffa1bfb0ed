"""A finished run of one process as several ranks would have written it."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from pipeline.arch.rows import by_feature
from pipeline.train import artifact, row_files
from pipeline.train.row_files import Held


def spread(run: Path, parts: Sequence[Sequence[range]]) -> None:
    """parts: the features of each rank, which together are all of them."""
    final = run / "final"
    tensors, model = load_file(final / artifact.WEIGHTS), artifact.read(run).transcoder
    entries = []
    for rank, features in enumerate(parts):
        held = {}
        for name, tensor in tensors.items():
            stored = name not in {"y_mean", *artifact.PER_FEATURE}
            rows = model.stored_rows(name, model.d_features) if stored else None
            rows = by_feature(model.d_features) if name in artifact.PER_FEATURE else rows
            if rows is not None:
                of = rows.of(features)
                ids = [i for one in of for i in one]
                held[name] = Held(
                    tensor.movedim(rows.axis, 0)[ids].movedim(0, rows.axis), rows.axis, tuple(of), rows.length
                )
            elif rank == 0:
                held[name] = Held(tensor)
        entries.append({artifact.STEM: row_files.write(final, artifact.STEM, held, rank, len(parts))})
    (final / row_files.INDEX).write_text(json.dumps(row_files.merged(entries, len(parts), 1)))
    (final / artifact.WEIGHTS).unlink()
