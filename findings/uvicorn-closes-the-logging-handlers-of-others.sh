#!/usr/bin/env bash
# Making a configuration of uvicorn closes the logging handlers of all other libraries, and that of
# absl, which many libraries of this field import, closes the stream that it writes to.
#
# Versions: uvicorn 0.54.0, absl-py 2.5.1.
#
# uvicorn configures logging with `disable_existing_loggers` off, so loggers of others are expected
# to stay as they are. `logging.config.dictConfig` closes their handlers all the same. absl's spares
# what `sys.stderr` is at that time, but not what it was when absl was imported: where the two
# differ, as under a test runner that captures output, the earlier one is closed under its owner.
# With `log_config=None` nothing is touched.
#
# Seen:
#   log_config=None: stderr of the import is open
#   usual: stderr of the import is closed
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet uvicorn==0.54.0 absl-py==2.5.1
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import contextlib

import uvicorn

captured = open("captured", "w")
with contextlib.redirect_stderr(captured):
    import absl.logging


async def app(scope, receive, send):
    """Never called."""


found = {}
for name, settings in (("log_config=None", {"log_config": None}), ("usual", {})):
    uvicorn.Config(app, **settings)
    found[name] = captured.closed
    print(f"{name}: stderr of the import is {'closed' if captured.closed else 'open'}")
assert found == {"log_config=None": False, "usual": True}
EOF
