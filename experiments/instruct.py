"""The quickstart's model learns to answer: questions about Python's library, in two minutes.

python -m experiments.quickstart && python -m experiments.instruct
2 CPU cores, two minutes, no download: questions and answers are made of the docstrings of Python's
standard library, both ways. Afterwards python -m lmjax.generation runs/instruct chat=true talks to
it. It is a toy: it has learned the form of an answer, and hardly any facts.
"""

from lmjax.data import Data, Domain
from lmjax.data.chat.embedded_instructions import EmbeddedInstructions
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.training.schedules import Cosine

experiment = Finetune(
    output="runs/instruct",
    begin_with="runs/quickstart",
    steps=300,
    data=Data(
        train=(Domain(name="questions", source=EmbeddedInstructions()),),
        length=256,
        batch_size=8,
        rows="whole_documents",
    ),
    schedule=Cosine(peak=1e-3, warmup=20, final=0.05),
    evaluation=ChatEvaluation(
        every=100,
        tokens=50_000,
        prompts=(
            "What does os.path.join(a, *p) do?",
            "What does this? Return a copy of the list.",
        ),
        sample_length=60,
    ),
    checkpoint=Checkpoints(every=100),
)

if __name__ == "__main__":
    run(experiment)
