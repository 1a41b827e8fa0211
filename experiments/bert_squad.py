"""BERT-base finds answers in paragraphs of Wikipedia (SQuAD 1.1).

python -m experiments.bert_squad

One A100, about an hour in float32: three epochs of 87,599 questions in rows of 512 tokens. It has
not been run to its end with this code.

Devlin et al. 2019 (arXiv:1810.04805, section 4.2): three epochs at 5e-5, 32 questions a step; the
line to 0 after warm-up over a tenth, AdamW's numbers and answers of at most 30 tokens are those of
the authors' run_squad.py (as remembered), whose model has exact match 80.8 and F1 88.5 in the
paper. There a paragraph that is too long for 384 tokens is read in windows that overlap; here rows
have 512, and of the few paragraphs that are longer the beginning is read. BERT's public folder is
in models/bert-base-uncased. SQuAD is public, a JSON document; of each of its files,

jq -c '.data[].paragraphs[] | .context as $c | .qas[] | {question, context: $c, answers: {text:
[.answers[].text], answer_start: [.answers[].answer_start]}}' train-v1.1.json \\
    > data/squad_train.jsonl

makes a line for each question. SQuAD 2.0's questions without an answer are learnt too.
"""

from lmjax.config import replace
from lmjax.data import Domain
from lmjax.data.questions import Questions
from lmjax.jobs.answer_questions import AnswerQuestions
from lmjax.jobs.assistant_recipes import groups
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

questions = Questions(path="data/squad_train.jsonl")
tests = replace(questions, path="data/squad_dev.jsonl")

experiment = AnswerQuestions(
    output="runs/bert_squad",
    begin_with="models/bert-base-uncased",
    epochs=3,
    data=groups(512, 32, Domain(name="squad", source=questions, evaluation=tests)),
    optimizer=AdamW(b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01),
    schedule=Linear(peak=5e-5, warmup=821),
    evaluation=ChatEvaluation(every=2000),
    checkpoint=Checkpoints(every=2000),
)

if __name__ == "__main__":
    run(experiment)
