#!/usr/bin/env bash
# TensorFlow Datasets stored as Parquet: as_data_source gives the whole split for every slice of it.
#
# Versions: tensorflow-datasets 4.9.10.
#
# `train[:50%]` and `train[50%:]` are both all of `train`, so training and held-out examples are the
# same, while the builder states half the number for each. Stored as array_record the slices are
# right. Expected: the slice, or an error.
#
# Seen:
#   tensorflow-datasets 4.9.10
#   array_record train[:50%]: 10 rows where 10 are stated: [4, 5, 6, 12, 13, 14, 15, 16, 18, 19]
#   array_record train[50%:]: 10 rows where 10 are stated: [0, 1, 2, 3, 7, 8, 9, 10, 11, 17]
#   parquet train[:50%]: 20 rows where 10 are stated: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
#       14, 15, 16, 17, 18, 19]
#   parquet train[50%:]: 20 rows where 10 are stated: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
#       14, 15, 16, 17, 18, 19]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tensorflow-datasets==4.9.10 importlib_resources array_record pyarrow
cd "$work"
mkdir numbers20
touch numbers20/__init__.py
cat > numbers20/builder.py <<'EOF'
import numpy as np
import tensorflow_datasets as tfds


class Numbers(tfds.core.GeneratorBasedBuilder):
    """The numbers from 0 to 19."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"number": np.int64})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(20):
            yield number, {"number": number}
EOF
"$work/venv/bin/python" -I - <<'EOF'
import sys

sys.path.insert(0, ".")
import tensorflow_datasets as tfds
from numbers20.builder import Numbers

print("tensorflow-datasets", tfds.__version__)
halves = {}
for file_format in ("array_record", "parquet"):
    builder = Numbers(data_dir=file_format, file_format=file_format)
    builder.download_and_prepare()
    for split in ("train[:50%]", "train[50%:]"):
        source = builder.as_data_source(split)
        stated = builder.info.splits[split].num_examples
        found = sorted(int(row["number"]) for row in source)
        halves.setdefault(file_format, []).append(found)
        print(f"{file_format} {split}: {len(found)} rows where {stated} are stated: {found}")
first, second = halves["array_record"]
assert len(first) == len(second) == 10 and sorted(first + second) == list(range(20))
assert halves["parquet"] == [list(range(20)), list(range(20))]
EOF
