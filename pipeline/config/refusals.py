"""What the user can mend, in one line: what Hydra, OmegaConf, the disk and our own stages raise."""

import difflib
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pipeline.errors import LostPeers, UserError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the operating system that are about the user's disk and not about our code."""


def refusal_of(error: Exception, stage: str) -> UserError | None:
    """What the user can mend, in one line; None for a bug of ours."""
    if isinstance(error, UserError):
        return UserError(one_line(error, stage))
    if isinstance(error, LostPeers):
        return UserError(f"lost the other ranks ({error}); one of them says why, and the same command goes on")
    if isinstance(error, OSError) and error.errno in DISK:
        place = error.filename or "the disk"
        return UserError(f"{place}: {os.strerror(error.errno)}; mend that and run the same command again")
    return None


def one_line(error: Exception, stage: str) -> str:
    """The cause, the valid choices (the likeliest first) and the fix."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value (such as optim.lr=1e-3), or its value needs quotes"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _wrong_choice(error)
    text = " ".join(re.split(r"\s+See https?:", str(error))[0].split())
    if ambiguous := re.match(r"Ambiguous value for argument '(.*?)' 1\. ", text):
        return f"{ambiguous[1]}: several values; add -m to run one job for each"
    where = found[0] if (found := re.match(r"In '[^']*': ", text)) else ""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    key = str(cause.full_key)
    if isinstance(cause, MissingMandatoryValue):
        return f"{where}{key} has no value; add {key}=... (clt {stage} --cfg job shows the whole configuration)"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return where + _wrong_key(key, cause.object_type)
    return f"{where}{key}: {_wrong_value(' '.join(str(cause.msg).split()).split(' full_key: ')[0])}"


def _wrong_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    choices = _likeliest_first(choice, error.options or [])
    if not group:
        return f"--config-name {choice}: no such file in the built-in configuration or in --config-dir"
    if group == "hydra/launcher" and choice != "basic":
        return f"{group}={choice}: no such launcher here ({choices}); pip install 'clt-pipeline[sweep]' has more"
    return f"{group}={choice}: no such {group}; {choices or f'conf/{group}/{choice}.yaml is missing'}"


def _wrong_key(key: str, schema: Any) -> str:
    section, _, name = key.rpartition(".")
    names = [field.name for field in fields(schema)] if is_dataclass(schema) else []
    return f"{key}: no such key{f' in {section}' if section else ''}; {_likeliest_first(name, names)}"


def _wrong_value(message: str) -> str:
    kinds = {"Float": "a number", "Integer": "a whole number"}
    if found := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message):
        return f"{found[1]!r} is not {kinds.get(found[2], found[2])}"
    if found := re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        return f"{found[1]!r} is not a choice; {_likeliest_first(found[1], found[2].split(', '))}"
    if found := re.match(r"Value '(.*)' is not a valid bool", message):
        return f"{found[1]!r} is neither true nor false"
    if re.match(r"field '.*' is not Optional", message):
        return "null is not a value here"
    if found := re.match(r"Invalid type assigned: .* is not a subclass of \w+. value: (.*)", message):
        return f"{found[1]!r} given for a whole section; set its keys one by one, section.key=value"
    return message


def _likeliest_first(word: str, choices: Sequence[str]) -> str:
    """'did you mean lr? choices: lr, beta1, beta2', or '' when there is nothing to choose from."""
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}choices: {', '.join([*close, *(c for c in choices if c not in close)])}" if choices else ""
