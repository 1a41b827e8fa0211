"""Documents from any TensorFlow Datasets builder, read without TensorFlow."""

import abc
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.hashes import FileHashes
from lmjax.files import local_path

EXAMPLES = 10_000  # examples in a part
TYPICAL_BYTES = 2_000  # of an example; for progress only
VARIABLE = "TFDS_DATA_DIR"  # of TFDS: where data sets lie unless `data_dir` says so


@config
class TFDSExamples(Source, abc.ABC):
    """Base of the sources that read a TensorFlow Datasets builder, prepared as array_record files.

    A source says what the documents of an example are: `documents_of`.
    """

    name: str  # "wiki40b/en", "lm1b:1.1.0"
    split: str = "train"  # TFDS split, a slice of one, or several: "train[:10%]", "train+test"
    data_dir: str = ""  # where prepared data sets lie; empty is TFDS's own default
    download: bool = False  # download and prepare it when it is not there yet

    def validate(self) -> None:
        """Raises UserError for a URL: array_record files are read from this machine alone."""
        local_path(self.data_dir, "data_dir")

    @abc.abstractmethod
    def documents_of(self, example: Any, identity: str) -> Iterator[Document]:
        """The documents of an example. UserError: it has not what it should have."""

    def settings(self) -> tuple[str, ...]:
        """Settings that the documents depend on, beside the examples; for the fingerprint."""
        return ()

    def check_features(self, features: Any) -> None:
        """Raises UserError where examples with these features cannot be read."""

    def parts(self) -> tuple[Part, ...]:
        count = len(self._open())
        return tuple(
            Part(self.name, start, min(start + EXAMPLES, count), TYPICAL_BYTES * EXAMPLES)
            for start in range(0, count, EXAMPLES)
        )

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`: name, version, split, and what the files of the split hold."""
        info = self._builder().info
        files = [str(path) for path in info.splits[self.split].filepaths]
        hashes = (hash_files or FileHashes())(files)
        return digest(info.full_name, self.split, *self.settings(), *hashes)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        examples = self._open()
        for index in range(part.start, part.stop):
            identity = f"{self.name} {self.split} example {index}"
            try:
                example = examples[index]
            except (OSError, RuntimeError, IndexError) as error:  # array_record's are of any kind
                raise UserError(f"{identity} cannot be read: {error}") from None
            yield from self.documents_of(example, identity)

    def examples(self) -> Any:
        """The examples as they are stored, whatever their features, by index.

        UserError: they cannot be read.
        """
        return self._stored(self._builder())

    def _open(self) -> Any:
        """The examples, which have the features that are wanted, by index."""
        builder = self._builder()
        self.check_features(builder.info.features)
        return self._stored(builder)

    def _stored(self, builder: Any) -> Any:
        try:
            examples = builder.as_data_source(self.split)
        except NotImplementedError:
            raise UserError(
                f"TFDS {self.name!r} in {builder.data_path} is stored in a format that only "
                f"TensorFlow reads; prepare it again as array_record:\n{self._command()}"
            ) from None
        stated = builder.info.splits[self.split].num_examples
        if len(examples) != stated:
            raise UserError(
                f"split {self.split!r} of TFDS {self.name!r} has {stated:,} examples, but "
                f"{len(examples):,} are read from {builder.data_path}. Of a data set in parquet "
                "files every slice is the whole split; otherwise files are missing. Prepare it "
                f"again as array_record:\n{self._command()}"
            )
        return examples

    def _builder(self) -> Any:
        try:
            import importlib_resources  # noqa: F401  (TFDS needs it and does not say so)
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"TFDS {self.name!r} needs a package that is missing ({error.name}): "
                "pip install tensorflow-datasets importlib_resources array_record"
            ) from None
        folder = self.data_dir or None
        if folder is None:
            local_path(os.environ.get(VARIABLE, ""), VARIABLE)
        try:
            builder = tfds.builder(self.name, data_dir=folder)
        except tfds.core.DatasetNotFoundError:
            raise UserError(
                f"TFDS knows no data set {self.name!r}, neither by name nor in "
                f"{self.data_dir or 'its data folder'}"
            ) from None
        if not builder.is_prepared():
            if not self.download:
                raise UserError(
                    f"TFDS {self.name!r} is not in {builder.data_path}; set download=true, or "
                    f"run\n{self._command()}"
                )
            builder = tfds.builder(self.name, data_dir=folder, file_format="array_record")
            builder.download_and_prepare()
        try:
            count = builder.info.splits[self.split].num_examples
        except (ValueError, KeyError):
            raise UserError(
                f"TFDS {self.name!r} has no split {self.split!r}; it has "
                f"{', '.join(map(repr, builder.info.splits))}, slices such as 'train[:10%]', and "
                "sums of them with +"
            ) from None
        if count < 1:
            raise UserError(f"split {self.split!r} of TFDS {self.name!r} has no example")
        return builder

    def _command(self) -> str:
        folder = f", data_dir={self.data_dir!r}" if self.data_dir else ""
        return (
            'python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({self.name!r}{folder}, file_format='array_record')"
            '.download_and_prepare()"'
        )


@config
class TFDS(TFDSExamples):
    """A TensorFlow Datasets builder by name, prepared beforehand as array_record files.

    A feature that is a list of texts (paragraphs, turns) makes one document of each example, with
    blank lines between them.
    """

    field: str = "text"  # the feature with the text, or the texts; "answers/text" inside another

    def settings(self) -> tuple[str, ...]:
        """See `TFDSExamples.settings`."""
        return (self.field,)

    def documents_of(self, example: Any, identity: str) -> Iterator[Document]:
        """See `TFDSExamples.documents_of`."""
        if text := _text(_value(example, self.field), identity):
            yield Document(text, identity)

    def check_features(self, features: Any) -> None:
        """Raises UserError where the field is no text, nor a list of texts."""
        found = dict(_leaves(features))
        texts = ", ".join(repr(name) for name, leaf in found.items() if _is_text(leaf)) or "none"
        if self.field not in found:
            inner = [name for name in found if name.startswith(f"{self.field}/")]
            others = inner or found
            raise UserError(
                f"TFDS {self.name!r} has no feature {self.field!r}; it has "
                f"{', '.join(map(repr, others))}, of which texts are {texts}"
            )
        leaf = found[self.field]
        if not _is_text(leaf):
            kind = f"{type(leaf).__name__} of {np.dtype(leaf.np_dtype)}, shape {leaf.shape}"
            raise UserError(
                f"feature {self.field!r} of TFDS {self.name!r} is neither a text nor a list of "
                f"texts, but {kind}; texts are {texts}"
            )


def plain_values(value: Any, identity: str) -> Any:
    """An example as JSON values: texts, numbers, lists and objects.

    A list of objects, which TFDS gives as an object of lists, becomes a list of objects again.

    Raises:
      UserError: a text is not UTF-8.
    """
    if isinstance(value, Mapping):
        found = {name: plain_values(each, identity) for name, each in value.items()}
        lengths = {len(each) if isinstance(each, list) else -1 for each in found.values()}
        if len(lengths) == 1 and lengths != {-1}:
            return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
        return found
    if isinstance(value, str | bytes):
        return _text(value, identity)
    if isinstance(value, np.generic):
        return plain_values(value.item(), identity)
    if value is None or isinstance(value, bool | int | float):
        return value
    return [plain_values(each, identity) for each in value]


def _leaves(features: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Name and feature of everything that an example holds, with "/" between nested names."""
    for name, feature in features.items():
        inner = feature
        while not hasattr(inner, "items") and hasattr(inner, "feature"):  # a list of dictionaries
            inner = inner.feature
        if hasattr(inner, "items"):
            yield from _leaves(inner, f"{path}{name}/")
        else:
            yield path + name, feature


def _is_text(feature: Any) -> bool:
    kind = feature.np_dtype
    return not isinstance(kind, dict) and np.dtype(kind) == object and len(feature.shape) <= 1


def _value(example: Any, field: str) -> Any:
    for name in field.split("/") if field not in example else [field]:
        if isinstance(example, Mapping):
            example = example[name]
        else:  # a data set inside the example
            example = [each[name] for each in example]
    return example


def _text(value: Any, identity: str) -> str:
    """A text, or several with blank lines between; what is optional and missing is empty."""
    if value is None:
        return ""
    if not isinstance(value, str | bytes):
        return "\n\n".join(filter(None, (_text(each, identity) for each in value)))
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{identity} is not UTF-8 at byte {error.start}") from None
