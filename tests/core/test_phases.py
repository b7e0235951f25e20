"""[[lighthouse.phases]]: which step is in which phase, how a window grows, and what a model attends to in each."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from lighthouse_core.attention import dense_attention
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import AttentionContext, Documents
from lighthouse_core.attention.module import DenseAttention
from lighthouse_core.config import dump_recipe, load_recipe
from lighthouse_core.config.load import loads_recipe
from lighthouse_core.config.phases import Phase, overlaps, phase_at, spans
from lighthouse_core.errors import RecipeError, UserError
from lighthouse_core.estimate import DENSE, flops_per_token, keys_of_stage_1, mean_keys, process_bytes
from lighthouse_core.models.decoder import Decoder, DecoderArgs, attention_layers, use_dense
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run, check_resumable
from lighthouse_core.titan.trainer import Stage, Trainer, _build_model

RECIPE = "recipes/quickstart.toml"
CHUNKED = 'lighthouse.method="chunked"'
CPU = torch.device("cpu")


def recipe(phases, *settings):
    return load_recipe(RECIPE, [*settings, f"lighthouse.phases=[{phases}]"])


def stage(recipe):
    run = SimpleNamespace(checkpoint_steps=list)
    return Stage(run, recipe, "lighthouse", 0, recipe.training.steps, recovery=False)


@given(
    st.lists(st.decimals("0.001", "1000", places=3).map(float), min_size=1, max_size=8),
    st.integers(1, 100_000),
)
def test_every_step_is_in_one_phase_and_shares_hold_within_a_step(shares, steps):
    found = spans(shares, steps)
    assert found[0][0] == 1 and found[-1][1] == steps
    assert all(end + 1 == begin for (_, end), (begin, _) in pairwise(found))
    for share, (begin, end) in zip(shares, found, strict=True):
        assert end - begin + 1 == pytest.approx(share / sum(shares) * steps, abs=1.001)


@given(st.integers(1, 12), st.integers(1, 100_000))
def test_equal_shares_begin_where_equal_parts_do(count, steps):
    assert [begin for begin, _ in spans([1.0] * count, steps)] == [
        -(-number * steps // count) + 1 for number in range(count)
    ]


def test_shares_are_the_decimal_numbers_that_are_written():
    # As binary fractions 0.1 and 0.2 are more than 0.3, and the second phase would begin a step later.
    assert spans([0.1, 0.2, 0.7], 10) == [(1, 1), (2, 3), (4, 10)]


@given(
    st.integers(1, 4096),
    st.integers(0, 200_000),
    st.integers(2, 5000),
    st.sampled_from(("linear", "geometric")),
    st.data(),
)
def test_a_window_grows_from_its_first_to_its_last(first, more, steps, growth, data):
    cfg = LighthouseConfig(method="chunked", window=first + more)
    begin = data.draw(st.integers(1, 1000))
    phase = Phase(1, begin, begin + steps - 1, cfg, first, growth)
    windows = [phase.window_at(step) for step in range(begin, begin + steps)]
    assert windows[0] == first and windows[-1] == first + more and windows == sorted(windows)
    unit = min(128, 2 ** int(math.log2(first)))
    assert all(window % unit == 0 for window in windows[1:-1] if window != first)
    assert len(set(windows)) <= more // unit + 3
    exact = (first * (1 + more / first) ** (i / (steps - 1)) for i in range(steps))
    if growth == "linear":
        exact = (first + more * i / (steps - 1) for i in range(steps))
    assert all(-1e-3 < wanted - window < unit or window == first for wanted, window in zip(exact, windows, strict=True))
    assert abs(phase.mean_window - sum(windows) / steps) <= unit + more / (steps - 1)
    assert phase.mean_window % unit == 0 or phase.mean_window in (first, first + more)


def test_a_geometric_window_meets_its_powers():
    phase = Phase(1, 1, 5, LighthouseConfig(method="chunked", window=32768), 2048, "geometric")
    assert [phase.window_at(step) for step in range(1, 6)] == [2048, 4096, 8192, 16384, 32768]
    assert phase_at([phase], 0) == phase_at([phase], 9) == phase
    # 30720 / ln(16) is 11080.
    assert phase.mean_window == 11008 and replace(phase, growth=None).mean_window == 32768


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_overlaps_count_every_step_once(lengths, data):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    cfg = LighthouseConfig()
    phases = [
        Phase(i + 1, end - length + 1, end, cfg, 0) for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]
    first = data.draw(st.integers(1, ends[-1]))
    last = data.draw(st.integers(first, ends[-1]))
    counted = {}
    for step in range(first, last + 1):
        counted[phase_at(phases, step)] = counted.get(phase_at(phases, step), 0) + 1
    assert overlaps(phases, first, last) == counted


def test_a_phase_overrides_the_section():
    made = recipe("{window=64}, {share=2, window=128, scorer='block', dense_layers=[], dense_backend='math'}", CHUNKED)
    one, other = made.phases
    assert (one.begin, one.end, other.begin, other.end) == (1, 34, 35, 100)
    assert (one.attention.scorer, one.dense_layers) == ("random", (0, 3))
    assert (other.attention.scorer, other.dense_layers, other.attention.dense_backend) == ("block", (), "math")
    assert loads_recipe(dump_recipe(made)) == made
    text = Path(RECIPE).read_text().replace("[data]", "[[lighthouse.phases]]\nwindow = 32\n\n[data]", 1)
    assert loads_recipe(text).phases[0].attention.window == 32
    # Without phases it is one.
    (whole,) = load_recipe(RECIPE).phases
    assert (whole.begin, whole.end, whole.dense_layers, whole.dense) == (1, 100, (0, 3), False)
    assert load_recipe(RECIPE, ["lighthouse.enabled=false"]).phases[0].dense


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (
            "{window=64, window_end=32}",
            "lighthouse.phases[1].window_end must be at least the phase's window, above 0 (64)",
        ),
        ("{window=64, growth='linear'}", "lighthouse.phases[1].growth needs a window_end"),
        ("{window=64, window_end=99, growth='log'}", 'growth must be "linear" or "geometric", not "log"'),
        ("{window=64}, {windw=64}", "unknown key lighthouse.phases[2].windw; did you mean window?"),
        (
            "{window=64}, {enabled=false, window=3}",
            "lighthouse.phases[2].window is not for a phase with enabled = false",
        ),
        ("{window=64}, {enabled=false, dense_layers=[]}", "lighthouse.phases[2].dense_layers is not for a phase with"),
        ("{window=64, share=0}", "lighthouse.phases[1].share must be above 0, not 0"),
        ("{window=64}, {}", "lighthouse.phases[2].window must be a number of tokens for the method chunked, not 0"),
        ("{window=64, window_end=2049}", "lighthouse.phases[1].window_end (2049) is above training.seq_len (2048)"),
        (
            "{window=64}, {window=99, rope_theta=500}",
            "lighthouse.phases[2].rope_theta (500) is not model.rope_theta (10000)",
        ),
        ("{window=64}, {window=2048}", "lighthouse.phases[2].window (2048) is not below training.seq_len (2048)"),
        ("{enabled=false}", "every phase is dense"),
        ("{window=64, dense_layers=[4]}", "lighthouse.phases[1].dense_layers: layer 4 is outside 0..3"),
        ("{window=64, dense_layers=[1, 1]}", "lighthouse.phases[1].dense_layers lists layer 1 more than once"),
        ("{window=64}, {window=96, share=1e-7}, {window=128, share=2}", "lighthouse.phases[2].share is too small"),
        ("{window=64, window_end=99, share=1e-7}, {window=99}", "window_end is for a phase of two steps or more"),
        (", ".join(["{window=64}"] * 101), "lighthouse.phases are 101, more than training.steps (100)"),
        (
            "{method='compressed', window=64, window_end=128}",
            "lighthouse.phases[1].window_end is not for the method comp",
        ),
        (
            "{window=64, window_end=128, dense_backend='cudnn'}",
            "lighthouse.phases[1].dense_backend 'cudnn' compiles",
        ),
        ("{method='pyramid', topk=100001}", "lighthouse.phases[1].topk must be a positive multiple"),
        ("{method='pyramid', topk=16000}", "use a smaller lighthouse.phases[1].topk"),
        ("{window='64'}", "lighthouse.phases[1].window must be an integer, not the string"),
        ("7", "lighthouse.phases[1] must be a table, not the integer 7"),
    ],
)
def test_phases_that_cannot_be(phases, words):
    with pytest.raises(RecipeError, match=re.escape(words)) as error:
        recipe(phases, CHUNKED)
    assert "\n" not in str(error.value)


def test_an_error_names_the_line_of_its_phase(tmp_path):
    text = (
        Path(RECIPE)
        .read_text()
        .replace("[data]", "[[lighthouse.phases]]\n\n[[lighthouse.phases]]\ntopk = 7\n\n[data]", 1)
    )
    line = text.splitlines().index("topk = 7") + 1
    with pytest.raises(RecipeError, match=rf"^mine.toml:{line}: lighthouse.phases\[2\].topk must be"):
        loads_recipe(text, source="mine.toml")


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("lighthouse.windows=[64, 128]", "write lighthouse.phases = [{window = 64}, {window = 128}]"),
        ("lighthouse.dense_every=3", "dense phases took its place: write lighthouse.phases = "),
    ],
)
def test_keys_of_earlier_releases_say_what_took_their_place(setting, hint):
    with pytest.raises(RecipeError, match="is no key any more") as error:
        load_recipe(RECIPE, [setting])
    assert error.value.hint.startswith(hint)
    shown = error.value.hint.partition(" = ")[2]
    assert load_recipe(RECIPE, [CHUNKED, "lighthouse.window=32", f"lighthouse.phases={shown}"]).phases


def test_a_run_of_an_earlier_release_goes_on(tmp_path):
    made = recipe("{window=64}, {window=128}", CHUNKED, f'output.dir="{tmp_path}"', "recover.steps=5")
    run = create_run(made, "quickstart", "old")
    path = run.path / "recipe.toml"
    old = re.sub(r"\[\[lighthouse.phases\]\]\n(.+\n)+\n", "", path.read_text())
    assert "phases" not in old
    path.write_text(old.replace("enabled = true\n", "enabled = true\ndense_every = 0\nwindows = [64, 128]\n", 1))
    assert Run(run.path).recipe == made
    run = Run(run.path)
    run.change(["metrics.every=3"])
    assert run.recipe.lighthouse == made.lighthouse
    (run.path / "checkpoints/step-100").mkdir(parents=True)
    planned = plan_recovery(run, ahead=SimpleNamespace(folder=run.checkpoint_dir(100), result=lambda: None))
    assert planned.recipe.lighthouse == made.lighthouse
    path.write_text(old.replace("enabled = true\n", "enabled = true\ndense_every = 3\nwindows = []\n", 1))
    with pytest.raises(RecipeError, match=r"lighthouse\.dense_every = 3: this run has single dense steps"):
        _ = Run(run.path).recipe
    # Phases of a dense baseline were never read.
    path.write_text(
        old.replace("enabled = true\n", "enabled = false\ndense_every = 3\n", 1).replace("chunked", "pyramid")
    )
    assert Run(run.path).recipe.phases[0].dense


def test_documents_suit_every_phase():
    settings = ['data.packing="documents"', "lighthouse.window=32"]
    made = recipe("{}, {levels=2, pooling=8}, {method='chunked'}, {enabled=false}", *settings)
    assert [phase.attention.alignment for phase in made.phases[:3]] == [16, 8, 1]
    assert made.alignment == 16
    assert recipe("{levels=2, pooling=8}, {levels=4, pooling=2}", *settings).alignment == 8
    with pytest.raises(RecipeError, match=r'not for lighthouse.phases\[2\].method "compressed"'):
        recipe("{}, {method='compressed'}", *settings)


def test_costs_count_phases_with_their_steps():
    phases = "{share=3, window=64}, {share=2, window=128, window_end=512, dense_layers=[]}, {share=2, enabled=false}"
    made = recipe(phases, CHUNKED, "training.steps=7")

    def alone(settings, *more):
        return flops_per_token(load_recipe(RECIPE, [CHUNKED, f"lighthouse.window={settings}", *more]), "lighthouse")

    none = "model.dense_layers=[]"
    costs = [alone(64)] * 3 + [alone(128, none), alone(512, none)] + [flops_per_token(made, "dense")] * 2
    assert flops_per_token(made, "lighthouse") == pytest.approx(sum(costs) / 7)
    for first in range(1, 8):
        for last in range(first, 8):
            mean = sum(costs[first - 1 : last]) / (last + 1 - first)
            assert flops_per_token(made, "lighthouse", (first, last)) == pytest.approx(mean)
    assert flops_per_token(made, "dense") == flops_per_token(load_recipe(RECIPE), "dense")
    seen = mean_keys(made)
    assert seen == {DENSE: 1024, 1: 32, 2: (64 + 256) / 2, 3: 1024}
    assert keys_of_stage_1(made, seen) == pytest.approx((3 * 32 + 2 * 160 + 2 * 1024) / 7)
    # Of many steps, the mean over some is that over all.
    grown = recipe("{window=64, window_end=1024}", CHUNKED, "training.steps=5000").phases[0]
    exact = sum(grown.settings(step).keys(2048) for step in range(1, 5001)) / 5000
    assert mean_keys(recipe("{window=64, window_end=1024}", CHUNKED, "training.steps=5000"))[1] == pytest.approx(
        exact, 5e-3
    )


def test_memory_is_that_of_the_largest_phase():
    each = [f"{{method='{name}', window=64}}" for name in ("chunked", "compressed")] + ["{enabled=false}"]
    sizes = [process_bytes(recipe(f"{{window=64}}, {one}"), 1)["lighthouse"] for one in each]
    small = process_bytes(recipe("{window=64}"), 1)["lighthouse"]
    assert process_bytes(recipe(", ".join(["{window=64}", *each])), 1)["lighthouse"] == max(small, *sizes)


MIXED = (
    "{scorer='random'}, {method='chunked', window=64, window_end=128, dense_layers=[]}, {enabled=false}, "
    "{method='compressed', window=32, scorer='block', keep=4, dense_layers=[0]}, {rotate='after', scorer='norm'}"
)


def test_a_step_alone_decides_what_is_attended_to():
    mixed = stage(recipe(MIXED, "training.steps=10"))
    found = [mixed.context(step, step, 0, CPU) for step in range(1, 11)]
    assert [context.settings.method for context in found[::2]] == [
        "pyramid",
        "chunked",
        "pyramid",
        "compressed",
        "pyramid",
    ]
    assert [context.settings.window for context in found] == [0, 0, 64, 128, 0, 0, 32, 32, 0, 0]
    assert [context.dense for context in found] == [False] * 4 + [True] * 2 + [False] * 4
    assert [context.key is not None for context in found] == [True] * 2 + [False] * 4 + [True] * 2 + [False] * 2
    assert [context.dense_layers for context in found[::2]] == [(0, 3), (), (0, 3), (0,), (0, 3)]
    assert [found[6].of_layer(number).dense for number in range(4)] == [True, False, False, False]
    assert found[6].of_layer(0).dense_layers == ()
    assert mixed.context(3, 3, 0, CPU).settings == found[2].settings
    model = _build_model(mixed, DecoderArgs.of(mixed.recipe.model, 2048))
    # A layer that is sparse in any phase; dense steps of such layers are the context's.
    assert [type(layer.inner_attention).__name__ for layer in attention_layers(model)] == ["LighthouseAttention"] * 4


def small(phases, *settings):
    shape = ["model.layers=2", "model.dim=32", "model.heads=2", "model.kv_heads=1", "model.head_dim=16"]
    more = ["model.ffn_dim=48", "model.dense_layers=[0]", "lighthouse.topk=8", "lighthouse.tile_parents=4"]
    return recipe(phases, *shape, *more, "training.seq_len=160", *settings)


def run(model, context):
    """Loss and gradient of a fixed batch."""
    tokens = torch.randint(256, (2, 160), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(tokens, labels=tokens, context=context)
    loss.backward()
    return loss.detach(), model.layers["0"].attention.wq.weight.grad.clone()


@torch.no_grad()
def built(mixed):
    """The model of a stage as it begins."""
    model = _build_model(mixed, DecoderArgs.of(mixed.recipe.model, 160))
    model.init_weights()
    return model


QUICK = {("concat", "chunked"), ("documents", "pyramid")}


def compiled(mixed):
    """The model of a stage as it trains, with its layers compiled, and how often they were."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = built(mixed)
    for block in model.layers.values():
        block.compile(backend=counter, fullgraph=True)
    return model, counter


@pytest.mark.parametrize(
    ("packing", "method"),
    [
        pytest.param(packing, method, marks=[pytest.mark.slow] * ((packing, method) not in QUICK))
        for packing in ("concat", "documents")
        for method in ("chunked", "sliding", "pyramid")
    ],
)
def test_a_window_that_grows_is_compiled_as_a_number_that_varies(method, packing):
    """Of a dense and a sparse layer: the dense one once; the other with its first window, and for all that follow."""
    settings = [f'lighthouse.method="{method}"', 'lighthouse.scorer="block"', f'data.packing="{packing}"']
    grows = stage(small("{window=16, window_end=160}", *settings, "training.steps=12"))
    model, counter = compiled(grows)
    eager = built(grows)
    starts = torch.tensor([0, 48, 160, 176, 320], dtype=torch.int32)
    documents = Documents(starts, 144) if packing == "documents" else None
    counted = []
    for step in range(1, 13):
        context = grows.context(step, step, 0, CPU)
        if documents is not None:
            context = type(context)(**vars(context) | {"documents": documents})
        torch.testing.assert_close(run(model, context), run(eager, context), rtol=1e-4, atol=1e-5)
        counted.append(counter.frame_count)
    assert len({grows.phase(step).window_at(step) for step in range(1, 13)}) >= 7
    # The last window is the whole sequence, which compiles once more.
    assert max(counted) == counted[-1] <= 4 and counted[2] == counted[-2]
    assert grows.phase(12).window_at(12) == 160


def test_phases_compiled_are_phases_eager():
    """Each phase compiles at its start and never again; a phase that comes back finds what was compiled."""
    mixed = stage(small(MIXED, "training.steps=15"))
    model, counter = compiled(mixed)
    eager = built(mixed)
    counted = []
    # A value that monkeypatch puts back is gone from torch's settings.
    with torch._dynamo.config.patch(recompile_limit=8 + mixed.compilations):
        for step in range(1, 16):
            context = mixed.context(step, step, 0, CPU)
            torch.testing.assert_close(run(model, context), run(eager, context), rtol=1e-4, atol=1e-5)
            counted.append(counter.frame_count)
    # The window of the second phase varies from its second step on.
    again = [step + 1 for step in range(1, 15) if counted[step] > counted[step - 1]]
    assert set(again) <= {phase.begin for phase in mixed.phases} | {mixed.phases[1].begin + 1}


def test_a_dense_phase_is_dense_attention():
    mixed = stage(
        small(
            "{scorer='norm'}, {enabled=false}, {scorer='norm', dense_layers=[0, 1]}, {scorer='norm'}",
            "training.steps=4",
        )
    )
    model = built(mixed)
    losses = [run(model, mixed.context(step, 1, 0, CPU))[0] for step in (1, 2, 3, 4)]
    dense = Decoder(DecoderArgs.of(mixed.recipe.model, 160))
    dense.load_state_dict(model.state_dict())
    use_dense(dense, "auto")
    plain = run(dense, type(mixed.context(1, 1, 0, CPU))())[0]
    assert torch.equal(losses[1], plain) and torch.equal(losses[2], plain)
    assert torch.equal(losses[0], losses[3]) and not torch.equal(losses[0], plain)


def test_the_recovery_has_the_sections_dense_kernel():
    made = small("{scorer='norm', dense_backend='math'}", 'lighthouse.dense_backend="flash"')
    recovery = Stage(SimpleNamespace(checkpoint_steps=list), made, "dense", 100, 120, recovery=True)
    assert (
        recovery.phases == ()
        and recovery.compilations == 0
        and recovery.context(101, 101, 0, CPU) == AttentionContext()
    )
    model = _build_model(recovery, DecoderArgs.of(made.model, 160))
    assert [layer.inner_attention.backend for layer in attention_layers(model)] == ["flash"] * 2
    # In a phase a dense layer has that phase's kernel.
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    layer, context = DenseAttention("cudnn"), stage(made).context(1, 1, 0, CPU)
    assert torch.equal(layer(q, k, v, context), dense_attention(q, k, v, backend="math"))
    with pytest.raises(ValueError, match="cudnn"):
        layer(q, k, v, AttentionContext())
    with pytest.raises(RecipeError, match=r'lighthouse.dense_backend "cudnn" is not for data.packing "documents"'):
        recipe(
            "{window=64, dense_backend='math'}", CHUNKED, 'data.packing="documents"', 'lighthouse.dense_backend="cudnn"'
        )


def test_a_checkpoint_decides_the_phases():
    with pytest.raises(UserError, match=r"the checkpoint decides lighthouse\.phases"):
        check_resumable(["lighthouse.phases=[{window=64}]"])


def test_a_phase_has_a_base_of_its_own_for_rope():
    """The table is that of a model with this base, and the model's own again once the phase is over."""
    turned = stage(small("{window=16, rope_theta=100}, {window=16}", "training.steps=4"))
    assert "rope_theta 100" in turned.phases[0].described() and "rope" not in turned.phases[1].described()
    trainer = SimpleNamespace(stage=turned, theta=None, model_parts=[built(turned)])
    (model,) = trainer.model_parts
    own = model.freqs_cis.clone()
    for step, theta in ((1, 100.0), (2, 100.0), (3, None), (4, None), (2, 100.0)):
        trainer.step = step
        Trainer._turn(trainer)
        other = Decoder(replace(model.args, rope_theta=theta or model.args.rope_theta)).freqs_cis
        assert torch.equal(model.freqs_cis, other) and torch.equal(other, own) == (theta is None)
