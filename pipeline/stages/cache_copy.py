"""`clt cache copy NAME PLACE`: a whole cache sent to a store, fetched from one, or copied between two places."""

import logging

from pipeline.data import inventory
from pipeline.data.address import Place, resolved
from pipeline.data.commands import overrides_of
from pipeline.data.inventory import State
from pipeline.data.layout import gb, stored_bytes
from pipeline.data.merged import places_of
from pipeline.data.transfer import copy
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def run(name: str, to: Place, cache_dir: Place, verify: bool = False) -> str:
    """-> the place of the copy, `to` being the cache directory around it. Raises UserError for a cache that is not
    whole, for a merged one, and for one that would be copied onto itself."""
    found = inventory.find(cache_dir, name)
    if found.state is not State.complete or found.request is None:
        raise UserError(f"{found.path} is {found.state} ({found.detail}); copies are made of whole caches")
    if parts := places_of(found.path, found.about):
        names = ", ".join(map(str, parts))
        raise UserError(f"{found.path} is merged and has no rows of its own; copy its parts, and merge there: {names}")
    target = to / found.path.name
    if resolved(target) == resolved(found.path):
        raise UserError(f"{found.path} is there already; name another directory, or address, to copy it to")
    is_new = copy(found.path, target, verify)
    size = gb(stored_bytes(found.about["manifest"]["arrays"]))
    logger.info("%s: %s%s", target, size, "" if is_new else ", already there, nothing to do")
    logger.info("next: clt train +experiment=batchtopk_across %s", overrides_of(found.request, to))
    return str(target)
