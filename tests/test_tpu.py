"""What a TPU's compiler makes of bertjax, on a machine without a TPU: counted and bounded, never timed.

libtpu stays out of the environment's own packages, because JAX would find it there and warn at every start; see
`benchmarks.tpu.library`. A process of its own compiles for all tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, tpu
from benchmarks.hlo import Program

ROOT = Path(__file__).parent.parent
#: A model size and a shape of full 128-lane tiles; two generations, for both sizes of matrix unit.
CHIPS, SIZE, SHAPE = ("v5e", "v6e"), "minilm", "8x128"


def compiled(module: str, *arguments: str):
    """What the compiler says, as a program of the benchmarks prints it."""
    if tpu.library() is None:
        message = "needs libtpu, the compiler for TPUs; see the test command in README.md"
        pytest.fail(f"CI must compile for TPUs: {message}") if os.environ.get("CI") else pytest.skip(message)
    command = [sys.executable, "-m", module, "--json", *arguments, "--size", SIZE, "--shape", SHAPE]
    # The eight devices of the other tests are of no use here; an option for CPUs is not one for TPUs either.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], dict]:
    """What the compiler says of each chip's two programs."""
    chips = [argument for chip in CHIPS for argument in ("--chip", chip)]
    found = compiled("benchmarks.tpu", *chips, "--program", "padded", "--program", "packed")
    return {(each["chip"], each["program"]): each for each in found["cases"]}


@pytest.mark.slow
def test_compiles_in_bfloat16_with_few_copies_and_fits(cases):
    assert set(cases) == {(chip, program) for chip in CHIPS for program in ("padded", "packed")}
    for each in cases.values():
        where = f"{each['chip']} {each['program']}"
        # Eight products a layer, which the scan holds once; the compiler may merge some but never multiplies more.
        assert each["matmuls"] > 0, where
        assert each["float32_matmuls"] == 0, where
        # The input may be laid out anew, once, before the loop.
        assert each["copies"] <= 1, where
        assert each["transposes"] == 0, where
        assert each["fits"], where
        # 1 % of the memory of the smallest chip: nothing of the size of a second set of activations is kept.
        assert each["memory_bytes"] < 0.01 * 16e9, where


@pytest.mark.slow
def test_packing_costs_less_than_half_of_padding_by_the_compilers_estimate(cases):
    for chip in CHIPS:
        assert cases[chip, "packed"]["kernels_not_estimated"] == cases[chip, "padded"]["kernels_not_estimated"] == 0
        packed, padded = (cases[chip, program]["cycles_per_real_token"] for program in ("packed", "padded"))
        assert packed <= 0.5 * padded, chip


@pytest.mark.slow
def test_a_training_step_compiles_for_a_slice_and_divides_its_state():
    replicated, sharded = compiled("benchmarks.tpu_train", "--chip", "v5e")
    assert (replicated["rules"], sharded["rules"]) == ("replicated", "fully sharded")
    for each in (replicated, sharded):
        assert each["devices"] == 4
        assert each["matmuls"] > 0
        assert each["float32_matmuls"] == 0
        assert each["fits"]
    # All but what can't be divided evenly, biases of the vocabulary and the like; a batch is the same in both.
    assert sharded["state_bytes"] < 1.05 * replicated["state_bytes"] / 4
    assert replicated["collectives"]["all-reduce"] > 0
    assert replicated["collectives"]["all-gather"] == 0
    assert sharded["collectives"]["all-gather"] > 0


HLO = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

%fused_move (param_0: f32[8,128]) -> f32[128,8] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %transpose.1 = f32[128,8]{1,0:T(8,128)} transpose(%param_0), dimensions={1,0}
}

%fused_dot (param_0.1: f32[8,128], param_1.1: bf16[128,128]) -> f32[8,128] {
  %param_0.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %param_1.1 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = f32[8,128]{1,0:T(8,128)} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf
}

%body (arg.1: (s32[], f32[8,128], bf16[128,128])) -> (s32[], f32[8,128], bf16[128,128]) {
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[128,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg.1), index=1
  %get-tuple-element.2 = bf16[128,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=2
  %copy-start.1 = (bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, bf16[128,128]{1,0}, u32[]{:S(2)}) copy-start(%get-tuple-element.2)
  %copy-done.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%get-tuple-element.1, %copy-done.1), kind=kOutput, calls=%fused_dot, backend_config={"window_config":{"estimated_cycles":"100"}}
  %copy.1 = f32[8,128]{0,1:T(8,128)} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{0,1:T(8,128)}, bf16[128,128]{1,0:T(8,128)(2,1)}) tuple(%arg.1, %copy.1, %get-tuple-element.2)
}

%condition (arg.2: (s32[], f32[8,128], bf16[128,128])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[128,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(12)
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.3, %constant.1), direction=LT
}

ENTRY %main.1 (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fusion.2 = f32[128,8]{1,0:T(8,128)} fusion(%p.1), kind=kLoop, calls=%fused_move, backend_config={"window_config":{"estimated_cycles":"30"}}
  %custom-call.1 = f32[8,128]{1,0:T(8,128)} custom-call(%fusion.2), custom_call_target="tpu_custom_call"
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[128,128]{1,0:T(8,128)(2,1)}) while(%custom-call.1), condition=%condition, body=%body
  ROOT %get-tuple-element.4 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501, lines as the compiler writes them


def test_what_is_read_from_a_programs_text():
    program = Program(HLO)
    assert program.cycles() == 30 + 12 * (100 + 7)
    assert (program.moves("copy"), program.moves("transpose")) == (1, 1)
    assert program.matmuls() == [("f32", "bf16")]
    assert program.kernels() == 1
    assert program.prefetched_bytes() == 12 * 128 * 128 * 2


GPU_HLO = """
HloModule jit_f, is_scheduled=true

%slice (param_0.1: bf16[12,8,16], param_1.1: s32[]) -> bf16[8,16] {
  %param_0.1 = bf16[12,8,16]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %constant.9 = s32[] constant(0)
  %dynamic-slice.1 = bf16[1,8,16]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %constant.9, %constant.9), dynamic_slice_sizes={1,8,16}
  ROOT %bitcast.1 = bf16[8,16]{1,0} bitcast(%dynamic-slice.1)
}

%add (param_0.2: f32[4,16], param_1.2: bf16[4,16]) -> f32[4,16] {
  %param_0.2 = f32[4,16]{1,0} parameter(0)
  %param_1.2 = bf16[4,16]{1,0} parameter(1)
  %convert.1 = f32[4,16]{1,0} convert(%param_1.2)
  ROOT %add.1 = f32[4,16]{1,0} add(%param_0.2, %convert.1)
}

%body (arg.1: (s32[], f32[4,16], bf16[12,8,16], bf16[4,8])) -> (s32[], f32[4,16], bf16[12,8,16], bf16[4,8]) {
  %arg.1 = (s32[], f32[4,16]{1,0}, bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %gte.0 = s32[] get-tuple-element(%arg.1), index=0
  %gte.1 = f32[4,16]{1,0} get-tuple-element(%arg.1), index=1
  %gte.2 = bf16[12,8,16]{2,1,0} get-tuple-element(%arg.1), index=2
  %gte.3 = bf16[4,8]{1,0} get-tuple-element(%arg.1), index=3
  %fusion.1 = bf16[8,16]{1,0} fusion(%gte.2, %gte.0), kind=kLoop, calls=%slice
  %cublas.1 = (bf16[4,16]{1,0}, s8[100]{0}) custom-call(%gte.3, %fusion.1), custom_call_target="__cublas$lt$matmul"
  %gte.4 = bf16[4,16]{1,0} get-tuple-element(%cublas.1), index=0
  %fusion.2 = f32[4,16]{1,0} fusion(%gte.1, %gte.4), kind=kLoop, calls=%add
  ROOT %tuple.1 = (s32[], f32[4,16]{1,0}, bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) tuple(%gte.0, %fusion.2, %gte.2, %gte.3)
}

%compare (param_0.3: s32[]) -> pred[] {
  %param_0.3 = s32[] parameter(0)
  %constant.3 = s32[] constant(12)
  ROOT %compare.1 = pred[] compare(%param_0.3, %constant.3), direction=LT
}

%condition (arg.2: (s32[], f32[4,16], bf16[12,8,16], bf16[4,8])) -> pred[] {
  %arg.2 = (s32[], f32[4,16]{1,0}, bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %gte.9 = s32[] get-tuple-element(%arg.2), index=0
  ROOT %fusion.9 = pred[] fusion(%gte.9), kind=kLoop, calls=%compare
}

ENTRY %main.1 (p.1: (s32[], f32[4,16], bf16[12,8,16], bf16[4,8])) -> f32[4,16] {
  %p.1 = (s32[], f32[4,16]{1,0}, bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %while.1 = (s32[], f32[4,16]{1,0}, bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) while(%p.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  ROOT %gte.5 = f32[4,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501, lines as the compiler writes them


def test_bytes_that_a_gpus_kernels_move():
    program = Program(GPU_HLO)
    kernels = {each.name: (times, program.traffic(each)) for times, each in program.scheduled()}
    # Of the stack of kernels, the slice; of the others, all that is read and written.
    assert kernels["fusion.1"] == (12, 2 * 8 * 16 * 2 + 4)
    assert kernels["fusion.2"] == (12, 4 * 16 * (4 + 2 + 4))
    assert kernels["cublas.1"] == (12, 4 * 8 * 2 + 8 * 16 * 2 + 4 * 16 * 2 + 100)
    assert [each.name for _, each in program.scheduled() if gpu.is_product(each)] == ["cublas.1"]


@pytest.mark.parametrize(("damage", "message"), [("direction=LT", "how often"), ("ENTRY ", "no entry")])
def test_a_text_that_is_not_understood_is_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        Program(HLO.replace(damage, "")).cycles()
