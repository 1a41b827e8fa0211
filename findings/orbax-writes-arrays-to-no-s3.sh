#!/usr/bin/env bash
# Orbax lists and reads folders of s3:// by etils.epath, and cannot write an array there.
#
# Versions: orbax-checkpoint 0.12.8, etils 1.15.0, s3fs 2026.9.0, jax 0.10.2.
#
# Its paths are etils.epath's, which serve gs://, s3://, az:// and hf://; of these, what writes the
# arrays knows gs:// alone, and takes all others for paths of the disk. epath itself knows none of
# fsspec's further schemes. Expected: that a path which is accepted can be written, or is refused as
# what it is.
#
# Seen (the server is moto's, on this machine):
#   orbax-checkpoint 0.12.8 jax 0.10.2
#   epath writes and lists s3://bucket: ['note.txt']
#   save: ValueError: Checkpoint path should be absolute. Got s3:/bucket/checkpoint.orbax-checkpoint-tmp
#   epath.Path("memory://bucket"): KeyError: 'memory://'
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2} orbax-checkpoint==0.12.8 etils==1.15.0 \
    s3fs==2026.9.0 'moto[s3,server]==5.2.5'
export JAX_PLATFORMS=cpu AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b AWS_DEFAULT_REGION=us-east-1
cd "$work"
"$work/venv/bin/python" -I - 2>"$work/errors" <<'EOF'
import importlib.metadata
import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from moto.server import ThreadedMotoServer

print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"), "jax", jax.__version__)
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
import s3fs

s3fs.S3FileSystem().mkdir("bucket")
(epath.Path("s3://bucket") / "note.txt").write_text("a note")
found = [path.name for path in epath.Path("s3://bucket").iterdir()]
print("epath writes and lists s3://bucket:", found)
assert found == ["note.txt"]
checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
try:
    tree = ocp.args.PyTreeSave({"weights": jnp.arange(4.0)})
    checkpointer.save(epath.Path("s3://bucket/checkpoint"), args=tree)
except ValueError as error:
    print(f"save: ValueError: {error}")
    assert "should be absolute" in str(error)
else:
    raise AssertionError("it was saved")
try:
    epath.Path("memory://bucket")
except KeyError as error:
    print(f'epath.Path("memory://bucket"): KeyError: {error}')
else:
    raise AssertionError("epath knows memory://")
server.stop()
EOF
