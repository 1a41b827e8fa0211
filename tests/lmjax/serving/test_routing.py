"""Requests find the engine that knows their beginning, and wait for none while another has room."""

import pytest

from lmjax.serving.active import ActiveRequest
from lmjax.serving.routing import EngineLoad, chosen_engine
from lmjax.serving.shared_queue import SharedQueue
from lmjax.serving.worker import QueueFull


def load(requests, known_pages=0):
    return EngineLoad(requests, 0, 0, 0, known_pages, 100)


@pytest.mark.parametrize(
    ("known", "loads", "chosen"),
    [
        ((0, 64), (load(0), load(2)), 1),  # the longer beginning, with as many ahead as may be
        ((0, 64), (load(0), load(3)), 0),  # one request too many
        ((32, 64, 48), (load(5), load(9), load(6)), 2),  # the longest of those that may have it
        ((32, 32), (load(2), load(1)), 1),  # equal beginnings: the fewest requests
        ((0, 0), (load(1, known_pages=7), load(1, known_pages=3)), 1),  # then the emptiest cache
        ((0, 0), (load(1), load(1)), 0),
    ],
)
def test_the_engine_of_a_request(known, loads, chosen):
    assert chosen_engine(known, loads, ahead=2) == chosen


def named(name):
    """Makes a request that has nothing but a name and its number."""

    def make(number):
        one = ActiveRequest.__new__(ActiveRequest)
        one.number, one.name = number, name
        return one

    return make


def test_what_waits_for_a_full_engine_is_taken_by_another():
    queue, full, woken = SharedQueue(4), [False, False], []
    takers = [queue.join(lambda n=n: woken.append(n), lambda n=n: full[n]) for n in (0, 1)]
    assert takers == [0, 1]
    for client, name in [("a", "a1"), ("a", "a2"), ("b", "b1")]:
        queue.push(client, named(name), 0)
    assert woken == [0, 1] * 3 and [queue.waiting(n) for n in takers] == [3, 0]
    assert not queue.offers(1) and queue.pop(1) is None  # they wait for one that has room
    full[0] = True
    assert queue.offers(1) and queue.pop(1).name == "a1"
    queue.push("c", named("c1"), 1)
    # What waits for itself comes first; then clients take turns here too.
    assert [queue.pop(n).name for n in (1, 1, 0)] == ["c1", "b1", "a2"] and len(queue) == 0
    for taker in (0, 0, 1, 1):
        queue.push("a", named("x"), taker)
    with pytest.raises(QueueFull):  # all together
        queue.push("a", named("x"), 0)
    assert len(queue.remove(lambda one: one.number % 2 == 0)) == 2 == len(queue)
