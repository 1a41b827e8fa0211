"""The adapter to EleutherAI's harness gives the numbers of our own evaluation."""

import dataclasses
import json
import os

import jax
import pytest

from lmjax.config import UserError, replace
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.chat_questions import in_chat
from lmjax.evaluation.lm_eval_adapter import lmjax_model, written_request
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest, WrittenRequest
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.tasks import harness_task
from lmjax.generation import load_run
from lmjax.generation.chat import chat_format
from lmjax.parallel import Mesh
from tests.lmjax.jobs.test_evaluate import write_run

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nothing is downloaded
SETTINGS = {"until": ["e", ""], "max_gen_toks": 4, "do_sample": False}


def test_settings_of_written_texts():
    assert written_request("a", SETTINGS, True) == WrittenRequest("a", ("e",), 4, special=True)
    assert written_request("a", {"until": "x"}, False) == WrittenRequest("a", ("x",), 256)
    drawn = written_request("a", {"temperature": 0.5, "top_p": 0.9}, False)
    assert (drawn.temperature, drawn.top_p) == (0.5, 0.9)
    with pytest.raises(UserError, match="generation_kwargs: num_beams is none of until"):
        written_request("a", {"num_beams": 2}, False)


@dataclasses.dataclass
class Asked:
    """A request as the harness hands it over."""

    args: tuple


def test_the_harness_gets_our_numbers(tmp_path):
    pytest.importorskip("lm_eval")
    write_run(tmp_path / "run", 0)
    model = lmjax_model(folder=str(tmp_path / "run"), batch_size="4", device=None)
    pairs = [("Is it?", " yes"), ("", "no"), ("x " * 80, "y")]
    with jax.set_mesh(Mesh().build()):
        own = Answering(load_run(tmp_path / "run"), 4)
        wanted = own.answers([ContinuationRequest(*pair) for pair in pairs])
        whole = own.answers([RollingRequest("a text")])
        texts = own.answers([WrittenRequest("Is it?", ("e",), 4)])
    found = model.loglikelihood([Asked(pair) for pair in pairs])
    assert found == [(one.log_probability, one.is_greedy) for one in wanted]
    assert model.loglikelihood_rolling([Asked(("a text",))]) == [whole[0].log_probability]
    written = model.generate_until([Asked(("Is it?", SETTINGS))])
    assert written == [texts[0].texts[0]] and "e" not in written[0]
    rendered = model.apply_chat_template([{"role": "user", "content": "Is it?"}])
    assert "Is it?" in rendered
    with jax.set_mesh(Mesh().build()):
        [one] = own.answers([ContinuationRequest(rendered, "yes", special=True)])
    # Of requests together, those are conversations that were rendered, and no others.
    mixed = model.loglikelihood([Asked((rendered, "yes")), Asked(pairs[0])])
    assert mixed[0] == (pytest.approx(one.log_probability, abs=1e-5), one.is_greedy)
    assert mixed[1] == (pytest.approx(found[0][0], abs=1e-5), found[0][1])
    with pytest.raises(UserError, match="there is no pretrained"):
        lmjax_model(folder=str(tmp_path / "run"), pretrained="x")


@pytest.mark.parametrize("chat", [False, True])
def test_both_ways_score_the_same_items_the_same(tmp_path, chat):
    """The harness with our model, and our runner with its task: answers and scores."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_run(tmp_path / "run", 0)
    lines = [{"q": f"Is it {n}?", "a": ["no", "yes"], "n": n % 2} for n in range(4)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/set.jsonl}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: a\ndoc_to_target: n\ndescription: "Say it.\\n"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = lmjax_model(folder=str(tmp_path / "run"), batch_size="4")
    settings = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    theirs = simple_evaluate(model, tasks=["own"], apply_chat_template=chat, **settings)
    task = harness_task(yaml=str(tmp_path / "own.yaml"), path=str(tmp_path / "set.jsonl"))
    questions = task.questions()
    with jax.set_mesh(Mesh().build()):
        text = load_run(tmp_path / "run")
        if chat:
            form = chat_format(str(tmp_path / "run"), text.tokenizer)
            questions = [in_chat(task, question, form) for question in questions]
        ours = result_of(task, questions, Answering(text, 4))
    samples = sorted(theirs["samples"]["own"], key=lambda sample: sample["doc_id"])
    for sample, given in zip(samples, ours.answers, strict=True):
        # The harness lets each answer stand in a list, and writes numbers as texts.
        said = [(float(value), str(greedy) == "True") for ((value, greedy),) in sample["resps"]]
        assert said == [(one.log_probability, one.is_greedy) for one in given]
    for measure in task.measures:
        found = theirs["results"]["own"][f"{measure.name},none"]
        assert found == pytest.approx(ours.estimate(measure).value, abs=1e-12)


@pytest.mark.parametrize(
    ("asked", "split", "sampler"),
    [("test", "test", "default"), ("test", "train", "default"), ("test", "test", "first_n"),
     ("validation", None, "default")],
)  # fmt: skip
def test_examples_are_those_of_the_harness(tmp_path, asked, split, sampler):
    """Prompts character by character, also where a question stands in its file twice."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    for name, count in (("test", 9), ("train", 6)):
        lines = [{"q": f"{name} {n % 7}?", "a": ["no", "yes"], "n": n % 2} for n in range(count)]
        lines += lines[:2]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = ", ".join(f"{name}: {tmp_path}/{name}.jsonl" for name in ("test", "train"))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{{files}}}}}\n"
        f"{asked}_split: test\ntraining_split: train\nfewshot_split: {split or 'null'}\n"
        "num_fewshot: 3\n"
        f"fewshot_config: {{sampler: {sampler}}}\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: a\ndoc_to_target: n\ndescription: "Say it.\\n"\n'
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = manager.load(["own"])["tasks"]["own"]
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(rank=0, world_size=1)
    wanted = [one.args[0] for one in theirs.instances[::2]]
    task = harness_task(
        yaml=str(tmp_path / "own.yaml"),
        path=f"{tmp_path}/test.jsonl",
        examples_path=f"{tmp_path}/{split or 'train'}.jsonl",
        drawing="harness",
    )
    assert [question.context for question in task.questions()] == wanted
    assert len(set(wanted)) > 1
    with pytest.raises(UserError, match="has 9 examples besides the question itself"):
        replace(task, examples_path=None, shots=11).questions()
