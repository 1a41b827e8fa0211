"""The command that makes weights of a model zero, or the model itself smaller."""

from __future__ import annotations

import jax
from rich.console import Console

from lmjax.compression.calibration_text import calibration_rows
from lmjax.compression.pruner import Pruner, PruningMethod
from lmjax.compression.shrinking import Shrinker
from lmjax.compression.sparsity import Sparsity
from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.interop.convert import new_folder_anywhere, read, tell_written, write_run
from lmjax.launch import import_modules
from lmjax.models import merge_adapters, with_quantization
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import TrainedModel
from lmjax.scaling.flops import count_parameters
from lmjax.training.zeros import share_of_zeros


@config
class Prune:
    """A model with zeros among its weights, or with fewer parts, in a run folder of its own.

    Weights are float32 in either case: zeros make no folder smaller and no product faster here.
    With fewer layers, heads or columns it is an ordinary smaller model. Training with
    begin_with=FOLDER goes on from both; with keep_zeros=true zeros stay zero.
    """

    source: str | None = None  # a run folder, or a model folder
    destination: str | None = None  # is made: it must not exist, or be empty
    # magnitude; wanda (arXiv:2306.11695); sparsegpt (arXiv:2301.00774); none: no zeros are made
    method: PruningMethod | None = None
    sparsity: float | None = None  # share of weights that become zero; none: 0.5, or the pattern's
    pattern: str | None = None  # as 2:4, where two of each four inputs of an output stay; none: any
    matrices: tuple[str, ...] = ("*",)  # layers that get zeros, by last names or dotted paths
    layers: int | None = None  # how many layers stay; none: all
    heads: int | None = None  # how many heads of queries stay in each layer; none: all
    width: int | None = None  # how many columns of each feed-forward layer stay; none: all
    calibration: str | None = None  # a text file, by whose inputs all but magnitude choose
    rows: int = 64  # of the text, that are read
    length: int = 256  # tokens of a row
    damping: float = 0.01  # of sparsegpt: share of the mean that is added to the diagonal
    step: int | None = None  # which checkpoint of a run; none: the best one, or else the newest
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.source or "", "source")
        check_path(self.destination or "", "destination", write=True)
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.damping <= 0:
            raise UserError(f"damping={self.damping}: must be above 0")
        Sparsity.of(self.sparsity, self.pattern)
        if self.method is None and (self.sparsity is not None or self.pattern is not None):
            raise UserError(
                "sparsity and pattern are of zeros: give method=magnitude, wanda or sparsegpt too"
            )

    @property
    def shrinks(self) -> bool:
        """Returns whether parts of the model are left out."""
        return any(number is not None for number in (self.layers, self.heads, self.width))

    def run(self) -> None:
        """Reads the model, prunes it and writes it.

        Raises:
          UserError: no folders are named, or one cannot be read or written; nothing is to be
            pruned, or the model cannot be pruned so.
        """
        if self.source is None or self.destination is None:
            raise UserError(
                "Which folders? For instance: python -m lmjax.compression prune runs/quickstart"
                " runs/quickstart-sparse method=magnitude"
            )
        if self.method is None and not self.shrinks:
            raise UserError(
                "What is pruned? Give method=magnitude, wanda or sparsegpt for zeros, or how many"
                " layers=, heads= or columns (width=) stay"
            )
        import_modules(self.imports)
        console = make_console()
        with jax.set_mesh(self.mesh.build()):
            source = local_copy(self.source, "source")
            with new_folder_anywhere(self.destination, True) as folder:
                trained, notes = read(source, self.step, console)
                small = self.pruned(trained, console)
                write_run(RunFolder(folder), small, source, console)
            tell_written(console, self.destination, notes)

    def pruned(self, trained: TrainedModel, console: Console) -> TrainedModel:
        """The pruned model."""

        def tell(text: str) -> None:
            console.print(text, soft_wrap=True)

        how = self.calibration, trained.tokenizer, self.source, self.rows, self.length
        rows = calibration_rows(*how)
        params, model = merge_adapters(trained.params, trained.config)
        params, model = with_quantization(params, model, None)
        before = count_parameters(model).total
        if self.shrinks:
            shrink = Shrinker(self.layers, self.heads, self.width, rows, tell)
            params, model = shrink(model, params)
            tell(f"{count_parameters(model).total:,} of {before:,} parameters stay")
        if self.method is not None:
            sparsity = Sparsity.of(self.sparsity, self.pattern)
            prune = Pruner(self.method, sparsity, rows, self.matrices, self.damping, tell)
            params = prune(model, params)
            tell(f"{share_of_zeros(params):.1%} of the weights of dense layers are zero")
        return TrainedModel(model, params, trained.tokenizer, trained.objective)
