"""Object stores (S3, GCS, Azure) through obstore, the library under zarr.storage.ObjectStore.

The only file that imports it. What the network or the store refuses is said in one line; obstore tries again by itself
before that."""

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pipeline.data.address import Remote
from pipeline.errors import UserError

PATIENCE = {"first": (6, timedelta(seconds=10)), "later": (25, timedelta(minutes=5))}
"""Tries again after a failure, and the time in which they begin: of a first look, which should fail soon when the
address is wrong, and in the middle of a job, which should live through an outage."""


class Store:
    """What lies under an address; keys are relative to it. Every method raises UserError for what the network or the
    store refuses."""

    def __init__(self, place: Remote, patience: str = "first") -> None:
        if importlib.util.find_spec("obstore") is None:
            raise UserError(f"{place} lies in an object store, which needs obstore; run: pip install obstore")
        from obstore.store import from_url

        n, limit = PATIENCE[patience]
        self.place = place
        client: Any = {"connect_timeout": "10 seconds", "timeout": "10 minutes"}  # the second: of a whole request
        for name in ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP"):  # which these options put aside
            client |= {"allow_http": True} if os.environ.get(name, "").lower() in ("1", "true", "yes", "on") else {}
        retry: Any = {"max_retries": n, "retry_timeout": limit}
        options: dict[str, Any] = {"client_options": client, "retry_config": retry}
        with self._refusing():
            self._store: Any = from_url(str(place), **({} if str(place).startswith("file:") else options))

    @property
    def server(self) -> str:
        """Who answers: the same address at two servers is two stores."""
        config = getattr(self._store, "config", None) or {}
        return f"{config.get('endpoint', '')} {config.get('account_name', '')}"

    def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        import obstore

        with self._refusing(key):
            return bytes(obstore.get(self._store, key).bytes())

    def put(self, key: str, data: bytes) -> None:
        """Write an object, which is there as a whole or not at all."""
        import obstore

        try:
            with self._refusing(key):
                obstore.put(self._store, key, data, chunk_size=64 << 20)
        except FileNotFoundError as error:  # a store has no folders: it is the bucket
            raise self._refusal(error, key) from error

    def sizes(self) -> dict[str, int]:
        """Every object under the address with its size in bytes, by one listing (of 1,000 a request)."""
        import obstore

        try:
            with self._refusing():
                return {found["path"]: found["size"] for page in obstore.list(self._store) for found in page}
        except FileNotFoundError as error:
            raise self._refusal(error) from error

    def children(self) -> list[str]:
        """Names of the folders right under the address."""
        import obstore

        try:
            with self._refusing():
                return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])
        except FileNotFoundError as error:
            raise self._refusal(error) from error

    def delete(self, keys: Iterable[str]) -> None:
        """Objects that are not there are passed over."""
        import obstore

        with self._refusing():
            for some in _groups(sorted(keys), 1000):
                obstore.delete(self._store, some)

    @contextmanager
    def _refusing(self, key: str = "") -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, PermissionError, ConnectionError, TimeoutError) as error:
            raise self._refusal(error, key) from error

    def _refusal(self, error: Exception, key: str = "") -> UserError:
        return UserError(f"{self.place / key if key else self.place}: {_explained(str(error), str(self.place))}")


def _explained(error: str, address: str) -> str:
    """Cause and fix, in one line, of what obstore says."""
    text = " ".join(error.split("\n\nDebug source")[0].split())
    names = _variables(address)
    if "NoSuchBucket" in text or "ContainerNotFound" in text or "specified bucket does not exist" in text:
        return "there is no such bucket; create it, or correct the address"
    if re.search("169\\.254|token request|metadata\\.google|[Cc]redential", text):
        return f"no credentials were found; set {names} (docs/remote.md)"
    if re.search("40[13] |AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|Forbidden|Unauthor", text):
        code = re.search("<Code>(\\w+)</Code>", text)
        return f"access is denied{f' ({code[1]})' if code else ''}; check the credentials: {names}"
    if "BadScheme" in error or "URL scheme is not allowed" in text:
        return "the endpoint is plain http; set AWS_ALLOW_HTTP=true if that is meant"
    if "HTTP error" in text or "error sending request" in text:
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
        at = f" at {endpoint} (AWS_ENDPOINT_URL)" if endpoint and address.startswith("s3") else ""
        tries = re.search("after (\\d+) retries", text)
        again = f" after {int(tries[1]) + 1} tries" if tries else ""
        return f"the store cannot be reached{at}{again}; check the network and the endpoint, then run the same again"
    text = re.sub(r"<\?xml.*", "", text).strip(" :")
    return f"the store refused ({text[:300]}); check the address and the settings of the store (docs/remote.md)"


def _variables(address: str) -> str:
    if address.startswith("gs"):
        return "GOOGLE_APPLICATION_CREDENTIALS"
    if address.startswith("s3"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"


def _groups(keys: list[str], n: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), n):
        yield keys[start : start + n]
