"""Models as ONNX files, with a key-value cache as inputs and outputs.

The names of inputs and outputs are those of transformers' own exports: input_ids, attention_mask,
position_ids, past_key_values.0.key; logits, present.0.key.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.config import UserError
from lmjax.interop import onnx_parts
from lmjax.interop.families import ranked
from lmjax.interop.huggingface import by_path
from lmjax.interop.onnx_experts import check_experts
from lmjax.interop.onnx_graph import Graph, Tensors, Value, cannot, library
from lmjax.interop.onnx_positions import ALL, BATCH, NEW, Texts, context, embedded, hiding, tables
from lmjax.interop.onnx_products import PRODUCTS, OnnxWeights, Weights
from lmjax.interop.tensor_files import Report, report_nothing
from lmjax.launch import is_first
from lmjax.models import EncoderDecoderConfig, TransformerConfig, merge_adapters
from lmjax.models.label_heads import TextHeadConfig

PAST, SOURCE = "past_sequence_length", "encoder_sequence_length"
LARGEST_GRAPH = 10**9  # bytes of weights in a graph; more of them have a file of their own
DATA, ENCODER = ".data", ".encoder"


def write(
    path: str | os.PathLike,
    config: TransformerConfig,
    params: dict,
    kind: OnnxWeights = "float32",
    report: Report = report_nothing,
    largest_graph: int = LARGEST_GRAPH,
    prefix: bool = False,
) -> list[str]:
    """Writes a model as an ONNX file, or as two where it has an encoder and a decoder.

    Args:
      path: of the file. What an encoder reads is a graph of its own, NAME.encoder.onnx; weights too
        large for a graph are in NAME.onnx.data, those of both graphs once.
      config: of the model; adapters are merged.
      params: float32, as `huggingface.read` or `initialize` gives them; a mesh must be set.
      kind: how weights of dense layers and of tokens are kept.
      report: is told the bytes of parameters that are written, and of how many.
      largest_graph: see `LARGEST_GRAPH`.
      prefix: prompts are read from both sides, as the input `ranks` says (`Batch`).

    Returns:
      Sentences for the user.

    Raises:
      UserError: a part of the model that an ONNX file cannot have, by its name; or the file cannot
        be written.
    """
    library()
    check(config)
    path = Path(path)
    params, config = merge_adapters(params, config)
    paths = by_path(params)
    total, done = sum(leaf.nbytes for leaf in paths.values()), 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        report(done, total)

    apart = total // (4 if kind == "int8" else 1) > largest_graph
    with _tensors(path, apart) as tensors:
        graphs = {}
        for name, build in _graphs(config, prefix).items():
            graph = Graph(tensors)
            weights = Weights(graph, paths, PRODUCTS[kind](graph), read=read)
            build(graph, config, weights)
            graphs[path.with_suffix(name + path.suffix)] = graph.model()
        if is_first():
            _save(graphs)
    return _notes(config, path, apart)


def check(config: TransformerConfig) -> None:
    """Raises UserError for a model whose own class, not one of its parts, cannot be written."""
    if type(config) not in (TransformerConfig, EncoderDecoderConfig):
        raise cannot("model", config)
    if config.alternate_feed_forward is not None:
        raise cannot("alternate_feed_forward", config.alternate_feed_forward)
    if config.feed_forward.reads_rows:
        check_experts(config.feed_forward, _continues(config))


def _continues(config: TransformerConfig) -> bool:
    """Returns whether a model continues texts, without an encoder beside it."""
    encodes = isinstance(config, EncoderDecoderConfig)
    return config.attention.causal and config.word_head and not encodes


def _graphs(config: TransformerConfig, prefix: bool) -> dict[str, Any]:
    """The functions that build the graphs of a model, by what is put behind the file's name."""
    if isinstance(config, EncoderDecoderConfig):
        return {ENCODER: encoder, "": decoder}
    if _continues(config):
        return {"": functools.partial(decoder, prefix=prefix)}
    return {"": whole_texts}


def _notes(config: TransformerConfig, path: Path, apart: bool) -> list[str]:
    notes = ["an ONNX file has no tokenizer: that of a model folder (to=huggingface) gives tokens"]
    files = [path.name]
    if isinstance(config, EncoderDecoderConfig):
        files.insert(0, path.with_suffix(ENCODER + path.suffix).name)
    if apart:
        files.append(path.name + DATA)
    if (length := context(config.attention)) is not None:
        notes.append(
            f"up to {length} tokens the file is the same model: it has no rotations that depend on"
            " the length of a text"
        )
    if len(files) > 1:
        notes.append(f"the model is {', '.join(files)}: they belong together")
    return notes


@contextmanager
def _tensors(path: Path, apart: bool) -> Iterator[Tensors]:
    """The weights of the graphs, in a file that gets its name when the block ends well."""
    if not apart:
        with Tensors() as tensors:
            yield tensors
        return
    data = path.with_name(path.name + DATA)
    partial = data.with_name(f".{data.name}.partial") if is_first() else Path(os.devnull)
    try:
        with Tensors(partial, data.name) as tensors:
            yield tensors
        if is_first():
            partial.replace(data)
    except OSError as error:
        raise UserError(f"{data} was not written: {error}") from None
    finally:
        if is_first():
            partial.unlink(missing_ok=True)


def _save(graphs: dict[Path, Any]) -> None:
    """Writes graphs, each of which gets its name when it is whole."""
    for path, model in graphs.items():
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(model.SerializeToString())
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path} was not written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)


def decoder(
    graph: Graph, config: TransformerConfig, weights: Weights, prefix: bool = False
) -> None:
    """The graph of a model that continues texts, one that looks at an encoder's states too."""
    ids = graph.input("input_ids", np.int64, (BATCH, NEW))
    mask = graph.input("attention_mask", np.int64, (BATCH, ALL))
    looks = isinstance(config, EncoderDecoderConfig)
    seen = graph.input("encoder_attention_mask", np.int64, (BATCH, SOURCE)) if looks else None
    sizes = BATCH, config.attention.kv_heads, PAST, config.attention.head_dim
    pasts = [_pair(graph, f"past_key_values.{n}", sizes) for n in range(config.num_layers)]
    texts = Texts(graph, ids, mask, pasts[0][0].size(2), prefix or ranked(config))
    x = embed(config, weights, texts)
    shared, memory = tables(config, weights, texts), None
    presents = []
    for layer, past in enumerate(pasts):
        with graph.scope(f"blocks.{layer}"):
            if looks:
                read = _pair(graph, f"encoder.{layer}", (*sizes[:2], SOURCE, sizes[3]))
                memory = read, hiding(graph, (seen.cast(bool)).expand(1, 2))
            block = weights.block(layer)
            x, present = onnx_parts.block(config, block, x, shared, past, memory)
            presents.append(present)
    graph.output(
        "logits",
        logits(config, weights, finished(config, weights, x)),
        (BATCH, NEW, config.vocab_size),
    )
    for layer, present in enumerate(presents):
        _give(graph, f"present.{layer}", present, (*sizes[:2], ALL, sizes[3]))


def whole_texts(graph: Graph, config: TransformerConfig, weights: Weights) -> None:
    """The graph of a model that reads texts whole, with all its heads, or else hidden states."""
    texts = _whole(graph)
    hidden = stack(config, weights, embed(config, weights, texts), texts)
    if config.word_head:
        graph.output("logits", logits(config, weights, hidden), (BATCH, NEW, config.vocab_size))
    if config.classifier is not None:
        part, classes = weights.part("classifier"), config.classifier.classes
        graph.output("classes", pooled(part, _token(hidden, 0), "classes"), (BATCH, classes))
    for head in config.heads:
        part = weights.part("heads").part(head.name)
        if isinstance(head, TextHeadConfig):
            states, sizes = text_state(texts, hidden, head.token), (BATCH, head.outputs)
            out = pooled(part, states, "outputs")
        else:
            out, sizes = onnx_parts.dense(part.part("outputs"), hidden), (BATCH, NEW, head.outputs)
        graph.output(head.name, out, sizes)
    if not (config.word_head or config.heads):
        width = config.embedding_size or config.hidden
        graph.output("last_hidden_state", hidden, (BATCH, NEW, width))


def encoder(graph: Graph, config: EncoderDecoderConfig, weights: Weights) -> None:
    """The graph of an encoder, which gives the keys and values that the decoder's layers read."""
    texts = _whole(graph)
    part = weights.part("encoder")
    states = stack(config.encoder, part, embed(config, weights, texts), texts)
    sizes = BATCH, config.attention.kv_heads, SOURCE, config.attention.head_dim
    for layer in range(config.num_layers):
        read = weights.block(layer).part("cross_attention")
        with graph.scope(f"blocks.{layer}"):
            pair = onnx_parts.source(config.attention, read, states)
        _give(graph, f"encoder.{layer}", pair, sizes)


def embed(config: TransformerConfig, weights: Weights, texts: Texts) -> Value:
    """Embeddings of tokens, positions and token types; see `Transformer.embed`."""
    product = weights.product
    x = product.lookup(texts.ids, "embedding.table", lambda: token_rows(config, weights))
    if config.embedding_scale != 1:
        x = x * config.embedding_scale
    if config.embedding_size is not None:
        x = onnx_parts.dense(weights.part("project_in"), x)
    rows = embedded(config.positions, weights.part("positions"), texts)
    if rows is not None:
        x = x + rows
    if config.token_types is not None:
        types = texts.graph.input("token_type_ids", np.int64, (BATCH, NEW))
        x = x + texts.graph.op("Gather", weights.weight("token_types.table"), types)
    if config.embedding_norm is not None:
        x = onnx_parts.norm(config.embedding_norm, weights.part("embedding_norm"), x)
    return x


def token_rows(config: TransformerConfig, weights: Weights, name: str = "embedding") -> np.ndarray:
    """A table's rows of real tokens."""
    return weights.array(f"{name}.table")[: config.vocab_size]


def stack(config: TransformerConfig, weights: Weights, x: Value, texts: Texts) -> Value:
    """The blocks of a stack without a cache, and the norm behind them."""
    shared = tables(config, weights, texts)
    for layer in range(config.num_layers):
        with weights.graph.scope(f"{weights.prefix}blocks.{layer}"):
            x, _ = onnx_parts.block(config, weights.block(layer), x, shared)
    return finished(config, weights, x)


def finished(config: TransformerConfig, weights: Weights, x: Value) -> Value:
    """Hidden states from what the last block gives."""
    if config.arrangement.final_norm:
        x = onnx_parts.norm(config.norm, weights.part("final_norm"), x)
    if config.embedding_size is not None and "project_out.weight" in weights:
        x = onnx_parts.dense(weights.part("project_out"), x)
    return x


def logits(config: TransformerConfig, weights: Weights, hidden: Value) -> Value:
    """Logits of the real vocabulary; see `Transformer.logits`."""
    graph, product = weights.graph, weights.product
    x = hidden * config.head_scale if config.head_scale != 1 else hidden
    if config.head_transform is not None:
        part = weights.part("head_transform")
        x = onnx_parts.activation(
            config.head_transform.activation, onnx_parts.dense(part.part("dense"), x)
        )
        x = onnx_parts.norm(config.norm, part.part("norm"), x)
    table = "embedding" if config.tied_head else "head"
    if config.tied_head and not config.normalized_head:
        rows = product.with_rows(x, "embedding.table", lambda: token_rows(config, weights))
    else:
        rows = product.rows(x, "head.matrix", lambda: _head_matrix(config, weights, table))
    if "head_bias" in weights:
        bias = weights.array("head_bias")[: config.vocab_size]
        rows = rows + graph.weight("head_bias", bias)
    if config.logit_softcap is not None:
        rows = graph.op("Tanh", rows / config.logit_softcap) * config.logit_softcap
    return rows


def _head_matrix(config: TransformerConfig, weights: Weights, table: str) -> np.ndarray:
    """The head as [width, vocab], with columns of length 1 where the model makes them so."""
    rows = token_rows(config, weights, table)
    if config.normalized_head:
        square = np.sum(np.square(rows), axis=1, keepdims=True)
        rows = rows / np.sqrt(np.maximum(square, 1e-24))
    return np.ascontiguousarray(rows.T)


def pooled(weights: Weights, states: Value, last: str) -> Value:
    """A last layer of states [batch, width], behind the pooler where there is one."""
    if "pooler.weight" in weights:
        states = states.graph.op("Tanh", onnx_parts.dense(weights.part("pooler"), states))
    return onnx_parts.dense(weights.part(last), states)


def text_state(texts: Texts, hidden: Value, token: str) -> Value:
    """The hidden state of each text's first or last token [batch, width]."""
    last = int(token == "last")
    mask = texts.mask.cast(np.int32)
    index = texts.graph.op(
        "ArgMax", mask, axis=1, keepdims=1, select_last_index=last, dtype=np.int64
    )
    return texts.graph.op("GatherND", hidden, index, batch_dims=1)


def _token(hidden: Value, number: int) -> Value:
    """The states of one column [batch, width]."""
    return hidden.graph.op("Gather", hidden, hidden.graph.constant(np.array(number)), axis=1)


def _whole(graph: Graph) -> Texts:
    ids = graph.input("input_ids", np.int64, (BATCH, NEW))
    return Texts(graph, ids, graph.input("attention_mask", np.int64, (BATCH, NEW)), None)


def _pair(graph: Graph, name: str, sizes: tuple) -> onnx_parts.Past:
    key, value = (graph.input(f"{name}.{part}", np.float32, sizes) for part in ("key", "value"))
    return key, value


def _give(graph: Graph, name: str, pair: onnx_parts.Past, sizes: tuple) -> None:
    for part, value in zip(("key", "value"), pair):
        graph.output(f"{name}.{part}", value, sizes)
