"""Texts whose words have labels, such as parts of speech, from JSON lines and from columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lmjax.config import UserError, config, replace
from lmjax.data.documents import BadRecord, Document, OnSkip, Part
from lmjax.data.files import file_parts, find_files
from lmjax.data.labelled_texts import class_name, class_number, sorted_names, whole_text
from lmjax.data.sources import JsonRecords
from lmjax.data.spans import CLASSES, SETS, class_code
from lmjax.data.tokenizers import Tokenizer

UNLABELLED = (None, -100, "-100", "_")  # labels of words without one


@config
class LabelledTokens(JsonRecords):
    """Texts as lists of words with a label each, in JSON lines, compressed or not.

    A line has the words, such as {"tokens": ["New", "York"], "labels": ["B-LOC", "I-LOC"]}. Labels
    are names of classes, or whole numbers that count the names from 0; null, -100 and _ are none.
    Of several sets of labels, as parts of speech and entities, each has a field of its own.

    Each text is a group of one document (data.rows=groups). A word has tokens of its own, with the
    space before it, and is a span that has the numbers of its classes.
    """

    tokens: str = "tokens"  # the field with the words
    sets: tuple[str, ...] = ("labels",)  # the fields with the labels of each set
    # Names of the classes of each set, the first of number 0; none: those that the files have,
    # sorted.
    labels: tuple[tuple[str, ...], ...] = ()

    def validate(self) -> None:
        """Raises UserError for names that cannot be meant."""
        super().validate()
        names = (self.tokens, *self.sets)
        if "" in names or len(set(names)) < len(names) or not 0 < len(self.sets) <= SETS:
            raise UserError(
                f"tokens={self.tokens!r}, sets={self.sets}: give different names of fields, and "
                f"one to {SETS} of labels"
            )
        if self.labels and len(self.labels) != len(self.sets):
            raise UserError(
                f"labels has names for {len(self.labels)} sets; sets has {len(self.sets)}"
            )
        for given in self.labels:
            if not 0 < len(given) <= CLASSES or len(set(given)) < len(given):
                raise UserError(f"labels={given}: give one to {CLASSES:,} names, each once")

    def names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the classes of each set: `labels`, or those that are found by reading all files.

        Raises:
          UserError: a line cannot be read, and the source says to stop there; or there is no label.
        """
        if self.labels:
            return self.labels
        found: tuple[set[str], ...] = tuple(set() for _ in self.sets)

        def look(record: dict[str, Any], identity: str) -> tuple[()]:
            for known, field in zip(found, self.sets, strict=True):
                given = self._labels(record, field, self._words(record))
                known |= {name for name in given if name is not None}
            return ()

        for part in self.parts():
            for _ in self.lines(part, lambda message: None, look):
                pass
        for known, field in zip(found, self.sets, strict=True):
            if not known:
                raise UserError(f"there is no word with a label {field!r} in {self.path}")
        return tuple(map(sorted_names, found))

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`; where `labels` are not given all files are read for them first."""
        if not self.labels:
            return replace(self, labels=self.names()).read(part, on_skip)
        return super().read(part, on_skip)

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`; lines without a word are left out."""
        if not (words := self._words(record)):
            return
        sets = [
            [
                None if name is None else class_number(name, names, field)
                for name in self._labels(record, field, words)
            ]
            for field, names in zip(self.sets, self.labels, strict=True)
        ]
        codes = [class_code(classes) for classes in zip(*sets, strict=True)]
        yield Document(
            " ".join(words),
            identity,
            metadata=self.metadata_of(record),
            labels=(0.0,),
            encode=functools.partial(_encode_words, words=words, codes=codes),
        )

    def _words(self, record: dict[str, Any]) -> list[str]:
        found = record.get(self.tokens)
        if not isinstance(found, list) or not all(isinstance(w, str) and w.strip() for w in found):
            raise BadRecord(f"field {self.tokens!r} should be a list of words, none of them empty")
        return found

    def _labels(self, record: dict[str, Any], field: str, words: Sequence[str]) -> list[str | None]:
        """Names of the classes of a line's words; None for those without one."""
        given = record.get(field)
        if not isinstance(given, list) or len(given) != len(words):
            count = f"{len(given)} labels" if isinstance(given, list) else "no list of labels"
            raise BadRecord(f"field {field!r} has {count} for {len(words)} words")
        found = [None if label in UNLABELLED else class_name(label) for label in given]
        for label, name in zip(given, found, strict=True):
            if name is None and label not in UNLABELLED:
                raise BadRecord(
                    f"field {field!r} has {label!r}: a class is a name or a whole number"
                )
        return found


@config
class LabelledColumns(LabelledTokens):
    """Texts whose words have labels, in columns (CoNLL), compressed or not.

    A line has a word and its labels, between white space; an empty line ends a text. CoNLL-U is
    read with word=1, columns=(3,) and left_out=("# ",), as long as each word is a line.
    """

    word: int = 0  # column of the words; -1 is the last
    columns: tuple[int, ...] = (-1,)  # columns of the labels of each set
    left_out: tuple[str, ...] = ("-DOCSTART-",)  # beginnings of lines that are none of words

    def validate(self) -> None:
        """Raises UserError for other than a column of each set of labels."""
        super().validate()
        if len(self.columns) != len(self.sets) or self.word in self.columns:
            raise UserError(
                f"word={self.word}, columns={self.columns}, sets={self.sets}: give a column of "
                "the words, and another one for each field of labels"
            )

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: a file each."""
        return file_parts(find_files(self.path), divide=False)

    def lines(
        self, part: Part, on_skip: OnSkip, use: Callable[[dict[str, Any], str], Iterable[Any]]
    ) -> Iterator[tuple[Any, ...]]:
        """See `JsonRecords.lines`; a message names the first line of a text."""
        if (text := whole_text(part, self.on_error, on_skip)) is None:
            return
        rows: list[list[str]] = []
        first = 1
        for number, line in enumerate((*text.split("\n"), ""), 1):
            if line.startswith(self.left_out):
                continue
            if columns := line.split():
                first = first if rows else number
                rows.append(columns)
            elif rows:
                try:
                    found = tuple(use(self._record(rows), f"{part.name}:{first}"))
                except BadRecord as error:
                    self._leave_out(part, first, error, on_skip)
                else:
                    yield found
                rows = []

    def _record(self, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The words of a text and their labels, as a line of JSON has them."""
        fields = dict(zip((self.tokens, *self.sets), (self.word, *self.columns), strict=True))
        most = max(column if column >= 0 else -column - 1 for column in fields.values())
        short = next((row for row in rows if len(row) <= most), None)
        if short is not None:
            raise BadRecord(f"there are {len(short)} columns, not {most + 1}: {' '.join(short)!r}")
        return {field: [row[column] for row in rows] for field, column in fields.items()}


def common_sets(sources: Sequence[LabelledTokens]) -> tuple[tuple[str, ...], ...]:
    """Names of the classes of several sources: those that some give, or all that are found.

    Raises:
      UserError: two give different ones or have different sets, or a source cannot be read.
    """
    given = dict.fromkeys(source.labels for source in sources if source.labels)
    if len(given) > 1:
        one, other, *_ = given
        raise UserError(f"the sources have different labels: {one} and {other}")
    if len({len(source.sets) for source in sources}) > 1:
        raise UserError("the sources have different numbers of sets of labels (sets)")
    if given:
        return next(iter(given))
    found = zip(*(source.names() for source in sources), strict=True)
    return tuple(sorted_names({name for names in parts for name in names}) for parts in found)


def _encode_words(
    tokenizer: Tokenizer, words: Sequence[str], codes: Sequence[int | None]
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """See `Document.encode`: each word that has a class is a span with its number."""
    tokens, spans = list(tokenizer.opening), []
    for number, (word, code) in enumerate(zip(words, codes, strict=True)):
        own = tokenizer.encode(f" {word}" if number else word)
        if own and code is not None:
            spans.append((len(tokens), len(tokens) + len(own), code))
        tokens += own
    return [*tokens, *tokenizer.closing], spans
