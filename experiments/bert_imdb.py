"""BERT-base learns whether a film review is good or bad (IMDb).

python -m experiments.bert_imdb

One A100, about half an hour in float32: four epochs of 25,000 reviews in rows of 512 tokens. It has
not been run to its end with this code.

Sun et al. 2019 (arXiv:1905.05583, section 5): 2e-5 in a line to 0 after warm-up over a tenth, 24
reviews a step, dropout of 0.1; AdamW has BERT's numbers. A review that is too long keeps its
beginning, for which the paper has an error of 5.6 % as remembered (5.4 % with its beginning and its
end). BERT's public folder is in models/bert-base-uncased. The reviews of Maas et al. 2011 are
public, a file each; data/imdb_train.jsonl and data/imdb_test.jsonl have a line for each, as
{"text": "...", "label": "neg"}.
"""

from lmjax.config import replace
from lmjax.data import Domain, LabelledTexts
from lmjax.jobs.assistant_recipes import groups
from lmjax.jobs.classify import Classify
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

reviews = LabelledTexts(path="data/imdb_train.jsonl", labels=("neg", "pos"))
tests = replace(reviews, path="data/imdb_test.jsonl")

experiment = Classify(
    output="runs/bert_imdb",
    begin_with="models/bert-base-uncased",
    epochs=4,
    data=groups(512, 24, Domain(name="imdb", source=reviews, evaluation=tests)),
    optimizer=AdamW(b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01),
    schedule=Linear(peak=2e-5, warmup=417),
    evaluation=ChatEvaluation(every=1042),
    checkpoint=Checkpoints(every=1042),
)

if __name__ == "__main__":
    run(experiment)
