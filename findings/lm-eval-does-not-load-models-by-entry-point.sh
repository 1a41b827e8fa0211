#!/usr/bin/env bash
# lm-evaluation-harness takes entry points for models in its registry, and never looks for any.
#
# Versions: lm_eval 0.4.13, datasets 5.2.0.
#
# The registry's placeholders are "str | importlib.metadata.EntryPoint", and both are resolved. But
# nothing calls importlib.metadata.entry_points: a package that states a model under a group such as
# lm_eval.models is not seen by `lm_eval --model`. Expected: that it is found. A package must call
# register_model in the same process, and so needs a command of its own.
#
# Seen:
#   lm_eval 0.4.13
#   groups of entry points that were asked for: none
#   found by its entry points: False
#   registered by hand as an entry point: True
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lm_eval==0.4.13 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat > "$site/stated.py" <<'PYTHON'
from lm_eval.api.model import LM


class Stated(LM):
    def loglikelihood(self, requests):
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError
PYTHON
mkdir "$site/stated-1.0.dist-info"
printf 'Metadata-Version: 2.1\nName: stated\nVersion: 1.0\n' > "$site/stated-1.0.dist-info/METADATA"
for group in lm_eval lm_eval.models lm_eval.model lm_eval.plugins lm_eval_models lm-eval; do
    printf '[%s]\nstated = stated:Stated\n' "$group"
done > "$site/stated-1.0.dist-info/entry_points.txt"
cd "$work"
"$work/venv/bin/python" -I - <<'PYTHON'
import importlib.metadata as metadata

assert metadata.entry_points(group="lm_eval.models")["stated"].load  # Python does see it
original, asked = metadata.entry_points, []


def entry_points(**selection):
    if "lm" in str(selection.get("group", "lm")):
        asked.append(str(selection.get("group")))
    return original(**selection)


metadata.entry_points = entry_points
import lm_eval
from lm_eval.api.registry import get_model, model_registry

print("lm_eval", metadata.version("lm_eval"))


def is_found():
    try:
        return get_model("stated").__name__ == "Stated"
    except (KeyError, ValueError):
        return False


before = is_found()
[point, *_] = original(group="lm_eval.models")
model_registry.register("stated", target=point)
after = is_found()
print("groups of entry points that were asked for:", ", ".join(asked) or "none")
print("found by its entry points:", before)
print("registered by hand as an entry point:", after)
assert not asked and not before and after
PYTHON
