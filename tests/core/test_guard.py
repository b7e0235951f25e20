"""The guard against bad numbers: what it leaves out leaves no trace, and what it does not is made."""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lighthouse_core.errors import PatchError, TrainingError
from lighthouse_core.titan.guard import Guard


class Job:
    """A small model trained under a guard; `train` takes what to spoil: "", "gradient" or "loss"."""

    def __init__(self, policy="skip", limit=3, device="cpu", guarded=True):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = torch.nn.Linear(5, 5).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.guard = Guard(policy, limit, 4, [self.optimizer], self.device) if guarded else None
        self.step = 0

    def train(self, *spoiled, value=float("nan")):
        for spoil in spoiled:
            self.step += 1
            self.optimizer.zero_grad()
            loss = self.model(torch.linspace(0, 1, 5, device=self.device) * self.step).square().sum()
            loss.backward()
            if spoil == "gradient":
                self.model.weight.grad[2, 3] = value
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if self.guard is None:
                self.optimizer.step()
                continue
            self.guard.see(loss * value if spoil == "loss" else loss)
            self.guard.judge(self.step, norm)
            self.optimizer.step()
            self.guard.check(self.step, 1)
            self.guard.look()

    def state(self):
        states = self.optimizer.state.values()
        return [
            *self.model.parameters(),
            *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step")),
        ]

    def snapshot(self):
        return [x.detach().clone() for x in self.state()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_a_bad_step_keeps_every_bit_and_the_next_one_counts(spoil, value):
    job = Job()
    job.train("", "")
    before = job.snapshot()
    job.train(spoil, value=value)
    assert equal(job.snapshot(), before)
    job.train("")
    assert not any(torch.equal(a, b) for a, b in zip(job.snapshot(), before, strict=True))


def test_healthy_steps_are_those_of_a_run_without_a_guard():
    job, plain = Job(), Job(guarded=False)
    job.train("", "", "", "")
    plain.train("", "", "", "")
    assert equal(job.snapshot(), plain.snapshot())


def test_left_out_steps_are_logged_with_their_data(caplog):
    job = Job()
    job.train("", "gradient", "", "")
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "step 2 (sequences 4 to 7 of the training data)"
    ]


def test_it_ends_after_the_limit_in_a_row_and_no_sooner():
    job = Job(limit=3)
    job.train("", *("gradient", "loss", "") * 4)
    before = job.snapshot()
    with pytest.raises(TrainingError, match=r"step 16 \(sequences 60 to 63 .*\) is not finite, 3 in a row"):
        job.train("gradient", "gradient", "gradient", "", "")
    assert equal(job.snapshot(), before)


def test_halt_keeps_the_weights_of_before_until_the_host_notices():
    job = Job("halt")
    job.train("", "")
    before = job.snapshot()
    with pytest.raises(TrainingError, match="step 3 "):
        job.train("gradient", "", "")
    assert job.step == 4 and equal(job.snapshot(), before)


def test_a_checkpoint_waits_for_the_verdict():
    job = Job("halt")
    job.train("gradient")
    with pytest.raises(TrainingError, match="step 1 "):
        job.guard.look(lag=0)


def test_a_bad_loss_of_another_process_leaves_out_the_step_here(monkeypatch):
    job = Job()
    job.guard.group = object()
    elsewhere = [0.0, 1.0, 0.0]

    def all_reduce(bad, op, group):
        assert op == torch.distributed.ReduceOp.MAX and group is job.guard.group
        bad.copy_(torch.maximum(bad, torch.tensor(elsewhere.pop(0))))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    job.train("")
    before = job.snapshot()
    job.train("")
    assert equal(job.snapshot(), before)
    job.train("")
    assert not any(torch.equal(a, b) for a, b in zip(job.snapshot(), before, strict=True))


def norm_of(job):
    job.model(torch.ones(5)).sum().backward()
    return torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)


def test_no_update_is_made_without_a_verdict():
    job = Job()
    job.train("")
    before = job.snapshot()
    norm_of(job)
    with pytest.raises(PatchError, match="nobody has judged"):
        job.optimizer.step()
    assert equal(job.snapshot(), before)


def test_a_verdict_is_for_one_update():
    job = Job()
    job.guard.judge(1, norm_of(job))
    with pytest.raises(PatchError, match="step 2 was judged twice"):
        job.guard.judge(2, norm_of(job))


def test_torch_may_fill_an_optimizer_for_a_checkpoint():
    job = Job()
    before = [x.detach().clone() for x in job.model.parameters()]
    get_optimizer_state_dict(job.model, job.optimizer)
    assert job.optimizer.state and equal(before, list(job.model.parameters())) and not job.guard.pending
    job.train("", "gradient", "")


@pytest.mark.parametrize("last", [0, 2])
def test_a_step_that_was_not_judged_or_not_updated_is_noticed(last):
    job = Job()
    job.train(*[""] * last)
    with pytest.raises(
        PatchError, match=f"step {last + 1} from 1 losses; it did {'last at step 2' if last else 'never'}"
    ):
        job.guard.check(last + 1, 1)
    job.guard.judge(last + 1, norm_of(job))
    with pytest.raises(PatchError, match="from 1 losses"):
        job.guard.check(last + 1, 1)
    with pytest.raises(PatchError, match="made no update"):
        job.guard.check(last + 1, 0)


def test_an_optimizer_that_is_not_fused_is_refused():
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(PatchError, match="not fused"):
        Guard("skip", 3, 4, [optimizer], torch.device("cpu"))


def test_an_optimizer_whose_verdict_was_taken_away_is_noticed():
    job = Job()
    job.train("")
    job.optimizer.found_inf = None
    with pytest.raises(PatchError, match="took the verdict"):
        job.train("gradient")


@pytest.mark.parametrize("spoil", ["gradient", "loss"])
@pytest.mark.parametrize("breaks", ["all", "weights", "counts"])
def test_an_optimizer_that_ignores_the_verdict_ends_the_run(monkeypatch, spoil, breaks):
    """Ignored as a whole, by the kernel alone, or by the count of updates alone."""
    job, kernel = Job(), torch._fused_adamw_

    def broken(*tensors, found_inf=None, **settings):
        kernel(*tensors, found_inf=found_inf if breaks == "counts" else None, **settings)
        if found_inf is not None and breaks != "weights":
            # torch takes it from the counts after this.
            for count in tensors[5]:
                count.add_(found_inf)

    job.train("", "")
    monkeypatch.setattr(torch, "_fused_adamw_", broken)
    job.train("")
    with pytest.raises(PatchError, match="did not obey the verdict on bad numbers in step 4"):
        job.train(spoil, "")
    assert job.step == 5


def test_an_optimizer_that_leaves_out_a_good_update_ends_the_run(monkeypatch):
    job = Job()
    job.train("")
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *tensors, **settings: None)
    monkeypatch.setattr(torch, "_foreach_add_", lambda *tensors, **settings: None)
    with pytest.raises(PatchError, match="did not obey"):
        job.train("", "")


def test_a_loss_of_another_scale_ends_the_run():
    job = Job()
    job.guard.see(torch.ones(()), torch.tensor(False))
    job.guard.judge(1, norm_of(job))
    job.optimizer.step()
    job.guard.look(lag=0)
    job.guard.see(torch.ones(()), torch.tensor(True))
    job.guard.judge(2, norm_of(job))
    job.optimizer.step()
    with pytest.raises(PatchError, match="step 2 is not one over the labels"):
        job.guard.look(lag=0)


@pytest.mark.gpu
def test_the_decision_does_not_wait_for_the_accelerator():
    job = Job(device="cuda")
    job.train("", "", "gradient", "")
    try:
        torch.cuda.set_sync_debug_mode("error")
        job.guard.see(torch.zeros((), device="cuda"))
        job.guard.judge(5, torch.full((), float("inf"), device="cuda"))
        job.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_bad_step_keeps_every_bit_on_an_accelerator():
    job = Job(device="cuda")
    job.train("", "")
    before = job.snapshot()
    job.train("gradient", "loss")
    assert equal(job.snapshot(), before)
    job.train("")
    assert not any(torch.equal(a, b) for a, b in zip(job.snapshot(), before, strict=True))
