"""Days, dollars, energy and carbon dioxide of a training run."""

from __future__ import annotations

import dataclasses

from lmjax.config import UserError, config
from lmjax.scaling.clusters import Cluster

GRAMS = 1000


@config
class Prices:
    """Prices and losses of a run.

    The defaults are those of LLaMA's account of its footprint (Touvron et al. 2023,
    arXiv:2302.13971, section 6): every chip draws all the power that it may, times 1.1 for the
    building, at 0.385 kg of carbon dioxide a kWh, the mean of the United States. Llama 3 reports
    more than 0.9 of the time spent on steps (Grattafiori et al. 2024, section 3.3.4).
    """

    dollars: float | None = None  # of an hour of a chip; none: a list price of the kind
    watts: float | None = None  # that a chip draws; none: what the kind may draw
    building: float = 1.1  # power of the building over that of its machines
    carbon: float = 0.385  # kg of carbon dioxide of a kWh
    uptime: float = 0.9  # share of the time in which steps are made

    def validate(self) -> None:
        """Raises UserError for prices that there are not."""
        for name in ("dollars", "watts", "carbon"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{name}={value:g}: must be 0 or more")
        if self.building < 1:
            raise UserError(f"building={self.building:g}: a building draws what its machines do")
        if not 0 < self.uptime <= 1:
            raise UserError(f"uptime={self.uptime:g}: a share lies above 0, and is at most 1")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a run.

    Attributes:
      days: with the time that is lost.
      chip_hours: in these days.
      dollars: of them.
      kilowatt_hours: with the building's.
      carbon: kg of carbon dioxide.
    """

    days: float
    chip_hours: float
    dollars: float
    kilowatt_hours: float
    carbon: float


def plan_costs(days: float, cluster: Cluster, prices: Prices) -> Costs:
    """Costs of a run.

    Args:
      days: without a stop.
      cluster: the chips, all rented for as long as it takes.
      prices: of them.
    """
    kind = cluster.accelerator
    days = days / prices.uptime
    hours = days * 24 * cluster.chips
    watts = kind.watts if prices.watts is None else prices.watts
    energy = hours * watts / GRAMS * prices.building
    price = kind.dollars if prices.dollars is None else prices.dollars
    return Costs(days, hours, hours * price, energy, energy * prices.carbon)
