"""The lmjax side of `benchmarks.evaluation`: a worker."""

import resource
import time
from typing import Any

from benchmarks.harness import keep_to_cores, serve


class Side:
    """A model that answers the requests of tasks."""

    def prepare(
        self, folder: str, batch: int, cores: int, shots: int, **shape: int
    ) -> dict[str, Any]:
        """Reads the model that the other side has written."""
        threads = keep_to_cores(cores)  # before XLA counts them
        import jax

        from benchmarks.evaluation import tasks
        from lmjax.evaluation.answering import Answering
        from lmjax.generation.run import load
        from lmjax.interop.folder import begin_token
        from lmjax.parallel import Mesh

        jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1]))
        text = load(f"{folder}/model", dtype="float32")
        begin = begin_token(f"{folder}/model", text.tokenizer)
        self.answering = Answering(text, batch, begin)
        self.tasks = tasks(folder, shots)
        return {"version": f"jax {jax.__version__}", "threads": threads}

    def score(self, task: str) -> dict[str, Any]:
        """Seconds until all requests of a task are answered, the answers and the scores."""
        from lmjax.evaluation.task_result import TaskResult

        questions = self.tasks[task].questions()
        requests = [request for question in questions for request in question.requests]
        begin = time.perf_counter()
        answers = self.answering.answers(requests)
        seconds = time.perf_counter() - begin
        rest = iter(answers)
        given = [[next(rest) for _ in question.requests] for question in questions]
        result = TaskResult.of(self.tasks[task], questions, given)
        return {
            "seconds": seconds,
            "answers": [[one.log_probability, one.is_greedy] for one in answers],
            "scores": {m.name: result.estimate(m).value for m in result.task.measures},
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "score": side.score})
