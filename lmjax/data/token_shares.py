"""Shares of domains by their tokens: temperature over languages, and most epochs of each."""

from __future__ import annotations

from collections.abc import Mapping

from lmjax.config import UserError, config


@config
class TokenShares:
    """Makes the weights of a mixture from the tokens of its domains.

    A domain has a share in proportion to its weight x tokens^exponent: 1 is as the data are, 0 all
    alike. Multilingual models take 0.3 (XLM-R, Conneau et al. 2020, arXiv:1911.02116; mT5, Xue et
    al. 2021, arXiv:2010.11934): small languages are read more often. What a domain has beyond
    `most_epochs` goes to the others in proportion: after about four, repeated text is worth less
    and less (Muennighoff et al. 2023, arXiv:2305.16264).
    """

    exponent: float = 0.3  # of the number of tokens; of a temperature T, 1 / T
    most_epochs: float = 0.0  # times that a domain is read in `tokens`; 0: any
    tokens: float = 0.0  # of the training, for `most_epochs`

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        if not 0 <= self.exponent <= 1:
            raise UserError(f"shares.exponent={self.exponent}: it lies between 0 and 1")
        if self.most_epochs < 0 or self.tokens < 0 or (self.most_epochs and not self.tokens):
            raise UserError(
                f"shares.most_epochs={self.most_epochs}, shares.tokens={self.tokens}: 0 or more, "
                "and epochs are counted in the tokens of the training"
            )

    def weights(self, given: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
        """The share of each domain; together 1.

        Args:
            given: weights by name.
            tokens: of each domain.

        Raises:
            UserError: the domains do not have so many tokens in `most_epochs`.
        """
        wanted = {n: weight * tokens[n] ** self.exponent for n, weight in given.items()}
        total = sum(wanted.values())
        shares = {name: weight / total for name, weight in wanted.items()}
        return self._limited(shares, tokens) if self.most_epochs else shares

    def _limited(self, shares: dict[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
        """Shares of which none is beyond the most epochs; what is over goes to the others."""
        most = {n: self.most_epochs * tokens[n] / self.tokens for n, s in shares.items() if s}
        # Of the whole, as a sum of rounded shares may be just below 1 where there are enough.
        enough = self.most_epochs * sum(tokens[n] for n in most)
        if enough < self.tokens:
            raise UserError(
                f"shares.most_epochs={self.most_epochs}: in so many epochs all domains have "
                f"{enough:,.0f} tokens, fewer than shares.tokens={self.tokens:,.0f}"
            )
        fixed: dict[str, float] = {}
        while True:
            free = {n: s for n, s in shares.items() if s and n not in fixed}
            left = 1 - sum(fixed.values())
            scale = left / sum(free.values()) if free else 0.0
            over = {n: most[n] for n, s in free.items() if s * scale > most[n]}
            if not over:
                return {n: fixed.get(n, s * scale) for n, s in shares.items()}
            fixed |= over
