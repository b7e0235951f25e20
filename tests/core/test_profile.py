"""What `lighthouse profile` works out, checks, draws and writes."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from fake_gpu import FakeGpu

from lighthouse_core.attention import LighthouseConfig, gathered_length
from lighthouse_core.attention.dense import BACKENDS, Facts
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.attention.methods.chunked import growing_windows
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.profile import attention, check, dense, machine, plots, report, run, sweep, timing, tune
from lighthouse_core.profile.attention import AttentionProfile, Call, Pass, Stage, check_size
from lighthouse_core.profile.fits import crossover, fit
from lighthouse_core.profile.machine import Roof, describe, roof
from lighthouse_core.profile.timing import Sample, measure
from lighthouse_core.profile.work import Shape, Work, stage_work

CPU = torch.device("cpu")
ROOF = Roof(2e12, 5e14, "bfloat16")
SMALL = LighthouseConfig(topk=16, tile_parents=16)


def sample(ms: float) -> Sample:
    return Sample(ms, 0.9 * ms, 1.2 * ms, 20)


def test_percentiles_of_a_sample():
    found = Sample.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.p10, found.p90, found.calls) == (3.0, pytest.approx(1.4), pytest.approx(4.6), 5)
    assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0, 1)


def test_what_is_measured_does_not_count_two_calls_and_keeps_to_the_budget(monkeypatch):
    clock = iter(range(0, 1000))
    calls = []

    def call():
        calls.append(None)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    # Each call takes a second by this clock.
    assert measure(call, CPU, repeats=5, seconds=100.0) == Sample(1000.0, 1000.0, 1000.0, 5)
    assert len(calls) == 7
    assert measure(call, CPU, repeats=5, seconds=4.0).calls == 4
    assert measure(call, CPU, repeats=5, seconds=1.5).calls == 3
    # One call that takes all of it is timed by the second that would not count.
    calls.clear()
    assert measure(call, CPU, repeats=5, seconds=0.5).calls == 1
    assert len(calls) == 2


def test_parts_of_a_call_are_timed_as_they_follow_each_other(monkeypatch):
    clock, done = iter(range(100)), []

    def call():
        for name in ("pool", "attend"):
            done.append(name)
            yield name

    # A second passes between one reading of this clock and the next.
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = timing.measure_parts(call, CPU, repeats=5, seconds=7.0)
    assert found == {name: Sample(1000.0, 1000.0, 1000.0, 3) for name in ("pool", "attend")}
    assert done == ["pool", "attend"] * 5, "two calls do not count, and three take less than 7 s"


def test_on_a_gpu_only_the_parts_themselves_are_timed(monkeypatch):
    gpu, device = FakeGpu(), torch.device("cuda")
    monkeypatch.setattr(timing, "torch", gpu)

    def call():
        gpu.run(2.0)
        yield "pool"
        gpu.run(5.0)
        yield "attend"

    found = timing.measure_parts(call, device, repeats=4)
    assert {name: (one.median, one.calls) for name, one in found.items()} == {"pool": (2.0, 4), "attend": (5.0, 4)}
    assert len(gpu.slept) == 3 and min(gpu.slept) >= 1e8
    assert timing.measure(lambda: gpu.run(3.0), device).median == 3.0
    gpu.allocated = 2**30
    assert timing.peak_gib(lambda: gpu.run(1.0, takes=2**31), device) == 3.0
    assert timing.peak_gib(lambda: gpu.run(1.0, takes=2**31), device, besides=2**30) == 2.0


def test_a_late_host_gets_a_longer_start(monkeypatch, caplog):
    starts, host = [], iter([0.01, 0.2, 0.2, 9.0, 9.0, 9.0])

    def times_after(head_start, call, device, repeats):
        starts.append(head_start)
        return [{None: 1.0}] * repeats, next(host)

    monkeypatch.setattr(timing, "_times_after", times_after)
    # On time; late, and then not; too late for any start. What does not count is not repeated.
    for repeats in (20, 20, 20, 1):
        assert not caplog.records
        timing._cuda_times(None, torch.device("cuda"), repeats)
        starts.append(len(caplog.records))
        caplog.clear()
    assert starts == [0.05, 0, 0.05, 0.4, 0, 0.05, 1.0, 1, 0.05, 0]


def test_the_work_of_the_stages_adds_up_to_the_floor():
    shape, cfg = Shape(98304, 8, 8, 128, "bfloat16"), LighthouseConfig(scorer="block")
    work = stage_work(shape, cfg)
    entries, coarse, touched, row = 18432, 6144, 16 * 1536, 2 * 8 * 128
    outside = [stage for name, stage in work.items() if name not in ("dense call", "select")]
    rows = 4 * shape.tokens + 6 * coarse + 3 * touched + 4 * entries
    assert sum(forward.bytes for forward, _ in outside) == rows * row
    backward = [found for _, found in outside if found]
    assert sum(found.bytes for found in backward) == (4 * shape.tokens + 4 * entries) * row
    assert work["dense call"][0].flops == 2 * 8 * 128 * entries**2
    assert work["dense call"][1].flops == 5 * 8 * 128 * entries**2
    # Norms are written, and those of candidates read; drawn scores are neither.
    scored = stage_work(shape, replace(cfg, scorer="norm"))
    written, read = (4 * 16 * (98304 // 16 + finer) for finer in (98304 // 4, 4 * 1536))
    assert scored["pyramid + score"][0].bytes - work["pyramid + score"][0].bytes == written
    assert scored["select"][0].bytes - work["select"][0].bytes == read


def test_the_gather_reads_what_is_stored_and_the_tokens_of_the_rest():
    shape, cfg = Shape(524288, 8, 8, 128, "bfloat16"), LighthouseConfig(levels=4, topk=2048, scorer="block")
    work = stage_work(shape, cfg)
    # Levels 2 and 3 are stored, windows of 16 and 64 tokens; all of level 3 are kept, 4 * 2048 of each other level.
    stored, kept, tokens_of_level_1 = 32768 + 8192, 8192 + 8192, 4 * 8192
    assert work["pyramid + score"][0].bytes == (524288 + stored) * shape.row
    assert work["gather"][0].bytes == (kept + tokens_of_level_1 + 32768) * shape.row
    # Windows of 2 and 4 tokens: none is stored, every token is gathered from, and only q and k are read for scores.
    cfg = replace(cfg, pooling=2, levels=3)
    narrow, scored = stage_work(shape, cfg), stage_work(shape, replace(cfg, scorer="norm"))
    assert narrow["pyramid + score"][0].bytes == 0
    assert scored["pyramid + score"][0].bytes == 2 * 524288 * shape.q_row + 4 * 16 * (524288 // 2 + 524288 // 4)
    assert narrow["gather"][0].bytes == (524288 + 524288 // 4 + 2 * 2 * 2048) * shape.row
    assert Pass.of(sample(2.0), narrow["pyramid + score"][0], ROOF).of_roof is None


def test_a_pass_is_compared_with_what_limits_it():
    memory = Pass.of(sample(2.0), Work(bytes=2 * 10**9), ROOF)
    assert memory.of_roof == pytest.approx(0.5) and memory.gigabytes == 2.0
    compute = Pass.of(sample(2.0), Work(bytes=10**9, flops=10**12), ROOF)
    assert compute.of_roof == pytest.approx(1.0)
    assert Pass.of(sample(2.0), None, ROOF).of_roof is None


def test_a_line_is_found_again():
    lengths = [8192, 32768, 98304]
    law = fit(lengths, [3e-9 * n**2 for n in lengths])
    assert law.slope == pytest.approx(2.0) and law.at(2**20) == pytest.approx(3e-9 * 2**40)
    assert fit([4096], [1.0]) is None and fit([4096, 4096], [1.0, 2.0]) is None


def test_where_two_curves_cross():
    lengths = [1000, 4000, 16000, 64000]
    ours, theirs = [0.1 * n for n in lengths], [1e-5 * n**2 for n in lengths]
    assert crossover(lengths, ours, theirs).tokens == pytest.approx(10000)
    always = crossover(lengths[2:], ours[2:], theirs[2:])
    assert always.tokens is None and "from 16000 tokens on" in always.note
    never = crossover(lengths[:2], ours[:2], theirs[:2])
    assert never.tokens is None and "at 4000 tokens" in never.note


PLAN = tune.Plan(
    layers=30,
    dense_layers=4,
    steps=10000,
    recover_steps=6000,
    calls=1,
    repeated=0,
    rest_ms=370.0,
    dense={"cudnn": (34.0, 124.0), "fa4": (29.0, 110.0)},
)


def test_amdahl():
    dense, slower = 370 + 30 * 110, 370 + 30 * 124
    assert PLAN.dense_step_ms("fa4") == dense and PLAN.dense_step_ms("cudnn") == slower
    bound = tune.amdahl(PLAN)
    assert bound.stage_1 == pytest.approx(dense / (370 + 4 * 110))
    assert bound.total == pytest.approx(16000 * dense / (10000 * (370 + 4 * 110) + 6000 * dense))
    some = tune.predict(PLAN, 2.0, 6.0, "fa4")
    assert some.step_ms == 370 + 4 * 110 + 26 * 6
    assert 1 < some.total < some.stage_1 < bound.stage_1
    # The dense layers of stage 1 and the recovery have the kernel that the recipe names; dense training the fastest.
    other = tune.predict(PLAN, 2.0, 6.0, "cudnn")
    assert other.step_ms == 370 + 4 * 124 + 26 * 6
    assert other.total == pytest.approx(16000 * dense / (10000 * other.step_ms + 6000 * slower))
    # A call that is as slow as dense attention gains nothing.
    assert tune.predict(PLAN, 29.0, 110.0, "fa4").total == pytest.approx(1.0)
    # Checkpointing that makes the forward pass again makes attention's again, of every sequence.
    again = replace(PLAN, calls=2, repeated=1)
    assert again.stage_1_step_ms(2.0, 6.0, "fa4") == 370 + 2 * (4 * 139 + 26 * 8)


def pyramids_of(tokens, floor):
    """The pyramids that are proposed, and their settings."""
    found = [one for one in tune.candidates(tokens, LighthouseConfig(), floor) if one.gathered is not None]
    return found, [replace(LighthouseConfig(), **one.call) for one in found]


@pytest.mark.parametrize("tokens", [8192, 98304, 100_000])
def test_candidates_keep_the_floor_with_the_fewest_parents(tokens):
    proposals, found = pyramids_of(tokens, 0.0625)
    assert found and len(set(found)) == len(found)
    for one, cfg in zip(proposals, found, strict=True):
        assert one.share == cfg.pooling * cfg.topk / tokens >= 0.0625
        assert cfg.pooling * (cfg.topk - 128) < 0.0625 * tokens or cfg.topk == 128
        assert one.coarsest == cfg.pooling ** (cfg.levels - 1) <= tune.COARSEST
        assert one.gathered == gathered_length(tokens, cfg) and one.dense_layers
    if tokens == 98304:
        assert LighthouseConfig(pooling=4, levels=3, topk=1536) in found
    assert not any(cfg.pooling == 16 and cfg.levels == 4 for cfg in found)
    assert not pyramids_of(tokens, 0.98)[0]


@pytest.mark.parametrize(
    ("tokens", "windows"),
    [(98304, (256, 24576)), (65536, (256, 16384)), (16384, (256, 8192)), (2048, (256, 1024)), (3, (1, 1)), (1, (1, 1))],
)
def test_chunks_grow_as_in_the_evidence(tokens, windows):
    assert growing_windows(tokens) == windows


def test_every_candidate_is_timed_by_every_kernel_and_ranked_by_the_run():
    proposals = tune.candidates(98304, LighthouseConfig(), 0.0625)
    _, pyramids = pyramids_of(98304, 0.0625)

    def time(cfg):
        # cuDNN is the faster one in the call, and the slower one in dense layers and the recovery.
        size = float(cfg.pooling * cfg.levels) if cfg.pools else cfg.window / 1e4
        return size / 3, size - 0.1 * (cfg.dense_backend == "cudnn")

    found = tune.timed(LighthouseConfig(), proposals, ["cudnn", "fa4"], time)
    # cuDNN compiles anew for each window, so that recipes refuse it where one grows.
    assert [one.settings["dense_backend"] for one in found if one.gathered is None] == ["fa4"]
    assert len(found) == 2 * len(pyramids) + 1
    assert [one.both_ms for one in found] == sorted(one.both_ms for one in found)
    ranked = tune.ranked(PLAN, found)
    assert len(ranked) == len(pyramids) + 1
    assert all(one.settings["dense_backend"] == "fa4" for one, _ in ranked)
    assert [one.both_ms for one, _ in ranked[:-1]] == sorted(float(cfg.pooling * cfg.levels) for cfg in pyramids)
    chunks, prediction = ranked[-1]
    assert chunks.settings["phases"] == [{"window": 256, "window_end": 24576, "growth": "geometric"}]
    assert not chunks.dense_layers
    # A call of the mean window, (24576 - 256) / ln(24576 / 256) = 5328, in tiles of 128.
    assert chunks.both_ms == pytest.approx(5248 / 1e4)
    assert prediction == tune.predict(replace(PLAN, dense_layers=0), chunks.forward_ms, chunks.both_ms, "fa4")


def test_growing_chunks_are_proposed_with_kernels_that_recipes_take():
    from lighthouse_core.attention.dense import BACKENDS
    from lighthouse_core.config import load_recipe
    from lighthouse_core.config.dump import toml_value
    from lighthouse_core.shelf import shipped_recipes

    proposals = [*METHODS["chunked"].proposals(LighthouseConfig(), 98304, 0.0625, 256)]
    found = tune.timed(LighthouseConfig(), proposals, [*BACKENDS], lambda cfg: (2.0, 6.0))
    assert {one.settings["dense_backend"] for one in found} == set(BACKENDS) - {"cudnn", "flex"}
    for one in found:
        settings = [f"lighthouse.{key}={toml_value(value)}" for key, value in one.settings.items()]
        assert load_recipe(shipped_recipes()["530m_98k_growing"], settings).phases[0].growth == "geometric"


def advice() -> tune.Advice:
    proposals = [METHODS["pyramid"].proposal(LighthouseConfig(), 98304)]
    proposals += METHODS["chunked"].proposals(LighthouseConfig(), 98304, 0.0625, 256)
    ranked = tune.ranked(PLAN, tune.timed(LighthouseConfig(), proposals, ["fa4"], lambda cfg: (2.0, 6.0)))
    found, predictions = map(list, zip(*ranked, strict=True))
    bound = tune.amdahl(PLAN)
    measured = 1020.0, found[0].settings, (0, 1, 28, 29)
    return tune.Advice("530m_98k", 98304, 0.0625, 256, PLAN, found, predictions, bound, *measured)


@pytest.mark.parametrize("name", ["530m_98k", "530m_98k_growing", "530m_98k_dense"])
def test_a_fragment_takes_the_place_of_any_recipes_section(name):
    import tomllib

    from lighthouse_core.config import load_recipe
    from lighthouse_core.config.dump import toml_value
    from lighthouse_core.shelf import shipped_recipes

    found = advice()
    for number in range(len(found.timed)):
        text = found.fragment(number)
        section = tomllib.loads(text)["lighthouse"]
        settings = [f"lighthouse.{key}={toml_value(value)}" for key, value in section.items()]
        recipe = load_recipe(shipped_recipes()[name], settings)
        lighthouse, attention = recipe.lighthouse, recipe.phases[0].attention
        assert lighthouse.enabled
        timed = (
            LighthouseConfig(dense_backend="fa4")
            if number == 0
            else LighthouseConfig(method="chunked", window=24576, dense_backend="fa4")
        )
        read = ["method", "window", "dense_backend"]
        read += ["pooling", "levels", "topk", "tile_parents", "scorer", "cover_prefix"] * (number == 0)
        assert all(getattr(attention, key) == getattr(timed, key) for key in read)
        assert f"{found.predictions[number].stage_1:.2f} times" in text
    assert f"{found.bound.total:.2f} if" in found.fragment(0)
    parts = report.tune_parts(found)
    assert parts[0].rows[0][:5] == ("p 4, L 3, k 1536", "fa4", "18432", "6.25%", "16")
    assert any("norm lets later tokens decide" in part for part in parts[1:])
    # Chunks are in all layers, of which four would else be dense.
    rest = found.plan.rest_ms
    assert found.predictions[1].stage_1 == pytest.approx((rest + 30 * 110.0) / (rest + 30 * found.timed[1].both_ms))
    assert f"at most {(rest + 30 * 110.0) / rest:.2f} and" in found.fragment(1)
    assert "# In [model]: dense_layers = []" in found.fragment(1)
    assert "# In [model]: dense_layers = [0, 1, 28, 29]" in found.fragment(0)
    assert all("# In [training]: seq_len = 98304" in found.fragment(number) for number in range(2))
    assert not any("packing" in part for part in parts[1:])
    packed = replace(found, documents=True)
    assert any("one document a sequence" in part for part in report.tune_parts(packed)[1:])
    assert '# In [data]: packing = "concat"' in packed.fragment(0)
    json.dumps(found.as_json())


def profile_of(tokens: int, extrapolated: int = 0, gib: float | None = None) -> AttentionProfile:
    stages = [
        Stage("gather", Pass.of(sample(1.0), Work(10**9), ROOF), Pass.of(sample(2.0), Work(10**9), ROOF)),
        Stage("dense call", Pass.of(sample(1.0), Work(10**9, 10**11), ROOF), None),
    ]
    ours, theirs = 1e-4 * tokens, 1e-8 * tokens**2
    peak = None if gib is None else gib * tokens / 98304
    settings = {"seq": tokens, "gathered_length": 100, "heads": 8, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    settings |= {
        "backend": "triton",
        "dense_backend": "fa4",
        "method": "pyramid",
        "pooling": 4,
        "levels": 3,
        "topk": 128,
        "scorer": "norm",
        "window": 0,
    }
    return AttentionProfile(
        settings=settings,
        checks={"output": 1e-3},
        stages=stages,
        lighthouse=Call("lighthouse", "Lighthouse, fa4 inside", sample(ours / 3), sample(ours), peak),
        others=[Call("lighthouse", "Lighthouse, cudnn inside", sample(ours / 2), sample(1.1 * ours), peak)],
        dense=[Call("fa4", "FlashAttention-4", sample(theirs / 3), sample(theirs), peak, extrapolated)],
        absent={"fa3": "is not installed"},
        resident_gib=1.0,
    )


def replace_call(profile: AttentionProfile, **changes) -> AttentionProfile:
    return replace(profile, lighthouse=replace(profile.lighthouse, **changes))


def several() -> sweep.Sweep:
    return sweep.together([profile_of(4096, gib=2.0), profile_of(32768, gib=2.0), profile_of(2**20, 32768, gib=2.0)])


def test_a_sweep_finds_slopes_and_crossovers_of_what_was_measured():
    found = several()
    ours, theirs = found.curves
    assert ours.law.slope == pytest.approx(1.0) and theirs.law.slope == pytest.approx(2.0)
    assert found.crossovers["fa4"].tokens == pytest.approx(10000)
    assert found.shares == tuple(512 / n for n in (4096, 32768, 2**20)) and ours.varied and not theirs.varied
    same = replace(found.profiles[0], settings=found.profiles[0].settings | {"seq": 8192, "topk": 256})
    assert sweep.together([found.profiles[0], same]).shares == ()
    assert found.profiles[1].speedup["fa4"]["forward_backward"] == pytest.approx(32768 / 10000)


@pytest.mark.parametrize("memory", [True, False])
def test_figures_show_something(tmp_path, memory):
    found = several()
    if not memory:
        found = sweep.together([profile_of(4096), profile_of(32768)])
    files = plots.draw(found, tmp_path)
    names = ["latency.png", "latency.svg"] + ["memory.png", "memory.svg"] * memory
    assert [file.name for file in files] == names
    for file in files:
        if file.suffix == ".png":
            pixels = matplotlib.image.imread(file)[..., :3]
            assert len({tuple(colour) for colour in pixels.reshape(-1, 3).round(2)}) > 20
    drawing = files[1].read_text()
    assert "another pyramid at each length" in drawing
    assert "stroke-dasharray" in drawing and "10,000: fa4" in drawing
    assert ("dashed: by the square of the length" in drawing) == memory
    assert not memory or "dashed: in proportion to the length" in files[3].read_text()


def test_crossovers_close_together_can_be_read(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots.figures, "save", lambda figure, path: figures.append(figure) or [])
    profiles = []
    for profile in several().profiles[:2]:
        (fa4,) = profile.dense
        others = [
            replace(fa4, name=name, both_ms=sample(share * fa4.both_ms.median))
            for name, share in (("a", 0.9), ("b", 0.8))
        ]
        profiles.append(replace(profile, dense=[fa4, *others]))
    plots.draw(sweep.together(profiles), tmp_path)
    figures[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(boxes) == 3 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_the_terminal_shows_both_curves():
    text = plots.terminal(several(), 80, colour=False)
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    *drawn, ours, theirs = text.splitlines()
    assert ours == "o Lighthouse, fa4 inside, another pyramid at each length"
    assert theirs == "x FlashAttention-4, slope 2.00 (dots: worked out)"
    text = "\n".join(drawn)
    assert "1M" in text and "Lighthouse" not in text
    assert text.count("o") > 10 and text.count("x") > 10 and text.count(".") > 20
    assert plots.terminal(sweep.together([profile_of(4096)]), 80, colour=False) is None


def test_without_the_extras_there_are_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.terminal(several(), 80, colour=False) is None
    assert plots.draw(several(), tmp_path) == []
    said = []
    assert run._drawn([], said.append) == [] and "pip install -e '.[plot]'" in said[0]


def test_a_report_has_its_schema_its_machine_and_its_tables(tmp_path):
    found = several()
    written = report.Report(
        "One call", "attention", describe(CPU), report.attention_parts(found), found.as_json(), ROOF
    )
    written.write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["schema"], results["kind"]) == (4, "attention")
    assert results["machine"]["packages"]["torch"] == torch.__version__
    assert results["roof"] == {"bytes_per_second": 2e12, "flops_per_second": 5e14, "dtype": "bfloat16"}
    assert [profile["settings"]["seq"] for profile in results["profiles"]] == [4096, 32768, 2**20]
    assert results["profiles"][0]["stages"][0]["forward"]["ms"] == {"median": 1.0, "p10": 0.9, "p90": 1.2, "calls": 20}
    assert results["profiles"][2]["dense"][0]["extrapolated"] == 32768
    assert results["slopes"]["fa4"] == pytest.approx(2.0)
    text = (tmp_path / "report.md").read_text()
    assert "| gather | forward | 1.000 | 0.900 | 1.200 | 1 | - | 1 TB/s | 50% |" in text
    assert "| dense call | forward | 1.000 | 0.900 | 1.200 | 1 | 100.0 | 100 TFLOP/s | 20% |" in text
    assert re.search(r"FlashAttention-4 \(worked out from 32768 tokens\) \| [\d.]+ \| [\d.]+ \| - \| - \| - \|", text)
    assert "fa3 is not installed" in text
    assert "| Lighthouse, cudnn inside |" in text and "Stages (triton, fa4 inside), N = 4096" in text
    assert "together 4.00 ms, where the call takes 0.41" in text and "plain PyTorch divides" not in text
    assert "| Lighthouse, fa4 inside | 1.00 | 3 |" in text and "| FlashAttention-4 | 2.00 | 2 |" in text
    assert "holds 12.50%, 1.56%, 0.05% of the tokens at level 0." in text
    commit = results["machine"]["git_commit"]
    assert commit is None or f"; commit {commit}." in text
    assert "Noisy" not in text and "A CPU's speed" not in text and "math inside" not in text
    calls = replace_call(profile_of(4096), peak_gib=None)
    assert report._DRIFT in report._profile_parts(calls)
    sliding = replace(calls, settings=calls.settings | {"method": "sliding", "window": 512, "dense_backend": "math"})
    assert report._PRODUCTS in report._profile_parts(sliding)
    loud = profile_of(4096)
    loud = replace_call(loud, both_ms=Sample(1.0, 0.5, 3.0, 9))
    assert "Noisy (p90 above 1.5 times p10)" in report._profile_parts(loud)[-2]
    odd = replace_call(profile_of(4096), forward_ms=Sample(2.0, 2.0, 2.0, 1), both_ms=Sample(1.0, 1.0, 1.0, 1))
    assert "Not to be used, as slower forward than both ways: Lighthouse" in report._profile_parts(odd)[-2]
    assert report._call_cells(odd.lighthouse)[2:6] == ("1.00", "-", "-", "1")


def test_a_narrow_terminal_gets_fewer_columns():
    table = next(part for part in report.attention_parts(several())[1:] if isinstance(part, report.Table))
    assert table.narrowed(200) is table and "p10" in table.columns
    narrow = table.narrowed(80)
    assert narrow._width() <= 80 and narrow.columns[0] == "call" and "faster, both" in narrow.columns
    assert "calls" not in narrow.columns and len(set(map(len, [narrow.columns, *narrow.rows]))) == 1


def test_a_report_takes_the_place_of_an_earlier_one(tmp_path):
    found = several()
    first = report.Report(
        "One call", "attention", describe(CPU), [], found.as_json(), ROOF, lambda place: plots.draw(found, place)
    )
    first.write(tmp_path)
    assert (tmp_path / "latency.png").exists() and (tmp_path / "memory.svg").exists()
    (tmp_path / "notes.txt").touch()
    replace(first, draw=lambda place: []).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "report.md", "results.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    report.prepare(tmp_path / "new/deep", "tune")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(UserError, match="is no report"):
        report.prepare(tmp_path / "full", "tune")
    (tmp_path / "full/results.json").touch()
    with pytest.raises(UserError, match="is no report"):
        report.prepare(tmp_path / "full", "tune")
    with pytest.raises(UserError, match="is no report"):
        report.prepare(tmp_path / "full/thesis.tex", "tune")
    (tmp_path / "full/results.json").write_text('{"kind": "step", "machine": {}}')
    with pytest.raises(UserError, match="has a report of another kind: step"):
        report.prepare(tmp_path / "full", "tune")
    report.prepare(tmp_path / "full", "step")


def test_what_a_cpu_is_busy_with_is_said(monkeypatch):
    said = []
    ticks = iter([(1000, 2000), (1040, 2100)])
    monkeypatch.setattr(machine, "_times", lambda: next(ticks))
    assert machine.busy(0.0) == pytest.approx(0.6)
    assert 0 <= (monkeypatch.undo() or machine.busy(0.05)) <= 1
    for share, tokens in ((0.6, 4096), (0.0, 98304), (0.05, 4096)):
        monkeypatch.setattr(run, "busy", lambda share=share: share)
        run._warn(CPU, tokens, said.append)
    assert len(said) == 2 and "keep 60% of the processors busy" in said[0] and "take minutes on a CPU" in said[1]
    run._warn(torch.device("cuda"), 2**20, pytest.fail)


def test_work_of_others_that_begins_between_two_steps_is_in_the_report(monkeypatch, tmp_path):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.shelf import shipped_recipes

    path, said, taken = shipped_recipes()["quickstart"], [], []
    given = ["lighthouse.phases=[{topk=32}, {topk=64}]"]
    # Before the first step, the second, and the dense one.
    shares = iter([0.0, 0.6, 0.05])
    monkeypatch.setattr(run, "busy", lambda: next(shares))
    monkeypatch.setattr(run, "step_parts", lambda profiles: [f"{len(profiles)} steps"])

    def run_step(*_, **which):
        taken.append(which)
        return SimpleNamespace(within=lambda folder: SimpleNamespace(as_json=lambda: {}))

    monkeypatch.setattr(run, "run_step", run_step)
    monkeypatch.setattr(run, "device", lambda: CPU)
    found = run.step(path, load_recipe(path, given), given, tmp_path, 1, said.append)
    assert taken == [{"phase": 1}, {"phase": 2}, {"stage": "dense"}] and next(shares, None) is None
    words = "others keep 60% of the processors busy: times beside other work are not to be used"
    assert said == [words] and found.parts[0] == "3 steps" and found.parts[-1] == f"After 1 of these steps: {words}."


def test_what_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(torch, "randn", None)
    with pytest.raises(UserError, match=r"needs about \d+ GiB"):
        attention.profile_attention(Shape(2**28, 8, 8, 128, "float32"), LighthouseConfig(topk=2**20), ROOF, CPU)
    with pytest.raises(UserError, match="so the call would be dense"):
        check_size(Shape(512, 8, 8, 128, "float32"), LighthouseConfig(), CPU)
    with pytest.raises(UserError, match="no attention call has"):
        check_size(Shape(8192, 8, 3, 128, "float32"), LighthouseConfig(topk=128), CPU)
    with pytest.raises(UserError, match="a window of 4096 tokens holds all of N = 4096"):
        check_size(Shape(4096, 8, 8, 128, "float32"), LighthouseConfig(method="sliding", window=4096), CPU)


@pytest.mark.parametrize(
    ("kind", "nproc", "message"),
    [
        ("cuda", 1, r"a step of 98304 tokens takes about 43 GiB on each GPU, which has 26 for it"),
        ("cuda", 8, None),
        ("cpu", 1, r"about 43 GiB on this machine, which has 20 for it"),
        ("cpu", 2, r"about 77 GiB on this machine, which has 20 for it"),
    ],
)
def test_a_step_far_too_large_is_refused_before_it_starts(monkeypatch, tmp_path, kind, nproc, message):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.shelf import shipped_recipes

    monkeypatch.setattr(run, "device", lambda: torch.device(kind))
    monkeypatch.setattr(run, "memory", lambda where: 26 * 2**30)
    monkeypatch.setattr(run, "free_memory", lambda where: 20 * 2**30)
    monkeypatch.setattr(run, "run_step", None)
    recipe = load_recipe(shipped_recipes()["530m_98k"])
    if message is None:
        run._check_step(recipe, nproc)
        return
    for work in (
        lambda: run.step(tmp_path / "530m_98k.toml", recipe, [], tmp_path, nproc, pytest.fail),
        lambda: run.tune(tmp_path / "530m_98k.toml", recipe, [], 0.0625, tmp_path, nproc, pytest.fail),
    ):
        with pytest.raises(UserError, match=message):
            work()


def test_what_is_available_is_less_than_all():
    assert 0 < machine.free_memory(CPU) < machine.memory(CPU)


def test_one_that_does_not_fit_stops_a_sweep_before_the_first():
    shapes = [(Shape(n, 2, 2, 16, "float32"), SMALL) for n in (1024, 2**40)]
    with pytest.raises(UserError):
        sweep.profile_lengths(shapes, lambda: pytest.fail("it was measured"), CPU, lambda words: None)


def test_a_sweep_keeps_what_was_measured_before_the_memory_was_full(monkeypatch):
    shapes = [(Shape(n, 2, 2, 16, "float32"), SMALL) for n in (1024, 2048, 4096)]
    full_at = 2048

    def profile_attention(shape, *arguments, **options):
        if shape.tokens >= full_at:
            raise torch.OutOfMemoryError
        return profile_of(shape.tokens)

    monkeypatch.setattr(sweep, "profile_attention", profile_attention)
    found, _ = sweep.profile_lengths(shapes, lambda: ROOF, CPU, lambda words: None)
    assert [profile.tokens for profile in found.profiles] == [1024]
    assert report.attention_parts(found)[-1] == "N = 2048 filled the GPU's memory."
    full_at = 0
    with pytest.raises(UserError, match="N = 1024 filled the GPU's memory"):
        sweep.profile_lengths(shapes, lambda: ROOF, CPU, lambda words: None)


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        replace(SMALL, scorer="random"),
        replace(SMALL, scorer="block", window=64),
        replace(SMALL, method="chunked", window=300),
        replace(SMALL, method="sliding", window=100),
        replace(SMALL, method="compressed", window=64),
    ],
    ids=lambda cfg: f"{cfg.method}-{cfg.scorer}-{cfg.window}",
)
def test_a_profile_on_the_cpu(cfg):
    shape = Shape(1024, 4, 2, 16, "float32")
    found = attention.profile_attention(shape, cfg, ROOF, CPU, repeats=2)
    assert max(found.checks.values()) < 1e-5
    names = [stage.name for stage in found.stages]
    pyramid = cfg.method == "pyramid" and not cfg.window
    assert names == (["pyramid + score", "select", "gather", "dense call", "scatter"] if pyramid else [])
    assert [stage.name for stage in found.stages if stage.backward is None] == ["select"] * pyramid
    whole = pyramid or cfg.method == "chunked"
    inside = "flash" if whole else "math"
    assert (f"output, 1024 tokens, {inside} inside" in found.checks) == (pyramid or cfg.method == "chunked")
    assert found.settings["dense_backend"] == inside and not found.others
    assert found.settings["backend"] == ("reference" if cfg.method == "pyramid" else "auto")
    assert min(found.lighthouse.both_ms.p10, found.lighthouse.forward_ms.p10) > 0
    assert [call.name for call in found.dense] == ["flash"] and found.lighthouse.peak_gib is None
    expected = found.dense[0].both_ms.median / found.lighthouse.both_ms.median
    assert found.speedup["flash"]["forward_backward"] == expected


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scorer", ["norm", "random", "block"])
@pytest.mark.parametrize(("pooling", "levels"), [(4, 3), (2, 3), (4, 2)])
def test_the_stages_make_the_call(monkeypatch, pooling, levels, scorer, kv_heads):
    cfg = replace(SMALL, pooling=pooling, levels=levels, scorer=scorer)
    inputs = dense.random_inputs(Shape(512, 4, kv_heads, 16, "float32"), CPU)
    key = torch.zeros(3, dtype=torch.int64)
    seen, grad = [], torch.autograd.grad

    def recorded(outputs, *arguments, **options):
        found = grad(outputs, *arguments, **options)
        seen.append((outputs, found))
        return found

    monkeypatch.setattr(attention.torch.autograd, "grad", recorded)
    assert len(list(attention._one_by_one(*inputs, cfg, key))) == 9
    monkeypatch.undo()
    call = lambda *x: attention.lighthouse_attention(*x, cfg, key=key)  # noqa: E731
    expected = dense.with_gradients(call, inputs)
    # What the gather gives the tokens themselves, and the pyramid by its windows.
    parts = zip(seen[2][1][:3], seen[3][1], strict=True)
    gradients = [sum(x for x in both if x is not None) for both in parts]
    for got, wanted in zip([*seen[0][0], *gradients], expected, strict=True):
        torch.testing.assert_close(got, wanted)


def refused(cfg: LighthouseConfig, match: str) -> None:
    with pytest.raises(LighthouseError, match=match):
        attention.profile_attention(Shape(1024, 2, 2, 16, "float32"), cfg, ROOF, CPU)


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    right = check.lighthouse_attention

    def wrong(q, k, v, cfg, **given):
        # Only as it is timed, and only the value's gradient.
        return right(q, k, v.detach() if cfg.dense_backend == "flash" else v, cfg, **given) + 0 * v.sum()

    monkeypatch.setattr(check, "lighthouse_attention", wrong)
    refused(SMALL, r"relative error of dv is .* nothing was timed")


@pytest.mark.parametrize("scorer", ["norm", "random", "block"])
def test_nor_a_call_that_scores_or_draws_otherwise_than_it_says(monkeypatch, scorer):
    from lighthouse_kernels import reference

    cfg = replace(SMALL, scorer=scorer)
    name = "pyramid" if scorer == "norm" else "select_drawn"
    right = getattr(reference, name)

    def wrong(*arguments, **options):
        if scorer != "norm":
            return right(arguments[0] + 1, *arguments[1:], **options)
        found = right(*arguments, **options)
        return found if found.scores is None else found._replace(scores=tuple(-x for x in found.scores))

    monkeypatch.setattr(reference, name, wrong)
    calls = []
    select = check.select_indices

    def told(q, k, settings, **given):
        # What plain PyTorch says is right.
        calls.append(settings.dense_backend)
        if settings.dense_backend == "flash":
            return select(q, k, settings, **given)
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, right)
            return select(q, k, settings, **given)

    monkeypatch.setattr(check, "select_indices", told)
    refused(cfg, "relative error of|selection is not that")
    assert calls


SHAPE = Shape(4096, 4, 2, 16, "float32")


def alone(monkeypatch, forward, why_not=None) -> None:
    """A kernel of that name is all there is but plain matrix products."""
    one = DenseKernel("mine", "Mine", lambda device: None, lambda *_: why_not, forward)
    for name in set(KERNELS) - {"math"}:
        monkeypatch.delitem(KERNELS, name)
    monkeypatch.setitem(KERNELS, "mine", one)
    monkeypatch.setitem(BACKENDS, "mine", Facts(lse=False, window=False, documents=False))


def test_a_dense_kernel_counts_if_it_is_there_and_right(monkeypatch):
    exact = KERNELS["math"].forward
    with monkeypatch.context() as patch:
        alone(patch, exact)
        there, absent = dense.dense_kernels(CPU, SHAPE)
        assert [kernel.name for kernel in there] == ["mine"] and not absent
        assert there[0].error < 1e-6 and there[0].trains and there[0].label == "Mine"
    with monkeypatch.context() as patch:
        alone(patch, lambda *x: 1.01 * exact(*x))
        there, absent = dense.dense_kernels(CPU, SHAPE)
        assert not there and absent["mine"].startswith("differs from plain PyTorch by 1.0e-02")

    def refuse(*_):
        raise KeyError("FlashAttention only supports fp16 and bf16 data type\nand more")

    with monkeypatch.context() as patch:
        alone(patch, refuse)
        assert "only supports fp16" in dense.dense_kernels(CPU, SHAPE)[1]["mine"]


def test_every_kernel_of_a_gpu_says_why_it_is_not_there(monkeypatch):
    names = {"fa4", "fa3", "fa2", "varlen", "flex", "cudnn"}
    assert {name for name, kernel in KERNELS.items() if kernel.absence("cpu")} == names
    there, absent = dense.dense_kernels(CPU, SHAPE)
    assert [kernel.name for kernel in there] == ["flash"] and not absent
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 0))
    found = {name: why for name, _, why in dense._candidates(gpu, SHAPE)}
    assert set(found) == names | {"flash", "efficient"}
    assert all(isinstance(found[name], str) for name in ("fa4", "fa3", "fa2", "varlen"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_plain_pytorch_loses_is_the_measure(dtype):
    inputs = dense.random_inputs(replace(SHAPE, tokens=256, dtype=dtype), CPU)
    exact = dense.with_gradients(dense._forced("math"), [x.float() for x in inputs])
    allowed = dense.bound(dense.with_gradients(dense._forced("math"), inputs), exact)
    assert (allowed == 1e-5) if dtype == "float32" else (4e-3 < allowed < 0.06)


def test_each_kernel_of_torch_is_forced():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function.overloadpacket._qualified_op_name)
            return function(*arguments, **(options or {}))

    q = torch.randn(1, 32, 2, 16)
    for name, expected in (("flash", "flash_attention_for_cpu"), ("math", "attention_math")):
        seen.clear()
        with Watch():
            dense._forced(name)(q, q, q)
        assert any(expected in op for op in seen) or (name == "math" and any("softmax" in op for op in seen))
        assert not any("flash" in op for op in seen) or name == "flash"


def test_a_long_dense_call_is_worked_out_from_a_shorter_one(monkeypatch):
    monkeypatch.setattr(attention, "LIMIT_MS", 100.0)
    timed_at = []

    def profile_call(name, label, call, shape, device, repeats):
        timed_at.append(shape.tokens)
        ms = shape.tokens**2 / 1e6
        return Call(name, label, sample(ms / 3), sample(ms), shape.tokens / 1e6)

    monkeypatch.setattr(attention, "profile_call", profile_call)
    kernel = dense.Kernel("flash", "flash", None, 0.0)
    short = Shape(8192, 2, 2, 16, "float32")
    measured = attention._dense(kernel, short, CPU, 5, None, 0)
    assert timed_at == [1024, 8192] and not measured.extrapolated
    timed_at.clear()
    long = attention._dense(kernel, replace(short, tokens=16384), CPU, 5, measured, 8192)
    assert not timed_at and long.extrapolated == 8192
    assert long.both_ms.median == pytest.approx(16384**2 / 1e6) and long.peak_gib == pytest.approx(0.016384)
    # What was worked out from something keeps its source.
    longer = attention._dense(kernel, replace(short, tokens=32768), CPU, 5, long, 16384)
    assert longer.extrapolated == 8192 and longer.both_ms.median == pytest.approx(32768**2 / 1e6)
    # A call that is too short says little.
    assert not timed_at
    far = attention._dense(kernel, replace(short, tokens=131072), CPU, 5, measured, 8192)
    assert timed_at == [16384] and far.extrapolated == 16384


def test_the_roof_of_this_machine(monkeypatch):
    monkeypatch.setitem(sys.modules["lighthouse_core.profile.machine"]._COPIED, "cpu", 2**22)
    monkeypatch.setitem(sys.modules["lighthouse_core.profile.machine"]._SIDE, "cpu", 256)
    found = roof(CPU, torch.float32)
    assert 1e8 < found.bytes_per_second < 1e13 and 1e8 < found.flops_per_second < 1e15
    assert math.isfinite(found.flops_per_second) and found.dtype == "float32"


def test_advice_for_a_recipe(monkeypatch):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.profile import advise
    from lighthouse_core.shelf import shipped_recipes

    tiny = ["model.heads=2", "model.kv_heads=1", "model.head_dim=16", "training.seq_len=1024"]
    tiny += ['data.packing="documents"']
    # Budgets of blocks, a dense recipe, and a pyramid that does not suit its length, are no hindrance.
    tiny += ["lighthouse.budget.every=10"]
    recipe = load_recipe(shipped_recipes()["quickstart"], [*tiny, "lighthouse.topk=512", "lighthouse.enabled=false"])
    trained = []
    seconds = 10.0

    def run(settings):
        trained.append(load_recipe(shipped_recipes()["quickstart"], [*tiny, *settings]))
        return SimpleNamespace(seconds=seconds, update_ms=1000.0, processes=2)

    def advised(floor):
        return advise.advise(recipe, "quickstart", floor, CPU, lambda words: None, run)

    monkeypatch.setattr(advise, "_REPEATS", 2)
    found = advised(0.125)
    (seen,) = trained
    assert seen.lighthouse.enabled and found.own is None
    assert seen.data.packing == "concat" and found.documents
    assert {key: getattr(seen.lighthouse, key) for key in found.measured_settings} == found.measured_settings
    assert all(one.share >= 0.125 for one in found.timed) and found.timed[-1].settings["method"] == "chunked"
    totals = [prediction.total for prediction in found.predictions[:-1]]
    assert totals == sorted(totals, reverse=True) and len(totals) > 3
    # A step of 10 s held one micro-batch a process; two processes take 2 of the global batch of 4.
    plan = found.plan
    best = next(one for one in found.timed if one.settings == found.measured_settings)
    once = replace(plan, calls=1, rest_ms=0.0)
    rest = 10_000 - once.stage_1_step_ms(best.forward_ms, best.both_ms, "flash")
    assert plan.calls == 2 and plan.rest_ms == pytest.approx(2 * (rest - 1000) + 1000)
    assert (plan.layers, plan.dense_layers, plan.steps, plan.recover_steps) == (4, 2, 100, 20)
    with pytest.raises(UserError, match="no pyramid of 1024 tokens gathers"):
        advised(0.99)
    long = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seq_len": 2 * 10**9})})
    with pytest.raises(UserError, match="windows is too large"):
        advise.advise(long, "quickstart", 0.125, CPU, pytest.fail, run)
    # The recipe's own pyramid is among the candidates, if it can be.
    lighthouse = recipe.lighthouse.model_copy(update={"topk": 48})
    recipe = recipe.model_copy(update={"lighthouse": lighthouse})
    found = advised(0.125)
    assert found.own == (4, 3, 48)
    assert [row[0] for row in report.tune_parts(found)[0].rows].count("p 4, L 3, k 48 (the recipe's)") == 1
    seconds = 1e-6
    with pytest.raises(LighthouseError, match="took less than its attention calls alone"):
        advised(0.125)


def test_budgets_are_profiled_in_the_phases_that_have_them(monkeypatch, tmp_path):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.profile import step
    from lighthouse_core.shelf import shipped_recipes

    path, given = shipped_recipes()["quickstart"], ["lighthouse.budget.every=10"]
    given += ['lighthouse.phases=[{method="chunked", window=64}, {method="blocks", window=64}]']
    trained = []

    def pretrain(path, settings, *rest):
        trained.append(load_recipe(path, settings))
        raise LighthouseError("that is all")

    monkeypatch.setattr(step, "_pretrain", pretrain)
    for phase in (1, 2):
        with pytest.raises(LighthouseError, match="that is all"):
            step.run_step(path, given, tmp_path, 1, lambda words: None, phase=phase)
    assert [(one.lighthouse.method, one.lighthouse.budget.every) for one in trained] == [
        ("chunked", 10),
        ("blocks", 10),
    ]
    assert [bool(one.lighthouse.without_effect) for one in trained] == [True, False]


def test_a_window_that_grows_is_profiled_at_its_mean(monkeypatch, tmp_path):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.profile import step
    from lighthouse_core.shelf import shipped_recipes

    trained, said = [], []

    def pretrain(path, settings, *rest):
        trained.append(load_recipe(path, settings).phases)
        raise LighthouseError("that is all")

    monkeypatch.setattr(step, "_pretrain", pretrain)
    with pytest.raises(LighthouseError, match="that is all"):
        step.run_step(shipped_recipes()["530m_98k_growing"], [], tmp_path, 1, said.append)
    ((phase,),) = trained
    assert (phase.attention.window, phase.growth) == (5248, None)
    assert said[0] == "the window of phase 1 grows from 256 to 24576; this step has the mean, 5248"


@pytest.mark.parametrize("name", ["530m_98k_growing", "530m_98k"])
def test_a_recipe_is_profiled_in_each_of_its_phases(monkeypatch, tmp_path, name):
    from lighthouse_core.config import load_recipe
    from lighthouse_core.profile import step
    from lighthouse_core.profile.step import StepProfile
    from lighthouse_core.profile.trace import COMMUNICATION, Breakdown, Cost
    from lighthouse_core.shelf import shipped_recipes

    made, path, seconds = [], shipped_recipes()[name], {0: 2.5, 2048: 1.0, 8192: 2.0, 49152: 4.0}
    three = [f"lighthouse.phases=[{', '.join(f'{{window={window}}}' for window in seconds if window)}]"]
    given = three if name == "530m_98k_growing" else []

    def run_step(path, settings, folder, nproc, say, *, stage="lighthouse", phase=0):
        recipe = load_recipe(path, settings)
        window = recipe.phases[phase - 1].attention.window if stage == "lighthouse" else 0
        profile = StepProfile(
            recipe=path.stem,
            settings=settings,
            stage=stage,
            phase=phase,
            steps=recipe.phases[phase - 1].end - recipe.phases[phase - 1].begin + 1,
            window=window,
            packing=recipe.data.packing,
            notes=[],
            machine={},
            processes=1,
            tokens=1000,
            timed=[1.0],
            seconds=5.0 if stage == "dense" else seconds[window],
            tokens_per_second=1.0,
            memory_gib=1.0,
            mfu=None,
            breakdown=Breakdown(
                "cuda",
                1.0,
                [Cost(COMMUNICATION, 0.25, 0.25, 0.25, None, 3)],
                idle_ms=0.0,
                overlap_ms=0.0,
                # Sums of the same times may differ by as little.
                hidden_ms=1e-12 if stage == "dense" else 0.5,
                largest=[],
            ),
            trace=folder / "trace.json.gz",
            stacks=folder / "stacks.folded",
            run=folder / "runs/a",
            exchanged=step.exchanged(load_recipe(path, [*settings, "parallel.context=4"])),
        )
        made.append(profile)
        return profile

    monkeypatch.setattr(run, "run_step", run_step)
    monkeypatch.setattr(run, "free_memory", lambda where: 2**40)
    found = run.step(path, load_recipe(path, given), given, tmp_path, 1, lambda words: None)
    steps = found.results["steps"]
    # Chunks exchange what dense attention does, a pyramid what it gathers.
    lighthouse, dense = ("144.0", "144.0") if name == "530m_98k_growing" else ("27.0", "144.0")
    said = f"a process sends {lighthouse} MiB in a Lighthouse layer and {dense} MiB in a dense layer, forward and"
    assert any(said in str(part) for part in found.parts)
    assert step.exchanged(load_recipe(path)) == {}
    assert not any(part in found.parts for part in (report._DRIFT, report._FIRST))
    on_cpu = [replace(one, processes=2, breakdown=replace(one.breakdown, device="cpu")) for one in made]
    parts = report.step_parts(on_cpu)
    assert parts.count(report._FIRST) == len(steps) and parts[-1] == report._DRIFT
    said = [part for part in found.parts if "beside other kernels" in str(part)]
    assert said == ["Communication took 0.75 ms, 0.50 of them beside other kernels, in no row."] * (len(steps) - 1)
    if name == "530m_98k":
        assert [step["trace"] for step in steps] == ["trace.json.gz", "dense/trace.json.gz"]
        assert "The step of stage 1 is 2.00 times as fast as the dense one, all without the profiler." in found.parts
    else:
        assert [step["window"] for step in steps] == [2048, 8192, 49152, 0]
        assert steps[1]["trace"] == "phase-2/trace.json.gz"
        said = "Steps of phases 1, 2, 3 are 5.00, 2.50, 1.25 times as fast as the dense one, and all of these phases"
        assert any(said in part and "together 2.14 times" in part for part in found.parts if isinstance(part, str))
    # A step of two micro-batches has no other one beside it where every layer is dense anyway.
    given = [*given, "lighthouse.enabled=false"]
    found = run.step(path, load_recipe(path, given), given, tmp_path, 1, lambda words: None)
    assert len(found.results["steps"]) == 1
