import gzip
import json
import os

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from corpora import NAMES, ids, packed, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertjax.corpus import lines
from bertjax.corpus.inputs import find_inputs, look_at
from bertjax.corpus.reader import RowReader, source_of
from bertjax.corpus.rows import Columns
from bertjax.errors import InputError, SourceError

BOTH = Columns(("text",), pa.schema([("id", pa.string())]))
TEXT = Columns(("text",), pa.schema([]))


def all_rows(path, columns=TEXT):
    file = look_at(path)
    return RowReader([file], columns).read(0, 0, source_of(file).count())


# What a line can hold, without what ends one.
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=texts, name=st.sampled_from(NAMES), data=st.data())
def test_any_range_of_rows_of_any_format(tmp_path, texts, name, data):
    if ".txt" in name and texts[0].startswith("\ufeff"):
        texts[0] = "x"  # there it marks the encoding
    path = write(tmp_path / name, texts, rows=data.draw(st.integers(1, 9)))
    os.utime(path, ns=(0, 0))  # files are written faster than the clock of the disk ticks
    columns = TEXT if ".txt" in name else BOTH
    file = look_at(path)
    assert source_of(file).count() == len(texts)
    reader = RowReader([file], columns)
    for _ in range(3):
        start, stop = sorted(data.draw(st.lists(st.integers(0, len(texts)), min_size=2, max_size=2, unique=True)))
        block = reader.read(0, start, stop)
        assert block.items == texts[start:stop]
        assert block.bad == {}
        for array in block.kept:
            assert array.to_pylist() == ids(len(texts))[start:stop]


def test_ranges_over_many_blocks_and_far_jumps(tmp_path, monkeypatch):
    monkeypatch.setattr("bertjax.corpus.reader._NEAR", 1500)
    texts = [f"text {index}" for index in range(5000)]
    for name in ("a.parquet", "a.jsonl.gz", "a.arrow"):
        reader = RowReader([look_at(write(tmp_path / name, texts, rows=1300))], TEXT)
        for start, stop in [(0, 1024), (1024, 1030), (2000, 4100), (4999, 5000), (0, 3), (3000, 3001)]:
            assert reader.read(0, start, stop).items == texts[start:stop]


def test_a_blank_line_of_text_is_a_text_and_carriage_returns_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n\x0ctwo\x0b three")
    assert all_rows(tmp_path / "a.txt").items == ["one", "", "\x0ctwo\x0b three"]


def test_csv_has_quotes_line_ends_in_fields_and_long_fields(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'\ufeffid,text\n1,"a ""b""\nc, d"\n\n007,{long}\n,\n', encoding="utf-8")
    block = all_rows(tmp_path / "a.csv", BOTH)
    assert block.items == ['a "b"\nc, d', long, ""]
    assert block.kept[0].to_pylist() == ["1", "007", ""]


BAD = {
    "a.jsonl": (
        b'{"text": "a"}\nnonsense\n[1]\n{"id": 1}\n{"text": null}\n{"text": 5}\n\n{"text": "\xff"}\n{"text": "b"}\n',
        ["not a line of JSON", "no JSON object", "'text' is missing", "is None", "is 5", "not a line", "not UTF-8"],
    ),
    "a.csv": (b"text,id\na,1\nb\nc,1,2\nd\xff,1\ne,2\n", ["1 fields, the header has 2", "3 fields", "not UTF-8"]),
    "a.txt": (b"a\n\xff\nb\n", ["not UTF-8 text (invalid start byte at byte 0)"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_a_bad_row(tmp_path, name):
    data, reasons = BAD[name]
    (tmp_path / name).write_bytes(data)
    block = all_rows(tmp_path / name)
    assert sorted(block.bad) == list(range(1, 1 + len(reasons)))
    for row, expected in enumerate(reasons, start=1):
        assert expected in block.bad[row]
    assert [index for index, item in enumerate(block.items) if item is None] == sorted(block.bad)


def test_a_null_and_broken_utf8_in_a_column_are_bad_rows(tmp_path):
    column = pa.array([b"a", None, b"\xff", b"d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    block = all_rows(tmp_path / "a.parquet")
    assert block.items == ["a", None, None, "d"]
    assert block.bad == {1: "'text' is null", 2: "not UTF-8 text (invalid start byte at byte 0)"}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_every_type_of_text_is_read(tmp_path, kind):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert source_of(look_at(path)).text_columns() == ["text"]
    assert all_rows(path).items == ["a", "b", "a"]


def test_several_columns_of_text_make_an_item(tmp_path):
    write(tmp_path / "a.jsonl", ["x", "y"])
    assert all_rows(tmp_path / "a.jsonl", Columns(("id", "text"), pa.schema([]))).items == [
        ("id-0", "x"),
        ("id-1", "y"),
    ]


def test_json_columns_have_the_types_that_hold_all_values(tmp_path):
    records = [{"n": 1, "l": [1]}, {"n": 2.5, "l": None}, {"l": [2, 3], "s": "x"}] * 900 + [{"late": True}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = source_of(look_at(tmp_path / "a.jsonl"))
    schema = source.schema(["n", "l", "s", "late"])
    assert schema.types == [pa.float64(), pa.list_(pa.int64()), pa.string(), pa.bool_()]
    block = all_rows(tmp_path / "a.jsonl", Columns(("s",), schema))
    assert block.kept[0].to_pylist()[:3] == [1.0, 2.5, None]
    with pytest.raises(InputError, match="no line has a field 'm'"):
        source.schema(["m"])
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": "x"}\n')
    with pytest.raises(InputError, match="the values of 'n' have no one type"):
        source.schema(["n"])


def test_half_a_surrogate_pair_in_a_kept_column_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": "\\ud800"}\n')
    block = all_rows(tmp_path / "a.jsonl", BOTH)
    assert block.kept[0].to_pylist() == ["x", None]
    assert list(block.bad) == [1]
    assert "field 'id' is" in block.bad[1]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.split(".")[-1] not in ("jsonl", "ndjson", "csv", "txt")]
)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name):
    path = write(tmp_path / name, [f"text {index}" for index in range(20_000)], rows=5000)
    data = path.read_bytes()
    for end in (len(data) // 3, len(data) - 9):
        path.write_bytes(data[:end])
        with pytest.raises(SourceError, match=rf"{name}: can't be read \(.*\); is it whole\?"):
            all_rows(path)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST", 1000)
    (tmp_path / "a.txt").write_text("short\n" + "x" * 1000 + "\n")
    with pytest.raises(SourceError, match=r"a\.txt:2: a line of more than"):
        all_rows(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("text\nshort\n" + "x" * 1001 + "\n")
    with pytest.raises(SourceError, match=r"a\.csv:3: can't be read as CSV \(field larger than"):
        all_rows(tmp_path / "a.csv")
    lines.csv.field_size_limit(1 << 26)


def test_columns_that_are_not_there(tmp_path):
    for name, message in {
        "a.parquet": r"no column 'x'; its columns are 'id' \(string\), 'text' \(string\)",
        "a.csv": "no column 'x'; its columns are 'id', 'text'",
        "a.txt": "no column 'x'; a text file has one, 'text'",
    }.items():
        with pytest.raises(InputError, match=message):
            source_of(look_at(write(tmp_path / name, ["a"]))).schema(["x"])
    (tmp_path / "b.csv").write_text("x,x\n1,2\n")
    with pytest.raises(InputError, match="has 2 columns 'x'"):
        source_of(look_at(tmp_path / "b.csv")).schema(["x"])


def test_feather_of_version_1_is_refused(tmp_path):
    (tmp_path / "a.feather").write_bytes(b"FEA1" + b"\0" * 100)
    with pytest.raises(InputError, match="Feather of version 1"):
        source_of(look_at(tmp_path / "a.feather")).schema(["text"])


def test_a_file_that_changed_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", ["a", "b"])
    reader = RowReader([look_at(path)], TEXT)
    path.write_text("a\nb\nc\n")
    with pytest.raises(InputError, match=r"a\.txt: has changed since the job was planned"):
        reader.read(0, 0, 2)
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.txt: can't be read \(No such file"):
        reader.read(0, 0, 2)


def test_inputs_are_found_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "z.txt",
        "d/b.jsonl.gz",
        "d/a.parquet",
        "d/e/c.csv",
        "d/_x.txt",
        "d/.y.txt",
        "d/_job/z.txt",
        "d/README",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def names(*inputs, **options):
        return [os.path.relpath(file.path, tmp_path) for file in find_inputs(inputs, **options)]

    assert names("z.txt", "d") == ["z.txt", "d/a.parquet", "d/b.jsonl.gz", "d/e/c.csv"]
    assert names("d/*.parquet", "*.txt") == ["d/a.parquet", "z.txt"]
    assert names("**/*.csv") == ["d/e/c.csv"]
    assert names(".", without="d/e") == ["d/a.parquet", "d/b.jsonl.gz", "z.txt"]
    for inputs, message in {
        ("d/README",): "README: its name says no format; expected one of .parquet",
        ("z.txt", "*.txt"): "z.txt: is among the inputs twice",
    }.items():
        with pytest.raises(InputError, match=message):
            find_inputs(inputs)
    for inputs, message in {
        ("nothing.txt",): "nothing.txt: no such file",
        ("*.feather",): "no file matches",
        ("d/_job/..", "d/e"): None,
        (): "no inputs: no files to read",
    }.items():
        if message is not None:
            with pytest.raises(SourceError, match=message):
                find_inputs(inputs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no file in this folder has a name that ends in one of"):
        find_inputs(["empty"])


def test_gzip_members_one_after_another_are_all_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert all_rows(tmp_path / "a.txt.gz").items == ["a", "bc", "d"]
    packed(tmp_path / "b.txt.zst", b"a\nb\n")
    assert all_rows(tmp_path / "b.txt.zst").items == ["a", "b"]


def test_a_mark_of_the_encoding_is_no_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    assert all_rows(tmp_path / "a.txt").items == []
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert all_rows(tmp_path / "b.jsonl").items == ["a"]


def test_a_quote_that_is_not_closed_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"abc\n2,def\n3,ghi\n')
    with pytest.raises(SourceError, match=r"a.csv:4: can't be read as CSV \(unexpected end of data\)"):
        all_rows(tmp_path / "a.csv")


def test_suffixes_may_be_in_capitals(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"a cat\na dog\n"))
    assert all_rows(tmp_path / "A.TXT.GZ").items == ["a cat", "a dog"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    with open(path, "w") as file:
        file.write("a")
    with pytest.raises(InputError, match="its name is no UTF-8; rename it"):
        find_inputs([str(tmp_path)])


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("data", "else"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.txt", ["a cat"])
    (tmp_path / "data" / "sub").symlink_to("../else")
    assert len(find_inputs([tmp_path / "data"])) == 2
    (tmp_path / "else" / "back").symlink_to("../data")
    with pytest.raises(InputError, match="links to a folder that is among the inputs anyway"):
        find_inputs([tmp_path / "data"])


def test_the_output_is_no_input_by_whatever_name(tmp_path):
    (tmp_path / "data" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    for name in ("data/a.txt", "data/out/b.txt"):
        write(tmp_path / name, ["a cat"])
    assert len(find_inputs([tmp_path / "data"], without=tmp_path / "link" / "out")) == 1


def test_types_that_do_not_go_together_are_named(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "n": [2**53 + 1]}), tmp_path / "a.parquet")
    columns = Columns(("text",), pa.schema([("n", pa.float64())]))
    with pytest.raises(InputError, match="column 'n' is int64 in one file and double over all of them"):
        all_rows(tmp_path / "a.parquet", columns)
