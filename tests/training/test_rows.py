"""Rows of files to what is learnt from: every format, and bad rows by their names."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertjax.errors import InputError, SourceError
from bertjax.training.rows import read_rows

RECORDS = [{"body": "a cat", "kind": "x"}, {"body": "it sat, on a mat", "kind": "y"}, {"body": "", "kind": "x"}]
COLUMNS = {"text": "body", "label": "kind"}


def write(folder, suffix):
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif suffix == ".csv":
        path.write_text("body,kind\n" + "".join(f'"{each["body"]}",{each["kind"]}\n' for each in RECORDS))
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = read_rows([write(tmp_path, suffix)], COLUMNS)
    assert rows.records == [{"text": each["body"], "label": each["kind"]} for each in RECORDS]
    assert [place for _, place in rows.places] == ["row 0", "row 1", "row 2"]


def test_columns_of_lists_and_records(tmp_path):
    answers = [{"text": ["cat"], "answer_start": [2]}, {"text": [], "answer_start": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"tokens": ["a", "cat"], "answers": each}) + "\n" for each in answers))
    rows = read_rows([path], {"tokens": "tokens", "answers": "answers"})
    assert rows.records == [{"tokens": ["a", "cat"], "answers": each} for each in answers]


def test_bad_rows_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a", "kind": "x"}\n{"body": \n{"body": "b"}\n[1]\n{"body": null, "kind": "y"}\n')
    rows = read_rows([path], COLUMNS)
    assert rows.records == [{"text": "a", "label": "x"}]
    assert sorted(place for _, place, _ in rows.bad) == ["row 1", "row 2", "row 3", "row 4"]
    assert {place: why for _, place, why in rows.bad}["row 2"] == "'kind' is null or missing"
    rows.write_bad(tmp_path / "bad.jsonl")
    written = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [each["place"] for each in written] == [place for _, place, _ in rows.bad]
    assert rows.describe_bad().startswith("4 bad row(s): ")
    left = rows.refuse({0: "is short"})
    assert (left.records, left.bad[-1]) == ([], (str(path), "row 0", "is short"))


def test_what_is_optional_may_be_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a", "kind": null}\n{"body": "b", "kind": "y"}\n')
    rows = read_rows([path], COLUMNS, optional=("label",))
    assert [record["label"] for record in rows.records] == [None, "y"]


CONLL = """-DOCSTART- -X- O

# sent_id = 1
She PRP B-PER
sat VBD O

#cat\tO
mat\tB-LOC
\t
alone
# sat O

"""


def test_conll(tmp_path):
    path = tmp_path / "words.conll"
    path.write_text(CONLL)
    rows = read_rows([path], {"tokens": "tokens", "tags": "tags"})
    assert rows.records == [
        {"tokens": ["She", "sat"], "tags": ["B-PER", "O"]},
        {"tokens": ["#cat", "mat"], "tags": ["O", "B-LOC"]},
    ]
    assert rows.places == [(str(path), "line 4"), (str(path), "line 7")]
    assert rows.bad == [(str(path), "line 10", "line 10 is 'alone' alone, expected a word and its tag")]


@pytest.mark.parametrize(
    ("name", "content", "columns", "error", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n', {"text": "y"}, InputError, "no line has a field 'y'"),
        ("a.csv", b"x,z\n1,2\n", {"text": "y"}, InputError, "no column 'y'"),
        ("a.conll", b"a O\n", {"text": "text"}, InputError, "no column 'text'; a CoNLL file has 'tokens' and 'tags'"),
        ("a.conll", b"\xff O\n", {"tokens": "tokens"}, SourceError, "not UTF-8"),
        ("a.jsonl", b"", {"text": "x"}, SourceError, "no rows"),
        ("a.doc", b"x", {"text": "x"}, InputError, "says no format"),
    ],
)
def test_what_can_not_be_read(tmp_path, name, content, columns, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_rows([tmp_path / name], columns)
