"""GPT-1 learns whether a sentence is positive (SST-2), and goes on learning its words.

python -m experiments.gpt1_classify

One A100, about ten minutes in float32: three epochs of 67,349 sentences. It has not been run to its
end with this code.

Radford et al. 2018, section 4.1: 6.25e-5 in a line to 0 after warm-up over 0.2 %, 32 sentences a
step, dropout of 0.1 before the classes, and the loss of next words as an auxiliary objective of
weight 0.5; weight decay of 0.01 and the mean by sentence are those of the authors' code (as
remembered). There a sentence is put between a start token and one that the class is read at; here
it is read at the sentence's last token. The paper's accuracy is 91.3 %. GPT-1's public folder
(openai-gpt) is in models/openai-gpt; data/SST-2 is GLUE's folder, tables with the columns sentence
and label.
"""

from lmjax.config import replace
from lmjax.data import Domain, LabelledTable
from lmjax.jobs.assistant_recipes import groups
from lmjax.jobs.classify import Classify
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.models import TextHeadConfig, gpt1
from lmjax.objectives import TextLabels
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

NAMES = ("negative", "positive")
sentences = LabelledTable(
    path="data/SST-2/train.tsv", text="sentence", delimiter="tab", labels=NAMES
)
tests = replace(sentences, path="data/SST-2/dev.tsv")

experiment = Classify(
    output="runs/gpt1_classify",
    begin_with="models/openai-gpt",
    epochs=3,
    model=replace(gpt1(), heads=(TextHeadConfig(outputs=2, labels=NAMES, dropout=0.1),)),
    objective=TextLabels(words=0.5),
    data=groups(128, 32, Domain(name="sst2", source=sentences, evaluation=tests)),
    optimizer=AdamW(b1=0.9, b2=0.999, epsilon=1e-8, weight_decay=0.01),
    schedule=Linear(peak=6.25e-5, warmup=13),
    evaluation=ChatEvaluation(every=1000),
    checkpoint=Checkpoints(every=1000),
)

if __name__ == "__main__":
    run(experiment)
