"""An expert of your own texts: the quickstart's model reads a folder, and learns to reply.

python -m experiments.quickstart && python -m experiments.domain path=my/folder
2 CPU cores, about five minutes, no download. The model is trained further on the folder's texts,
with a quarter of its old text among them, and then on instructions: questions about Python's
library, or those of instructions=file.jsonl. runs/domain/report.html has the bits per byte of the
old and the new text before and after each run, and what was forgotten. Afterwards
python -m lmjax.generation runs/domain/chat chat=true talks to it.
"""

from lmjax.jobs.domain_expert import DomainExpert
from lmjax.launch import run

experiment = DomainExpert(prompts=("What does os.path.join(a, *p) do?",))

if __name__ == "__main__":
    run(experiment, positional="path")
