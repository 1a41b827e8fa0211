"""FineWeb's steps on many machines, by Apache Beam (Penedo et al. 2024, arXiv:2406.17557).

python -m experiments.data.fineweb_beam sources.0.source.path=crawl storage=clean
Two processes of this machine, which shows in minutes that it works; needs the extras: pip install
-e '.[data,beam]'. lmjax/data/README.md has the commands for Dataflow, Flink and Spark.
"""

from experiments.data.fineweb import experiment as fineweb
from lmjax.jobs.beam_cleaning import CleaningOnBeam
from lmjax.launch import run

experiment = CleaningOnBeam(
    output="runs/fineweb_beam",
    sources=fineweb.sources,
    steps=fineweb.steps,
    written=fineweb.written,
    on_error=fineweb.on_error,
    storage="runs/fineweb_beam/storage",
    runner="FnApiRunner",
    options=("--direct_running_mode=multi_processing", "--direct_num_workers=2"),
)

if __name__ == "__main__":
    run(experiment)
