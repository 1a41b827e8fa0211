"""Replies of the model to given requests."""

from __future__ import annotations

from lmjax.config import UserError, config
from lmjax.console import Table
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.chat.templated import template_of
from lmjax.data.chat.templates import PLAIN
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.evaluation.text_samples import describe_sampling
from lmjax.generation.fill import AutoregressiveInfiller, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator
from lmjax.training.feed import TextFeed

COLUMNS = ("request", "reply")


@config
class ChatSamples(Evaluator):
    """Replies that the model writes, in the format of the conversations that it is trained on.

    Where the model fills blanks, requests are texts with blanks, and replies those texts filled; a
    model of an encoder and a decoder may reply to texts without any.
    """

    requests: tuple[str, ...] = ()  # of a user, each the first message of a conversation
    length: int = 80  # most tokens of a reply
    sampling: Sampling = Sampling(temperature=0.8, top_k=50)  # how tokens are drawn

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`.

        Raises:
          UserError: a request leaves no room for a reply.
        """
        feed: TextFeed = context.feed
        given, model = template_of(feed.prepared.data), context.learner.model
        template, filling = given or PLAIN, infiller_of(feed.objective, given)
        for request in self.requests:
            if isinstance(filling, AutoregressiveInfiller):
                filling.share(filling.read(feed.tokenizer, request), model.max_length)
            else:
                self._check(request, feed, template, model.max_length)

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            if not self.requests:
                return ()
            prefix = feed.objective.reads_prefix
            trained = Generator(model, params, merge=False)
            generator = TextGenerator(trained, feed.tokenizer, filling, reads_prefix=prefix)
            if isinstance(filling, AutoregressiveInfiller):
                filled = generator.fill(self.requests, self.sampling, self.length)
                replies = [text.text for text in filled]
            else:
                replies = [self._reply(generator, template, text) for text in self.requests]
            rows = tuple(zip(self.requests, replies, strict=True))
            return (Table("Replies", COLUMNS, rows, describe_sampling(self.sampling)),)

        return evaluate

    def _reply(self, generator: TextGenerator, template: ChatFormat, request: str) -> str:
        asked = [Message("user", request)]
        return "".join(generator.reply(template, asked, self.sampling, self.length))

    def _check(self, request: str, feed: TextFeed, template: ChatFormat, room: int | None) -> None:
        length = len(template.encode(feed.tokenizer, [Message("user", request)]))
        if room is not None and length >= room:
            raise UserError(
                f"the request {request[:40]!r}... has {length:,} tokens and leaves no room for a "
                f"reply in model.max_length={room:,}"
            )
