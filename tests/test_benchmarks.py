"""The parts of the benchmarks that compute nothing heavy: formulas, statistics, turns, reports, absent peers."""

import json
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from oracle import require

from benchmarks import __main__ as command_line
from benchmarks import harness, reports, timing, workloads
from benchmarks.harness import Case, Entrant, Plan
from benchmarks.peers import PEERS, Absent, Loaded, Setting, load, prepare
from benchmarks.worker import first, measure, read_inputs
from benchmarks.workloads import Sizes
from bertjax import BertConfig, BertForMaskedLM

BASE = Sizes(layers=12, hidden=768, intermediate=3072, vocab=30522)


@pytest.fixture
def plan(tmp_path) -> Plan:
    return Plan(
        task="dense",
        model=tmp_path,
        device="cpu",
        threads=1,
        pythons={},
        exported=tmp_path,
        folder=tmp_path,
        rounds=3,
        burn_in=1,
        probe_size=64,
    )


class FakeEntrant:
    """Answers as a worker does, at a known speed, and writes down when it was asked."""

    def __init__(self, peer, seconds, log, dtype="float32", fails_at=None, result=1.0):
        self.peer, self.dtype, self.start, self.absent = peer, dtype, {}, None
        self.seconds, self.log, self.fails_at, self.result = seconds, log, fails_at, result

    def ask(self, operation, **request):
        self.log.append((self.peer, operation, request.get("calls")))
        if operation == "first":
            np.save(request["save"], np.full((1, 2, 4), self.result, np.float32))
            return {"first_s": 5.0}
        if operation == self.fails_at:
            return {"failed": "out of memory"}
        return {"seconds": self.seconds, "memory": 2_000_000_000, "device_memory": None}


# --- FLOPs ---


def test_a_token_of_base_takes_the_hand_derived_operations():
    # 12 layers of 4 square matrices of 768 and two of 768 x 3072, two operations a weight: 169.9 million; and for each
    # token of its text 768 products in the scores and as many in the context, 36 864 operations.
    dense = 12 * 2 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert dense == 169_869_312
    assert BASE.encoder_flops([1]) == dense + 36_864
    assert BASE.encoder_flops([128] * 8) == 8 * 128 * (dense + 36_864 * 128)


def test_operations_of_large_are_those_of_the_formula():
    large = Sizes(layers=24, hidden=1024, intermediate=4096, vocab=30522)
    assert large.encoder_flops([384]) == 384 * 24 * (24 * 1024**2 + 4 * 384 * 1024)


def test_a_text_attends_to_itself_only_and_a_narrow_intermediate_counts_as_such():
    assert BASE.encoder_flops([10, 20]) == BASE.encoder_flops([10]) + BASE.encoder_flops([20])
    assert BASE.encoder_flops([30]) > BASE.encoder_flops([10, 20])
    assert Sizes(1, 4, 2, 10).encoder_flops([1]) == 8 * 16 + 4 * 4 * 2 + 4 * 4


def test_training_is_three_passes_and_a_head_at_the_predicted_positions():
    head = 2 * 768 * 768 + 2 * 768 * 30522
    assert BASE.training_flops(8, 128, 154) == 3 * (BASE.encoder_flops([128] * 8) + 154 * head)


def test_sizes_are_read_from_the_configuration(tmp_path):
    config = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 50, "other": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Sizes.of(tmp_path) == Sizes(2, 8, 16, 50)


# --- workloads ---


@pytest.mark.parametrize("text", ["8", "8x", "ax2", "0x128", "1x2x3"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ValueError):
        workloads.parse_shape(text)


def test_shapes_are_batch_by_length():
    assert workloads.parse_shape("8x128") == (8, 128)


def test_masked_batches_predict_fifteen_percent():
    batch = workloads.masked_batch((8, 128), 30522)
    predicted = batch["labels"] != -100
    assert predicted.sum() == round(0.15 * 8 * 128)
    assert (batch["input_ids"][predicted] == 103).all()
    unchanged = workloads.random_ids((8, 128), 30522)
    assert (batch["input_ids"][~predicted] == unchanged[~predicted]).all()
    assert (batch["labels"][predicted] == unchanged[predicted]).all()
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32


def test_texts_are_distinct_long_enough_and_from_pairs_where_it_is_a_table(tmp_path):
    lines, pairs = tmp_path / "a.txt", tmp_path / "a.csv"
    lines.write_text(" one two three \nshort\none two three\n\nfour five six\nseven eight nine\n")
    pairs.write_text('"A, b.",C.,5.0\nC.,D.,1.0\n')
    assert workloads.read_texts(lines, 2, least_words=3) == ["one two three", "four five six"]
    assert workloads.read_texts(pairs, 10) == ["A, b.", "C.", "D."]
    assert len(workloads.read_texts(None, 20)) == 20


def test_texts_near_a_length():
    assert workloads.texts_near(["a", "a b c", "a b c d e"], 4, 2) == ["a b c", "a b c d e"]


# --- statistics ---


def test_ratios_are_of_the_same_round():
    assert timing.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    with pytest.raises(ValueError):
        timing.ratios([1.0, 2.0], [1.0])


def test_the_command_tells_no_path(tmp_path):
    shown = timing.command(["embed", str(tmp_path), "--python", f"flaxbert={sys.executable}", "--rounds", "3"])
    python = Path(sys.executable).name
    assert shown == f"python -m benchmarks embed {tmp_path.name} --python flaxbert={python} --rounds 3"


# --- turns ---


def test_entrants_take_turns_and_burn_in_is_not_measured(plan):
    log = []
    group = [FakeEntrant("torch", 0.25, log), FakeEntrant("bertjax", 10.0, log)]
    answers = harness.measure(plan, group, Case("c", plan.folder / "c.npz", 1, 1, 1))
    assert [peer for peer, _, _ in log] == ["torch", "bertjax"] * 4
    # A turn takes half a second, as far as calls divide it; how many, the burn-in says.
    assert [calls for _, _, calls in log] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [answer["seconds"] for answer in answers] == [[0.25] * 3, [10.0] * 3]


def test_what_fails_on_the_way_is_reported_and_the_others_go_on(plan):
    log = []
    group = [FakeEntrant("torch", 0.5, log, fails_at="measure"), FakeEntrant("bertjax", 0.5, log)]
    broken, good = harness.measure(plan, group, Case("c", plan.folder / "c.npz", 1, 1, 1))
    assert broken["failed"] == "out of memory"
    assert good["seconds"] == [0.5] * 3
    assert [peer for peer, _, _ in log].count("torch") == 1


def test_nothing_is_timed_that_disagrees(plan):
    log, reference = [], plan.folder / "reference.npy"
    np.save(reference, np.ones((1, 2, 4), np.float32))
    group = [FakeEntrant("torch", 0.5, log), FakeEntrant("bertjax", 0.5, log, result=1.01)]
    case = Case("c", plan.folder / "c.npz", tokens=10, flops=100, texts=2)
    good, bad = harness.compare(plan, group, [case], {None: {"c": reference}})
    assert good["seconds"] == [0.5] * 3
    assert (good["first_s"], good["compile_s"], good["flops"], good["tokens"]) == (5.0, 4.5, 100, 10)
    assert "disagrees" in bad["failed"] and "seconds" not in bad
    assert ("bertjax", "measure", 1) not in log


def test_agreement_is_absolute_in_float32_and_an_angle_below():
    one = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    same = harness.difference(one, one)
    assert same == {"largest": 0.0, "cosine_distance": 0.0}
    longer = harness.difference(one * 2, one)
    assert longer["largest"] == 2.0 and longer["cosine_distance"] == 0.0
    assert not harness.agrees(longer, "float32") and harness.agrees(longer, "bfloat16")
    turned = harness.difference(np.array([[1.0, 0.0], [2.0, 0.0]], np.float32), one)
    assert turned["cosine_distance"] == 1.0 and not harness.agrees(turned, "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_or_of_another_shape_agrees_with_nothing(dtype):
    one = np.ones((2, 2), np.float32)
    for wrong in (np.full((2, 2), np.nan, np.float32), np.ones((3, 2), np.float32)):
        assert not harness.agrees(harness.difference(wrong, one), dtype)


def test_losses_are_compared_relative_to_the_reference_below_float32():
    found = harness.difference(np.array([9.0, 11.0], np.float32), np.array([10.0, 10.0], np.float32))
    assert found["largest"] == 1.0
    assert found["cosine_distance"] == pytest.approx(0.1)


# --- workers ---


def test_inputs_reach_the_worker_as_they_were(tmp_path):
    arrays = [{"input_ids": np.full((2, 3), i), "labels": np.full((2, 3), -i)} for i in range(2)]
    back = read_inputs(harness.write_inputs(tmp_path / "a", arrays))
    assert [sorted(each) for each in back] == [["input_ids", "labels"]] * 2
    assert all((a[name] == b[name]).all() for a, b in zip(arrays, back, strict=True) for name in a)
    texts = [["a text", "ünother"], ["1.5"]]
    assert read_inputs(harness.write_inputs(tmp_path / "v1.5", texts)) == texts


def test_calls_take_the_inputs_in_turn_and_wait_for_each_unless_queued(tmp_path):
    log = []
    loaded = Loaded(run=lambda each: log.append(f"run {each}") or each, wait=lambda each: log.append(f"wait {each}"))
    measure(loaded, [1, 2], 3, queued=False)
    assert log == ["run 1", "wait 1", "run 2", "wait 2", "run 1", "wait 1", "wait 1"]
    log.clear()
    measure(loaded, [1, 2], 3, queued=True)
    assert log == ["run 1", "run 2", "run 1", "wait 1"]
    assert first(loaded, [1, 2], str(tmp_path / "saved.npy"))["first_s"] >= 0
    assert np.load(tmp_path / "saved.npy").tolist() == [1, 2]


def test_a_worker_starts_elsewhere_and_multiplies(plan):
    entrant = Entrant("matmul (jax)", "float32", plan, task="probe")
    try:
        assert entrant.absent is None, entrant.start
        assert {"import_s", "load_s", "load_memory", "versions"} == set(entrant.start)
        inputs = harness.write_inputs(plan.folder / "none", [["nothing"]])
        answer = entrant.ask("first", inputs=str(inputs), save=str(plan.folder / "product.npy"))
        assert "failed" not in answer, answer
        values = np.random.default_rng(0).integers(-8, 8, (64, 64))
        np.testing.assert_array_equal(np.load(plan.folder / "product.npy")[0], values @ values)
        assert "FileNotFoundError" in entrant.ask("measure", inputs="no.json", calls=1)["failed"]
    finally:
        entrant.close()


@pytest.mark.parametrize("peer", ["bertjax", "torch"])
def test_every_case_of_training_begins_with_the_weights_on_disk(plan, peer):
    require("torch" if peer == "torch" else "jax")
    config = BertConfig.preset("tiny", vocab_size=500)
    BertForMaskedLM(config, rngs=nnx.Rngs(0)).save_pretrained(plan.model)
    batches = [workloads.masked_batch((2, 16), config.vocab_size, seed) for seed in range(2)]
    inputs = str(harness.write_inputs(plan.folder / "batches", batches))
    entrant = Entrant(peer, "float32", plan, task="train")
    try:
        saved = [str(plan.folder / f"{number}.npy") for number in range(2)]
        for path in saved:
            assert "failed" not in entrant.ask("first", inputs=inputs, save=path)
            assert "failed" not in entrant.ask("measure", inputs=inputs, calls=3)
        np.testing.assert_array_equal(np.load(saved[0]), np.load(saved[1]))
    finally:
        entrant.close()


def test_a_peer_that_needs_its_own_environment_is_absent_without_one(plan):
    entrant = Entrant("flaxbert", "float32", plan)
    assert entrant.absent == "needs an environment of its own: --python flaxbert=PYTHON"
    entrant.close()


def test_an_interpreter_that_can_not_be_started_makes_a_peer_absent(plan):
    plan.pythons["flaxbert"] = str(plan.folder / "no-python")
    assert "can't be started" in Entrant("flaxbert", "float32", plan).absent


def test_what_is_not_installed_or_not_computed_is_absent(plan, monkeypatch):
    setting = Setting(plan.model, "float32", "cpu", 1, plan.folder, 64)
    monkeypatch.setitem(PEERS, "missing", type(PEERS["torch"])(("no_such_library",), {}))
    with pytest.raises(Absent, match="there is no no_such_library"):
        prepare("missing", setting)
    int8 = Setting(plan.model, "int8", "cpu", 1, plan.folder, 64)
    with pytest.raises(Absent, match="does not compute in int8"):
        prepare("flaxbert", int8)
    unpadded = Setting(plan.model, "bfloat16", "cpu", 1, plan.folder, 64)
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", type(sys)("sentence_transformers"))
    sys.modules["sentence_transformers"].SentenceTransformer = None
    with pytest.raises(Absent, match="GPU"):
        load("sentence-transformers unpadded", "text", unpadded)


# --- reports ---


def found_rows():
    ours = {"case": "8x128", "peer": "bertjax", "dtype": "float32", "probe": False, "tokens": 1000, "texts": 8}
    ours |= {"flops": 10**11, "first_s": 3.0, "compile_s": 2.0, "seconds": [1.0, 1.0, 2.0], "memory": 10**9}
    ours |= {"difference": {"largest": 2e-6, "cosine_distance": 1e-7}, "device_memory": None}
    theirs = ours | {"peer": "torch", "seconds": [1.5, 2.0, 2.0]}
    half = ours | {"dtype": "bfloat16", "seconds": [0.5, 0.25, 0.5]}
    probe = ours | {"peer": "matmul (jax)", "probe": True, "seconds": [0.5] * 3, "tokens": 0}
    slow_probe = probe | {"peer": "matmul (torch)", "seconds": [0.8] * 3}
    broken = {"case": "8x128", "peer": "onnxruntime", "dtype": "float32", "probe": False, "failed": "out of memory"}
    return [ours, theirs, half, broken, probe, slow_probe]


def cells(table, peer, dtype="float32"):
    header = table[0]
    [row] = [row for row in table[1:] if row[:2] == [peer, dtype]]
    return dict(zip(header, row, strict=True))


def test_a_case_reports_rates_ratios_and_fractions():
    table = reports.case_rows(found_rows())
    ours, theirs, half = (cells(table, *key) for key in (("bertjax",), ("torch",), ("bertjax", "bfloat16")))
    assert (ours["a call"], ours["tokens/s"], ours["GFLOP/s"]) == ("1.00 (1.00 to 2.00) s", "1000", "100")
    assert (ours["first call"], ours["compiling"], ours["memory"]) == ("3.00 s", "2.00 s", "1.00 GB")
    assert ours["of matmul"] == "50%"  # of the faster one, 200 GFLOP/s
    assert theirs["bertjax is"] == "1.50x (1.00 to 2.00)" and ours["bertjax is"] == "-"
    assert half["own float32"] == "4.00x (2.00 to 4.00)" and half["of matmul"] == "-"
    assert (ours["off by"], half["off by"]) == ("2.0e-06", "1.0e-07")
    assert cells(table, "onnxruntime")["first call"] == "failed: out of memory"
    assert cells(table, "matmul (jax)")["tokens/s"] == "-"


def test_a_gpu_with_a_known_peak_has_a_column_for_it():
    table = reports.case_rows(found_rows(), "NVIDIA H200")
    assert cells(table, "bertjax", "bfloat16")["of nominal"] == f"{2e11 / 989e12:.0%}"
    assert cells(table, "bertjax")["of nominal"] == "-"
    assert "of nominal" not in reports.case_rows(found_rows(), "Some GPU")[0]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-40GB", 312)],
)
def test_nominal_peaks_by_name(name, teraflops):
    assert reports.nominal_flops(name) == teraflops * 1e12


def report_of(rows):
    starts = [
        {"peer": "torch", "dtype": "float32", "import_s": 1.0, "load_s": 2.0, "load_memory": 10**9}
        | {"other_versions": {"torch": "0.0"}},
        {"peer": "kerashub", "dtype": "float32", "absent": "can't be imported", "other_versions": {}},
    ]
    settings = {
        "threads": 2,
        "rounds": 3,
        "burn_in": 1,
        "probe_size": 64,
        "reference": "torch",
        "dtypes": ["float32"],
        "unit": "flops",
    }
    names = {"title": "T", "model": "m", "device": "cpu", "command": "c", "about": "a", "task": "dense"}
    return names | settings | {"machine": timing.machine(), "starts": starts, "rows": rows}


def test_the_report_names_every_peer_that_was_asked_for():
    text = reports.report(report_of(found_rows()))
    assert "| kerashub | float32 | absent |" in text
    assert "- kerashub float32 is absent: can't be imported" in text
    assert "torch 0.0" in text and "## 8x128" in text


def test_results_are_text_json_and_a_plot(tmp_path, monkeypatch):
    require("matplotlib")
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    found = report_of(found_rows())
    path = timing.save("trial", reports.report(found), found)
    reports.plot(found, path.with_suffix(".png"))
    assert json.loads(path.with_suffix(".json").read_text())["rows"][0]["seconds"] == [1.0, 1.0, 2.0]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.name == f"{found['machine']['date']}-trial.md"


# --- the command line ---


@pytest.mark.parametrize("arguments", [["dense"], ["train"], ["embed", "."], ["latency", "."], ["all", "."]])
def test_without_a_gpu_a_comparison_on_one_ends_well(arguments, monkeypatch):
    monkeypatch.setattr(timing, "gpu_name", lambda: None)
    done = CliRunner().invoke(command_line.main, [*arguments, "--device", "gpu"])
    assert (done.exit_code, done.output) == (0, "no GPU here: nothing to measure\n")


def test_all_runs_every_comparison_in_every_dtype(tmp_path, monkeypatch):
    config = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen = []

    def run(task, title, model, make_cases, reference, **options):
        seen.append((task, options["name"], tuple(options["dtypes"]), options["rounds"], options["burn_in"]))

    monkeypatch.setattr(command_line, "run", run)
    monkeypatch.setattr(workloads, "random_checkpoint", lambda size: tmp_path)
    done = CliRunner().invoke(command_line.main, ["all", str(tmp_path), "--rounds", "2"])
    assert done.exit_code == 0, done.output
    every = ("float32", "bfloat16", "int8")
    assert seen == [
        ("dense", "dense-base-cpu", every, 2, 1),
        *(("dense", f"dense-large-cpu-{dtype}", (dtype,), 2, 1) for dtype in every),
        ("text", "embed-cpu", every, 2, 1),
        ("text", "latency-cpu", every, 2, 1),
        ("train", "train-cpu", every[:2], 2, 1),
    ]


def test_an_interpreter_belongs_to_a_peer():
    with pytest.raises(click.BadParameter, match="not PEER=INTERPRETER"):
        command_line._pair("python3")
    assert command_line._pair("flaxbert=a=b") == ("flaxbert", "a=b")
