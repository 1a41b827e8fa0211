"""The tuner: what it is asked, how it searches, and the row that it writes."""

import json

import pytest

from pallas_kernels import block_sizes, tune


def test_the_command_line():
    call = tune.parsed(["kernel=attention_backward", "chip=v4", "documents=8", "write=true"])
    assert call == tune.TuningCall("attention_backward", "v4", documents=8, write=True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kernel=attention", "attention_forward, attention_backward"),
        ("chip=v3", "v4, v5e, v5p, v6e"),
        ("length=long", "whole number"),
        ("blocks=3", "NAME=VALUE"),
        ("write", "NAME=VALUE"),
    ],
)
def test_words_that_say_nothing(word, message):
    with pytest.raises(SystemExit, match=message):
        tune.parsed([word])


def test_the_search_finds_the_least_of_a_bowl():
    best = {"query": 512, "key": 2048, "chunk_keys": 128, "chunk_queries": 256, "ahead": 2}
    call = tune.TuningCall()

    def cost(call):
        sizes = block_sizes.block_sizes(call.kernel, "any", **call.numbers)
        if sizes["query"] == 256:
            raise ValueError("too small")
        return 1 + sum(abs(sizes[name] - value) for name, value in best.items())

    start = block_sizes.block_sizes(call.kernel, "TPU v4", **call.numbers)
    found = list(tune.tried(call, start, cost))
    costs = [cost for _, cost in found]
    assert costs == sorted(costs, reverse=True)
    assert found[-1] == (start | best, 1)


@pytest.mark.parametrize("documents", [0, 8])
def test_a_written_row_is_found(documents, monkeypatch):
    call = tune.TuningCall(documents=documents, head_dim=64)
    sizes = {"span": 1, "key": 2}
    table = json.loads(tune.written(block_sizes.table(), call, "TPU v4", sizes))
    again = json.loads(tune.written(table, call, "TPU v4", sizes))
    assert again == table
    monkeypatch.setattr(block_sizes, "table", lambda: table)

    def found(chip, head_dim, segments):
        numbers = {"head_dim": head_dim, "value_bytes": 2, "segments": segments}
        return block_sizes.block_sizes("attention_forward", chip, **numbers)

    assert found("TPU v4", 64, int(documents > 0)) == sizes
    assert found("TPU v4", 128, int(documents > 0)) != sizes
    assert found("TPU v4", 64, int(not documents)) != sizes
    assert found("TPU v5 lite", 64, int(documents > 0)) != sizes
