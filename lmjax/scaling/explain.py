"""Layer table of a model: parameters, FLOPs and bytes."""

import dataclasses

from rich.console import Console
from rich.table import Table

from lmjax.models import TransformerConfig
from lmjax.scaling.flops import forward_flops_per_token, parameters

BYTES = 4  # of a parameter: float32
WIDTH = 100  # columns, also of a file or a smaller terminal: nothing is left out


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
      name: of the parameter, or of what costs FLOPs without one.
      shape: of the parameter in one layer.
      layers: how many layers have it; None: it is in none.
      parameters: numbers in all layers.
      flops: of one token in a forward pass, in all layers.
    """

    name: str
    shape: tuple[int, ...]
    layers: int | None
    parameters: int
    flops: float


def layer_table(
    config: TransformerConfig, length: int, source_length: int | None = None
) -> list[Line]:
    """The parameters of a model in the order of their names, then the head and attention.

    The FLOPs add up to `forward_flops_per_token`, which says what is counted.

    Args:
      config: the model.
      length: of a sequence, in tokens.
      source_length: tokens that an encoder reads for each sequence; None: as many.
    """
    lines = []
    source = length if source_length is None else source_length
    for parameter in parameters(config):
        layers, shape = None, parameter.shape
        if "blocks" in parameter.path:
            layers, shape = shape[0], shape[1:]
        used = parameter.role == "product"
        times = 2.0 * config.uses(parameter.path, length, source) if used else 0.0
        size = parameter.size
        lines.append(Line(".".join(parameter.path), shape, layers, size, times * size))
    if config.tied_head and config.word_head:
        shape = (config.vocab_size, config.embedding_size or config.hidden)
        lines.append(Line("head, the embedding", shape, None, 0, 2.0 * shape[0] * shape[1]))
    rest = forward_flops_per_token(config, length, source_length)
    rest -= sum(line.flops for line in lines)
    lines.append(Line(f"scores and values, {length:,} tokens", (), config.depth, 0, rest))
    return lines


def print_layers(lines: list[Line], console: Console) -> None:
    """Prints the table, with its sums."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("parameter", no_wrap=True)
    for name in ("shape", "layers", "numbers", "bytes", "FLOPs", ""):
        table.add_column(name, justify="right", no_wrap=True)
    size, flops = (sum(getattr(line, name) for line in lines) for name in ("parameters", "flops"))
    for line in (*lines, Line("all", (), None, size, flops)):
        if line.name == "all":
            table.add_section()
        table.add_row(
            line.name,
            "x".join(map(str, line.shape)),
            "" if line.layers is None else str(line.layers),
            _short(line.parameters),
            _short(line.parameters * BYTES),
            _short(line.flops),
            f"{line.flops / flops:.1%}" if line.flops else "",
        )
    console.width = max(console.width, WIDTH)
    console.print(table)
    console.print(
        f"\n{size:,} parameters; FLOPs are of one token, forward; bytes in float32", soft_wrap=True
    )


def _short(number: int | float) -> str:
    """Three digits and a unit: 9.22 k, 38.6 M; nothing for 0."""
    if not number:
        return ""
    power = min(4, max(0, (len(str(round(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()
