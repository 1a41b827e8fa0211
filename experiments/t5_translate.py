"""T5-base learns to translate English to German, as the paper fine-tunes it.

python -m experiments.t5_translate

262,144 steps of 128 rows of 512 tokens, 17 B tokens; 50 hours of one A100 80 GB at 45 % of its
peak. It has not been run to its end with this code.
222,903,552 parameters with their gradient and Adafactor's means are 1.8 GB, and the activations of
32 rows at a time a few GB more.

Raffel et al. 2020 (arXiv:1910.10683), section 3.1.2: Adafactor at a constant rate of 1e-3, relative
to each parameter's root mean square, dropout of 0.1, a checkpoint every 5,000 steps. It begins with
T5's public folder in models/t5-base. data/wmt14_en_de.jsonl has a pair a line,
{"prompt": "That is good.", "completion": "Das ist gut."}. The encoder reads a prompt after the name
of the task (section 2.4); afterwards python -m lmjax.generation runs/t5_translate
prompt="That is good." puts the name there too.
"""

from lmjax.config import replace
from lmjax.data import ChatTemplate, Conversations, Data, Domain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, Log
from lmjax.launch import run
from lmjax.models import t5
from lmjax.objectives import SequenceToSequence
from lmjax.training.optimizers import Adafactor
from lmjax.training.schedules import Constant

pairs = Conversations(
    path="data/wmt14_en_de.jsonl",
    template=ChatTemplate(user=("translate English to German: {content}",)),
)
experiment = Finetune(
    output="runs/t5_translate",
    begin_with="models/t5-base",
    steps=2**18,
    model=replace(t5("base"), dtype="bfloat16", remat="full"),
    objective=SequenceToSequence(),
    data=Data(
        train=(Domain(name="wmt14", source=pairs),),
        length=512,
        batch_size=128,
        rows="whole_documents",
        long_documents="drop",
    ),
    optimizer=Adafactor(),
    schedule=Constant(peak=1e-3, warmup=0),
    gradient_clip=None,
    accumulation=4,
    evaluation=ChatEvaluation(every=5000, prompts=("That is good.",)),
    checkpoint=Checkpoints(every=5000),
    log=Log(every=10),
)

if __name__ == "__main__":
    run(experiment)
