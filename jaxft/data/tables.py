"""Parquet and Arrow files to rows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from jaxft.errors import UserError

Record = tuple[str, dict[str, Any]]
BUFFER = 2**20  # bytes of a column read at once
ROWS = 1024  # turned into Python's objects at once


def read_parquet(name: str, opened: IO[bytes]) -> Iterator[Record]:
    """Yields ("path:row", values) for each row of a Parquet file, counted from 1."""
    yield from _rows(name, _parquet_batches(name, opened))


def read_arrow(name: str, opened: IO[bytes]) -> Iterator[Record]:
    """Yields ("path:row", values) for each row of an Arrow file, streamed (as `datasets`) or not."""
    yield from _rows(name, _arrow_batches(name, opened))


def _parquet_batches(name: str, opened: IO[bytes]) -> Iterator[pyarrow.RecordBatch]:
    file = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=BUFFER)
    _check_names(name, file.schema_arrow)
    for group in range(file.num_row_groups):  # over all at once, it holds what it has read
        yield from file.iter_batches(batch_size=ROWS, row_groups=[group], use_threads=False)


def _arrow_batches(name: str, opened: IO[bytes]) -> Iterator[pyarrow.RecordBatch]:
    begin = opened.read(6)
    opened.seek(0)
    if begin == b"ARROW1":
        file = pyarrow.ipc.open_file(opened)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
    else:
        batches = file = pyarrow.ipc.open_stream(opened)
    _check_names(name, file.schema)
    for batch in batches:
        batch.validate(full=True)  # Arrow itself does not ask whether offsets lie in their buffers
        for start in range(0, batch.num_rows, ROWS):
            yield batch.slice(start, ROWS)


def _rows(name: str, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    number = 0
    try:
        for batch in batches:
            for values in _values(batch, name, number):
                number += 1
                yield f"{name}:{number}", {key: present(part) for key, part in values.items()}
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: cannot be read after row {number}: {reason}") from error


def _values(batch: pyarrow.RecordBatch, name: str, before: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            for key in batch.schema.names:
                try:
                    batch.column(key).slice(index, 1).to_pylist()
                except UnicodeDecodeError as error:
                    raise UserError(f"{name}:{before + index + 1}: {key}: not UTF-8") from error
        raise


def present(value: Any) -> Any:
    """The value without the nulls that fill a struct's absent keys, at every depth."""
    if isinstance(value, dict):
        return {key: present(part) for key, part in value.items() if part is not None}
    return [present(part) for part in value] if isinstance(value, list) else value


def _check_names(name: str, schema: pyarrow.Schema) -> None:
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise UserError(f"{name}: the column {column!r} stands twice")
