"""CoQA: prompts of its turns, scores by hand and by a loop, layouts, and mistakes."""

import json
import random

import pytest

from lmjax.config import UserError
from lmjax.evaluation.reference_scores import reference_table
from lmjax.evaluation.requests import Written, WrittenRequest
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import CoQA

STORY = "Mia has a red kite. She flew it with her uncle."
ASKED = ["What does Mia have?", "When did she fly it?"]
GIVEN = [["a red kite", "Sunday"], ["Kite", "on Sunday"], ["A red kite.", "last Sunday"]]


def turns(texts):
    return [{"input_text": text, "turn_id": n} for n, text in enumerate(texts, 1)]


def story(number=0, text=STORY, people=GIVEN, source="stories"):
    """A story in the layout of the authors."""
    fields = {
        "source": source,
        "id": str(number),
        "story": text,
        "questions": turns(ASKED),
        "answers": turns(people[0]),
    }
    if people[1:]:
        fields["additional_answers"] = {str(n): turns(given) for n, given in enumerate(people[1:])}
    return fields


@pytest.fixture
def write(tmp_path):
    """Writes stories as a file of the authors, and gives the task."""

    def written(*stories, **settings):
        path = tmp_path / "coqa.json"
        path.write_text(json.dumps({"version": "1.0", "data": stories}, indent=1))
        return CoQA(path=str(path), **settings)

    return written


def test_earlier_questions_and_their_right_answers_stand_in_front(write):
    first, second = write(story()).questions()
    assert first.context == f"{STORY}\n\nQ: What does Mia have?\n\nA:"
    assert second.context == f"{first.context} a red kite\n\nQ: When did she fly it?\n\nA:"
    assert second.requests == (WrittenRequest(second.context, ("\nQ:",), 256),)
    assert second.item.details["answers"] == ("Sunday", "on Sunday", "last Sunday")
    assert second.item.subject == "stories" and "record 1, question 2" in second.item.identity


def test_scores_by_hand(write):
    """Without articles: "kite" against "red kite" (F1 2/3, twice) and "kite" (1).

    Without the first or the last answer the best is 1, without the second 2/3.
    """
    task = write(story())
    first, second = task.questions()
    found = task.measure(first.item, [Written(("\n The kite!\n\nQ: Why?",))])
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx(8 / 9)}
    assert task.people(first.item) == pytest.approx({"exact_match": 2 / 3, "f1": 8 / 9})
    # Of "Sunday", "on Sunday" and "last Sunday" each has F1 2/3 with its nearest.
    assert task.people(second.item) == pytest.approx({"exact_match": 0, "f1": 2 / 3})
    assert task.measure(second.item, [Written(("",))]) == {"exact_match": 0, "f1": 0}
    result = TaskResult.of(task, [first, second], [[Written(("kite",))], [Written(("Sunday",))]])
    people = {row[0]: row[1] for row in reference_table({"ours": [result]}, ()).rows}
    assert people == pytest.approx({"CoQA 0-shot exact_match": 1 / 3, "CoQA 0-shot f1": 7 / 9})


def test_one_answer_is_compared_as_it_is(write):
    """People's scores are those of the paper then."""
    task = write(story(people=GIVEN[:1]))
    questions = task.questions()
    item = questions[0].item
    found = task.measure(item, [Written(("red",))])
    assert found == pytest.approx({"exact_match": 0, "f1": 2 / 3})
    assert task.people(item) == {}
    result = TaskResult.of(task, questions, [[Written(("a",))]] * 2)
    rows = reference_table({"ours": [result]}, ()).rows
    assert rows == (("CoQA 0-shot f1", 0.888, 0.0),)


def plain_words(text):
    words = "".join(one for one in text.lower() if one.isalnum() or one == " ").split()
    return [word for word in words if word not in ("a", "an", "the")]


def loop_scores(said, others):
    """Best exact match and F1 with one of the others, whose words are crossed off one by one."""
    exact, best = 0.0, 0.0
    for other in others:
        found, left, shared = plain_words(said), plain_words(other), 0
        exact = max(exact, float(found == left))
        size = len(found) + len(left)
        for word in found:
            if word in left:
                left.remove(word)
                shared += 1
        best = max(best, 2 * shared / size if size else 1.0)
    return exact, best


@pytest.mark.parametrize("people", [1, 2, 4])
def test_scores_are_those_of_a_loop(write, people):
    generator = random.Random(people)
    words = ["the", "red", "Red.", "kite", "on", "Sunday", "!"]

    def draw():
        return " ".join(generator.choices(words, k=generator.randint(1, 4)))

    for _ in range(50):
        given, said = [draw() for _ in range(people)], draw()
        task = write(story(people=[[one, "x"] for one in given]))
        item = task.questions()[0].item
        numbers = range(people)
        others = [[given[k] for k in numbers if k != n] or given for n in numbers]
        rounds = [loop_scores(said, some) for some in others]
        wanted = {"exact_match": sum(r[0] for r in rounds), "f1": sum(r[1] for r in rounds)}
        wanted = {name: value / people for name, value in wanted.items()}
        assert task.measure(item, [Written((said,))]) == pytest.approx(wanted, abs=1e-12)
        if people > 1:
            rounds = [loop_scores(one, some) for one, some in zip(given, others, strict=True)]
            exact, f1 = (sum(values) / people for values in zip(*rounds, strict=True))
            assert task.people(item) == pytest.approx({"exact_match": exact, "f1": f1}, abs=1e-12)


def test_examples_are_whole_conversations_about_other_stories(write):
    """A later turn of the same story would tell the answer."""
    task = write(*(story(n, f"Story {n}.") for n in range(4)), shots=2)
    for number, question in enumerate(task.questions()):
        *examples, asked = question.context.split("Story ")[1:]
        own = number // 2
        assert asked.startswith(f"{own}.") and len(examples) == 2
        for example in examples:
            assert not example.startswith(f"{own}.")
            assert example.endswith("Q: When did she fly it?\n\nA: Sunday\n\n")
    with pytest.raises(UserError, match=r"shots=4, but .* has 3 examples of stories besides"):
        write(*(story(n, f"Story {n}.") for n in range(4)), shots=4).questions()


def test_other_layouts_are_the_same(write, tmp_path):
    """Lines with lists of texts, as of the hub and of TensorFlow Datasets."""
    wanted = [question.context for question in write(story()).questions()]
    layouts = (
        {"questions": ASKED, "answers": {"input_text": GIVEN[0], "answer_start": [0, 1]}},
        {"questions": {"input_text": ASKED}, "answers": {"input_text": GIVEN[0]}},
    )
    for layout in layouts:
        path = tmp_path / "lines.jsonl"
        path.write_text(json.dumps({"source": "stories", "story": STORY, **layout}) + "\n")
        assert [question.context for question in CoQA(path=str(path)).questions()] == wanted


def test_mistakes_are_told(write):
    with pytest.raises(UserError, match=r"record 1: answers is '1'; it must be one for each of 2"):
        write(story(people=[["one"]])).questions()
    with pytest.raises(UserError, match=r"question 2: the answer '周日' has no spaces"):
        write(story(people=[["kite", "周日"]])).questions()
    task = write(story(people=[["kite", "周日下午"]]), by_characters=True)
    found = task.measure(task.questions()[1].item, [Written(("周日。",))])
    assert found == {"exact_match": 0, "f1": pytest.approx(2 / 3)}  # two of four characters
    broken = story()
    del broken["story"]
    with pytest.raises(UserError, match="record 1: there is no field story; fields: source"):
        write(broken).questions()
