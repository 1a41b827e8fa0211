"""The planner against published runs, and the table in the guide."""

import re
from pathlib import Path

import pytest

from lmjax.scaling.calibration import WITHIN, calibration_rows, calibration_table
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.flops import count_parameters
from lmjax.scaling.plan_tables import markdown_rows
from lmjax.scaling.published_models import maxtext_model, maxtext_v4_model, megatron_model
from lmjax.scaling.published_runs import RUNS

OUTLIERS = "GLM-130B", "MaxText 128B, 128 TPU v5p", "MaxText 1024B"  # by 11 to 19 percent
GUIDE = Path(__file__).parents[3] / "lmjax" / "scaling" / "README.md"


@pytest.fixture(scope="module")
def rows():
    """All comparisons; not made where tests are only collected."""
    return list(calibration_rows())


def test_runs_use_all_their_chips():
    for run in RUNS:
        assert run.division.chips == find_cluster(run.topology, run.slices).chips, run.title


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        (maxtext_v4_model(6144, 48, 24), 22),
        (maxtext_v4_model(12_288, 32, 32), 52),
        (maxtext_model(16), 16),
        (maxtext_model(128), 125),  # called 128B
        (maxtext_model(1024), 998),  # called 1024B
        (megatron_model(25_600, 128, 160), 1008),
        (megatron_model(6144, 40, 48), 18.4),
    ],
)
def test_models_have_the_published_size(model, billions):
    assert count_parameters(model).total == pytest.approx(billions * 1e9, rel=0.02)


def test_speeds_of_published_flops():
    """BLOOM: 105 s for 2,048 rows on 384 GPUs, which its logs show, are 104 tokens/s/GPU."""
    (bloom,) = [run for run in RUNS if run.title.startswith("BLOOM")]
    assert bloom.published == pytest.approx(2048 * 2048 / 105 / 384, rel=0.02)


def test_predictions_are_near_or_explained(rows):
    for row in rows:
        assert row.source, row.name
        if abs(row.miss) > WITHIN:
            assert row.why, row.name
        if row.layout and not row.name.startswith(OUTLIERS):
            assert abs(row.miss) <= WITHIN, row.name


def test_most_rows_are_near(rows):
    misses = sorted(abs(row.miss) for row in rows)
    assert misses[len(misses) // 2] < 0.07
    assert sum(miss > WITHIN for miss in misses) <= 4


def test_one_number_is_fitted_for_a_kind_of_chip():
    by_kind = {run.plan().cluster.accelerator.name: run.plan().cluster for run in RUNS}
    fitted = {name: cluster.accelerator.efficiency for name, cluster in by_kind.items()}
    assert fitted["a100-40gb"] == fitted["a100-80gb"]
    assert all(0.5 <= efficiency <= 0.9 for efficiency in fitted.values())


def test_the_readme_has_the_table():
    text = GUIDE.read_text("utf-8")
    table = text[text.index("| run | unit | published") :]
    found = re.match(r"(?:\|.*\n)+", table)[0].splitlines()
    assert found == markdown_rows(calibration_table())
