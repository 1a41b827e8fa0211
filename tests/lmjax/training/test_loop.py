"""The loop with a step that only counts: what happens when, and that nothing happens twice."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.training.loop import Diverged, Loop, PerformanceTarget
from lmjax.training.state import TrainState


def state_after(steps):
    """A state that holds nothing but the number of steps done."""
    return TrainState(None, None, None, jnp.int32(steps), jax.random.key(0))


class Run:
    """Records what the loop does."""

    def __init__(self, steps, bad=None, on_step=None, **settings):
        self.events, self.records = [], []
        self.bad, self.on_step = bad or {}, on_step
        self.loop = Loop(
            **{
                "advance": self.advance,
                "steps": steps,
                "write": self.write,
                "evaluate": self.evaluate,
                "is_evaluation": lambda step: step % 4 == 0 or step == steps,
                "save": self.save,
                "save_every": 3,
                "target": PerformanceTarget(10.0, 1e9, lambda: 123),
                **settings,
            }
        )

    def advance(self, state, step):
        assert step == int(state.step) + 1
        if self.on_step:
            self.on_step(step)
        metrics = {"loss": 1.0 / step, "gradient_norm": 1.0, "tokens": 64.0}
        metrics |= self.bad.get(step, {})
        self.events.append(f"step {step}")
        metrics = {name: jnp.float32(value) for name, value in metrics.items()}
        return state_after(step), metrics, 96  # tokens, of which 64 have a weight

    def write(self, record):
        self.records.append(record)
        self.events.append(f"write {record['split']} {record['step']}")

    def evaluate(self, step, state):
        assert step == state.step
        return [{"step": step, "split": "held_out", "loss": 0.5, "bits_per_byte": 1.0}]

    def save(self, step, state):
        assert step == state.step
        self.events.append(f"save {step}")

    def train_steps(self):
        return [record["step"] for record in self.records if record["split"] == "train"]


def test_the_order_of_events():
    run = Run(5)
    state, done, interruption = run.loop.run(state_after(0), 0)
    assert (state.step, done, interruption.signal) == (5, 5, None)
    assert run.events == [
        *["step 1"],
        *["step 2", "write train 1"],
        *["step 3", "write train 2", "write train 3", "save 3"],
        *["step 4", "write train 4", "write held_out 4"],
        *["step 5", "write train 5", "write held_out 5", "save 5"],
    ]


def test_saves_are_looked_after():
    """A failure is noticed after the step, not at the next save; the last save is waited for."""
    checks = {
        "check_save": lambda: run.events.append("check"),
        "end_save": lambda: run.events.append("end"),
    }
    run = Run(5, **checks)
    run.loop.run(state_after(0), 0)
    kinds = [event for event in run.events if event.split()[0] in ("step", "check", "save", "end")]
    assert kinds == [
        *("step 1", "check", "step 2", "check", "step 3", "check", "save 3"),
        *("step 4", "check", "step 5", "check", "save 5", "end"),
    ]

    def failing():
        if "save 3" in failed.events:
            raise OSError("the disk has gone")

    failed = Run(10, check_save=failing)
    with pytest.raises(OSError, match="the disk has gone"):
        failed.loop.run(state_after(0), 0)
    assert failed.train_steps() == [1, 2, 3]


@pytest.mark.parametrize("log_every", [1, 2, 5, 100])
def test_every_step_has_one_line_before_its_checkpoint(log_every):
    run = Run(11, log_every=log_every)
    run.loop.run(state_after(0), 0)
    assert run.train_steps() == list(range(1, 12))
    for saved in (3, 6, 9, 11):
        written = run.events[: run.events.index(f"save {saved}")]
        assert [e for e in written if e.startswith("write train")][-1] == f"write train {saved}"


def test_a_run_goes_on_where_it_stopped():
    run = Run(7)
    run.loop.run(state_after(4), 4)
    assert run.train_steps() == [5, 6, 7]


def test_losses_are_written_to_the_last_bit():
    run = Run(11)
    run.loop.run(state_after(0), 0)
    for record in run.records:
        if record["split"] == "train":
            assert jnp.float32(record["loss"]) == jnp.float32(1.0 / record["step"])


def test_a_step_without_targets_has_no_loss_and_is_told_of_once(capsys):
    run = Run(6, bad={step: {"loss": 0.0, "tokens": 0.0} for step in (2, 5)})
    run.loop.run(state_after(0), 0)
    train = [record for record in run.records if record["split"] == "train"]
    assert [record["step"] for record in train if "loss" not in record] == [2, 5]
    assert all("nan" not in str(record).lower() for record in train)
    assert capsys.readouterr().out.count("nothing to learn from") == 1


def test_utilisation_is_the_rate_times_flops_over_the_peak():
    run = Run(6)
    run.loop.run(state_after(0), 0)
    assert "mfu" not in run.records[0]  # the first step compiles
    timed = [record for record in run.records if "tokens_per_second" in record]
    assert len(timed) >= 4
    assert all(record["peak_memory"] == 123 for record in run.records[:3])
    for record in timed:
        # 10 FLOPs a token that is read at 1e9 a second; written with four decimals.
        assert record["mfu"] == pytest.approx(
            96 / 64 * record["tokens_per_second"] * 1e-8, abs=1e-4
        )


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(name, value):
    run = Run(9, bad={6: {name: value}})
    with pytest.raises(Diverged, match=rf"step 6: the {name.replace('_', ' ')} is"):
        run.loop.run(state_after(0), 0)
    assert [event for event in run.events if "save" in event] == ["save 3"]
    assert run.train_steps()[-1] == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_parameters_that_are_not_finite_are_neither_evaluated_nor_saved(value, place):
    """The update of a step may overflow though its loss and gradient were numbers."""

    def overflowing(state, step):
        state, metrics, tokens = run.advance(state, step)
        params = {"table": np.zeros(10_000, np.float32), "bias": np.zeros(3, np.float32)}
        if state.step == 6:
            params["table"][place] = value
        return dataclasses.replace(state, params=params), metrics, tokens

    run = Run(9, advance=overflowing)
    with pytest.raises(Diverged, match=r"step 6: the parameters are not finite.*is from before"):
        run.loop.run(state_after(0), 0)
    assert [event for event in run.events if "save" in event] == ["save 3"]
    assert run.train_steps() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_on_held_out_text_that_is_not_finite_ends_the_run_and_is_not_saved(value):
    """Parameters may be numbers that overflow on the next text that is read."""

    def evaluate(step, state):
        return [{"step": step, "split": "held_out/a", "loss": value if step == 8 else 1.0}]

    run = Run(9, evaluate=evaluate, save_every=4)
    with pytest.raises(Diverged, match=rf"step 8: the loss on held_out/a is {value}, so"):
        run.loop.run(state_after(0), 0)
    assert [event for event in run.events if "save" in event] == ["save 4"]
    assert run.records[-1]["step"] == 8 and run.records[-1]["split"] == "held_out/a"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_saves(number, capfd):
    before = signal.getsignal(number)
    run = Run(100, on_step=lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    _, done, interruption = run.loop.run(state_after(0), 0)
    assert done == 5
    assert run.events[-1] == "save 5"
    assert run.train_steps() == [1, 2, 3, 4, 5]
    assert interruption.exit_code == 128 + number
    assert "saving" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
    code = """
    import os, signal
    from lmjax.training.interruption import Interruption
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert "Stopped at once" in ended.stderr
