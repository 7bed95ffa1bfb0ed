"""The commands that make a cache, mend it and go on with it, as they are said to whoever needs one."""

import json
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.data import asking
from pipeline.data.address import Place, Remote
from pipeline.data.layout import MERGED, Json, directory_of, found_at, targets_of
from pipeline.data.model_files import BUILTIN
from pipeline.data.options import Codec, Targets


def command_of(request: Json, cache_dir: Place) -> str:
    """The command that makes the cache of a request, and mends it, whether it was extracted, converted or merged."""
    if MERGED in request:
        return _merge_command(request, cache_dir)
    return f"clt extract {overrides_of(request, cache_dir)}"


def command_to_go_on(state: Json, cache_dir: Place) -> str:
    """The command that goes on with what a journal says: an extraction or a conversion."""
    if is_conversion(state):
        source = shlex.quote(str(cache_dir / state["codec"]["from"]))
        return f"clt cache convert {source} codec={state['request']['codec']}"
    return command_of(state["request"], cache_dir)


def is_conversion(state: Json) -> bool:
    """Whether the state of an unfinished cache is that of `clt cache convert`."""
    return "n_chunks" in state


def _merge_command(request: Json, cache_dir: Place) -> str:
    """With the parts where they lie now, as far as the merged cache is there to say so."""
    parts = [directory_of(cache_dir, part).name for part in request[MERGED]]
    path = found_at(cache_dir, request)
    if not isinstance(path, Remote):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or damaged
            parts = [part["path"] for part in json.loads((path / "zarr.json").read_bytes())["attributes"]["parts"]]
    words = ["clt", "cache", "merge", *parts]
    words += ["--name", path.name] if path != directory_of(cache_dir, request) else []
    words += ["--allow-repeats"] if request.get("repeats") else []
    words += ["--cache-dir", str(cache_dir)] if str(cache_dir) != "cache" else []
    return " ".join(map(shlex.quote, words))


def overrides_of(request: Json, cache_dir: Place) -> str:
    """What to say on a command line to name a request, quoted for a shell."""
    model, dataset = request["model"], request["dataset"]
    if model["path"] == BUILTIN and model["name"] == "world":
        words = ["model=world"]
    elif model["name"] == "local" or Path(model["path"]).expanduser().is_dir():
        words = ["model=local", f"model.path={model['path']}"]
        words += [f"model.name={model['name']}"] if model["name"] != "local" else []
    else:
        words = [f"model={model['name']}"]
        words += [f"model.path={model['path']}"] if model["name"] == "hub" else []
    words += [f"model.revision={model['revision']}"] if model["revision"] is not None else []
    words += [f"model.layers=[{','.join(map(str, model['layers']))}]"] if model["layers"] is not None else []
    words += [f"model.{key}={model[key]}" for key in ("dtype", "attention") if model[key] != "auto"]
    words += asking.words_of(dataset)
    words += [f"cache.codec={request['codec']}"] if request["codec"] != Codec.raw else []
    targets = targets_of(request)
    words += [f"cache.targets={targets}"] if targets is not Targets.stored else []
    words += [f"cache.dir={cache_dir}"] if str(cache_dir) != "cache" else []
    return " ".join(shlex.quote(word) for word in words)
