"""Conversions between folders: runs of ours, and models as transformers has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from lmjax.config import UserError, config
from lmjax.console import ByteBar, make_console
from lmjax.data.chat.folder import TEMPLATE_FOLDER, read_templates, write_templates
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop import gguf_source, huggingface
from lmjax.interop.adapter_folder import (
    base_folder,
    is_adapter_folder,
    read_adapted,
    text_folder,
    write_adapters,
)
from lmjax.interop.folder import load_trained_model, model_folder, same_adapters
from lmjax.interop.huggingface import Dtype
from lmjax.interop.kept_files import keep
from lmjax.interop.new_folder import new_folder_anywhere
from lmjax.interop.prefix_notes import left_to_right
from lmjax.interop.tensor_files import LARGEST_FILE
from lmjax.interop.tokenizer_files import end_ids, own_class_notes, public_files
from lmjax.launch import is_first
from lmjax.models import EncoderDecoderConfig, TransformerConfig
from lmjax.parallel import training_layout
from lmjax.remote import local_copy
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import TrainedModel, beyond_table, read_experiment
from lmjax.training.trainable import Adapters, parameter_paths

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
    family: str | None = None  # the model_type there; none: it was trained in a run


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
      source: a run folder, or a model folder: config.json and safetensors or PyTorch's .bin files;
        or a folder of PEFT's adapters, which are merged where a model folder is written; or a GGUF
        file.
      destination: must not exist, or be empty.
      to_run: whether it becomes a run folder; None: if the source is none.
      step: which checkpoint of a run; None: the newest undamaged one.
      dtype: of the tensors in a model folder; None: as in a source folder, float32 from a run.
      largest_file: bytes of a tensor file in a model folder.
      console: is told what happens.

    Raises:
      UserError: see `huggingface.read`, `huggingface.write` and `load_trained_model`; or the
        destination holds something, or settings do not go together.
    """
    console = make_console() if console is None else console
    with gguf_source.as_folder(local_copy(source, "source")) as folder:
        how = to_run, step, dtype, largest_file, console
        notes = _convert(folder, destination, *how, str(source))
    tell_written(console, destination, notes)


def tell_written(console: Console, destination: str | os.PathLike, notes: Iterable[str]) -> None:
    """Tells the user what was written, and what is to be known of it."""
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"written: {destination}", soft_wrap=True)


def _convert(
    source: Path,
    destination: str | os.PathLike,
    to_run: bool | None,
    step: int | None,
    dtype: Dtype | None,
    largest_file: int,
    console: Console,
    named: str,
) -> list[str]:
    """Converts a folder, which the user named so; gives notes for him. See `convert`."""
    adapters, packed = is_adapter_folder(source), gguf_source.weights_of(source) is not None
    public = adapters or huggingface.is_model_folder(source)
    to_run = public if to_run is None else to_run
    if to_run and dtype not in (None, "float32"):
        raise UserError(f"dtype={dtype}: the parameters in a run folder are float32")
    if public and step is not None:
        raise UserError(f"step={step}: {named} is a model and has no checkpoints")
    with new_folder_anywhere(destination, to_run) as folder:
        if public and not (to_run or adapters or packed):
            if not is_first():
                return []  # from file to file there is nothing to gather
            with ByteBar("copying", console) as report:
                huggingface.rewrite(source, folder, dtype, largest_file, report)
            notes = carry(source, folder)
        else:
            trained, notes = read(source, step, console)
            if to_run:
                write_run(RunFolder(folder), trained, source, console, named)
            else:
                how = dtype or "float32", largest_file, console
                notes += write_model(folder, trained, source, *how)
    return notes


def convert_adapters(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Writes the adapters of a run alone, as a folder that PEFT loads.

    Args:
      source: a run folder whose adapters were trained, and nothing else.
      destination: see `convert`.
      step: see `convert`.
      console: see `convert`.

    Raises:
      UserError: there are no adapters, more than they were trained, or PEFT cannot have them.
    """
    source = local_copy(source, "source")
    console = make_console() if console is None else console
    config = model_folder(str(source))
    if config.lora is None:
        raise UserError(f"{source}: the model has no adapters (model.lora)")
    experiment = None if is_adapter_folder(source) else read_experiment(source)
    trainable = getattr(experiment, "trainable", None) or Adapters()
    rest = [p for p in parameter_paths(config, training_layout()) if ".adapter." not in p]
    if more := list(filter(trainable.trains, rest)):
        raise UserError(
            f"{source} trained more than adapters, such as {more[0]}: without it they are not the"
            " model; to=huggingface writes the whole model"
        )
    trained, _ = read(source, step, console)
    base = base_of(source, trained.config)
    with new_folder_anywhere(destination, index=False) as folder:
        write_adapters(folder, trained.config, trained.params, base)
    notes = left_to_right(trained)
    if base is None:
        notes.append(
            "adapter_config.json names no base_model_name_or_path, because the run did not begin"
            " with a model folder"
        )
    tell_written(console, destination, notes)


def base_of(source: Path, config: TransformerConfig) -> str | None:
    """The model folder that a run's adapters belong to; None: it is none, or is not known."""
    if huggingface.is_model_folder(source):
        return str(source)
    if is_adapter_folder(source):
        return str(base_folder(source))
    experiment = read_experiment(source)
    before = getattr(experiment, "begin_with", None) or getattr(experiment, "source", None)
    if before is None:
        return None
    before = local_copy(before, "begin_with")
    if huggingface.is_model_folder(before):
        return str(before)
    if not before.is_dir() or not same_adapters(model_folder(str(before)).lora, config.lora):
        return None  # other adapters were merged into the weights
    return base_of(before, config)


def read(source: Path, step: int | None, console: Console) -> tuple[TrainedModel, list[str]]:
    """The model of a folder of any kind, and what the user should know."""
    adapters = is_adapter_folder(source)
    if adapters or huggingface.is_model_folder(source):
        reader, weights = read_adapted if adapters else huggingface.read, source
        if (packed := gguf_source.weights_of(source)) is not None:
            reader, weights = gguf_source.read, packed
        with ByteBar("reading", console) as report:
            config, _, params = reader(weights, training_layout(), report)
        tokenizer, notes = find_tokenizer(text_folder(source))
        trained = TrainedModel(config, params, tokenizer)
    else:
        console.print("reading the checkpoint")
        trained, notes = load_trained_model(source, training_layout(), step), []
    if trained.tokenizer is not None:
        notes += filter(None, [beyond_table(trained.tokenizer, trained.config.vocab_size)])
    return trained, notes


def find_tokenizer(folder: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a model folder, or the reason why there is none."""
    if reason := gguf_source.tokenizer_note(folder):
        return None, [f"no tokenizer was carried over, and text needs one: {reason}"]
    try:
        return read_tokenizer(folder), []
    except UserError as error:
        return None, [f"no tokenizer was carried over, and text needs one: {error}"]


def write_run(
    folder: RunFolder,
    trained: TrainedModel,
    source: Path,
    console: Console,
    named: str | None = None,
) -> None:
    """Writes a run folder with a checkpoint of step 0 that holds the parameters alone.

    Args:
      folder: of the run.
      trained: the model.
      source: the folder that it is from.
      console: is told what happens.
      named: the source as the user named it; None: as it is.
    """
    console.print("writing the checkpoint")
    extra = {}
    if trained.tokenizer is not None:
        if is_first():
            trained.tokenizer.save(folder.tokenizer)
        extra["tokenizer"] = trained.tokenizer.fingerprint
    with Checkpointer(folder.checkpoints) as checkpointer:
        checkpointer.save(0, {"params": trained.params}, extra)
    if is_first():
        keep(source, folder.path)
        name = str(source) if named is None else named
        made = ConvertedModel(model=trained.config, source=name, family=family_of(source))
        folder.write_config(made)


def family_of(source: Path) -> str | None:
    """The model_type of a public model, also where its run folder is the source."""
    if is_adapter_folder(source):
        source = base_folder(source)
    if huggingface.is_model_folder(source):
        return huggingface.read_config(source)[0].model_type
    experiment = read_experiment(source)
    return experiment.family if isinstance(experiment, ConvertedModel) else None


def write_model(
    folder: Path,
    trained: TrainedModel,
    source: Path,
    dtype: Dtype,
    largest_file: int,
    console: Console,
    write: Callable[..., None] = huggingface.write,
) -> list[str]:
    """Writes a model folder for transformers; what the user should know of its tokenizer."""
    files, notes, ends = {}, ["the run has no tokenizer"], {}
    if trained.tokenizer is not None:
        closed = isinstance(trained.config, EncoderDecoderConfig)  # T5 was trained so
        files, notes = public_files(trained.tokenizer, trained.config.max_length, closed)
        ends = end_ids(trained.tokenizer)
    if is_first():
        # Without eos_token_id transformers would stop at what models of the family usually end at.
        settings = keep(source, folder, ends)
        ends = {role: settings[role] for role in ends}
        for name, data in files.items():
            (folder / name).write_bytes(data)
    with ByteBar("writing", console) as report:
        write(folder, trained.config, trained.params, dtype, largest_file, report, extra=ends)
    notes = notes + head_notes(trained.config) + left_to_right(trained)
    return notes + own_class_notes(folder) if is_first() else notes


def head_notes(config: TransformerConfig) -> list[str]:
    """Notes on what transformers makes of a model with a head on labels."""
    notes = []
    if config.heads and (config.word_head or config.classifier is not None):
        notes.append(
            f"the model has the head {config.heads[0].name!r} alone: no class of transformers has"
            " heads of words or of sentence pairs beside one on labels"
        )
    causal = config.attention.causal and not isinstance(config, EncoderDecoderConfig)
    if causal and any(head.of_texts for head in config.heads):
        notes.append(
            "transformers finds the last token of a text by its id of padding: to score rows of"
            " several texts set model.config.pad_token_id to a token that no text ends with"
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
        elif path.name == TEMPLATE_FOLDER:
            write_templates(folder, read_templates(source))
        elif not path.name.startswith("."):
            left.append(path.name)
    return [f"not copied, because they are folders: {', '.join(left)}"] if left else []
