"""Converts models: a run folder to a folder that transformers loads, or the other way.

python -m lmjax.interop runs/quickstart models/quickstart
python -m lmjax.interop models/Mistral-7B-v0.1 runs/mistral mesh.tensor=8
python -m lmjax.interop models/opt-13b models/opt-13b-half to=huggingface dtype=bfloat16
python -m lmjax.interop runs/instructions adapters/instructions to=peft
python -m lmjax.interop runs/quickstart quickstart.gguf weights=q8_0
"""

from typing import Literal

import jax

from lmjax.config import UserError, config
from lmjax.interop.convert import convert, convert_adapters, convert_to_gguf
from lmjax.interop.gguf_file import GGUFType
from lmjax.launch import import_modules, run
from lmjax.parallel import Mesh
from lmjax.remote import check_path


@config
class Convert:
    """A model in another form."""

    # a run folder, or a model folder: config.json and tensor files, or PEFT's of adapters
    source: str | None = None
    destination: str | None = None  # is made: it must not exist, or be empty
    # a folder that transformers loads, one of adapters alone that PEFT loads, or a run folder;
    # none: a run becomes one for transformers, all else a run
    # (gguf, which a destination that ends with .gguf says too: a file that llama.cpp runs)
    to: Literal["huggingface", "peft", "run", "gguf"] | None = None
    step: int | None = None  # which checkpoint of a run; none: the best one, or else the newest
    # of the tensors for transformers; none: as in the source folder, float32 from a run
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: GGUFType = "f16"  # of a GGUF file; q8_0, q5_1 and q4_0 have 8, 5 and 4 bits
    # GB (10^9 bytes) in the largest file for transformers; a larger tensor has a file alone
    file_size: float = 5.0
    mesh: Mesh = Mesh()  # how the devices are arranged, over which the parameters are cut
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for a URL that cannot be served, or a size that no file can have."""
        check_path(self.source or "", "source")
        check_path(self.destination or "", "destination", write=True)
        if self.file_size <= 0:
            raise UserError(f"file_size={self.file_size:g}: must be more than 0 GB")

    def run(self) -> None:
        """Converts.

        Raises:
            UserError: no folders are named, or one cannot be read or written.
        """
        if self.source is None or self.destination is None:
            raise UserError(
                "Which folders? For instance: "
                "python -m lmjax.interop runs/quickstart models/quickstart"
            )
        import_modules(self.imports)
        with jax.set_mesh(self.mesh.build()):
            to_gguf = self.to is None and self.destination.endswith(".gguf")
            if self.to == "gguf" or to_gguf:
                if self.dtype is not None:
                    raise UserError(f"dtype={self.dtype}: of a GGUF file set weights")
                convert_to_gguf(self.source, self.destination, self.weights, step=self.step)
                return
            if self.to == "peft":
                if self.dtype not in (None, "float32"):
                    raise UserError(f"dtype={self.dtype}: adapters are float32")
                convert_adapters(self.source, self.destination, step=self.step)
                return
            convert(
                self.source,
                self.destination,
                to_run=None if self.to is None else self.to == "run",
                step=self.step,
                dtype=self.dtype,
                largest_file=round(self.file_size * 1e9),
            )


if __name__ == "__main__":
    run(Convert(), positional=("source", "destination"))
