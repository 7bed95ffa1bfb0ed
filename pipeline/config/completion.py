"""What the shell may put in place of an unfinished override."""

from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.table import CONF


def complete(stage: str, words: Sequence[str], incomplete: str) -> list[str]:
    """What the shell may put in place of the unfinished override: groups, choices, keys, values in force."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
            return list(plugin._query(config_name=stage, line=" ".join([*words, incomplete])))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []  # a command line that is wrong so far has no completions; running it says what is wrong
