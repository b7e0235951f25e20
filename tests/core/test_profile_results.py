"""The committed profile of an H100 agrees with the benchmark of the same shapes, which has its own code for times."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = json.loads((ROOT / "kernels/benchmarks/results/2026-11-27-h100.json").read_text(encoding="utf-8"))
PROFILE = ROOT / "recipes/results/2026-11-27-h100-profile"
ATTENTION = json.loads((PROFILE / "attention/results.json").read_text(encoding="utf-8"))
KERNELS = {"cudnn": "cuDNN", "fa4": "FlashAttention-4"}
# Of the benchmark: of the profile.
STAGES = {
    "pyramid": ("pyramid + score", "forward"),
    "gather": ("gather", "forward"),
    "scatter": ("scatter", "forward"),
    "scatter backward": ("scatter", "backward"),
    "gather backward": ("gather", "backward"),
}
SHARED = [
    pytest.param(row, profile, id=str(row["N"]))
    for row in BENCHMARK["rows"]
    for profile in ATTENTION["profiles"]
    if profile["settings"]["seq"] == row["N"]
]


def test_they_have_lengths_in_common():
    assert [row.id for row in SHARED] == ["32768", "98304", "524288", "1048576"]


@pytest.mark.parametrize(("row", "profile"), SHARED)
def test_times_memory_and_ratios_agree_within_a_tenth(row, profile):
    assert {key: profile["settings"][key] for key in ("levels", "topk", "gathered_length")} == {
        "levels": row["levels"],
        "topk": row["topk"],
        "gathered_length": row["S"],
    }
    ours = {name: _call(profile, f"{name} inside") for name in KERNELS}
    dense = {call["name"]: call for call in profile["dense"] if not call["extrapolated"]}
    for name, call in ours.items():
        seen = row[name]
        assert _ms(call, "forward") == pytest.approx(seen["forward_ms"], rel=0.1)
        assert _ms(call, "both") == pytest.approx(seen["both_ms"], rel=0.1)
        assert call["peak_gib"] == pytest.approx(seen["peak_gib"], rel=0.1)
        if "dense_both_ms" in seen:
            assert _ms(dense[name], "forward") == pytest.approx(seen["dense_forward_ms"], rel=0.1)
            assert _ms(dense[name], "both") == pytest.approx(seen["dense_both_ms"], rel=0.1)
            ratio = seen["dense_both_ms"] / seen["both_ms"]
            assert _ms(dense[name], "both") / _ms(call, "both") == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(("row", "profile"), SHARED)
def test_stages_agree_within_a_tenth(row, profile):
    times = {
        (stage["name"], direction): stage[direction]["ms"]["median"]
        for stage in profile["stages"]
        for direction in ("forward", "backward")
        if stage[direction]
    }
    seen = row["stages_ms"]
    for name, where in STAGES.items():
        assert times[where] == pytest.approx(seen[name], rel=0.1), name
    # Not with seen["select"]: torch's profiler says less of two kernels so short than events do.
    assert times["select", "forward"] == pytest.approx(row["selection_ms"], rel=0.1)
    dense = times["dense call", "forward"] + times["dense call", "backward"]
    assert dense == pytest.approx(row["fa4"]["dense_call_ms"], rel=0.1)
    outside = sum(ms for (name, _), ms in times.items() if name != "dense call")
    assert outside == pytest.approx(row["outside_ms"], rel=0.1)


def test_no_stage_was_faster_than_the_machine():
    for profile in ATTENTION["profiles"]:
        for stage in profile["stages"]:
            assert all(stage[one]["of_roof"] < 1.02 for one in ("forward", "backward") if stage[one]), stage["name"]


def test_the_readme_has_the_benchmarks_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for row in BENCHMARK["rows"]:
        for name, label in KERNELS.items():
            seen = row[name]
            dense = seen.get("dense_both_ms")
            cells = [
                *(str(row["N"]), str(row["S"]), f"{4 * row['topk'] / row['N']:.1%}", label),
                *(f"{seen[key]:.2f}" for key in ("forward_ms", "both_ms", "dense_call_ms")),
                *((f"{dense:.1f}", f"{dense / seen['both_ms']:.1f}x") if dense else ("-", "-")),
                *(f"{value:.2f}" for value in (seen["peak_gib"], row["outside_ms"], row["floor_ms"])),
            ]
            assert f"| {' | '.join(cells)} |" in readme


def test_the_readme_has_the_steps_that_were_profiled():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    read = {name: json.loads((PROFILE / f"{name}.json").read_text()) for name in ("step/results", "growing/results")}
    own, dense = read["step/results"]["steps"]
    *windows, all_dense = read["growing/results"]["steps"]
    assert [step["window"] for step in windows] == [2048, 8192, 49152]
    rows = [("530m_98k", "the paper's rule", own, dense), ("530m_98k", "dense", dense, None)]
    rows += [("530m_98k_growing", f"window {step['window']}", step, all_dense) for step in windows]
    for recipe, stage, step, beside in (*rows, ("530m_98k_growing", "dense", all_dense, None)):
        ratio = f"{beside['seconds'] / step['seconds']:.2f}x " if beside else ""
        assert (
            f"| `{recipe}` | {stage} | {step['tokens_per_second']:,.0f} | {step['memory_gib']:.1f} | {ratio}|" in readme
        )
    two, two_dense = json.loads((PROFILE / "two-gpus/results.json").read_text())["steps"]
    (talk,) = (row for row in two["breakdown"]["rows"] if row["name"] == "communication")
    more = two["tokens_per_second"] / own["tokens_per_second"]
    assert (
        f"{two['tokens_per_second']:,.0f} tokens/s in stage 1, {more:.2f} times those of one above, "
        f"{two_dense['tokens_per_second']:,.0f} dense ({two_dense['seconds'] / two['seconds']:.2f}x), with "
        f"{two['memory_gib']:.1f} and {two_dense['memory_gib']:.1f} GiB on each; "
        f"of the communication {100 * talk['share']:.1f} % of the step is not hidden"
    ) in readme.replace("\n", " ")
    own_total = 16000 * dense["seconds"] / (10000 * own["seconds"] + 6000 * dense["seconds"])
    tuned = json.loads((PROFILE / "tune/results.json").read_text())["tune"]
    settings = [[one["settings"].get(key) for key in ("method", "pooling", "levels", "topk")] for one in tuned["timed"]]
    predicted = tuned["predictions"][settings.index(["pyramid", 4, 3, 1536])]
    assert f"With its recovery `530m_98k` is {own_total:.2f} times as fast (10000 + 6000)" in readme.replace("\n", " ")
    assert f"predicted {predicted['stage_1']:.2f} times for the stage 1 of `530m_98k`" in readme.replace("\n", " ")


def _call(profile: dict, words: str) -> dict:
    return next(call for call in (profile["lighthouse"], *profile["others"]) if words in call["label"])


def _ms(call: dict, what: str) -> float:
    return call[f"{what}_ms"]["median"]
