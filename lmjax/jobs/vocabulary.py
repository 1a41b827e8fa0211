"""Whether the model has a row for every token of the text."""

from collections.abc import Callable

from lmjax.config import UserError
from lmjax.data import PreparedData

NAMED = 5  # tokens in a message


def check_vocabulary(prepared: PreparedData, vocab_size: int, warn: Callable[[str], None]) -> None:
    """Compares the tokens of all stores with those that the model has.

    A tokenizer may have more, as public ones do whose padding token was added later, as long as
    none of these occurs.

    Args:
      prepared: tokenizer and stores.
      vocab_size: the model's.
      warn: is told of tokens that the model lacks.

    Raises:
      UserError: one of them is in the text.
    """
    tokenizer, size = prepared.tokenizer, prepared.tokenizer.vocab_size
    if size <= vocab_size:
        return
    words = f"the tokenizer has {size} tokens, the model only model.vocab_size={vocab_size}"
    for name, store in (prepared.train | prepared.held_out).items():
        if (largest := store.manifest.largest) >= vocab_size:
            raise UserError(
                f"{words}, and the text of {name} has the token {largest}; set "
                f"model.vocab_size={size}"
            )
    names = {token: name for name, token in tokenizer.special.items()}
    missing = [
        f"{token} ({names[token]!r})" if token in names else str(token)
        for token in range(vocab_size, min(size, vocab_size + NAMED))
    ]
    if size > vocab_size + NAMED:
        missing.append("...")
    warn(f"{words}: it lacks {', '.join(missing)}, which are not in the text")
