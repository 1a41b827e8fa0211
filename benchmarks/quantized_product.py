"""Product of one row with a weight in few bits: in the loop, in pieces, and of integers.

python -m benchmarks.quantized_product [inputs=768] [outputs=3072] [json=FILE]

It is what decoding on a CPU does for every layer and token. The ways take turns, over as many
weights as no cache holds; times are of one weight.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import save, seconds_of, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import Int4, Int8
from lmjax.models.few_rows import few_row_product, piecewise_product
from lmjax.models.integer_products import DynamicInt8, integer_product
from lmjax.models.linear import in_parts
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import WeightCode
from lmjax.parallel import Layout, Mesh


@config
class QuantizedProductBenchmark:
    """One row times many weights."""

    inputs: int = 768  # of a weight
    outputs: int = 3072  # of a weight
    group: int = 64  # inputs that share a scale
    megabytes: int = 100  # of all weights in float32
    rounds: int = 15  # turns of each way
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        for name in ("inputs", "outputs", "group", "megabytes", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")


def ways(settings: QuantizedProductBenchmark) -> dict[str, Callable]:
    """Functions without arguments, each of which multiplies the row with every weight."""
    random, shape = np.random.default_rng(0), (settings.inputs, settings.outputs)
    count = max(1, settings.megabytes * 10**6 // (4 * settings.inputs * settings.outputs))
    x = jnp.asarray(random.normal(size=(1, settings.inputs)), jnp.float32)
    weights = [jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(count)]

    def over_all(product: Callable, stored: list) -> Callable:
        run = jax.jit(lambda x, stored: [product(x, one) for one in stored])
        return lambda: jax.block_until_ready(run(x, stored))

    def kept(code: WeightCode) -> tuple[WeightForm, list]:
        axes = (("embed", settings.inputs),), (("mlp", settings.outputs),)
        form = WeightForm(*axes, code, Layout(rules=()))
        return form, [jax.jit(form.encode)(weight) for weight in weights]

    def integers(x, stored, form):
        rows = x[None]
        scale = DynamicInt8().scale(None, rows)
        return integer_product(rows, scale, form, stored, jax.P(None, None, None))

    found = {"float32": over_all(in_parts, weights)}
    codes = {
        "int8": Int8(block=settings.group, scales="float16"),
        "int8, a scale an output": Int8(block=None),
        "int4": Int4(block=settings.group, scales="float16"),
    }
    for name, code in codes.items():
        form, stored = kept(code)
        for way, product in (("in the loop", few_row_product), ("in pieces", piecewise_product)):
            found[f"{name}, {way}"] = over_all(
                lambda x, one, form=form, product=product: product(x, form, one), stored
            )
        if code.block is None:
            found["int8 times int8"] = over_all(
                lambda x, one, form=form: integers(x, one, form), stored
            )
    return {name: (run, count) for name, run in found.items()}


def main() -> None:
    """Runs the benchmark that the command line describes."""
    settings = from_command_line(QuantizedProductBenchmark())
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        found = ways(settings)
        taken: dict[str, list[float]] = {name: [] for name in found}
        for run, _ in found.values():
            run()
        for _ in range(settings.rounds):
            for name, (run, count) in found.items():
                taken[name].append(seconds_of(run, 1)[0] / count)
    rows = [(name, *(1e3 * value for value in spread(taken[name]).values())) for name in found]
    print(table(("way", "min ms", "median ms", "max ms"), rows))
    results = {name: spread(taken[name]) for name in found}
    save(settings.json, "quantized_product", inputs=settings.inputs, results=results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
