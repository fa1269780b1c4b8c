"""Shards as files: their bytes depend on nothing but what is in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertjax.errors import InputError

# Rows of a row group: one is what a reader takes into memory at a time.
_GROUP_ROWS = 8192


def check_storable(schema: pa.Schema, format: str) -> None:
    """Raises `InputError` for a column that can't be written, such as one of a type that Parquet does not have."""
    for field in schema if format == "parquet" else ():
        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except pa.ArrowException as problem:
            raise InputError(f"column {field.name!r} ({field.type}) can't be written to Parquet: {problem}") from None


class ShardFile(Protocol):
    """A file that is being written. An `OSError` names its path, which is a temporary one."""

    def add(self, columns: Sequence[pa.Array]) -> None:
        """Adds rows: an array for each column."""

    def close(self) -> None:
        """Writes what is left."""


class ParquetShard:
    """A Parquet file.

    Args:
        path: the file to write.
        schema: its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        # The numbers of a vector repeat nowhere: to look for that takes time and saves nothing.
        plain = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
        self._writer = pq.ParquetWriter(
            path, schema, version="2.6", compression="snappy", use_dictionary=plain, write_statistics=plain
        )

    def add(self, columns: Sequence[pa.Array]) -> None:
        """See `ShardFile`."""
        self._waiting.append(pa.record_batch(list(columns), schema=self._schema))
        while sum(batch.num_rows for batch in self._waiting) >= _GROUP_ROWS:
            table = pa.Table.from_batches(self._waiting)
            self._write(table.slice(0, _GROUP_ROWS))
            self._waiting = table.slice(_GROUP_ROWS).to_batches()

    def close(self) -> None:
        """See `ShardFile`."""
        if self._waiting:
            self._write(pa.Table.from_batches(self._waiting))
        self._writer.close()

    def _write(self, table: pa.Table) -> None:
        # In one piece, so that the bytes do not show how the rows came.
        self._writer.write_table(table.combine_chunks(), row_group_size=_GROUP_ROWS)


class NpyShard:
    """A .npy file of vectors [rows, dim]; those of bad rows are NaN, or zero where numbers are whole.

    Args:
        path: the file to write.
        schema: one column, a fixed-size list.
        rows: how many rows there will be.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        kind = schema.field(0).type
        self._width = kind.list_size
        self._dtype = np.dtype(kind.value_type.to_pandas_dtype())
        self._file = open(path, "xb")  # noqa: SIM115
        fields = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**fields, "shape": (rows, self._width)})

    def add(self, columns: Sequence[pa.Array]) -> None:
        """See `ShardFile`."""
        (vectors,) = columns
        found = vectors.flatten()
        numbers = np.full(len(found), np.nan if self._dtype.kind == "f" else 0, self._dtype)
        numbers[found.is_valid().to_numpy(zero_copy_only=False)] = found.drop_null().to_numpy()
        self._file.write(numbers.data)

    def close(self) -> None:
        """See `ShardFile`."""
        self._file.close()
