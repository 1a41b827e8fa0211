"""Trained models on tasks, beside each other.

python -m experiments.evaluate runs/x 'tasks=(Arc(path="ARC-Challenge-Test.jsonl", shots=25),)'
The model is a run folder or a public model folder, several are models=("a", "b"). Answers are kept
in output=runs/evaluate: the same command goes on after a kill, and asks nothing twice. Its
report.html has leaderboard, intervals, subjects, errors and prompts. A tiny model
takes seconds on a laptop; billions of parameters need a GPU or TPU.
"""

from lmjax.jobs.evaluate import Evaluate
from lmjax.launch import run

experiment = Evaluate()

if __name__ == "__main__":
    run(experiment, positional="model")
