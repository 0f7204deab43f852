"""The tables of a run: explicit Parquet schemas, their one writer and their one reader."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybd import parquet, table_rules
from raybd.errors import DataError
from raybd.store import Store
from raybd.terms import TERMS

SCHEMA_VERSION = 2
TOGETHER = 32  # trials in one part

_text, _int, _float, _time = pa.string(), pa.int64(), pa.float64(), pa.timestamp("us", tz="UTC")

_RATES = [
    ("zeroshot_top1", _float),
    ("asr_top1", _float),
    ("robust_top1", _float),
    ("n_clean", _int),
    ("n_triggered", _int),
    ("correct_clean", _int),
    ("hit_target", _int),
    ("correct_triggered", _int),
]
_TRAINING = [
    ("step", _int),
    ("samples_seen", _int),
    ("lr", _float),
    ("loss", _float),
    *((f"loss_{term}", _float) for term in TERMS),
    ("logit_scale", _float),
]
_SPEED = [("train_seconds", _float), ("evaluate_seconds", _float), ("samples_per_second", _float)]
# Retrieval: shares and counts of right answers among the first k.
RECALL_AT = (1, 5, 10)
_RETRIEVAL = [
    ("n_images", _int),
    ("n_texts", _int),
    *(
        (f"{measure}{kind}_at_{k}", column)
        for measure in ("image_to_text", "text_to_image", "retrieval_asr", "retrieval_control")
        for k in RECALL_AT
        for kind, column in (("", _float), ("_hits", _int))
    ),
]
# A cleaning trial's settings, one typed column each, whether searched or not.
SETTINGS: dict[str, tuple[str, pa.DataType]] = {
    "num_samples": ("num_samples", _int),
    "leaked_poison": ("leaked_poison", _int),
    "leaked_share": ("leaked_share", _float),
    "epochs": ("epochs_planned", _int),
    "batch_size": ("batch_size", _int),
    "lr": ("lr", _float),
    "warmup_steps": ("warmup_steps", _int),
    "schedule": ("schedule", _text),
    "weight_decay": ("weight_decay", _float),
    "beta1": ("beta1", _float),
    "beta2": ("beta2", _float),
    "eps": ("eps", _float),
    **{f"loss_weights.{term}": (f"loss_weights.{term}", _float) for term in TERMS},
    "image_view": ("image_view", _text),
    "text_view": ("text_view", _text),
    "precision": ("precision", _text),
    "shrink_perturb.shrink": ("shrink_perturb.shrink", _float),
    "shrink_perturb.perturb": ("shrink_perturb.perturb", _float),
    "deep_clustering.clusters": ("deep_clustering.clusters", _int),
    "deep_clustering.iterations": ("deep_clustering.iterations", _int),
    "deep_clustering.weight": ("deep_clustering.weight", _float),
    "pseudo_labels.weight": ("pseudo_labels.weight", _float),
    "pseudo_labels.model": ("pseudo_labels.model", _text),
    "pseudo_labels.checkpoint": ("pseudo_labels.checkpoint", _text),
    "par.threshold": ("par.threshold", _float),
    "par.noise": ("par.noise", _float),
    "par.erase": ("par.erase", _float),
    "ft_sam.rho": ("ft_sam.rho", _float),
    "abd.epsilon": ("abd.epsilon", _float),
    "abd.steps": ("abd.steps", _int),
    "abd.step_size": ("abd.step_size", _float),
}

SCHEMAS: dict[str, pa.Schema] = {
    "poison_plan": pa.schema(
        [
            ("key", _text),
            ("shard", _text),
            ("trigger", _text),
            ("placement", _text),
            ("target_class", _text),
            ("caption_before", _text),
            ("caption_after", _text),
            ("seed", _int),
        ]
    ),
    "pretrain_epochs": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("pretrain_id", _text),
            ("objective", _text),
            ("epoch", _int),
            *_TRAINING,
            *_RATES,
            ("poisoned_seen", _int),
            ("broken", _int),
            *_SPEED,
        ]
    ),
    # Only where a study has several attacks, or controls; `trial_id` is null for pretraining.
    "attacks": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("pretrain_id", _text),
            ("trial_id", _text),
            ("objective", _text),
            ("epoch", _int),
            ("alpha", _float),
            ("split", _text),
            ("role", _text),
            ("trigger", _text),
            ("target_class", _text),
            ("n_triggered", _int),
            ("hit_target", _int),
            ("correct_triggered", _int),
            ("asr_top1", _float),
            ("robust_top1", _float),
        ]
    ),
    "trials": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("trial_id", _text),
            ("number", _int),
            ("pretrain_id", _text),
            ("objective", _text),
            ("method", _text),
            *SETTINGS.values(),
            ("params_json", _text),
            ("state", _text),
            ("stop_reason", _text),
            # Null, or why it failed: died, hung, out_of_memory, non_finite, error, settings (`study.Failure`).
            ("error_type", _text),
            ("error_message", _text),
            ("epochs_done", _int),
            ("weight_decay_in_force", _float),
            ("seed", _int),
            ("attempt", _int),
            ("node", _text),
            ("device", _text),
            ("started", _time),
            ("ended", _time),
            ("device_seconds", _float),
        ]
    ),
    "epochs": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("trial_id", _text),
            ("pretrain_id", _text),
            ("objective", _text),
            ("method", _text),
            ("epoch", _int),
            ("alpha", _float),
            ("split", _text),
            *_TRAINING,
            *_RATES,
            ("broken", _int),
            *_SPEED,
        ]
    ),
    "fronts": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("pretrain_id", _text),
            ("objective", _text),
            ("method", _text),
            ("kind", _text),
            ("split", _text),
            ("trial_id", _text),
            ("epoch", _int),
            ("alpha", _float),
            ("zeroshot_top1", _float),
            ("asr_top1", _float),
            ("hv_contribution", _float),
            ("hypervolume", _float),
            ("checkpoint", _text),
            ("baseline_top1", _float),
            ("baseline_asr", _float),
        ]
    ),
    "evaluations": pa.schema(
        [
            ("study", _text),
            ("study_hash", _text),
            ("pretrain_id", _text),
            ("objective", _text),
            ("method", _text),
            ("trial_id", _text),
            ("epoch", _int),
            ("checkpoint", _text),
            ("task", _text),
            ("data", _text),
            ("data_hash", _text),
            ("split", _text),
            ("classes", _text),
            ("templates", _text),
            ("role", _text),
            ("trigger", _text),
            ("target_class", _text),
            *_RATES,
            *_RETRIEVAL,
            ("code", _text),
        ]
    ),
}
# Columns that differ between two runs of the same study with the same seeds: when, where and how fast.
TIMES = frozenset({"started", "ended", "device_seconds", "node", *(name for name, _ in _SPEED)})


def write(store: Store, table: str, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part of a table, whole or not at all; a part of the same name is replaced.

    Errors: DataError on a row with a key that the schema does not have or a value of another type, or a part whose
        name leads elsewhere.
    """
    _put(store, table, part, _of_rows(table, part, rows))


def write_trial(store: Store, table: str, trial: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a trial's rows of a table in the place of those that are there of it.

    Some trials of consecutive numbers share a part: of a sweep of thousands each reader would else open as many files,
    which takes most of its time. A part is replaced as a whole, so readers see every trial once.

    Args:
        trial: its row of the table `trials`.

    Errors: as of `write`, and of `read` where the part that is there is damaged.
    """
    import pyarrow.compute as pc  # takes longer to load than to read a table with

    first = trial["number"] - trial["number"] % TOGETHER
    part = f"{trial['objective']}-{first:04d}-{first + TOGETHER - 1:04d}"
    found, name = _of_rows(table, part, rows), f"tables/{table}/{part}.parquet"
    if store.exists(name):
        there = _part(store.get(name), SCHEMAS[table], store.path(name)).cast(SCHEMAS[table])
        found = pa.concat_tables([there.filter(pc.not_equal(there.column("trial_id"), trial["trial_id"])), found])
        found = found.take(pc.sort_indices(found.column("trial_id")))
    _put(store, table, part, found)


def _of_rows(table: str, part: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    if "/" in part:
        raise DataError(f"no name of a part: {part!r}", where=f"tables/{table}", expected="a name without /")
    schema = SCHEMAS[table]
    for row in rows:
        if extra := set(row) - set(schema.names):
            raise DataError(f"row has columns that {table} has not: {sorted(extra)}", where=f"tables/{table}/{part}")
    texts = [{name: _utf8(value) for name, value in row.items()} for row in rows]
    try:
        return pa.Table.from_pylist(texts, schema=schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"row has values of other types: {error}", where=f"tables/{table}/{part}") from None


def _put(store: Store, table: str, part: str, found: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    metadata = {"raybd.schema_version": str(SCHEMA_VERSION), "raybd.table": table}
    pq.write_table(found.replace_schema_metadata(metadata), sink, compression="zstd")
    store.put(f"tables/{table}/{part}.parquet", sink.getvalue().to_pybytes())


def _utf8(value: Any) -> Any:
    """Return a value as Parquet takes it: in texts, what is no character (of a file name in an error) is escaped."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def read(store: Store, table: str, *, columns: Collection[str] | None = None, encoded: bool = False) -> pa.Table:
    """Read all parts of a table, in the order of their names; empty if there is none.

    Args:
        columns: those that are needed; all by default. Of others only those are read, and looked at for what cannot be,
            without which no row is one.
        encoded: leave texts as dictionaries, which takes less time and memory where many are the same.

    Errors: DataError that names a part which is damaged, written by another raybd, or has rows that cannot be.
    """
    schema = SCHEMAS[table]
    if columns is not None:
        needed = {*columns, *table_rules.REQUIRED[table]}
        schema = pa.schema([field for field in schema if field.name in needed])
    found: list[tuple[str, pa.Table]] = []
    try:
        names = store.names(f"tables/{table}", suffix=".parquet")
        for name, content in zip(names, store.get_each(names), strict=True):
            where = store.path(name)
            found.append((where, _part(content, schema, where)))
    except DataError:
        _check(found, table, schema)  # what is wrong in an earlier part is told first
        raise
    if not found:
        return schema.empty_table()
    rows = _check(found, table, schema)
    if table == "epochs":
        table_rules.check_points(rows, where=store.path(f"tables/{table}"))
    return rows if encoded else rows.cast(schema)


def searched(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the searched settings of a row of `trials`, by dotted name; none where nobody wrote down which they are.

    Errors: DataError where a row that this reader has not checked has something else there.
    """
    return table_rules.json_object(
        trial["params_json"] or "{}", name="params_json", where=f"trial {trial.get('trial_id')}"
    )


def _part(content: bytes, schema: pa.Schema, where: str) -> pa.Table:
    """Return a part of a table, texts as dictionaries. Errors: DataError."""
    part = parquet.read(content, where=where, columns=schema.names, encoded=True)
    version = (part.schema.metadata or {}).get(b"raybd.schema_version", b"")
    if version != str(SCHEMA_VERSION).encode():
        raise DataError(
            f"schema version {version.decode(errors='replace') or 'missing'}",
            where=where,
            expected=f"version {SCHEMA_VERSION}",
            fix="read it with the raybd that wrote it, or remove the part",
        )
    have = set(part.schema.names)
    missing = [field for field in schema.names if field not in have]
    if missing:
        raise DataError(f"columns missing: {', '.join(missing)}", where=where)
    own = _encoded(schema)
    rows = part.select(schema.names).replace_schema_metadata()
    if rows.schema == own:
        return rows
    try:
        return rows.cast(schema).cast(own)
    except pa.ArrowException as error:
        raise DataError(f"columns of other types: {error}", where=where) from None


@cache
def _encoded(schema: pa.Schema) -> pa.Schema:
    """Return a schema with its texts as dictionaries."""
    encoded = pa.dictionary(pa.int32(), _text)
    return pa.schema([field.with_type(encoded) if field.type == _text else field for field in schema])


def _check(parts: Sequence[tuple[str, pa.Table]], table: str, schema: pa.Schema) -> pa.Table:
    """Return all parts as one table. Errors: DataError on rows that cannot be, of the first part that has some."""
    if not parts:
        return schema.empty_table()
    rows = pa.concat_tables([part for _, part in parts])
    try:
        rows = rows.unify_dictionaries().combine_chunks()
        table_rules.check(rows, table=table, where="")
    except (DataError, pa.ArrowException):
        # At once is faster by far where there are many parts; which one it is, the parts say. Arrow gives up where
        # their texts together are longer than 2 GB.
        for where, part in parts:
            table_rules.check(part.cast(schema), table=table, where=where)
    return rows
