"""Makes models smaller, and measures what that costs.

python -m lmjax.compression quantise runs/quickstart runs/quickstart-int8 weights=int8
python -m lmjax.compression quantise models/Qwen3-8B runs/qwen-int4 method=gptq calibration=text.txt
python -m lmjax.compression prune runs/quickstart runs/sparse method=wanda calibration=text.txt
python -m lmjax.compression prune runs/quickstart runs/small layers=3 width=256 calibration=text.txt
python -m lmjax.compression table models/Qwen3-8B runs/qwen-int4 text=held_out.txt
"""

from __future__ import annotations

import json
import sys

from lmjax.compression.forms_table import FormsTable
from lmjax.compression.prune import Prune
from lmjax.compression.quantise import Quantise
from lmjax.config import UserError
from lmjax.launch import exit_on_user_error, run

COMMANDS = {"quantise": Quantise(), "prune": Prune(), "table": FormsTable()}
FOLDERS = "source", "destination"  # that the words of `quantise` and `prune` are, in order


def main() -> None:
    """Runs the command that the first word names."""
    word, *rest = sys.argv[1:] or [""]
    with exit_on_user_error():
        if word in ("-h", "--help"):
            print(__doc__)
            return
        if word not in COMMANDS:
            raise UserError(
                f"Which command? {word + ' is none' if word else 'The first word names it'}:"
                f" {', '.join(COMMANDS)}, as in python -m lmjax.compression quantise --help"
            )
    if word == "table":  # all words that are no settings are models
        models = [word for word in rest if "=" not in word and not word.startswith("-")]
        rest = [word for word in rest if word not in models]
        rest += [f"models=({','.join(map(json.dumps, models))},)"] * bool(models)
    run(COMMANDS[word], rest, () if word == "table" else FOLDERS)


if __name__ == "__main__":
    main()
