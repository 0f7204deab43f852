"""What all tests share: no test touches the user's cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import settings

# Ray's workers are nicer than other processes: beside another test that computes, they would hardly get on.
os.environ.setdefault("RAY_worker_niceness", "0")
# A busy machine is no failure. Of a property that holds, tens of examples say what hundreds do; the fuzz tests, whose
# cases are broken in many ways, draw many by `make fuzz`.
settings.register_profile("unhurried", deadline=None, max_examples=40)
settings.load_profile("unhurried")

# What takes longest comes first, so that no process is left alone with it at the end. A process that is at its last
# two tests has its next file already: behind the one test of test_chaos.py comes one that does not take long.
FIRST = (
    *("test_chaos.py", "test_search_faults.py", "test_methods.py"),
    *("test_signals.py", "test_run.py", "test_dead_workers.py", "test_stopping.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; all others keep their place."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images go to one temporary folder, which the tests of a session share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYBD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """Leave raybd's logger as it was: a command sends it to the screen alone, where no later test would see it."""
    logger = logging.getLogger("raybd")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread: tiny models gain nothing from more, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Found again wherever they are written.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIASHOWNNOWHERE0001",
    "AWS_SECRET_ACCESS_KEY": "shown/nowhere+secret/0002",
    "AWS_SESSION_TOKEN": "shown-nowhere-token-0003",
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A real S3 server with the bucket `chaos`, its endpoint and `CREDENTIALS` in the environment; these are given."""
    from tests.chaos.bucket import Bucket

    server = Bucket(dict(os.environ), tmp_path_factory.mktemp("bucket") / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        others = {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in {**CREDENTIALS, **others, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
            patch.setenv(name, value)
        yield CREDENTIALS
    server.close()
