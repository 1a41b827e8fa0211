"""Converts models: a run folder to a folder that transformers loads, or the other way.

python -m lmjax.interop runs/quickstart models/quickstart
python -m lmjax.interop models/Mistral-7B-v0.1 runs/mistral mesh.tensor=8
python -m lmjax.interop models/opt-13b models/opt-13b-half to=huggingface dtype=bfloat16
python -m lmjax.interop runs/instructions adapters/instructions to=peft
python -m lmjax.interop runs/quickstart quickstart.gguf weights=q8_0
python -m lmjax.interop runs/quickstart quickstart.onnx weights=int8
python -m lmjax.interop runs/quickstart quickstart.stablehlo
"""

from typing import Literal, get_args

import jax

from lmjax.config import UserError, config
from lmjax.interop.convert import convert, convert_adapters
from lmjax.interop.export import convert_to_gguf, convert_to_onnx, convert_to_stablehlo
from lmjax.interop.gguf_file import GGUFType
from lmjax.interop.onnx_products import OnnxWeights
from lmjax.launch import import_modules, run
from lmjax.parallel import Mesh
from lmjax.remote import check_path

# Forms of other programs: who writes them, and how weights can be kept there.
FORMS = {
    "gguf": (convert_to_gguf, get_args(GGUFType)),
    "onnx": (convert_to_onnx, get_args(OnnxWeights)),
    "stablehlo": (convert_to_stablehlo, ()),
}


@config
class Convert:
    """A model in another form."""

    # a run folder, or a model folder: config.json and tensor files, or PEFT's of adapters
    source: str | None = None
    destination: str | None = None  # is made: it must not exist, or be empty
    # a folder that transformers loads, one of adapters alone that PEFT loads, or a run folder;
    # none: a run becomes one for transformers, all else a run
    # (gguf, onnx and stablehlo, which the end of the destination says too: a file for llama.cpp,
    # one for ONNX runtimes, a folder that jax alone runs)
    to: Literal["huggingface", "peft", "run", "gguf", "onnx", "stablehlo"] | None = None
    step: int | None = None  # which checkpoint of a run; none: the best one, or else the newest
    # of the tensors for transformers; none: as in the source folder, float32 from a run
    dtype: Literal["float32", "bfloat16"] | None = None
    # of a GGUF file (none: f16; q8_0, q5_1 and q4_0 have 8, 5 and 4 bits), or of an ONNX file
    # (float32, also if none, or int8)
    weights: GGUFType | OnnxWeights | None = None
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

    @property
    def form(self) -> str | None:
        """The form that `to` or the end of the destination says; None: see `to`."""
        ending = (self.destination or "").rstrip("/").rpartition(".")[2]
        return ending if self.to is None and ending in FORMS else self.to

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
            if self.form in FORMS:
                self._to_file()
                return
            if self.weights is not None:
                raise UserError(f"weights={self.weights}: is of files in gguf and onnx")
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

    def _to_file(self) -> None:
        """Converts to one of `FORMS`."""
        write, allowed = FORMS[self.form]
        if self.dtype is not None:
            raise UserError(f"dtype={self.dtype}: is of other forms than {self.form}")
        if self.weights not in (None, *allowed):
            raise UserError(
                f"weights={self.weights}: must be {' or '.join((*allowed, 'none'))} in {self.form}"
            )
        kind = {} if self.weights is None else {"weights": self.weights}
        write(self.source, self.destination, step=self.step, **kind)


if __name__ == "__main__":
    run(Convert(), positional=("source", "destination"))
