"""Where a step's time goes, from small traces made by hand, and from one real step."""

import gzip
import json
from dataclasses import replace

import jobs
import pytest

from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.profile import trace as t
from lighthouse_core.profile.report import step_parts
from lighthouse_core.profile.step import run_step

# 4 heads of 16 and one KV head; sequences of 512, two at a time.
SHAPES = t.StepShapes(dim=64, q_width=64, kv_width=16, ffn_dim=96, vocab_size=320, tokens=512, batch=2)
MAIN, AUTOGRAD = 7, 8


def event(kind: str, name: str, ts: float, dur: float, tid: int = MAIN, **args) -> dict:
    return {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def step(dur: float, ts: float = 0.0) -> dict:
    return event("user_annotation", "ProfilerStep#1", ts, dur)


def op(name: str, ts: float, dur: float, number: int | None = None, tid: int = MAIN, **args) -> dict:
    return event("cpu_op", name, ts, dur, tid, **({} if number is None else {"Sequence number": number}), **args)


def node(name: str, ts: float, dur: float, number: int | None = None, tid: int = MAIN, made_by: int = 1) -> dict:
    """A node of the backward pass; `made_by` is torch's own number of the thread of its forward operation."""
    args = {} if number is None else {"Fwd thread id": made_by}
    return op(f"autograd::engine::evaluate_function: {name}", ts, dur, number, tid, **args)


def note(name: str, ts: float, dur: float, tid: int = MAIN) -> dict:
    return event("user_annotation", name, ts, dur, tid)


def kernel(name: str, ts: float, dur: float, correlation: int = 0, stream: int = 7, kind: str = "kernel") -> dict:
    return event(kind, name, ts, dur, stream, correlation=correlation) | {"pid": 0}


def launch(ts: float, correlation: int, tid: int = MAIN) -> dict:
    return event("cuda_runtime", "cudaLaunchKernel", ts, 1, tid, correlation=correlation)


def costs(*events: dict, shapes: t.StepShapes = SHAPES) -> dict[str, float]:
    """Microseconds by category, which add up to the step."""
    found = t.breakdown(list(events), shapes)
    assert sum(row.ms for row in found.rows) - found.overlap_ms == pytest.approx(found.wall_ms)
    assert sum(row.share for row in found.rows) == pytest.approx(1 + found.overlap_ms / found.wall_ms)
    return {row.name: pytest.approx(row.ms * 1e3) for row in found.rows}


def on_gpu(*around: dict, name: str = "some_kernel") -> str:
    """The category of a kernel that is launched within all of these, the outermost first."""
    nested = [call | {"ts": 10.0 + i, "dur": 50.0 - 2 * i} for i, call in enumerate(around)]
    (found, *others) = costs(step(100), *nested, launch(30, 1), kernel(name, 0, 100, 1))
    assert others == [t.IDLE]
    return found


def test_on_the_cpu_an_operation_costs_its_own_time():
    events = [
        *(step(100), note(t.MODEL, 5, 60), note(t.MLP, 10, 30)),
        *(op("aten::linear", 12, 20), op("aten::mm", 15, 10), op("aten::add", 45, 5)),
        *(note(t.OPTIMIZER, 70, 20), op("aten::_fused_adamw_", 72, 8), op("aten::item", 95, 5)),
    ]
    assert costs(*events) == {t.MLP: 20, t.REST: 5, t.OPTIMIZER: 8, t.OTHER: 5, t.IDLE: 62}
    found = t.breakdown(events, SHAPES)
    assert found.device == "cpu" and found.wall_ms == pytest.approx(0.1) and found.idle_ms == pytest.approx(0.062)
    assert found.largest == [t.IDLE, t.MLP, t.OPTIMIZER]
    assert [row.calls for row in found.rows] == [2, 1, 1, 1, 0]
    assert [row.backward_ms for row in found.rows] == [None] * 5
    assert t.folded(events, SHAPES) == [
        "step;MLP;aten::linear 10",
        "step;MLP;aten::linear;aten::mm 10",
        "step;idle 62",
        "step;norms, RoPE, residuals;aten::add 5",
        "step;optimizer;aten::_fused_adamw_ 8",
        "step;other;aten::item 5",
    ]


def test_a_backward_operation_is_of_the_forward_one_that_made_it():
    events = [
        *(step(100), note(t.MODEL, 0, 40)),
        # Of the same number, but it made no node.
        *(note(t.GATHER, 2, 6), op("aten::view", 3, 4, 5)),
        *(note(t.MLP, 10, 10), op("aten::linear", 11, 8, 5), op("aten::mm", 12, 6, 5)),
        *(note(t.SCATTER, 22, 6), op("aten::index", 23, 4, 6)),
        *(node("MmBackward0", 50, 20, 5), op("MmBackward0", 52, 10, 5, **{"Fwd thread id": 1}), op("aten::mm", 53, 8)),
        node("IndexBackward0", 80, 7, 6),
    ]
    assert costs(*events) == {t.GATHER: 4, t.SCATTER: 11, t.MLP: 28, t.IDLE: 57}
    rows = {row.name: row for row in t.breakdown(events, SHAPES).rows}
    assert rows[t.MLP].forward_ms == pytest.approx(0.008) and rows[t.MLP].backward_ms == pytest.approx(0.020)
    assert "step;MLP;MmBackward0;aten::mm 8" in t.folded(events, SHAPES)


def test_what_checkpointing_makes_again_is_of_the_thread_that_makes_it():
    events = [
        *(step(100), note(t.MODEL, 0, 40), note(t.MLP, 10, 10), op("aten::mm", 12, 6, 5)),
        *(note(t.HEAD, 20, 9), op("_LinearCrossEntropy", 21, 7, 9)),
        node("_LinearCrossEntropyBackward", 50, 2, 9, AUTOGRAD),
        *(note(t.MODEL, 55, 20, AUTOGRAD), note(t.PROJECTIONS, 60, 10, AUTOGRAD), op("aten::mm", 61, 5, 5, AUTOGRAD)),
        node("MmBackward0", 80, 3, 5, AUTOGRAD, made_by=2),
        node("MmBackward0", 90, 4, 5, AUTOGRAD),
    ]
    found = costs(*events)
    # Another thread than the step's works while that one is in no operation.
    assert found == {t.PROJECTIONS: 8, t.MLP: 10, t.HEAD: 9, t.IDLE: 87}
    assert t.breakdown(events, SHAPES).overlap_ms == pytest.approx(0.014)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("torch::autograd::AccumulateGrad", t.OTHER),
        ("_LinearCrossEntropyBackward", t.HEAD),
        ("EmbeddingBackward0", t.EMBEDDING),
        ("AddBackward0", t.REST),
    ],
)
def test_a_node_without_a_number_is_known_by_its_name(name, category):
    assert costs(step(10), node(name, 2, 8)) == {category: 8, t.IDLE: 2}


def test_an_annotation_may_outlive_what_began_it():
    events = [op("PythonDispatchMode", 10, 4), note(t.MLP, 12, 48), op("aten::mm", 20, 30), op("aten::add", 65, 5)]
    assert costs(step(100), *events) == {t.MLP: 30, t.OTHER: 9, t.IDLE: 61}


def test_a_kernel_is_of_what_launched_it_whenever_it_runs():
    events = [
        *(step(100), note(t.MODEL, 0, 20), note(t.PROJECTIONS, 2, 6), op("aten::mm", 3, 4, 5), launch(4, 11)),
        *(note(t.DENSE_CALL, 10, 6), op("aten::mul", 11, 4), launch(12, 12)),
        *(node("MmBackward0", 30, 9, 5, AUTOGRAD), op("aten::mm", 31, 4, tid=AUTOGRAD), launch(32, 13, AUTOGRAD)),
        *(kernel("void at::gemm<float, (int)4>(float*)", 40, 20, 11), kernel("flash_fwd", 60, 15, 12)),
        *(kernel("gemm", 80, 10, 13), kernel("Memcpy DtoH", 92, 1, kind="gpu_memcpy")),
        # Of the step before.
        kernel("late", -5, 10),
    ]
    assert costs(*events) == {t.DENSE_CALL: 15, t.PROJECTIONS: 30, t.OTHER: 6, t.IDLE: 49}
    found = t.breakdown(events, SHAPES)
    assert found.device == "cuda" and found.overlap_ms == pytest.approx(0)
    assert [row.calls for row in found.rows] == [1, 2, 2, 0]
    assert [row.backward_ms and row.backward_ms * 1e3 for row in found.rows] == [None, pytest.approx(10), None, None]
    lines = t.folded(events, SHAPES)
    assert "step;projections;aten::mm;at::gemm 20" in lines and "step;projections;MmBackward0;gemm 10" in lines
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == 100


@pytest.mark.parametrize("stray", [[], [launch(2, 1, tid=99)]])
def test_without_its_launch_a_kernel_is_of_the_operation_it_names(stray):
    known = note(t.MLP, 0, 9), op("aten::mm", 1, 3, **{"External id": 4})
    by_id = kernel("gemm", 5, 5, 1)
    by_id["args"]["External id"] = 4
    assert costs(step(10), *known, *stray, by_id) == {t.MLP: 5, t.IDLE: 5}


def test_streams_overlap_and_waiting_for_data_is_not_idle():
    events = [
        *(step(100), note(t.DATA, 0, 30), note(t.DATA, 90, 10)),
        *(kernel("gemm", 20, 40), kernel("ncclDevKernel_AllGather", 50, 30, stream=8)),
    ]
    # 10 of the 40 in which data was waited for, the GPU still had work from before.
    assert costs(*events) == {t.COMMUNICATION: 20, t.DATA: 30, t.OTHER: 40, t.IDLE: 10}
    found = t.breakdown([*events, kernel("gemm", 25, 5, stream=9)], SHAPES)
    assert (found.overlap_ms, found.hidden_ms) == (pytest.approx(0.005), pytest.approx(0.010))


@pytest.mark.parametrize(
    ("work", "communication", "alone"),
    [
        ([(10, 80)], [(20, 30)], 0),
        ([(10, 20), (40, 20), (70, 20)], [(0, 100)], 40),
        ([(10, 20), (15, 5), (25, 15)], [(20, 40)], 20),
        # Two at a time count once.
        ([(10, 10)], [(15, 40), (30, 10), (50, 20)], 50),
        ([(10, 50)], [(0, 70), (20, 20), (90, 10)], 30),
    ],
)
def test_communication_costs_what_no_work_hides(work, communication, alone):
    gemms = [kernel("gemm", *span) for span in work]
    events = [step(100), *gemms, *(kernel("ncclDevKernel", *span, stream=8) for span in communication)]
    found = t.breakdown(events, SHAPES)
    (row,) = (row for row in found.rows if row.name == t.COMMUNICATION)
    assert row.ms * 1e3 == pytest.approx(alone) and row.calls == len(communication)
    assert row.ms + found.hidden_ms == pytest.approx(sum(dur for _, dur in communication) / 1e3)
    assert costs(*events)[t.COMMUNICATION] == alone
    sums = [int(line.rsplit(" ", 1)[1]) for line in t.folded(events, SHAPES)]
    assert sum(sums) == pytest.approx(100 + found.overlap_ms * 1e3)


def test_on_the_cpu_waiting_is_what_the_main_thread_does_in_no_operation():
    events = [
        *(note(t.DATA, 0, 10), op("aten::mm", 20, 20), note("gloo:all_reduce", 30, 20, 9)),
        *(note("FSDP::pre_forward (layers.0)", 60, 20), op("fsdp::all_gather_copy_in", 62, 5)),
    ]
    assert costs(step(100), *events) == {t.DATA: 10, t.OTHER: 20, t.COMMUNICATION: 30, t.IDLE: 40}


@pytest.mark.parametrize(
    ("dims", "category"),
    [
        ([[1024, 64], [64, 64]], t.PROJECTIONS),
        ([[1024, 64], [64, 16]], t.PROJECTIONS),
        ([[16, 1024], [1024, 64]], t.PROJECTIONS),
        ([[1024, 96], [96, 64]], t.MLP),
        ([[64, 1024], [1024, 96], [64, 96]], t.MLP),
        ([[1000, 64], [64, 320]], t.HEAD),
        ([[96], [1024, 64], [64, 96]], t.MLP),
        ([[1024, 50], [50, 64]], t.REST),
        ([[1024, 96]], t.REST),
    ],
)
def test_a_compiled_product_is_known_by_its_sizes(dims, category):
    product = op("aten::mm", 0, 0, **{"Input Dims": dims})
    assert on_gpu(note(t.MODEL, 0, 0), op("CompiledFunction", 0, 0), product) == category


def test_where_sizes_fit_two_the_name_says_so():
    product = op("aten::mm", 0, 0, **{"Input Dims": [[1024, 64], [64, 96]]})
    wide = replace(SHAPES, q_width=96)
    events = [step(50), product | {"dur": 9.0}, launch(3, 1), kernel("gemm", 0, 50, 1)]
    assert costs(*events, shapes=wide) == {"projections or MLP": 50, t.IDLE: 0}
    assert costs(*events[1:], step(60, -2), note(t.MLP, -1, 20), shapes=wide) == {t.MLP: 50, t.IDLE: 10}


def test_the_number_of_tokens_is_no_width_even_where_it_is_as_large():
    product = op("aten::mm", 2, 9, **{"Input Dims": [[96, 64], [64, 64]]})
    few = replace(SHAPES, tokens=48)
    assert costs(step(50), product, launch(3, 1), kernel("gemm", 0, 50, 1), shapes=few) == {
        t.PROJECTIONS: 50,
        t.IDLE: 0,
    }


@pytest.mark.parametrize(
    ("name", "length", "window", "category"),
    [
        ("aten::_scaled_dot_product_cudnn_attention", 512, None, t.DENSE_LAYERS),
        ("aten::_scaled_dot_product_flash_attention_backward", 200, None, t.DENSE_CALL),
        ("lighthouse::flash4", 512, "0", t.DENSE_LAYERS),
        ("lighthouse::flash4", 512, "128", t.DENSE_CALL),
        ("lighthouse::flash4", 200, "0", t.DENSE_CALL),
        ("lighthouse::flash4_backward", 512, "0", t.DENSE_LAYERS),
        ("lighthouse::flash4_backward", 512, "128", t.DENSE_CALL),
    ],
)
def test_dense_attention_is_of_a_lighthouse_layer_where_it_sees_fewer_tokens(name, length, window, category):
    tokens_first, backward = name.startswith("lighthouse"), name.endswith("backward")
    dims = [2, length, 4, 16] if tokens_first else [2, 4, length, 16]
    scalars = [""] * (6 if backward else 3) + ["0.25", "False", window]
    call = op(name, 0, 0, **{"Input Dims": [dims], "Concrete Inputs": scalars if window else []})
    assert on_gpu(note(t.MODEL, 0, 0), call) == category


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("lighthouse::pyramid", t.PYRAMID),
        ("lighthouse::norm_scores", t.PYRAMID),
        ("lighthouse::select_drawn", t.SELECT),
        ("lighthouse::gather_backward", t.GATHER),
        ("lighthouse::scatter", t.SCATTER),
        ("lighthouse::merge_backward", t.MERGE),
        ("_LinearCrossEntropy", t.HEAD),
        ("aten::embedding_dense_backward", t.EMBEDDING),
        ("c10d::allreduce_", t.COMMUNICATION),
        ("fsdp::chunk_cat", t.COMMUNICATION),
        ("aten::add", t.REST),
    ],
)
def test_operations_are_known_by_name_in_compiled_blocks(name, category):
    assert on_gpu(note(t.MODEL, 0, 0), op(name, 0, 0)) == category


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("_reduce_kernel", t.PYRAMID),
        ("_select_kernel", t.SELECT),
        ("_gather_backward_kernel", t.GATHER),
        ("_scatter_kernel", t.SCATTER),
        ("_merge_backward_rows_kernel", t.MERGE),
        ("triton_poi_fused_mul_silu_3", t.MLP),
        ("triton_red_fused_add_rms_norm_1", t.REST),
        ("ncclDevKernel_ReduceScatter_Sum_f32", t.COMMUNICATION),
    ],
)
def test_kernels_are_known_by_name_in_compiled_blocks(name, category):
    assert on_gpu(note(t.MODEL, 0, 0), op("CompiledFunction", 0, 0), name=name) == category


def test_an_annotation_says_more_than_a_name_but_communication_is_that_everywhere():
    assert on_gpu(note(t.HEAD, 0, 0), op("aten::mm", 0, 0, **{"Input Dims": [[1024, 64], [64, 96]]})) == t.HEAD
    assert on_gpu(note(t.HEAD, 0, 0), note("FSDP::pre_forward (output)", 0, 0), op("aten::copy_", 0, 0)) == (
        t.COMMUNICATION
    )
    assert on_gpu(note("Optimizer.step#AdamW.step", 0, 0), op("aten::_fused_adamw_", 0, 0)) == t.OPTIMIZER
    assert on_gpu(note(t.OPTIMIZER, 0, 0), op("aten::mul", 0, 0), name="ncclDevKernel_AllReduce") == t.COMMUNICATION
    assert on_gpu(note(t.OPTIMIZER, 0, 0), op("aten::mul", 0, 0), name="_gather_kernel") == t.OPTIMIZER


def test_the_last_step_of_several_counts_alone():
    assert costs(step(10, 0), op("aten::mm", 2, 8), step(20, 10), op("aten::add", 15, 5)) == {t.OTHER: 5, t.IDLE: 15}


def test_a_file_that_is_no_trace_is_an_error(tmp_path):
    for name, content in (("a.json", b"[]"), ("b.json.gz", b"no gzip"), ("c.json.gz", gzip.compress(b"{}")[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LighthouseError, match="no trace"):
            t.read_trace(tmp_path / name)
    with pytest.raises(LighthouseError, match="no whole step"):
        t.breakdown([op("aten::mm", 0, 1)], SHAPES)


def test_a_run_that_fails_says_why(tmp_path):
    settings = ["training.global_batch_size=4"]
    with pytest.raises(
        UserError, match=r"the run ended with exit code 2: training.global_batch_size \(4\) must be a multiple"
    ):
        run_step(jobs.RECIPE, settings, tmp_path, 3, lambda text: None)
    assert "must be a multiple" in (tmp_path / "pretrain.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["lighthouse", "dense"])
def test_a_step_with_documents(tmp_path, stage):
    settings = [*jobs.TINY, 'data.packing="documents"', "lighthouse.window=32"]
    profile = run_step(jobs.RECIPE, settings, tmp_path, None, lambda text: None, stage=stage)
    assert profile.packing == "documents" and any("packing: documents." in str(part) for part in step_parts([profile]))
    assert all("flops_per_token" in row for row in jobs.lines(profile.run))
    assert (t.MERGE in {row.name for row in profile.breakdown.rows}) == (stage == "lighthouse")


@pytest.mark.slow
def test_a_step_with_budgets(tmp_path):
    settings = [*jobs.TINY, 'lighthouse.method="blocks"', "lighthouse.window=32", "lighthouse.budget.every=1"]
    settings += ["lighthouse.tile=16", "lighthouse.block_size=16", "lighthouse.blocks=2"]
    profile = run_step(jobs.RECIPE, settings, tmp_path, None, lambda text: None)
    assert any("budget_share" in row for row in jobs.lines(profile.run))
    assert len(profile.timed) == 5 and profile.seconds > 0


@pytest.mark.slow
def test_a_real_step_is_taken_apart(tmp_path):
    said: list[str] = []
    settings = [*jobs.TINY, "lighthouse.phases=[{window=16}, {window=16, window_end=64}]"]
    profile = run_step(jobs.RECIPE, settings, tmp_path, None, said.append)
    assert profile.window == 32 and profile.notes == said[:1] and "grows from 16 to 64" in said[0]
    rows = {row.name: row for row in profile.breakdown.rows}
    # A window is merged in place of scattering.
    assert list(rows) == [name for name in t.CATEGORIES if name not in (t.SCATTER, t.COMMUNICATION)]
    assert all(row.ms > 0 for row in rows.values())
    assert sum(row.share for row in rows.values()) == pytest.approx(1, abs=0.01)
    assert rows[t.OTHER].share < 0.1
    # What has a gradient has it everywhere; what decides the selection, and what follows the gradient, has none.
    without = {t.SELECT, t.OPTIMIZER, t.DATA, t.IDLE}
    assert {name for name, row in rows.items() if row.backward_ms is None} == without
    # A micro-batch is one sequence: four at three layers, two of them Lighthouse's.
    names = [event["name"] for event in t.read_trace(profile.trace) if event.get("cat") == "user_annotation"]
    assert names.count(t.GATHER) == 8 and names.count(t.MLP) == 12 and names.count(t.PROJECTIONS) == 48
    lines = profile.stacks.read_text().splitlines()
    total = sum(int(line.rsplit(" ", 1)[1]) for line in lines) / 1e3
    assert total == pytest.approx(profile.breakdown.wall_ms, rel=0.02)
    assert any(line.startswith("step;MLP;MmBackward0;aten::mm ") for line in lines)

    assert len(profile.timed) == 5 and min(profile.timed) <= profile.seconds <= max(profile.timed)
    assert profile.tokens == 4 * 512 and profile.tokens_per_second == pytest.approx(2048 / profile.seconds)
    assert profile.memory_gib > 0 and profile.mfu is None and profile.processes == 1
    assert profile.machine["device"] == "cpu" and "torch" in profile.machine["versions"]
    assert not list((profile.run / "checkpoints").iterdir())
    assert [row["step"] for row in jobs.lines(profile.run)] == list(range(1, 10)), "and no validation"
    written = profile.within(tmp_path).as_json()
    assert (written["trace"], written["run"]) == ("trace.json.gz", f"runs/{profile.run.name}")
    assert written["settings"] == settings
    json.dumps(written)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"trace.json.gz", "stacks.folded", "pretrain.log", "runs"}
