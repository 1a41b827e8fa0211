"""HellaSwag: endings of scenes (Zellers et al. 2019, arXiv:1905.07830)."""

from __future__ import annotations

import re
from typing import ClassVar

from lmjax.config import UserError, config
from lmjax.evaluation.tasks.choices import ChoiceTask
from lmjax.evaluation.tasks.records import TFDS, Record, read_files
from lmjax.evaluation.tasks.task import Item

BLOCK = 6  # lines of an item in text files: scene, number of the right ending, four endings
BRACKETS = re.compile(r"\[.*?\]")  # marks of WikiHow's pages


def cleaned(text: str) -> str:
    """A scene or an ending without the marks that its web page left."""
    text = BRACKETS.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@config
class HellaSwag(ChoiceTask):
    """HellaSwag: four endings of a scene, from JSON lines, or from text with six lines an item."""

    draws_one_more: ClassVar[bool] = True

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`."""
        if path.startswith(TFDS) or ".txt" not in path.rpartition("/")[2]:
            return super().read_items(path)
        items = []
        for file in read_files(path):
            lines = file.text.rstrip("\n").split("\n")
            if len(lines) % BLOCK:
                raise UserError(f"{file.name} has {len(lines)} lines, no multiple of {BLOCK}")
            for first in range(0, len(lines), BLOCK):
                scene, label, *endings = lines[first : first + BLOCK]
                where = f"{file.name}, line {first + 2}"
                gold = Record({}, where).index(label, len(endings), "the right ending")
                items.append(_item(scene, endings, gold, where))
        return items

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        if record.has("ctx_a"):
            scene = f"{record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
        else:  # TensorFlow Datasets joins both parts, and begins the second in small letters
            scene = record.text("context")
        endings = [cleaned(ending) for ending in record.texts("endings")]
        gold = record.index(record.value("label"), len(endings), "label")
        title = record.text("activity_label")
        return _item(cleaned(f"{title}: {scene}"), endings, gold, record.where)


def _item(scene: str, endings: list[str], gold: int, where: str) -> Item:
    return Item(scene, endings[gold], tuple(endings), gold, identity=where)
