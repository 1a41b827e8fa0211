"""The embedded corpus: what is in it, and that held-out modules are held out of all domains."""

import inspect
import json
import pathlib
import textwrap

from lmjax.data.documents import is_held_out
from lmjax.data.embedded import EmbeddedCorpus


def documents(domain):
    return {document.identity: document for document in EmbeddedCorpus(domain=domain).documents()}


def test_code_is_the_source_of_the_standard_library():
    found = documents("code")
    assert found["json/__init__.py"].text == pathlib.Path(json.__file__).read_text()
    assert sum(len(document.text) for document in found.values()) > 5e6
    parts = {part for name in found for part in pathlib.PurePath(name).parts[:-1]}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    assert not any(name.startswith("pydoc_data") for name in found)


def test_documentation_is_docstrings_and_help_topics():
    found = documents("documentation")
    text = found["json/__init__.py"].text
    assert text.startswith("json\n\nJSON (JavaScript Object Notation)")
    assert "json.dumps(obj, *, skipkeys=False" in text
    assert "Serialize ``obj`` to a JSON formatted ``str``." in text
    assert "def dumps" not in text
    assert "The *if* statement" in found["help topic if"].text.replace('"', "*")
    assert sum(len(document.text) for document in found.values()) > 1.5e6


def test_a_module_is_held_out_of_both_domains():
    code, documentation = documents("code"), documents("documentation")
    both = code.keys() & documentation.keys()
    assert len(both) > 300
    held_out = {name for name in both if is_held_out(code[name], 0.1)}
    assert held_out == {name for name in both if is_held_out(documentation[name], 0.1)}
    assert 0.04 < len(held_out) / len(both) < 0.18


def test_prose_is_the_sentences_of_the_documentation():
    """Every paragraph stands there, but for line breaks, and is held out with its module."""
    whole = {
        name: " ".join(document.text.split())
        for name, document in documents("documentation").items()
    }
    found = list(EmbeddedCorpus(domain="prose").documents())
    assert len(found) > 5000
    for document in found:
        assert document.text in whole[document.group]
        assert document.text[0].isupper() and document.text[-1] in ".?!"
    wrapping = [document.text for document in found if document.group == "textwrap.py"]
    for paragraph in inspect.cleandoc(textwrap.wrap.__doc__).split("\n\n"):
        assert " ".join(paragraph.split()) in wrapping
    assert not any(">>> " in text or "(text" in text for text in wrapping)  # examples, headings


def test_fingerprint_and_order_are_stable():
    source = EmbeddedCorpus(domain="code")
    assert source.fingerprint() == EmbeddedCorpus(domain="code").fingerprint()
    assert source.fingerprint() != EmbeddedCorpus(domain="documentation").fingerprint()
    names = [part.name for part in source.parts()]
    assert names == sorted(names)
