"""A queue in which clients take turns, so that one with many requests does not hold up others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of several clients: the first of each in turn, and those of a client in order."""

    def __init__(self) -> None:
        self._of_client: OrderedDict[str, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        for items in self._of_client.values():
            yield from items

    def push(self, client: str, item: Item) -> None:
        """Adds an item behind those of the client."""
        self._of_client.setdefault(client, deque()).append(item)
        self._length += 1

    def pop(self) -> Item:
        """Takes the item whose turn it is. IndexError where there is none."""
        if not self._of_client:
            raise IndexError("the queue is empty")
        client, items = self._of_client.popitem(last=False)
        item = items.popleft()
        if items:  # behind the other clients
            self._of_client[client] = items
        self._length -= 1
        return item

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Takes all items that are wanted out of the queue."""
        found = []
        for client, items in list(self._of_client.items()):
            found += [item for item in items if wanted(item)]
            left = deque(item for item in items if not wanted(item))
            if left:
                self._of_client[client] = left
            else:
                del self._of_client[client]
        self._length -= len(found)
        return found
