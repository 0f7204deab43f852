"""The kinds of fault."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What is done to a study that runs."""

    TRIAL_WORKER = "a trial's worker killed"
    PRETRAIN_WORKER = "a pretraining worker killed"
    RAYLET = "a raylet killed"
    NODE = "a raylet and all below it killed"
    DRIVER = "the driver killed"
    TERMINATE = "SIGTERM to the driver"
    HEAD = "the head killed: GCS and raylet"
    DISK_FULL = "disk full for a while"
    DISK_STAYS_FULL = "disk full until the driver gives up"
    READ_ONLY = "disk read-only for a while"
    BUCKET_SLOW = "bucket slow for a while"
    BUCKET_ERRORS = "bucket answering 500 for a while"
    BUCKET_DROPS = "bucket hanging up for a while"


STORAGE = frozenset(
    {
        Kind.DISK_FULL,
        Kind.DISK_STAYS_FULL,
        Kind.READ_ONLY,
        Kind.BUCKET_SLOW,
        Kind.BUCKET_ERRORS,
        Kind.BUCKET_DROPS,
    }
)
# How often each is drawn beside the others: those that cost a minute or more are rarer, and those of a bucket, in
# which few rounds run.
SHARES = {
    Kind.TRIAL_WORKER: 4.0,
    Kind.PRETRAIN_WORKER: 4.0,
    Kind.RAYLET: 2.0,
    Kind.NODE: 2.0,
    Kind.DRIVER: 2.5,
    Kind.TERMINATE: 2.0,
    Kind.HEAD: 1.0,
    Kind.DISK_FULL: 2.0,
    Kind.DISK_STAYS_FULL: 0.5,
    Kind.READ_ONLY: 2.0,
    Kind.BUCKET_SLOW: 1.0,
    Kind.BUCKET_ERRORS: 1.0,
    Kind.BUCKET_DROPS: 1.0,
}
