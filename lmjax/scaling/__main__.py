"""Plans a training run before a chip is rented: memory, speed, costs, by formulas.

python -m lmjax.scaling experiments.gpt3_175b topology=v4:8x8x16
python -m lmjax.scaling experiments.gpt3_175b topology=a100-80gb:1024 mesh.tensor=8 mesh.stage=8
python -m lmjax.scaling experiments.llama_65b topology=h100:512 model.remat=dots tokens=1.4e12
python -m lmjax.scaling experiments.gpt3_175b topology=v4:8x8x16 search=true report=plan.html
python -m lmjax.scaling experiments.llama_65b topology=h100:8 serve=true requests.rows=16
python -m lmjax.scaling experiments.llama_1b topology=v4:2x2x1 mesh.fsdp=4 compile=true

Settings that are not the planner's own are the experiment's, those of the mesh too. A mesh smaller
than the topology is repeated along `data`.
"""

from __future__ import annotations

import sys

from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.scaling.plan_command import PlanCommand, split_words


def main() -> None:
    """Plans what the command line says."""
    with exit_on_user_error():
        own, others = split_words(sys.argv[1:])
        command = from_command_line(PlanCommand(), own, positional="experiment")
        command.plan(others)


if __name__ == "__main__":
    main()
