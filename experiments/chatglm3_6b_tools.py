"""ChatGLM3-6B learns to call tools.

python -m experiments.chatglm3_6b_tools

4 A100 80 GB, half an hour at 45 % of their peak: 200 steps of 64 rows of 2,048 tokens. It has not
been run to its end with this code.
6,243,584,000 parameters with their gradient and AdamW's two means are 25.0 GB on each of the 4
devices.

The authors' script finetune_ds_multiturn.sh of github.com/THUDM/ChatGLM3: 200 steps of 64
conversations of ToolAlpaca (Tang et al. 2023, arXiv:2306.05301) at 1e-4; AdamW without decay and a
line to 0 without warm-up are those of transformers' trainer. A row holds more than one conversation
here. The learning begins with the public folder in models/chatglm3-6b. data/tool_alpaca.jsonl has
`messages`: a system message with `tools`, a list of descriptions; an assistant's message that calls
a tool has its name as `metadata` and as content a line of Python, tool_call(city='Rome'), in a
fence; the result comes from the role "observation". The loss is on what the assistant writes, calls
included, and results are not learnt.
"""

from lmjax.data.chat.catalogue import chat_template
from lmjax.jobs.assistant_recipes import for_accelerators, instructions, mixture
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.models import chatglm3
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

experiment = Finetune(
    output="runs/chatglm3_6b_tools",
    begin_with="models/chatglm3-6b",
    steps=200,
    model=for_accelerators(chatglm3("6B")),
    data=mixture(
        2048,
        64,
        instructions("tools", "data/tool_alpaca.jsonl", chat_template("chatglm3")),
    ),
    optimizer=AdamW(b1=0.9, b2=0.999, weight_decay=0.0),
    schedule=Linear(peak=1e-4, warmup=0),
    mesh=Mesh(fsdp=4),
    accumulation=4,
    evaluation=ChatEvaluation(every=50),
    checkpoint=Checkpoints(every=50),
)

if __name__ == "__main__":
    run(experiment)
