"""The book of pages: what is held, found again, and given back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.serving.pages import PageBook, page_keys

SIZE = 2  # tokens of a page


def test_keys_are_of_all_tokens_up_to_the_end_of_the_page():
    keys = page_keys(b"a", [1, 2, 3, 4, 5], SIZE)
    assert len(keys) == 2 and page_keys(b"a", [1, 2, 3, 4], SIZE, keys[:1]) == keys
    assert page_keys(b"b", [1, 2], SIZE) != keys[:1]
    assert page_keys(b"a", [9, 2, 3, 4], SIZE)[1] != keys[1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_book_agrees_with_a_plain_account(data):
    """Texts take pages and give them back in any order; known ones are those that hold the text."""
    book = PageBook(6)
    texts: list[tuple[list[int], list[bytes]]] = []
    content: dict[int, bytes] = {}  # of each page that was published, as it would be on the device
    for _ in range(data.draw(st.integers(1, 25), "steps")):
        if texts and data.draw(st.booleans(), "give back"):
            pages, _ = texts.pop(data.draw(st.integers(0, len(texts) - 1), "text"))
            book.release(pages)
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=8), "tokens")
            keys = page_keys(b"", tokens, SIZE)
            found = book.match(keys)
            assert [content[page] for page in found] == keys[: len(found)]
            before = book.available
            more = book.take(len(keys) - len(found))
            if more is None:
                assert before < len(keys) - len(found)
                book.release(found)
            else:
                for page, key in zip(more, keys[len(found) :]):
                    content[page] = key
                    book.publish(page, key)
                texts.append((found + more, keys))
        book.check()
        held = {page for pages, _ in texts for page in pages}
        assert book.held == len(held)
        for pages, keys in texts:
            assert [content[page] for page in pages] == keys
    for pages, _ in texts:
        book.release(pages)
    assert book.held == 0 and book.available == 6


def test_the_least_recently_used_page_goes_first():
    book = PageBook(3)
    keys = {name: page_keys(name, [1, 2], SIZE) for name in (b"a", b"b", b"c", b"d")}
    for name in (b"a", b"b", b"c"):
        (page,) = book.take(1)
        book.publish(page, keys[name][0])
        book.release([page])
    book.release(book.match(keys[b"a"]))  # used again
    book.publish(book.take(1)[0], keys[b"d"][0])
    assert [len(book.match(keys[name])) for name in (b"b", b"a", b"c", b"d")] == [0, 1, 1, 1]


def test_of_a_text_its_end_goes_first():
    book = PageBook(2)
    keys = page_keys(b"", [1, 2, 3, 4], SIZE)
    pages = book.take(2)
    for page, key in zip(pages, keys):
        book.publish(page, key)
    book.release(pages)
    book.take(1)
    assert book.match(keys) == pages[:1]
