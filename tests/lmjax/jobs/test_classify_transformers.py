"""Classifiers that were fine-tuned here, as transformers reads and runs them."""

import json

import numpy as np
import pytest

from lmjax.data import Data, Domain, LabelledTexts
from lmjax.interop.__main__ import Convert
from lmjax.jobs.classify import Classify
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Constant

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "cat", "dog", "##s"]
NAMES = ("different", "same")


def bert_folder(folder):
    """A tiny BERT with its tokenizer, as transformers saves it."""
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )


@pytest.mark.slow
def test_pairs_have_the_same_classes_in_transformers(tmp_path):
    """From public folder to public folder: its tokenizer joins the pairs as ours did.

    The accuracy that the run reports is that of transformers' class on the same held-out pairs.
    """
    bert_folder(tmp_path / "bert")
    words = ["red cat", "blue dogs", "cats", "dog dog red"]
    records = [
        {"text": a, "other": b, "label": NAMES[a == b]}
        for a in words
        for b in [*words, a, a]  # as many alike as not
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    train, test = (
        LabelledTexts(path=str(tmp_path / f"{name}.jsonl"), second="other")
        for name in ("train", "test")
    )
    job = Classify(
        output=str(tmp_path / "run"),
        steps=40,
        begin_with=str(tmp_path / "bert"),
        data=Data(
            train=(Domain(name="pairs", source=train, evaluation=test),),
            length=12,
            batch_size=16,
            rows="groups",
            cache=str(tmp_path / "cache"),
        ),
        schedule=Constant(peak=5e-3, warmup=0),
    )
    job.run()
    Convert(source=job.output, destination=str(tmp_path / "out")).run()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == dict(enumerate(NAMES))
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "bert")
    pairs = [(record["text"], record["other"]) for record in records]
    with torch.no_grad():
        given = tokenizer(pairs, padding=True, return_tensors="pt")
        logits = model(**given).logits
    labels = torch.tensor([NAMES.index(record["label"]) for record in records])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    [table] = [
        t for t in RunFolder(job.output).results()["tables"] if t["columns"][-1] == "accuracy"
    ]
    accuracy = table["rows"][0][-1]
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
    *_, record = RunFolder(job.output).metrics()
    np.testing.assert_allclose(record["loss"], float(loss), rtol=1e-4)  # float32 of two libraries
    assert accuracy > 0.5
