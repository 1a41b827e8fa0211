"""The table of layers adds up to what the counts say, for every kind of model."""

import importlib

import jax
import pytest

from lmjax.interop.__main__ import Convert
from lmjax.jobs.pretrain import Pretrain
from lmjax.launch import run
from lmjax.models import bert, gpt2, llama, mixtral, palm, t5, xlnet
from lmjax.scaling.explain import layer_table
from lmjax.scaling.flops import count_parameters, forward_flops_per_token


@pytest.mark.parametrize(
    "config, lengths",
    [
        (gpt2("124M"), (1024,)),
        (llama("7B"), (2048,)),
        (mixtral("8x7B"), (2048,)),
        (palm("8B"), (512,)),
        (bert("base"), (512,)),
        (xlnet("base"), (512,)),
        (t5("small"), (114, 512)),
    ],
)
def test_it_adds_up(config, lengths):
    lines = layer_table(config, *lengths)
    assert sum(line.parameters for line in lines) == count_parameters(config).total
    flops = sum(line.flops for line in lines)
    assert flops == pytest.approx(forward_flops_per_token(config, *lengths), rel=1e-12)
    assert min(line.flops for line in lines) >= 0
    assert len({line.name for line in lines}) == len(lines)


def test_a_layer_of_gpt2():
    """By hand: 768 inputs to 4 x 768, in 12 layers, two FLOPs for each weight."""
    [line] = [line for line in layer_table(gpt2("124M"), 1024) if line.name.endswith("up.weight")]
    assert (line.shape, line.layers) == ((768, 3072), 12)
    assert (line.parameters, line.flops) == (12 * 768 * 3072, 2 * 12 * 768 * 3072)


@pytest.mark.parametrize("name", ["gpt3_175b", "t5_base"])
def test_an_experiment_is_explained_and_not_run(name, monkeypatch, capsys):
    """No array is made, whatever the size."""
    monkeypatch.setattr(Pretrain, "run", lambda self: pytest.fail("it is run"))
    experiment = importlib.import_module(f"experiments.{name}").experiment
    before = len(jax.live_arrays())
    run(experiment, ["explain=true", "steps=5"])
    total = count_parameters(experiment.model).total
    assert f"{total:,} parameters" in capsys.readouterr().out
    assert len(jax.live_arrays()) == before


def test_what_makes_no_model_is_not_explained(capsys):
    with pytest.raises(SystemExit):
        run(Convert(), ["explain=true"])
    assert "this command makes no model" in capsys.readouterr().err
