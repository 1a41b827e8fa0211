"""Conversions between folders: runs of ours, and models as transformers has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lmjax.config import UserError, config, to_json
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop import huggingface
from lmjax.interop.huggingface import Dtype
from lmjax.interop.progress import ByteBar
from lmjax.interop.tensor_files import LARGEST_FILE, write_json
from lmjax.interop.tokenizer_files import end_ids, public_files
from lmjax.models import TransformerConfig
from lmjax.parallel import training_layout
from lmjax.training.checkpoints import Checkpointer
from lmjax.training.trained import Trained, read_trained

# Endings of files that hold weights, in whatever format, and of what belongs to them.
WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"),
    *(".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt"),
)


@config
class ConvertedModel:
    """A model that was not trained here: what the config.json of its run folder says."""

    model: TransformerConfig
    source: str  # the folder that it was converted from


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to_run: bool | None = None,
    step: int | None = None,
    dtype: Dtype | None = None,
    largest_file: int = LARGEST_FILE,
    console: Console | None = None,
) -> None:
    """Converts a run folder to a model folder that transformers loads, or the other way.

    A mesh must be set; the model is cut over it, but from one model folder to another it goes
    tensor by tensor from file to file. The destination appears when it is complete.

    Args:
      source: a run folder, or a model folder: config.json and safetensors or PyTorch's .bin files.
      destination: must not exist, or be empty.
      to_run: whether it becomes a run folder; None: if the source is none.
      step: which checkpoint of a run; None: the newest undamaged one.
      dtype: of the tensors in a model folder; None: as in a source folder, float32 from a run.
      largest_file: bytes of a tensor file in a model folder.
      console: is told what happens.

    Raises:
      UserError: see `huggingface.read`, `huggingface.write` and `read_trained`; or the destination
        holds something, or settings do not go together.
    """
    source, destination = Path(source), Path(destination)
    console = Console(highlight=False) if console is None else console
    public = huggingface.is_model_folder(source)
    to_run = public if to_run is None else to_run
    if to_run and dtype not in (None, "float32"):
        raise UserError(f"dtype={dtype}: the parameters in a run folder are float32")
    if public and step is not None:
        raise UserError(f"step={step}: {source} is a model folder and has no checkpoints")
    with new_folder(destination) as folder:
        if public and not to_run:
            with ByteBar("copying", console) as report:
                huggingface.rewrite(source, folder, dtype, largest_file, report)
            notes = carry(source, folder)
        else:
            trained, notes = read(source, step, console)
            if to_run:
                write_run(folder, trained, source, console)
            else:
                notes += write_model(folder, trained, dtype or "float32", largest_file, console)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"written: {destination}", soft_wrap=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name `path` when the block ends well.

    Until then it is hidden beside it, and whatever goes wrong it is removed again; one that a kill
    has left there too.

    Raises:
      UserError: `path` is there and is not an empty folder, or cannot be made; the system does not
        let the block read or write.
    """
    path = Path(os.path.realpath(path))  # where a link leads to, a folder can get its name
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already and is not an empty folder: choose another one")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write in {path.parent}: {error.strerror}") from None
    try:
        yield partial
        partial.replace(path)
    except BrokenPipeError:  # of a reader of our output: no matter of files
        raise
    except OSError as error:  # a full disk, a file of the source that may not be read
        raise UserError(f"{path} was not written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(source: Path, step: int | None, console: Console) -> tuple[Trained, list[str]]:
    """The model of a folder of either kind, and what the user should know."""
    if not huggingface.is_model_folder(source):
        console.print("reading the checkpoint")
        return read_trained(source, training_layout(), step), []
    with ByteBar("reading", console) as report:
        config, _, params = huggingface.read(source, training_layout(), report)
    tokenizer, notes = find_tokenizer(source)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        notes.append(
            f"the tokenizer was left out: it has {tokenizer.vocab_size} tokens, more than the"
            f" {config.vocab_size} of the model"
        )
        tokenizer = None
    return Trained(config, params, tokenizer), notes


def find_tokenizer(folder: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a model folder, or the reason why there is none."""
    try:
        return read_tokenizer(folder), []
    except UserError as error:
        return None, [f"no tokenizer was carried over, and text needs one: {error}"]


def write_run(folder: Path, trained: Trained, source: Path, console: Console) -> None:
    """Writes a run folder with a checkpoint of step 0 that holds the parameters alone."""
    console.print("writing the checkpoint")
    extra = {}
    if trained.tokenizer is not None:
        trained.tokenizer.save(folder / "tokenizer")
        extra["tokenizer"] = trained.tokenizer.fingerprint
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(0, {"params": trained.params}, extra)
    made = ConvertedModel(model=trained.config, source=str(source))
    (folder / "config.json").write_text(to_json(made), "utf-8")


def write_model(
    folder: Path, trained: Trained, dtype: Dtype, largest_file: int, console: Console
) -> list[str]:
    """Writes a model folder for transformers; what the user should know of its tokenizer."""
    files, notes, ends = {}, ["the run has no tokenizer"], {}
    if trained.tokenizer is not None:
        files, notes = public_files(trained.tokenizer, trained.config.max_length)
        ends = end_ids(trained.tokenizer)
        # Without it transformers would stop at the token that models of the family usually end at.
        write_json(folder / "generation_config.json", ends)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with ByteBar("writing", console) as report:
        huggingface.write(
            folder, trained.config, trained.params, dtype, largest_file, report, extra=ends
        )
    return notes


def carry(source: Path, folder: Path) -> list[str]:
    """Copies what lies beside the weights: tokenizer, licence, generation settings and the like."""
    left = []
    for path in sorted(source.iterdir()):
        if path.name.endswith(WEIGHTS) or path.name == "config.json":
            continue
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif not path.name.startswith("."):
            left.append(path.name)
    return [f"not copied, because they are folders: {', '.join(left)}"] if left else []
