r"""Replies of two models compared by a third, the judge: A/B with both orders.

python -m experiments.judge requests=questions.jsonl ours=LocalModel ours.folder=runs/x \
    theirs=ChatEndpoint theirs.address=https://api.openai.com/v1 theirs.model=gpt-4o \
    judge=ChatEndpoint judge.address=https://api.openai.com/v1 judge.model=gpt-4o
Every model may be a folder or an endpoint; replies=runs/x/replies.jsonl judges those of a
side-by-side job. form=scores asks for scores from 1 to 10, and gives the ratio to the other model.
Replies and verdicts are kept in output=runs/judge: nothing is asked twice. The judge reads each
pair twice; keys of endpoints stand in environment variables. An endpoint takes as long as it takes
to answer; a small local model takes seconds a pair on a laptop.
"""

from lmjax.jobs.judge_replies import JudgeReplies
from lmjax.launch import run

experiment = JudgeReplies()

if __name__ == "__main__":
    run(experiment)
